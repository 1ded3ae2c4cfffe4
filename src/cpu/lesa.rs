//! CPU kernels of [`crate::ops::lesa`]: a thread an image, each head by matrix products.
//!
//! What goes by offsets is a product with all rows of the table, `[L, 2 L - 1]`: entry `i + L - 1 - j` of row i belongs to the pair (i, j),
//! so moving between offsets and pairs is a walk backwards along the row.

use super::gemm::gemm;
use super::lanes::exp;
use super::rows::sum_by;
use super::simd::vectorise;
use super::softmax::row_max;
use super::threads::with_scratch;
use crate::kernel::CpuArgs;
use crate::ops::lesa::LesaParams;
use rayon::prelude::*;

/// Sizes that all kernels use.
#[derive(Clone, Copy)]
struct Sizes {
    /// Pixels, offsets, heads.
    l: usize,
    offsets: usize,
    heads: usize,
    /// Numbers of a query or key.
    e: usize,
    /// From one pixel's qkv to the next, from one row of the table to the next, and from one pixel's context to the next.
    pixel: usize,
    row: usize,
    context: usize,
}

impl Sizes {
    fn new(p: LesaParams) -> Self {
        let [l, heads, e] = [p.pixels, p.heads, p.size].map(|v| v as usize);
        let (offsets, row) = (2 * l - 1, 4 * e);
        Self { l, offsets, heads, e, pixel: heads * row, row, context: 4 * e * heads }
    }

    /// Where q, k and v of a head begin in a pixel's qkv.
    fn parts(&self, head: usize) -> [usize; 3] {
        [0, self.e, 2 * self.e].map(|part| head * self.row + part)
    }

    /// Where a pair's entry stands in a matrix by offsets.
    #[inline(always)]
    fn at(&self, i: usize, j: usize) -> usize {
        i * self.offsets + i + self.l - 1 - j
    }
}

/// `out[c, r] = x[r, c]` for `rows` rows that lie `stride` apart.
fn transpose(x: &[f32], rows: usize, columns: usize, stride: usize, out: &mut [f32]) {
    for (c, out) in out[..rows * columns].chunks_exact_mut(rows).enumerate() {
        out.iter_mut().enumerate().for_each(|(r, out)| *out = x[r * stride + c]);
    }
}

/// `qkv, table -> logits`.
pub(crate) fn logits_fwd(a: &CpuArgs<'_>) {
    let s = Sizes::new(a.params());
    let Sizes { l, offsets, heads, e, pixel, row, .. } = s;
    let (qkv, table) = (a.f32(0), a.f32(1));
    let images = a.f32_mut(2).par_chunks_mut(l * l * 3 * heads).zip(qkv.par_chunks(l * pixel));
    images.for_each(|(out, qkv)| {
        with_scratch(l * l + 2 * l * offsets + e * offsets, |scratch| {
            let (pairs, scratch) = scratch.split_at_mut(l * l);
            let (by_q, scratch) = scratch.split_at_mut(l * offsets);
            let (by_k, flipped) = scratch.split_at_mut(l * offsets);
            for g in 0..heads {
                let [q, k, _] = s.parts(g).map(|part| &qkv[part..]);
                transpose(k, l, e, pixel, flipped);
                gemm(l, l, e, 1.0, q, pixel, 1, flipped, l, false, pairs, l);
                transpose(table, offsets, e, row, flipped);
                gemm(l, offsets, e, 1.0, q, pixel, 1, flipped, offsets, false, by_q, offsets);
                transpose(&table[e..], offsets, e, row, flipped);
                gemm(l, offsets, e, 1.0, k, pixel, 1, flipped, offsets, false, by_k, offsets);
                for i in 0..l {
                    for j in 0..l {
                        let at = (i * l + j) * 3 * heads + g;
                        out[at] = pairs[i * l + j];
                        out[at + heads] = by_q[s.at(i, j)];
                        out[at + 2 * heads] = by_k[s.at(j, i)];
                    }
                }
            }
        });
    });
}

