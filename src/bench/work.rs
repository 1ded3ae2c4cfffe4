//! What a row has to do at least: useful floating-point operations, exponentials, and bytes to and from memory.
//!
//! FLOP are those of the products (a multiply-add is two): norms, softmax, activations and position terms are not counted,
//! and products with padding are, as everybody counts convolutions. Attention: 4 for each channel of a (query, key) pair
//! forward; backward 10, since the scores are made again; of a window only the keys on the map count. Bytes: every input and
//! output once, whatever an implementation stores beside; statistics and log-sum-exps of attention are left out.

use super::row::{Position, Subject};
use crate::models;
use serde::{Deserialize, Serialize};

/// The least that a row takes. Zero: not counted (a pass without products; bytes of a whole training step).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// The forward.
    pub forward: Pass,
    /// Forward and backward, or the whole step.
    pub whole: Pass,
}

/// The least that one pass takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pass {
    /// Useful floating-point operations.
    pub flop: f64,
    /// Exponentials, which bind attention with few channels a head.
    pub exp: f64,
    /// Bytes read and written.
    pub bytes: f64,
}

impl Pass {
    fn plus(self, other: Self) -> Self {
        Self {
            flop: self.flop + other.flop,
            exp: self.exp + other.exp,
            bytes: self.bytes + other.bytes,
        }
    }
}

fn product(sizes: &[usize]) -> f64 {
    sizes.iter().map(|&n| n as f64).product()
}

/// Height and width after a kernel padded by `kernel / 2`.
pub(crate) fn shrink(size: usize, kernel: usize, stride: usize) -> usize {
    (size + 2 * (kernel / 2) - kernel) / stride + 1
}

/// FLOP, exponentials and bytes of a subject with elements of `bytes` bytes.
pub(crate) fn work(subject: &Subject, bytes: usize) -> Work {
    let element = bytes as f64;
    match *subject {
        Subject::Conv2d { n, size, channels, out, kernel, stride } => {
            let side = shrink(size, kernel, stride);
            let flop = 2.0 * product(&[n, side, side, out, channels, kernel, kernel]);
            let x = element * product(&[n, size, size, channels]);
            let w = element * product(&[out, kernel, kernel, channels]);
            let y = element * product(&[n, side, side, out]);
            matrix(flop, x, w, y, channels != 3)
        }
        Subject::Depthwise { n, size, channels, kernel, stride } => {
            let side = shrink(size, kernel, stride);
            let flop = 2.0 * product(&[n, side, side, channels, kernel, kernel]);
            let x = element * product(&[n, size, size, channels]);
            let w = element * product(&[channels, kernel, kernel]);
            let y = element * product(&[n, side, side, channels]);
            matrix(flop, x, w, y, true)
        }
        Subject::SqueezeExcite { n, size, channels, .. } => {
            // Forward x twice (the gate needs all of it first), y. Backward x and dy, then dy again, dx.
            let map = element * product(&[n, size, size, channels]);
            moved(3.0 * map, 4.0 * map)
        }
        Subject::Linear { rows, inputs, outputs } => {
            let flop = 2.0 * product(&[rows, inputs, outputs]);
            let [x, w, y] =
                [[rows, inputs], [inputs, outputs], [rows, outputs]].map(|s| element * product(&s));
            matrix(flop, x, w, y, true)
        }
        Subject::BatchNorm { n, size, channels, residual } => {
            // Forward x (and r), y. Backward dy, x (and y, which tells where the ReLU was open), dx (and dr).
            let map = element * product(&[n, size, size, channels]);
            let (forward, backward) = if residual { (3.0, 5.0) } else { (2.0, 3.0) };
            moved(forward * map, backward * map)
        }
        Subject::MaxPool2d { n, size, channels } => {
            let side = shrink(size, 3, 2);
            let maps = element
                * (product(&[n, size, size, channels]) + product(&[n, side, side, channels]));
            moved(maps, maps)
        }
        Subject::GlobalAttention { n, size, heads, d, position } => {
            let tables = element * tables(position, 2 * size - 1, heads, d);
            attention([n, size * size, heads, d], (size * size).pow(2), tables, element)
        }
        Subject::LocalAttention { n, size, heads, d, window, position, .. } => {
            let tables = element * tables(position, window, heads, d);
            attention([n, size * size, heads, d], on_map(size, window).pow(2), tables, element)
        }
        Subject::AttentionBlock { n, size, heads, d } => {
            let (rows, c, tokens) = (n * size * size, heads * d, size * size);
            let inner = attention([n, tokens, heads, d], tokens * tokens, 0.0, element);
            let flop = 8.0 * product(&[rows, c, c]);
            let (map, weights) = (element * product(&[rows, c]), element * product(&[4, c, c]));
            let more = weights + element * tables(Position::Rel, 2 * size - 1, heads, d);
            // Forward x, y; backward dy, x, dx, and weights and tables read and their gradients written.
            let pass = |products: f64, pass: Pass, bytes| Pass {
                flop: products * flop + pass.flop,
                bytes,
                ..pass
            };
            Work {
                forward: pass(1.0, inner.forward, 2.0 * map + more),
                whole: pass(3.0, inner.whole, 5.0 * map + 3.0 * more),
            }
        }
        Subject::Adamw { len } => {
            // Reads parameter, gradient and two means, writes all but the gradient; always f32.
            moved(7.0 * 4.0 * len as f64, 0.0)
        }
        Subject::Step { ref model, size, n } => {
            let flop = step_flop(model, size, n).unwrap_or_default();
            Work { forward: Pass::default(), whole: flop }
        }
    }
}

