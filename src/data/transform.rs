//! From a decoded picture to the numbers a net sees: resize, crop, flip, rotate, jitter, normalise.
//!
//! In two steps. `prepare` needs no random numbers: it makes the picture as small as augmentation allows, so that it can be kept in memory
//! between epochs. `finish` does the rest with draws keyed by (seed, epoch, item): which thread does it, and when, changes nothing.

use serde::{Deserialize, Serialize};

use super::resize::{Window, resize};
use super::{Draws, Image};
use crate::{Error, Result};

/// Mean of ImageNet's red, green and blue, of values in 0..1.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation of ImageNet's red, green and blue, of values in 0..1.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Random changes that keep a picture's label. The defaults are this crate's choice for dermoscopy and histology, where no direction is
/// special; crops of at least 60 % of the area with sides of at most 4:3 keep the middle third of every picture whole, which
/// PatchCamelyon's labels depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Mirror left and right, every second time.
    pub hflip: bool,
    /// Mirror top and bottom, every second time.
    pub vflip: bool,
    /// Rotate by 0, 90, 180 or 270 degrees.
    pub rot90: bool,
    /// Smallest and largest area of a random crop, as a share of the picture; `[1, 1]` takes the centre crop of evaluation.
    pub crop_scale: [f32; 2],
    /// Smallest and largest width of a random crop over its height.
    pub crop_ratio: [f32; 2],
    /// Brightness is multiplied by a factor in `1 - b .. 1 + b`.
    pub brightness: f32,
    /// Distance from the picture's mean grey is multiplied by a factor in `1 - c .. 1 + c`.
    pub contrast: f32,
    /// Distance of each pixel from its grey is multiplied by a factor in `1 - s .. 1 + s`.
    pub saturation: f32,
    /// Colours are rotated about the grey axis by up to this share of a full turn.
    pub hue: f32,
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            crop_scale: [0.6, 1.0],
            crop_ratio: [0.75, 4.0 / 3.0],
            brightness: 0.2,
            contrast: 0.2,
            saturation: 0.2,
            hue: 0.02,
            ..Self::flips()
        }
    }
}

impl Augment {
    /// No change at all.
    pub fn none() -> Self {
        Self { hflip: false, vflip: false, rot90: false, ..Self::flips() }
    }

    /// Flips and quarter turns only: what remains safe when labels depend on colours and on all of the picture.
    pub fn flips() -> Self {
        Self {
            hflip: true,
            vflip: true,
            rot90: true,
            crop_scale: [1.0, 1.0],
            crop_ratio: [1.0, 1.0],
            brightness: 0.0,
            contrast: 0.0,
            saturation: 0.0,
            hue: 0.0,
        }
    }

    fn crops(&self) -> bool {
        self.crop_scale != [1.0, 1.0]
    }

    fn check(&self) -> Result<()> {
        let span = |name: &str, [lo, hi]: [f32; 2], most: f32| {
            if lo > 0.0 && lo <= hi && hi <= most {
                Ok(())
            } else {
                Err(Error::usage(format!(
                    "augment.{name} = [{lo}, {hi}]: expected 0 < low <= high <= {most}"
                )))
            }
        };
        span("crop_scale", self.crop_scale, 1.0)?;
        span("crop_ratio", self.crop_ratio, 10.0)?;
        let strengths = [
            ("brightness", self.brightness, 1.0),
            ("contrast", self.contrast, 1.0),
            ("saturation", self.saturation, 1.0),
            ("hue", self.hue, 0.5),
        ];
        for (name, strength, most) in strengths {
            if !(0.0..=most).contains(&strength) {
                return Err(Error::usage(format!(
                    "augment.{name} = {strength}: expected 0 to {most}"
                )));
            }
        }
        Ok(())
    }
}

/// Everything between a decoded picture and the tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    /// Side of the square result in pixels.
    pub size: usize,
    /// Random changes; [`Augment::none`] for evaluation.
    pub augment: Augment,
    /// The centre crop takes this share of the shorter side (1: all of it).
    pub crop_share: f32,
    /// Subtracted from values in 0..1, by channel.
    pub mean: [f32; 3],
    /// Divides after that, by channel.
    pub std: [f32; 3],
}

impl Transform {
    /// Centre crop and resize to `size`, ImageNet's normalisation.
    pub fn eval(size: usize) -> Self {
        Self {
            size,
            augment: Augment::none(),
            crop_share: 1.0,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        }
    }