/// `qkv, table, dlogits -> dqkv, dtables`; zeros for values.
pub(crate) fn logits_bwd(a: &CpuArgs<'_>) {
    let s = Sizes::new(a.params());
    let Sizes { l, offsets, heads, e, pixel, row, .. } = s;
    let (qkv, table, dlogits) = (a.f32(0), a.f32(1), a.f32(2));
    let out =
        a.f32_mut(3).par_chunks_mut(l * pixel).zip(a.f32_mut(4).par_chunks_mut(offsets * row));
    let images = qkv.par_chunks(l * pixel).zip(dlogits.par_chunks(l * l * 3 * heads));
    out.zip(images).for_each(|((dqkv, dtable), (qkv, dlogits))| {
        dqkv.fill(0.0);
        dtable.fill(0.0);
        with_scratch(l * l + 2 * l * offsets, |scratch| {
            let (pairs, scratch) = scratch.split_at_mut(l * l);
            let (by_q, by_k) = scratch.split_at_mut(l * offsets);
            by_q.fill(0.0);
            by_k.fill(0.0);
            for g in 0..heads {
                for i in 0..l {
                    for j in 0..l {
                        let at = (i * l + j) * 3 * heads + g;
                        pairs[i * l + j] = dlogits[at];
                        by_q[s.at(i, j)] = dlogits[at + heads];
                        by_k[s.at(j, i)] = dlogits[at + 2 * heads];
                    }
                }
                let parts = s.parts(g);
                let [q, k, _] = parts.map(|part| &qkv[part..]);
                let dq = &mut dqkv[parts[0]..];
                gemm(l, e, l, 1.0, pairs, l, 1, k, pixel, false, dq, pixel);
                gemm(l, e, offsets, 1.0, by_q, offsets, 1, table, row, true, dq, pixel);
                let dk = &mut dqkv[parts[1]..];
                gemm(l, e, l, 1.0, pairs, 1, l, q, pixel, false, dk, pixel);
                gemm(l, e, offsets, 1.0, by_k, offsets, 1, &table[e..], row, true, dk, pixel);
                gemm(offsets, e, l, 1.0, by_q, 1, offsets, q, pixel, true, dtable, row);
                gemm(offsets, e, l, 1.0, by_k, 1, offsets, k, pixel, true, &mut dtable[e..], row);
            }
        });
    });
}

/// `qkv, table, logits -> weights, y`.
pub(crate) fn context_fwd(a: &CpuArgs<'_>) {
    let s = Sizes::new(a.params());
    let Sizes { l, offsets, heads, e, pixel, row, context } = s;
    let (qkv, table, logits) = (a.f32(0), a.f32(1), a.f32(2));
    let out =
        a.f32_mut(3).par_chunks_mut(heads * l * l).zip(a.f32_mut(4).par_chunks_mut(l * context));
    let images = qkv.par_chunks(l * pixel).zip(logits.par_chunks(l * l * 3 * heads));
    out.zip(images).for_each(|((weights, y), (qkv, logits))| {
        with_scratch(l * offsets, |by_offset| {
            by_offset.fill(0.0);
            for (g, weights) in weights.chunks_exact_mut(l * l).enumerate() {
                for (i, weights) in weights.chunks_exact_mut(l).enumerate() {
                    for (j, weight) in weights.iter_mut().enumerate() {
                        let at = &logits[(i * l + j) * 3 * heads + g..];
                        *weight = at[0] + at[heads] + at[2 * heads];
                    }
                    vectorise!(|| normalise(weights));
                    for (j, &weight) in weights.iter().enumerate() {
                        by_offset[s.at(i, j)] = weight;
                    }
                }
                let (v, at) = (&qkv[s.parts(g)[2]..], 2 * e * g);
                gemm(l, 2 * e, l, 1.0, weights, l, 1, v, pixel, false, &mut y[at..], context);
                let (places, y) = (&table[2 * e..], &mut y[context / 2 + at..]);
                gemm(l, 2 * e, offsets, 1.0, by_offset, offsets, 1, places, row, false, y, context);
            }
        });
    });
}