/// y = x w: backward has two such products, or one where x wants no gradient.
fn matrix(flop: f64, x: f64, w: f64, y: f64, input_gradient: bool) -> Work {
    let forward = Pass { flop, exp: 0.0, bytes: x + w + y };
    // dy, x and w in; dw and dx out. Without dx, w is not needed.
    let backward = if input_gradient {
        Pass { flop: 2.0 * flop, exp: 0.0, bytes: y + 2.0 * x + 2.0 * w }
    } else {
        Pass { flop, exp: 0.0, bytes: y + x + w }
    };
    Work { forward, whole: forward.plus(backward) }
}

/// A pass without products.
fn moved(forward: f64, backward: f64) -> Work {
    let pass = |bytes| Pass { flop: 0.0, exp: 0.0, bytes };
    Work { forward: pass(forward), whole: pass(forward + backward) }
}

/// Elements of the position tables of attention with `offsets` offsets along each axis.
fn tables(position: Position, offsets: usize, heads: usize, d: usize) -> f64 {
    match position {
        Position::None => 0.0,
        Position::Rel => product(&[2, offsets, heads, d]),
        Position::Bias => product(&[heads, offsets, offsets]),
    }
}

/// Places of all windows along one axis that lie on the map.
fn on_map(size: usize, window: usize) -> usize {
    let reach = window / 2;
    (0..size).map(|at| (at + reach).min(size - 1) - at.saturating_sub(reach) + 1).sum()
}

/// q, k, v in and y out; backward reads these and dy, and writes three gradients. Tables are read twice and their gradient
/// written once. `pairs` of query and key an image and head.
fn attention([n, tokens, heads, d]: [usize; 4], pairs: usize, tables: f64, element: f64) -> Work {
    let pairs = product(&[n, heads, pairs]);
    let map = element * product(&[n, tokens, heads, d]);
    let forward = Pass { flop: 4.0 * pairs * d as f64, exp: pairs, bytes: 4.0 * map + tables };
    let backward =
        Pass { flop: 10.0 * pairs * d as f64, exp: pairs, bytes: 8.0 * map + 2.0 * tables };
    Work { forward, whole: forward.plus(backward) }
}