    /// The same with random changes.
    pub fn train(size: usize, augment: &Augment) -> Self {
        Self { augment: augment.clone(), ..Self::eval(size) }
    }

    /// Whether the numbers make sense. Errors: `Usage` with the name of the one that does not.
    pub fn check(&self) -> Result<()> {
        self.augment.check()?;
        if self.size == 0 || self.size > 4096 {
            return Err(Error::usage(format!(
                "image size {}: expected 1 to 4096 pixels",
                self.size
            )));
        }
        if !(self.crop_share > 0.0 && self.crop_share <= 1.0) {
            return Err(Error::usage(format!(
                "crop share {}: expected more than 0, at most 1",
                self.crop_share
            )));
        }
        if self.std.iter().any(|&std| !(std > 0.0 && std.is_finite()))
            || self.mean.iter().any(|mean| !mean.is_finite())
        {
            return Err(Error::usage(format!(
                "normalisation mean {:?}, std {:?}: expected finite means and positive deviations",
                self.mean, self.std
            )));
        }
        Ok(())
    }

    /// A picture as evaluation sees it: `[size, size, 3]`, row-major. A transform with random changes draws the same ones each time.
    pub fn apply(&self, image: &Image) -> Vec<f32> {
        let mut out = vec![0.0; self.size * self.size * 3];
        self.finish(&self.prepare(image), Draws::new(&[0]), &mut out);
        out
    }

    /// The part that is the same in every epoch: the centre crop at its final size, or, where crops are random, the whole picture made so
    /// small that the smallest crop still has `size` pixels a side. Never enlarges a picture that will be cropped.
    pub(super) fn prepare(&self, image: &Image) -> Image {
        let (width, height) = (image.width as f32, image.height as f32);
        let short = width.min(height);
        if !self.augment.crops() {
            let side = short * self.crop_share;
            let window = Window {
                x: (width - side) / 2.0,
                y: (height - side) / 2.0,
                width: side,
                height: side,
            };
            return resize(image, window, self.size, self.size);
        }
        // The shortest side a crop can have, as a share of the picture's shorter side.
        let [lowest, highest] = self.augment.crop_ratio;
        let share = (self.augment.crop_scale[0] / highest.max(1.0 / lowest)).sqrt();
        let shrink = (self.size as f32 / (share * short)).min(1.0);
        let (to_width, to_height) =
            ((width * shrink).ceil() as usize, (height * shrink).ceil() as usize);
        if (to_width, to_height) == (image.width, image.height) {
            return image.clone();
        }
        resize(image, Window { x: 0.0, y: 0.0, width, height }, to_width, to_height)
    }

    /// The random part and the normalisation: writes `[size, size, 3]` to `out`. All random numbers come from `draws`.
    pub(super) fn finish(&self, prepared: &Image, mut draws: Draws, out: &mut [f32]) {
        let cropped;
        let image = if self.augment.crops() {
            let window = random_window(prepared, &self.augment, &mut draws);
            cropped = resize(prepared, window, self.size, self.size);
            &cropped
        } else {
            prepared
        };
        let turn = Turn::draw(&self.augment, &mut draws);
        let colour = Colour::draw(&self.augment, image, &mut draws);
        let last = self.size - 1;
        for (place, pixel) in out.chunks_exact_mut(3).enumerate() {
            let (x, y) = turn.source(place % self.size, place / self.size, last);
            let at = (y * self.size + x) * 3;
            let rgb = [0, 1, 2].map(|channel| f32::from(image.pixels[at + channel]) / 255.0);
            let rgb = colour.apply(rgb);
            for channel in 0..3 {
                pixel[channel] = (rgb[channel] - self.mean[channel]) / self.std[channel];
            }
        }
    }
}

/// A crop with area and shape drawn from `augment`, anywhere in the picture. Aspect ratios are those of the picture in a square: what
/// counts is which share of each side is kept.
fn random_window(image: &Image, augment: &Augment, draws: &mut Draws) -> Window {
    let area = draws.range(augment.crop_scale[0], augment.crop_scale[1]);
    let [lo, hi] = augment.crop_ratio.map(f32::ln);
    let ratio = draws.range(lo, hi).exp();
    let (share_x, share_y) = ((area * ratio).sqrt().min(1.0), (area / ratio).sqrt().min(1.0));
    // Square windows in a picture that is not: the shorter side is the measure for both.
    let short = image.width.min(image.height) as f32;
    let (width, height) = (share_x * short, share_y * short);
    let x = draws.unit() * (image.width as f32 - width);
    let y = draws.unit() * (image.height as f32 - height);
    Window { x, y, width, height }
}

