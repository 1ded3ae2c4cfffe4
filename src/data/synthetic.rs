//! Built-in data: generated pictures, so that everything can be tried without a download. Nothing here is medical data.

use std::sync::Arc;

use super::{Augment, Dataset, Decode, Draws, Format, Image, Item, Options};
use crate::{Error, Result};

/// Opens `synthetic:NAME`. Picture `i` is drawn from (seed, i), the same on every machine.
pub(super) fn open(name: &str, options: &Options) -> Result<Dataset> {
    let (size, count, seed) =
        (options.synthetic_size, options.synthetic_count, options.synthetic_seed);
    if !(32..=1024).contains(&size) {
        return Err(Error::usage(format!(
            "synthetic pictures of {size} pixels: expected 32 to 1024"
        )));
    }
    let (classes, augment, note): (&[&str], Augment, &str) = match name {
        "dermoscopy" => {
            (&["nevus", "melanoma", "seborrheic_keratosis"], Augment::default(), DERMOSCOPY)
        }
        // Crops could cut a patch off, and with it the label; colours are what is compared.
        "longrange" => (&["different", "same"], Augment::flips(), LONGRANGE),
        _ => {
            return Err(Error::usage(format!(
                "unknown built-in data \"synthetic:{name}\"; there are synthetic:dermoscopy and synthetic:longrange"
            )));
        }
    };
    if count < classes.len() * 10 {
        return Err(Error::usage(format!(
            "{count} synthetic pictures are too few; expected at least {}",
            classes.len() * 10
        )));
    }
    let file: Arc<std::path::Path> = std::path::Path::new("(generated)").into();
    let item = |index: usize| Item {
        id: format!("{name}-{index:06}"),
        label: (index % classes.len()) as u32,
        group: None,
        domain: None,
        official: None,
        file: file.clone(),
    };
    let (longrange, modulus) = (name == "longrange", classes.len());
    let decode: Decode = Box::new(move |index| {
        let mut draws = Draws::new(&[seed, u64::from(longrange), index as u64]);
        Ok(if longrange {
            draw_longrange(size, index % modulus == 1, &mut draws)
        } else {
            draw_lesion(size, index % modulus, &mut draws)
        })
    });
    Ok(Dataset {
        name: format!("synthetic:{name}"),
        format: Format::Synthetic,
        root: std::path::PathBuf::new(),
        classes: classes.iter().map(|class| class.to_string()).collect(),
        items: (0..count).map(item).collect(),
        augment,
        notes: vec![note.to_string()],
        skipped: Vec::new(),
        decode,
        sealed: Vec::new(),
    })
}

const DERMOSCOPY: &str = "generated pictures in the manner of dermoscopy; they say nothing about skin. Classes differ in symmetry, border, \
                          colours and structure; skin tone, light, hair, place and size vary in all of them.";
const LONGRANGE: &str = "generated pictures; two coloured patches lie at opposite sides, at least 0.6 of the width apart. Label: have they the \
                         same of eight colours? Any one patch, and so any window that holds one, says nothing about the label.";

type Rgb = [f32; 3];

fn blend(from: Rgb, to: Rgb, share: f32) -> Rgb {
    [0, 1, 2].map(|channel| from[channel] + (to[channel] - from[channel]) * share)
}

/// 0 below `lo`, 1 above `hi`, smooth between.
fn step(lo: f32, hi: f32, value: f32) -> f32 {
    let share = ((value - lo) / (hi - lo)).clamp(0.0, 1.0);
    share * share * (3.0 - 2.0 * share)
}

