//! Position embeddings of a transformer for images of another size, as torchvision's `interpolate_embeddings` makes them: the class
//! token's row stays, the others are a picture of patches that is resized.

use super::{Family, Model};
use crate::error::{Error, Result};
use crate::nn::{StateArray, StateDict};

const NAME: &str = "encoder.pos_embedding";

/// Height and width of a map of patches.
type Map = (usize, usize);

impl Model {
    /// Brings a state dict's position embeddings to the map of this model, where they are for another; tells from which to which.
    ///
    /// # Errors
    /// [`Error::File`] where the file does not tell height and width of its map: it is no square, and nothing else says so.
    pub(super) fn fit_positions(&self, dict: &mut StateDict) -> Result<Option<(Map, Map)>> {
        if self.spec.backbone.family() != Family::ViT {
            return Ok(None);
        }
        let patch = self.spec.patch;
        let to = (self.image.0 / patch, self.image.1 / patch);
        let Some(array) = dict.arrays.get(NAME) else { return Ok(None) };
        let &[1, rows, width] = &*array.shape else { return Ok(None) };
        // Another width is another model: loading says so.
        if rows < 2 || rows == to.0 * to.1 + 1 || width != self.spec.width {
            return Ok(None);
        }
        let Some(from) = map_of(dict, rows - 1, patch) else {
            let message = format!(
                "'{NAME}' has rows for a class token and {} patches, which are no square map; expected {} ({}x{}), or a square to \
                 interpolate from",
                rows - 1,
                to.0 * to.1,
                to.0,
                to.1
            );
            return Err(Error::file(&dict.source, message));
        };
        let old = array.to_f32();
        let (token, patches) = old.split_at(width);
        let mut new = token.to_vec();
        new.extend(bicubic(patches, from, to));
        dict.arrays.insert(NAME.into(), StateArray::f32(&[1, to.0 * to.1 + 1, width], new));
        Ok(Some((from, to)))
    }
}

/// The map of a file with so many patches: that of the image size which it names, or else a square.
fn map_of(dict: &StateDict, patches: usize, patch: usize) -> Option<Map> {
    let named = dict.metadata.get("image_size").and_then(|size| {
        let (h, w) = size.split_once('x')?;
        Some((h.parse::<usize>().ok()? / patch, w.parse::<usize>().ok()? / patch))
    });
    let side = patches.isqrt();
    let square = (side * side == patches).then_some((side, side));
    named.filter(|(h, w)| h * w == patches).or(square)
}

/// A picture `[h, w, C]` at another height and width: cubic convolution (Keys 1981) with a = -0.75, corners on corners, the border
/// repeated beyond it. As `torch.nn.functional.interpolate(mode="bicubic", align_corners=True)`.
fn bicubic(picture: &[f32], from: Map, to: Map) -> Vec<f32> {
    let channels = picture.len() / (from.0 * from.1);
    let (down, across) = (taps(from.0, to.0), taps(from.1, to.1));
    let mut out = Vec::with_capacity(to.0 * to.1 * channels);
    for rows in &down {
        for columns in &across {
            for c in 0..channels {
                let at =
                    |(y, x): (usize, usize)| f64::from(picture[(y * from.1 + x) * channels + c]);
                let along = |y| columns.iter().map(|&(x, weight)| weight * at((y, x))).sum::<f64>();
                let sum: f64 = rows.iter().map(|&(y, weight)| weight * along(y)).sum();
                out.push(sum as f32);
            }
        }
    }
    out
}