/// One of the eight ways to lay a square on itself.
struct Turn {
    transpose: bool,
    mirror_x: bool,
    mirror_y: bool,
}

impl Turn {
    fn draw(augment: &Augment, draws: &mut Draws) -> Self {
        let quarter = draws.below(4);
        let (hflip, vflip) = (draws.chance(0.5), draws.chance(0.5));
        let quarter = if augment.rot90 { quarter } else { 0 };
        // A quarter turn is a transposition and one mirror; a half turn is both mirrors.
        let (transpose, x, y) =
            [(false, false, false), (true, true, false), (false, true, true), (true, false, true)]
                [quarter];
        Self {
            transpose,
            mirror_x: x ^ (augment.hflip && hflip),
            mirror_y: y ^ (augment.vflip && vflip),
        }
    }

    /// Where the pixel at (x, y) of the result comes from; `last` is the largest coordinate.
    fn source(&self, x: usize, y: usize, last: usize) -> (usize, usize) {
        let x = if self.mirror_x { last - x } else { x };
        let y = if self.mirror_y { last - y } else { y };
        if self.transpose { (y, x) } else { (x, y) }
    }
}

/// Brightness, contrast, saturation and hue in one: all four are affine in (r, g, b), so their product is one matrix and one offset.
struct Colour {
    matrix: [[f32; 3]; 3],
    offset: f32,
    identity: bool,
}

/// Weights of red, green and blue in grey (ITU-R BT.601).
const GREY: [f32; 3] = [0.299, 0.587, 0.114];

impl Colour {
    fn draw(augment: &Augment, image: &Image, draws: &mut Draws) -> Self {
        let mut factor = |strength: f32| 1.0 + strength * draws.range(-1.0, 1.0);
        let (brightness, contrast, saturation) =
            (factor(augment.brightness), factor(augment.contrast), factor(augment.saturation));
        let angle = augment.hue * draws.range(-1.0, 1.0) * std::f32::consts::TAU;
        let identity = brightness == 1.0 && contrast == 1.0 && saturation == 1.0 && angle == 0.0;
        // Rotation about (1, 1, 1) by Rodrigues' formula.
        let (sin, cos) = angle.sin_cos();
        let (third, root) = ((1.0 - cos) / 3.0, sin / 3.0f32.sqrt());
        let rotation = [
            [cos + third, third - root, third + root],
            [third + root, cos + third, third - root],
            [third - root, third + root, cos + third],
        ];
        let mut matrix = [[0.0; 3]; 3];
        for (row, cells) in matrix.iter_mut().enumerate() {
            for (column, cell) in cells.iter_mut().enumerate() {
                // Saturation s mixes each pixel with its grey: s * 1 + (1 - s) * grey; grey of the rotated colour is grey . rotation.
                let grey: f32 = (0..3).map(|k| GREY[k] * rotation[k][column]).sum();
                *cell = brightness
                    * contrast
                    * (saturation * rotation[row][column] + (1.0 - saturation) * grey);
            }
        }
        // Contrast c moves values away from the mean grey m of the brightened picture: c * v + (1 - c) * m.
        let offset = if identity { 0.0 } else { (1.0 - contrast) * brightness * mean_grey(image) };
        Self { matrix, offset, identity }
    }

    fn apply(&self, rgb: [f32; 3]) -> [f32; 3] {
        if self.identity {
            return rgb;
        }
        self.matrix.map(|row| {
            (row[0] * rgb[0] + row[1] * rgb[1] + row[2] * rgb[2] + self.offset).clamp(0.0, 1.0)
        })
    }
}

