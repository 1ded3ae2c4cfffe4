//! Any kernel size and stride: a pixel's sums are made eight channels at a time, then one at a time.

use crate::cpu::conv2d::Dims;
use crate::cpu::grouped::{covering, taps};
use crate::cpu::rows;
use std::ops::Range;

/// Channels side by side in a vector register.
const LANES: usize = 8;

/// `w` as [tap][channel]; y[n,p,q,c] = bias[c] + sum over r, s of x[n, p * stride + r - pad, q * stride + s - pad, c] * w[r,s,c].
pub(super) fn forward(d: &Dims, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let c = d.c;
    rows::each!(y, d.q * c, x.len(), |number, y| {
        let (image, p) = (number / d.p, number % d.p);
        let rows = taps(p, d.stride.0, d.pad.0, d.kh, d.h);
        for (q, y) in y.chunks_exact_mut(c).enumerate() {
            let columns = taps(q, d.stride.1, d.pad.1, d.kw, d.w);
            // Where a tap falls, and its weights.
            let tap = |r: usize, s: usize| {
                let (h, v) = (p * d.stride.0 + r - d.pad.0, q * d.stride.1 + s - d.pad.1);
                (((image * d.h + h) * d.w + v) * c, (r * d.kw + s) * c)
            };
            pixel(y, bias, x, w, rows.clone(), columns, tap);
        }
    });
}

/// dx[n,h,v,c] = sum over the p, q, r, s with h = p * stride + r - pad, and so in width, of dy[n,p,q,c] * w[r,s,c].
pub(super) fn input_gradient(d: &Dims, dy: &[f32], w: &[f32], dx: &mut [f32]) {
    let (c, size) = (d.c, dx.len());
    rows::each!(dx, d.w * c, size, |number, dx| {
        let (image, h) = (number / d.h, number % d.h);
        let rows = covering(h, d.stride.0, d.pad.0, d.kh, d.p);
        for (v, dx) in dx.chunks_exact_mut(c).enumerate() {
            let columns = covering(v, d.stride.1, d.pad.1, d.kw, d.q);
            let tap = |p: usize, q: usize| {
                let (r, s) = (h + d.pad.0 - p * d.stride.0, v + d.pad.1 - q * d.stride.1);
                (((image * d.p + p) * d.q + q) * c, (r * d.kw + s) * c)
            };
            pixel(dx, None, dy, w, rows.clone(), columns, tap);
        }
    });
}

/// `out` = bias + sum over `rows` and `columns` of `from` times `w`, each a pixel's channels from where `tap` says.
#[inline(always)]
fn pixel(
    out: &mut [f32],
    bias: Option<&[f32]>,
    from: &[f32],
    w: &[f32],
    rows: Range<usize>,
    columns: Range<usize>,
    tap: impl Fn(usize, usize) -> (usize, usize) + Copy,
) {
    let c = out.len();
    let whole = c - c % LANES;
    for at in (0..whole).step_by(LANES) {
        lanes::<LANES>(at, out, bias, from, w, rows.clone(), columns.clone(), tap);
    }
    for at in whole..c {
        lanes::<1>(at, out, bias, from, w, rows.clone(), columns.clone(), tap);
    }
}

/// Channels `at..at + L` of [`pixel`].
#[inline(always)]
fn lanes<const L: usize>(
    at: usize,
    out: &mut [f32],
    bias: Option<&[f32]>,
    from: &[f32],
    w: &[f32],
    rows: Range<usize>,
    columns: Range<usize>,
    tap: impl Fn(usize, usize) -> (usize, usize),
) {
    let mut sum = [0.0f32; L];
    if let Some(bias) = bias {
        sum.copy_from_slice(&bias[at..at + L]);
    }
    for row in rows {
        for column in columns.clone() {
            let (x, tap) = tap(row, column);
            let (x, w) = (&from[x + at..][..L], &w[tap + at..][..L]);
            for l in 0..L {
                sum[l] = x[l].mul_add(w[l], sum[l]);
            }
        }
    }
    out[at..at + L].copy_from_slice(&sum);
}

/// parts[part][r,s,c] = sum over the part's pixels, `block` output rows, of dy[pixel,c] * x[under the tap, c].
pub(super) fn weight_parts(d: &Dims, block: usize, x: &[f32], dy: &[f32], parts: &mut [f32]) {
    let c = d.c;
    rows::each!(parts, d.kh * d.kw * c, x.len() + dy.len(), |number, part| {
        part.fill(0.0);
        for row in number * block..(d.n * d.p).min((number + 1) * block) {
            let (image, p) = (row / d.p, row % d.p);
            for q in 0..d.q {
                let dy = &dy[(row * d.q + q) * c..][..c];
                for r in taps(p, d.stride.0, d.pad.0, d.kh, d.h) {
                    for s in taps(q, d.stride.1, d.pad.1, d.kw, d.w) {
                        let (h, v) = (p * d.stride.0 + r - d.pad.0, q * d.stride.1 + s - d.pad.1);
                        let x = &x[((image * d.h + h) * d.w + v) * c..][..c];
                        let part = &mut part[(r * d.kw + s) * c..][..c];
                        for l in 0..c {
                            part[l] = x[l].mul_add(dy[l], part[l]);
                        }
                    }
                }
            }
        }
    });
}