/// A row's softmax, in place.
#[inline(always)]
fn normalise(row: &mut [f32]) {
    let max = row_max(row);
    row.iter_mut().for_each(|v| *v = exp(*v - max));
    let scale = 1.0 / sum_by(row.len(), |i| row[i]);
    row.iter_mut().for_each(|v| *v *= scale);
}

/// `qkv, table, weights, dy -> dlogits`.
pub(crate) fn context_bwd(a: &CpuArgs<'_>) {
    let s = Sizes::new(a.params());
    let Sizes { l, offsets, heads, e, pixel, row, context } = s;
    let (qkv, table, weights, dy) = (a.f32(0), a.f32(1), a.f32(2), a.f32(3));
    let images = qkv.par_chunks(l * pixel).zip(weights.par_chunks(heads * l * l));
    let images = images.zip(dy.par_chunks(l * context));
    let out = a.f32_mut(4).par_chunks_mut(l * l * 3 * heads);
    out.zip(images).for_each(|(dlogits, ((qkv, weights), dy))| {
        with_scratch(l * l + l * offsets + 2 * e * offsets, |scratch| {
            let (pairs, scratch) = scratch.split_at_mut(l * l);
            let (by_offset, flipped) = scratch.split_at_mut(l * offsets);
            for (g, weights) in weights.chunks_exact(l * l).enumerate() {
                let (v, at) = (&qkv[s.parts(g)[2]..], 2 * e * g);
                transpose(v, l, 2 * e, pixel, flipped);
                gemm(l, l, 2 * e, 1.0, &dy[at..], context, 1, flipped, l, false, pairs, l);
                transpose(&table[2 * e..], offsets, 2 * e, row, flipped);
                let (dy, by) = (&dy[context / 2 + at..], &mut *by_offset);
                gemm(l, offsets, 2 * e, 1.0, dy, context, 1, flipped, offsets, false, by, offsets);
                for i in 0..l {
                    let (weights, dweights) = (&weights[i * l..][..l], &mut pairs[i * l..][..l]);
                    for (j, d) in dweights.iter_mut().enumerate() {
                        *d += by_offset[s.at(i, j)];
                    }
                    let mean = vectorise!(|| sum_by(l, |j| weights[j] * dweights[j]));
                    for (j, (w, d)) in weights.iter().zip(&*dweights).enumerate() {
                        let at = (i * l + j) * 3 * heads + g;
                        let d = w * (d - mean);
                        (dlogits[at], dlogits[at + heads], dlogits[at + 2 * heads]) = (d, d, d);
                    }
                }
            }
        });
    });
}

/// `weights, dy -> dqkv, dtables`; zeros for queries and keys.
pub(crate) fn context_bwd_values(a: &CpuArgs<'_>) {
    let s = Sizes::new(a.params());
    let Sizes { l, offsets, heads, e, pixel, row, context } = s;
    let (weights, dy) = (a.f32(0), a.f32(1));
    let out =
        a.f32_mut(2).par_chunks_mut(l * pixel).zip(a.f32_mut(3).par_chunks_mut(offsets * row));
    let images = weights.par_chunks(heads * l * l).zip(dy.par_chunks(l * context));
    out.zip(images).for_each(|((dqkv, dtable), (weights, dy))| {
        dqkv.fill(0.0);
        dtable.fill(0.0);
        with_scratch(l * offsets, |by_offset| {
            by_offset.fill(0.0);
            for (g, weights) in weights.chunks_exact(l * l).enumerate() {
                for (i, weights) in weights.chunks_exact(l).enumerate() {
                    for (j, &weight) in weights.iter().enumerate() {
                        by_offset[s.at(i, j)] = weight;
                    }
                }
                let (dy, dv) = (&dy[2 * e * g..], &mut dqkv[s.parts(g)[2]..]);
                gemm(l, 2 * e, l, 1.0, weights, 1, l, dy, context, false, dv, pixel);
                let (dy, places) = (&dy[context / 2..], &mut dtable[2 * e..]);
                gemm(offsets, 2 * e, l, 1.0, by_offset, 1, offsets, dy, context, true, places, row);
            }
        });
    });
}