/// For each place of an axis of `to` places, the four of `from` that it is made of, with their weights.
fn taps(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // up to 1 away
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A; // 1 to 2 away
    let step = if to > 1 { (from - 1) as f64 / (to - 1) as f64 } else { 0.0 };
    let of = |place: usize| {
        let centre = place as f64 * step;
        let (first, t) = (centre.floor() as usize, centre.fract());
        let weights = [far(1.0 + t), near(t), near(1.0 - t), far(2.0 - t)];
        std::array::from_fn(|i| ((first + i).saturating_sub(1).min(from - 1), weights[i]))
    };
    (0..to).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::models::Load;

    /// PyTorch 2's answers to `interpolate(x, size=to, mode="bicubic", align_corners=True)` for
    /// `x = torch.arange(h * w * 1.0).mul(0.7).sin().reshape(1, 1, h, w)`.
    #[test]
    fn pictures_are_resized_as_pytorch_does() {
        let cases: [(Map, Map, &[f32]); 4] = [
            (
                (3, 3),
                (5, 5),
                &[
                    0.0, 0.2901183, 0.6442177, 0.8752291, 0.9854497, 0.5942408, 0.6289411,
                    0.613113, 0.4801401, 0.3436286, 0.8632094, 0.6633899, 0.3349882, -0.0574182,
                    -0.3507832, 0.0767428, -0.1132797, -0.3527224, -0.524772, -0.6162968,
                    -0.8715757, -0.9599378, -0.9824526, -0.8172544, -0.6312667,
                ],
            ),
            (
                (4, 4),
                (3, 3),
                &[
                    0.0, 0.8866891, 0.8632094, -0.256034, -0.2579248, 0.0049392, 0.8545991,
                    -0.0257793, -0.8796958,
                ],
            ),
            ((2, 3), (3, 1), &[0.0, 0.4316047, 0.8632094]),
            ((3, 3), (1, 1), &[0.0]),
        ];
        for (from, to, expected) in cases {
            let picture = |c: f32| (0..from.0 * from.1).map(move |i| c * (0.7 * i as f32).sin());
            // A second channel, to see that they are kept apart.
            let both: Vec<f32> =
                picture(1.0).zip(picture(-2.0)).flat_map(|(a, b)| [a, b]).collect();
            let got = bicubic(&both, from, to);
            assert_eq!(got.len(), 2 * expected.len());
            for (got, expected) in got.as_chunks::<2>().0.iter().zip(expected) {
                let off = (got[0] - expected).abs().max((got[1] + 2.0 * expected).abs());
                assert!(off < 1e-6, "{from:?} to {to:?}: {got:?} for {expected}");
            }
        }
    }

    fn model(side: usize) -> Model {
        let spec = "vit_ti_16:w8,heads=2,depth=1,patch=4".parse().unwrap();
        Model::build(&spec, 2, (side, side), &Device::cpu(), 3).unwrap()
    }

    #[test]
    fn pretrained_positions_fit_another_image() {
        let (small, large) = (model(8), model(12));
        let file = small.state().unwrap();
        let loaded = large.load_pretrained(&file, false).unwrap();
        assert_eq!(loaded.positions, Some(((2, 2), (3, 3))));
        assert!(loaded.differences == Default::default() && loaded.new_head.is_none());
        let rows = |model: &Model| model.state().unwrap().arrays[NAME].to_f32();
        let (from, to) = (rows(&small), rows(&large));
        assert_eq!(to[..8], from[..8], "the class token's");
        // Corners on corners: the four corners of 3x3 are the four of 2x2.
        for (patch, corner) in [(1, 1), (3, 2), (7, 3), (9, 4)] {
            assert_eq!(to[8 * patch..][..8], from[8 * corner..][..8]);
        }
        // The same size is taken over to the bit; a run that goes on wants exactly its own.
        assert_eq!(small.load_pretrained(&file, false).unwrap().positions, None);
        assert!(large.load(&file, Load::Exact).is_err());
        let mut odd = file;
        odd.metadata.clear();
        odd.arrays.insert(NAME.into(), StateArray::f32(&[1, 6, 8], vec![0.0; 48]));
        let error = large.load_pretrained(&odd, false).unwrap_err().to_string();
        assert!(error.contains("5 patches, which are no square map; expected 9 (3x3)"), "{error}");
    }
}
