//! Depthwise convolution on the CPU, NHWC: forward, and the gradients of input and weight. Every channel has a kernel of its own, so
//! the vector lanes are channels. `tiles.rs` has forward and input gradient of the kernels that networks use, `weight.rs` their
//! weight gradient, `any.rs` all three for every other size and step.
//!
//! Each output element is summed by one thread in an order that depends on the shape alone: results are the same for any number of
//! threads.
//!
//! Measured, N = 8, ms of forward and both gradients on two threads (EPYC Zen 3; `attn2d bench ops --filter depthwise`, mean of the medians of
//! two runs), beside PyTorch 2.13 in the same minutes (`benches/peers/torch_bench.py`: the best of NCHW and channels_last, each also with
//! freed memory kept); when the weight gradient took one row of taps at a time:
//!
//! | channels x map | ours | PyTorch | | channels x map | ours | PyTorch |
//! |---|---|---|---|---|---|---|
//! | 3x3, 32x112 | 3.26 | 4.84 | | 3x3, 480x14 | 0.72 | 0.96 |
//! | 3x3 / 2, 96x112 | 9.21 | 8.32 | | 5x5, 480x14 | 1.55 | 4.78 |
//! | 3x3, 144x56 | 6.70 | 7.48 | | 5x5, 672x14 | 2.10 | 7.09 |
//! | 5x5 / 2, 144x56 | 4.32 | 8.53 | | 5x5 / 2, 672x14 | 0.71 | 2.62 |
//! | 5x5, 240x28 | 3.26 | 9.74 | | 5x5, 1152x7 | 0.82 | 3.58 |
//! | 3x3 / 2, 240x28 | 0.57 | 0.83 | | 3x3, 1152x7 | 0.45 | 0.75 |
//!
//! What it took: the weight gradient with sums in registers for a tile and not in memory for a pixel (480x14, 5x5, one thread: 2.4 ms to
//! 1.0); its tasks by rows on large maps, which read memory in one go; rows fetched ahead there (144x56, 3x3, two threads: 4.6 ms to
//! 2.4), which costs up to a fifth where the image is in the cache. Tiles at the border leave out what lies outside: copying rows with
//! their border would be a load and a store for nine products. What is left on large maps is memory. Stores past the caches, which should
//! have saved the read of what they overwrite, made the passes over large maps 1.2 to 1.5 times slower here, and those of batch norm 1.2 to 1.3
//! times: ordinary ones are kept.

mod any;
mod tiles;
mod weight;

use super::conv2d::Dims;
use super::threads::with_scratch;
use crate::kernel::CpuArgs;
use crate::ops::conv2d::Conv2dParams;

/// x, w, bias -> y.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: Conv2dParams = a.params();
    let bias = (p.bias == 1).then(|| a.f32(2));
    forward(&Dims::new(&p), a.f32(0), a.f32(1), bias, a.f32_mut(3));
}

/// dy, w -> dx.
pub(crate) fn dgrad(a: &CpuArgs<'_>) {
    input_gradient(&Dims::new(&a.params()), a.f32(0), a.f32(1), a.f32_mut(2));
}

/// x, dy -> dw: needs no parts.
pub(crate) fn wgrad(a: &CpuArgs<'_>) {
    weight_gradient(&Dims::new(&a.params()), a.f32(0), a.f32(1), a.f32_mut(2));
}

fn forward(d: &Dims, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    with_scratch(w.len(), |taps| {
        transpose(w, d.c, taps);
        let work = if tiles::fit(d) { tiles::forward } else { any::forward };
        work(d, x, taps, bias, y);
    });
}

fn input_gradient(d: &Dims, dy: &[f32], w: &[f32], dx: &mut [f32]) {
    with_scratch(w.len(), |taps| {
        transpose(w, d.c, taps);
        if tiles::fit(d) {
            taps.chunks_exact_mut(d.kw * d.c).for_each(|row| turn_round(row, d.c));
            tiles::input_gradient(d, dy, taps, dx);
        } else {
            any::input_gradient(d, dy, taps, dx);
        }
    });
}

fn weight_gradient(d: &Dims, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    if tiles::fit(d) {
        return weight::gradient(d, x, dy, dw);
    }
    let block = block_rows(d);
    let parts = (d.n * d.p).div_ceil(block);
    with_scratch(dw.len() * (parts + 1), |scratch| {
        let (sum, parts) = scratch.split_at_mut(dw.len());
        any::weight_parts(d, block, x, dy, parts);
        sum.fill(0.0);
        for part in parts.chunks_exact(sum.len()) {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        transpose(sum, d.kh * d.kw, dw);
    });
}

/// Output rows (counted through all images) that one part of the weight gradient sums over: as many as keep the parts few, and no
/// more than keep a sum accurate.
fn block_rows(d: &Dims) -> usize {
    const PARTS: usize = 16;
    const LONGEST: usize = 4096;
    (d.n * d.p).div_ceil(PARTS).min(LONGEST / d.q).max(1)
}

/// out[column][row] = rows[row][column], `rows` of them.
fn transpose(from: &[f32], rows: usize, to: &mut [f32]) {
    let columns = from.len() / rows;
    for (column, to) in to.chunks_exact_mut(rows).enumerate() {
        for (row, to) in to.iter_mut().enumerate() {
            *to = from[row * columns + column];
        }
    }
}

/// The pixels of a row, `c` numbers each, in the opposite order.
fn turn_round(row: &mut [f32], c: usize) {
    let pixels = row.len() / c;
    for i in 0..pixels / 2 {
        let (left, right) = row.split_at_mut((pixels - 1 - i) * c);
        left[i * c..][..c].swap_with_slice(&mut right[..c]);
    }
}

#[cfg(test)]
mod tests;