/// The products of a training step: three for each forward, since both factors want a gradient, two for the first layer, whose
/// images want none; of attention three and a half, since the scores are made again.
fn step_flop(model: &str, size: usize, n: usize) -> Option<Pass> {
    let layers = models::layers(&model.parse().ok()?, super::CLASSES, (size, size)).ok()?;
    let mut total = Pass::default();
    for (i, layer) in layers.iter().enumerate() {
        let forwards = match i {
            0 => 2.0,
            _ if layer.pairs > 0.0 => 3.5,
            _ => 3.0,
        };
        total.flop += forwards * n as f64 * layer.flop;
        total.exp += 2.0 * n as f64 * layer.pairs;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::row::Outside;

    #[test]
    fn convolution() {
        let w =
            work(&Subject::Conv2d { n: 2, size: 8, channels: 4, out: 6, kernel: 3, stride: 2 }, 2);
        // 2 x 4 x 4 pixels, 6 channels each, 9 taps of 4 channels.
        assert_eq!(w.forward.flop, 2.0 * 32.0 * 6.0 * 36.0);
        assert_eq!(w.whole.flop, 3.0 * w.forward.flop);
        let (x, weight, y) = (2.0 * 512.0, 2.0 * 216.0, 2.0 * 192.0);
        assert_eq!(w.forward.bytes, x + weight + y);
        assert_eq!(w.whole.bytes, 3.0 * x + 3.0 * weight + 2.0 * y);
        let stem =
            work(&Subject::Conv2d { n: 1, size: 8, channels: 3, out: 6, kernel: 3, stride: 1 }, 4);
        assert_eq!(stem.whole.flop, 2.0 * stem.forward.flop);
        let depthwise = Subject::Depthwise { n: 2, size: 7, channels: 6, kernel: 5, stride: 2 };
        // 2 x 4 x 4 pixels, 6 channels each, 25 taps.
        assert_eq!(work(&depthwise, 4).whole.flop, 3.0 * 2.0 * 32.0 * 6.0 * 25.0);
    }

    /// The worked floors of a memory- and of a compute-bound attention, by hand: 128 x 8 heads of 196 x 196 x 64.
    #[test]
    fn attention_counts_pairs_and_maps() {
        let position = Position::None;
        let w = work(&Subject::GlobalAttention { n: 128, size: 14, heads: 8, d: 64, position }, 2);
        let map = 128.0 * 196.0 * 512.0 * 2.0;
        assert_eq!(w.forward.flop, 4.0 * 1024.0 * 196.0 * 196.0 * 64.0);
        assert_eq!(w.whole.flop, 3.5 * w.forward.flop);
        assert_eq!((w.forward.bytes, w.whole.bytes), (4.0 * map, 12.0 * map));
        let local = |position| {
            let border = Outside::Mask;
            work(
                &Subject::LocalAttention {
                    n: 1,
                    size: 5,
                    heads: 2,
                    d: 4,
                    window: 3,
                    border,
                    position,
                },
                4,
            )
        };
        // Along an axis of 5 the windows of 3 hold 2 + 3 + 3 + 3 + 2 places.
        assert_eq!(local(Position::None).forward.exp, 2.0 * 13.0 * 13.0);
        assert_eq!((on_map(7, 13), on_map(7, 15), on_map(1, 3)), (49, 49, 1));
        let extra = |p| local(p).whole.bytes - local(Position::None).whole.bytes;
        assert_eq!(extra(Position::Rel), 3.0 * 4.0 * 2.0 * 3.0 * 8.0);
        assert_eq!(extra(Position::Bias), 3.0 * 4.0 * 2.0 * 9.0);
    }

    /// ResNet18 has 3.63 GFLOP forward at 224 x 224: the published 1.814 G multiply-adds.
    #[test]
    fn a_step_is_three_forwards_less_the_stem() {
        let step = work(&Subject::Step { model: "resnet18".into(), size: 224, n: 1 }, 4).whole;
        let stem = 2.0 * product(&[112, 112, 64, 147]);
        let forward = (step.flop + stem) / 3.0;
        assert!((forward / 2.0 - 1.814e9).abs() < 2e6, "{forward}");
        let ga = work(&Subject::Step { model: "resnet18+ga@4".into(), size: 224, n: 1 }, 4).whole;
        // Two 3x3 products of 512 x 512 become three 1x1 each, and 49 x 49 pairs of 8 heads.
        let less = 2.0 * 3.0 * 2.0 * 49.0 * 512.0 * 512.0 * (9.0 - 3.0);
        let more = 2.0 * 14.0 * 49.0 * 49.0 * 512.0;
        assert!((step.flop - ga.flop - less + more).abs() < 1.0);
        assert_eq!(ga.exp, 2.0 * 2.0 * 8.0 * 49.0 * 49.0);
    }
}