/// A picture of which `colour(x, y)` gives the pixels; x and y run over -1..1.
fn paint(size: usize, mut colour: impl FnMut(f32, f32) -> Rgb) -> Image {
    let at = |place: usize| (place as f32 + 0.5) / size as f32 * 2.0 - 1.0;
    let mut pixels = Vec::with_capacity(size * size * 3);
    for place in 0..size * size {
        let rgb = colour(at(place % size), at(place / size));
        pixels.extend(rgb.map(|value| (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8));
    }
    Image { width: size, height: size, pixels }
}

/// Smooth noise of unit size: a few plane waves of random direction, about `frequency` periods over the picture.
struct Waves(Vec<[f32; 3]>);

impl Waves {
    fn new(frequency: f32, draws: &mut Draws) -> Self {
        let wave = |_| {
            let (angle, pitch) = (
                draws.range(0.0, std::f32::consts::TAU),
                frequency * draws.range(0.6, 1.4) * std::f32::consts::PI,
            );
            [pitch * angle.cos(), pitch * angle.sin(), draws.range(0.0, std::f32::consts::TAU)]
        };
        Self((0..5).map(wave).collect())
    }

    fn at(&self, x: f32, y: f32) -> f32 {
        self.0.iter().map(|[kx, ky, phase]| (kx * x + ky * y + phase).sin()).sum::<f32>()
            / (self.0.len() as f32 / 2.0).sqrt()
    }
}

/// What tells the classes of `synthetic:dermoscopy` apart. Ranges overlap where nature's would.
struct Lesion {
    centre: [f32; 2],
    radius: f32,
    squash: f32,
    angle: f32,
    /// Amplitude and phase of the outline's waves, two to six around: the border's irregularity.
    outline: [[f32; 2]; 5],
    /// Width of the transition to skin.
    softness: f32,
    colours: [Rgb; 3],
    /// How much the second and third colour show.
    mixing: f32,
    /// Displacement of the dark part from the centre: asymmetry of colour.
    shift: f32,
    /// Strength of the pigment network's mesh.
    network: f32,
    dots: Vec<Dot>,
}

/// A small round spot in the lesion's own coordinates (radius 1 is its border).
struct Dot {
    place: [f32; 2],
    radius: f32,
    colour: Rgb,
}

fn lesion(class: usize, draws: &mut Draws) -> Lesion {
    let brown = blend([0.55, 0.33, 0.20], [0.36, 0.20, 0.13], draws.unit());
    let dark = blend([0.22, 0.12, 0.10], [0.10, 0.07, 0.09], draws.unit());
    let (irregular, softness, colours, mixing, shift, network) = match class {
        0 => {
            let colours = [brown, blend(brown, dark, 0.5), brown];
            let (irregular, softness) = (draws.range(0.0, 0.09), draws.range(0.06, 0.22));
            (
                irregular,
                softness,
                colours,
                draws.range(0.3, 0.7),
                draws.range(0.0, 0.2),
                draws.range(0.0, 0.6),
            )
        }
        1 => {
            // The third colour is a blue-grey veil or red, and sometimes too faint to help.
            let third = if draws.chance(0.5) { [0.38, 0.42, 0.52] } else { [0.62, 0.28, 0.27] };
            let (irregular, softness) = (draws.range(0.06, 0.2), draws.range(0.05, 0.2));
            (
                irregular,
                softness,
                [brown, dark, third],
                draws.range(0.65, 1.2),
                draws.range(0.2, 0.6),
                draws.range(0.0, 0.6),
            )
        }
        _ => {
            let waxy = blend([0.60, 0.46, 0.30], brown, draws.unit());
            (
                draws.range(0.02, 0.09),
                draws.range(0.02, 0.1),
                [waxy, blend(waxy, dark, 0.4), waxy],
                0.6,
                0.1,
                0.0,
            )
        }
    };
    let mut dots = Vec::new();
    if class == 2 {
        for _ in 0..draws.below(10) + 3 {
            // Milia-like cysts are pale, comedo-like openings dark.
            let colour = if draws.chance(0.5) { [0.90, 0.84, 0.72] } else { [0.22, 0.15, 0.11] };
            dots.push(dot(draws, 0.85, [0.06, 0.12], colour));
        }
    } else {
        for _ in 0..draws.below(if class == 1 { 8 } else { 5 }) {
            dots.push(dot(draws, 0.9, [0.04, 0.08], dark));
        }
    }
    let outline = std::array::from_fn(|order| {
        [
            irregular * draws.range(0.3, 1.0) / (1.0 + order as f32 * 0.35),
            draws.range(0.0, std::f32::consts::TAU),
        ]
    });
    Lesion {
        centre: [draws.range(-0.2, 0.2), draws.range(-0.2, 0.2)],
        radius: draws.range(0.42, 0.72),
        squash: draws.range(0.75, 1.0),
        angle: draws.range(0.0, std::f32::consts::TAU),
        outline,
        softness,
        colours,
        mixing,
        shift,
        network,
        dots,
    }
}

fn dot(draws: &mut Draws, spread: f32, radius: [f32; 2], colour: Rgb) -> Dot {
    let (angle, distance) = (draws.range(0.0, std::f32::consts::TAU), spread * draws.unit().sqrt());
    Dot {
        place: [distance * angle.cos(), distance * angle.sin()],
        radius: draws.range(radius[0], radius[1]),
        colour,
    }
}

/// One picture of `synthetic:dermoscopy`.
fn draw_lesion(size: usize, class: usize, draws: &mut Draws) -> Image {
    let lesion = lesion(class, draws);
    let skin = blend([0.93, 0.76, 0.66], [0.62, 0.43, 0.32], draws.unit() * draws.unit());
    let flush = draws.range(-0.04, 0.04);
    let skin = [skin[0] + flush, skin[1], skin[2] - flush];
    let (texture, patches, edge) =
        (Waves::new(9.0, draws), Waves::new(1.6, draws), Waves::new(5.0, draws));
    let (light, slope) =
        (draws.range(0.85, 1.08), [draws.range(-0.1, 0.1), draws.range(-0.1, 0.1)]);
    let vignette = draws.range(0.0, 0.35);
    let hairs: Vec<Hair> = (0..draws.below(7)).map(|_| Hair::new(draws)).collect();
    let grain = draws.range(0.005, 0.02);
    paint(size, |x, y| {
        let mut rgb = skin.map(|value| value + 0.018 * texture.at(x, y) + 0.02 * patches.at(x, y));
        let (colour, cover) = lesion.colour(x, y, &patches, &edge);
        rgb = blend(rgb, colour, cover);
        for hair in &hairs {
            rgb = blend(rgb, hair.colour, hair.cover(x, y, size));
        }
        let lit = light
            * (1.0 + slope[0] * x + slope[1] * y)
            * (1.0 - vignette * step(0.7, 1.45, (x * x + y * y).sqrt()));
        let noise = grain * draws.normal();
        rgb.map(|value| value * lit + noise)
    })
}

impl Lesion {
    /// The lesion's colour at a place of the picture, and how much of it covers the skin there.
    fn colour(&self, x: f32, y: f32, patches: &Waves, edge: &Waves) -> (Rgb, f32) {
        let (sin, cos) = self.angle.sin_cos();
        let (dx, dy) = (x - self.centre[0], y - self.centre[1]);
        let (u, v) = (
            (cos * dx + sin * dy) / self.radius,
            (cos * dy - sin * dx) / (self.radius * self.squash),
        );
        let (distance, bearing) = ((u * u + v * v).sqrt(), v.atan2(u));
        let waves = self
            .outline
            .iter()
            .enumerate()
            .map(|(order, [size, phase])| size * ((order + 2) as f32 * bearing + phase).sin());
        let border = 1.0 + waves.sum::<f32>() + self.outline[0][0] * 0.3 * edge.at(x, y);
        let cover = 1.0 - step(border - self.softness, border + self.softness, distance);
        if cover <= 0.0 {
            return (self.colours[0], 0.0);
        }
        // Darker towards a point that lies off the centre in asymmetric lesions; two fields of patches show the other colours.
        let from_dark = ((u - self.shift).powi(2) + v * v).sqrt();
        let second = (1.0 - step(0.2, 0.9, from_dark)) * 0.6
            + 0.4 * step(0.0, 1.2, patches.at(x * 1.7, y * 1.7));
        let third = step(0.3, 1.2, patches.at(y * 1.3 + 2.0, x * 1.3))
            * self.mixing
            * step(0.6, 1.0, self.mixing);
        let mut rgb = blend(self.colours[0], self.colours[1], (second * self.mixing).min(1.0));
        rgb = blend(rgb, self.colours[2], third.clamp(0.0, 0.9));
        let mesh = (u * 17.0).sin().max((v * 17.0).sin());
        rgb = rgb.map(|value| value * (1.0 - 0.35 * self.network * step(0.5, 1.0, mesh)));
        for dot in &self.dots {
            let gap = ((u - dot.place[0]).powi(2) + (v - dot.place[1]).powi(2)).sqrt();
            rgb = blend(rgb, dot.colour, 1.0 - step(dot.radius * 0.6, dot.radius * 1.3, gap));
        }
        (rgb, cover)
    }
}

/// A hair: a thin parabola across the picture.
struct Hair {
    place: [f32; 2],
    direction: [f32; 2],
    bend: f32,
    length: f32,
    width: f32,
    colour: Rgb,
}

impl Hair {
    fn new(draws: &mut Draws) -> Self {
        let angle = draws.range(0.0, std::f32::consts::TAU);
        Self {
            place: [draws.range(-0.9, 0.9), draws.range(-0.9, 0.9)],
            direction: [angle.cos(), angle.sin()],
            bend: draws.range(-0.5, 0.5),
            length: draws.range(0.3, 1.2),
            width: draws.range(0.008, 0.02),
            colour: blend([0.12, 0.09, 0.08], [0.45, 0.32, 0.20], draws.unit() * draws.unit()),
        }
    }

    fn cover(&self, x: f32, y: f32, size: usize) -> f32 {
        let (dx, dy) = (x - self.place[0], y - self.place[1]);
        let along = dx * self.direction[0] + dy * self.direction[1];
        if along.abs() > self.length {
            return 0.0;
        }
        let across = dy * self.direction[0] - dx * self.direction[1] - self.bend * along * along;
        // Thinner than a pixel: fainter, not invisible.
        let width = self.width.max(1.0 / size as f32);
        0.85 * (self.width / width) * (1.0 - step(width * 0.5, width * 1.5, across.abs()))
    }
}

/// How many colours the patches of `synthetic:longrange` can have.
const KINDS: usize = 8;

/// A saturated colour on the circle of hues; `turn` in 0..1.
fn hue(turn: f32) -> Rgb {
    [0.0, 1.0 / 3.0, 2.0 / 3.0]
        .map(|shift| 0.5 + 0.45 * ((turn + shift) * std::f32::consts::TAU).cos())
}

/// One picture of `synthetic:longrange`: two patches in opposite margins, of one kind (`same`) or of two.
///
/// The first kind is uniform over all kinds whatever the label, and so is the second, so each patch alone carries no information. A net
/// that adds up what it sees at each place (local features, global average pooling, a linear head) knows the two kinds only through
/// f(a) + f(b); ranking the kinds by f, it can be sure of `same` for the top one alone, hence its accuracy is at most
/// 1/2 + 1/(2 * 8) = 0.5625. To do better, features of both places have to meet before a non-linearity.
fn draw_longrange(size: usize, same: bool, draws: &mut Draws) -> Image {
    let first = draws.below(KINDS);
    let second = if same { first } else { (first + 1 + draws.below(KINDS - 1)) % KINDS };
    let (upright, swap) = (draws.chance(0.5), draws.chance(0.5));
    // Half the patch's side is 0.14 of half the picture; margins of 0.39 leave at least 2 - 2 * 0.39 = 1.22 of 2 between the patches.
    let mut spot = |side: f32| {
        let (away, along) = (side * draws.range(0.76, 0.86), draws.range(-0.8, 0.8));
        if upright { [along, away] } else { [away, along] }
    };
    let (one, other) = (spot(-1.0), spot(1.0));
    let spots =
        if swap { [(one, second), (other, first)] } else { [(one, first), (other, second)] };
    let grey = draws.range(0.35, 0.65);
    let (texture, shade) = (Waves::new(8.0, draws), Waves::new(1.5, draws));
    let grain = draws.range(0.01, 0.03);
    paint(size, |x, y| {
        let level = grey + 0.05 * texture.at(x, y) + 0.05 * shade.at(x, y);
        let mut rgb = [level; 3];
        for &([px, py], kind) in &spots {
            let gap = (x - px).abs().max((y - py).abs());
            rgb = blend(rgb, hue(kind as f32 / KINDS as f32), 1.0 - step(0.11, 0.15, gap));
        }
        let noise = grain * draws.normal();
        rgb.map(|value| value + noise)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(size: usize, count: usize) -> Options {
        Options { synthetic_size: size, synthetic_count: count, ..Options::default() }
    }

    #[test]
    fn pictures_depend_on_seed_and_number_only() {
        for name in ["dermoscopy", "longrange"] {
            let set = open(name, &options(32, 60)).unwrap();
            assert_eq!(
                set.image(7).unwrap(),
                open(name, &options(32, 90)).unwrap().image(7).unwrap()
            );
            assert_ne!(set.image(7).unwrap(), set.image(8).unwrap());
            let reseeded = open(name, &Options { synthetic_seed: 1, ..options(32, 60) }).unwrap();
            assert_ne!(set.image(7).unwrap(), reseeded.image(7).unwrap());
            assert_eq!(set.image(7).unwrap().pixels.len(), 32 * 32 * 3);
        }
    }

    /// The colour of each patch, found again in the picture: the most saturated pixels of each margin.
    fn kinds(image: &Image) -> Vec<usize> {
        let size = image.width;
        let mut found = Vec::new();
        for margin in 0..4 {
            let inside = |x: usize, y: usize| {
                [x < size / 5, x >= size - size / 5, y < size / 5, y >= size - size / 5][margin]
            };
            let mut votes = [0usize; KINDS];
            for place in (0..size * size).filter(|place| inside(place % size, place / size)) {
                let rgb =
                    [0, 1, 2].map(|channel| f32::from(image.pixels[place * 3 + channel]) / 255.0);
                let spread = rgb.iter().copied().fold(0.0, f32::max)
                    - rgb.iter().copied().fold(1.0, f32::min);
                let away = |kind: usize| {
                    hue(kind as f32 / KINDS as f32)
                        .iter()
                        .zip(rgb)
                        .map(|(a, b)| (a - b).powi(2))
                        .sum::<f32>()
                };
                if spread > 0.6 {
                    votes[(0..KINDS).min_by(|a, b| away(*a).total_cmp(&away(*b))).unwrap()] += 1;
                }
            }
            found.push(votes);
        }
        // Opposite margins hold one patch each; a patch near a corner may show in a third margin, never in the fourth.
        let best = |votes: &[usize; KINDS]| (0..KINDS).max_by_key(|&kind| votes[kind]).unwrap();
        let total = |votes: &[usize; KINDS]| votes.iter().sum::<usize>();
        let across =
            total(&found[0]).min(total(&found[1])) > total(&found[2]).min(total(&found[3]));
        if across {
            vec![best(&found[0]), best(&found[1])]
        } else {
            vec![best(&found[2]), best(&found[3])]
        }
    }

    #[test]
    fn longrange_labels_say_whether_far_patches_agree() {
        let set = open("longrange", &options(64, 400)).unwrap();
        let (mut right, mut first) = (0, vec![[0usize; KINDS]; 2]);
        for index in 0..set.len() {
            let kinds = kinds(&set.image(index).unwrap());
            let label = set.items[index].label as usize;
            right += usize::from((kinds[0] == kinds[1]) == (label == 1));
            first[label][kinds[0]] += 1;
        }
        assert!(right >= 398, "{right} of 400 labels agree with the colours found in the pictures");
        assert_eq!(set.class_counts(0..400), [200, 200]);
        // One patch says nothing: each kind is equally frequent under both labels (25 expected, deviation below 5).
        for (kind, (differ, agree)) in first[0].iter().zip(&first[1]).enumerate() {
            assert!(differ.abs_diff(*agree) < 25, "kind {kind}: {differ} and {agree}");
        }
    }

    #[test]
    fn classes_of_dermoscopy_overlap_in_mean_colour() {
        let set = open("dermoscopy", &options(32, 300)).unwrap();
        let mean = |index: usize| {
            let image = set.image(index).unwrap();
            image.pixels.iter().map(|&value| f64::from(value)).sum::<f64>()
                / image.pixels.len() as f64
        };
        // Brightness alone must not give the class away: each class's mean lies within one deviation of the others'.
        let stats: Vec<(f64, f64)> = (0..3)
            .map(|class| {
                let values: Vec<f64> = (0..100).map(|number| mean(number * 3 + class)).collect();
                let mean = values.iter().sum::<f64>() / 100.0;
                (
                    mean,
                    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 100.0).sqrt(),
                )
            })
            .collect();
        for (a, b) in [(0, 1), (1, 2), (0, 2)] {
            let apart = (stats[a].0 - stats[b].0).abs();
            assert!(apart < stats[a].1 + stats[b].1, "classes {a} and {b}: {stats:?}");
        }
    }

    #[test]
    fn impossible_requests_are_refused_with_the_reason() {
        let refused = |name: &str, size: usize, count: usize| {
            open(name, &options(size, count)).unwrap_err().to_string()
        };
        assert!(refused("dermoscopy", 16, 300).contains("expected 32"));
        assert!(refused("longrange", 64, 3).contains("too few"));
        assert!(refused("longrang", 64, 300).contains("synthetic:longrange"));
    }
}