fn mean_grey(image: &Image) -> f32 {
    // Whole numbers until the end: exact in any order.
    let sums = image.pixels.chunks_exact(3).fold([0u64; 3], |sums, pixel| {
        [0, 1, 2].map(|channel| sums[channel] + u64::from(pixel[channel]))
    });
    let pixels = (image.pixels.len() / 3).max(1) as f32 * 255.0;
    (0..3).map(|channel| GREY[channel] * sums[channel] as f32 / pixels).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture whose red is the column, green the row, blue a checkerboard.
    fn ramp(width: usize, height: usize) -> Image {
        let pixels = (0..width * height).flat_map(|place| {
            [
                (place % width) as u8,
                (place / width) as u8,
                255 * ((place % width + place / width) % 2) as u8,
            ]
        });
        Image { width, height, pixels: pixels.collect() }
    }

    #[test]
    fn evaluation_takes_the_centre_and_normalises() {
        let transform = Transform::eval(4);
        let image = ramp(12, 4);
        let prepared = transform.prepare(&image);
        assert_eq!(
            prepared.pixels.chunks(3).take(4).map(|pixel| pixel[0]).collect::<Vec<_>>(),
            [4, 5, 6, 7]
        );
        let mut out = vec![0.0; 48];
        transform.finish(&prepared, Draws::new(&[1]), &mut out);
        assert!((out[0] - (4.0 / 255.0 - 0.485) / 0.229).abs() < 1e-6);
        assert!((out[3 * 5 + 1] - (1.0 / 255.0 - 0.456) / 0.224).abs() < 1e-6);
    }

    #[test]
    fn all_eight_turns_occur_and_are_distinct() {
        let augment = Augment::flips();
        let mut seen = std::collections::BTreeSet::new();
        for key in 0..200 {
            let turn = Turn::draw(&augment, &mut Draws::new(&[key]));
            seen.insert(
                (0..9).map(|place| turn.source(place % 3, place / 3, 2)).collect::<Vec<_>>(),
            );
        }
        assert_eq!(seen.len(), 8);
    }

    #[test]
    fn augmentation_depends_on_the_key_only() {
        let transform = Transform::train(16, &Augment::default());
        let prepared = transform.prepare(&ramp(200, 90));
        assert!(
            prepared.height >= 16 && prepared.height <= 26,
            "shrunk as far as crops allow, not further: {}",
            prepared.height
        );
        let make = |key: [u64; 3]| {
            let mut out = vec![0.0; 16 * 16 * 3];
            transform.finish(&prepared, Draws::new(&key), &mut out);
            out
        };
        assert_eq!(make([1, 2, 3]), make([1, 2, 3]));
        for other in [[2, 2, 3], [1, 3, 3], [1, 2, 4]] {
            assert_ne!(make([1, 2, 3]), make(other));
        }
        assert!(make([1, 2, 3]).iter().all(|value| value.abs() < 3.0));
    }

    #[test]
    fn crops_stay_inside_and_keep_the_middle_third() {
        let image = ramp(96, 96);
        for key in 0..2000 {
            let window = random_window(&image, &Augment::default(), &mut Draws::new(&[key]));
            assert!(
                window.x >= 0.0
                    && window.y >= 0.0
                    && window.x + window.width <= 96.001
                    && window.y + window.height <= 96.001,
                "{window:?}"
            );
            assert!(window.x <= 32.01 && window.x + window.width >= 63.99, "{window:?}");
            assert!(window.y <= 32.01 && window.y + window.height >= 63.99, "{window:?}");
        }
    }

    #[test]
    fn colour_jitter_without_strength_is_identity_and_grey_stays_grey() {
        let image = ramp(8, 8);
        let none = Colour::draw(&Augment::none(), &image, &mut Draws::new(&[5]));
        assert_eq!(none.apply([0.1, 0.5, 0.9]), [0.1, 0.5, 0.9]);
        let strong = Augment { hue: 0.5, saturation: 1.0, ..Augment::none() };
        for key in 0..20 {
            let [r, g, b] = Colour::draw(&strong, &image, &mut Draws::new(&[key])).apply([0.4; 3]);
            assert!(
                (r - 0.4).abs() < 1e-5 && (g - 0.4).abs() < 1e-5 && (b - 0.4).abs() < 1e-5,
                "{r} {g} {b}"
            );
        }
    }

    #[test]
    fn impossible_settings_are_named() {
        let refused = |transform: Transform| transform.check().unwrap_err().to_string();
        assert!(refused(Transform::eval(0)).contains("image size 0"));
        assert!(
            refused(Transform::train(8, &Augment { crop_scale: [0.9, 0.5], ..Augment::default() }))
                .contains("crop_scale")
        );
        assert!(
            refused(Transform::train(8, &Augment { hue: f32::NAN, ..Augment::default() }))
                .contains("hue")
        );
        assert!(refused(Transform { std: [0.0; 3], ..Transform::eval(8) }).contains("std"));
    }
}
