//! Depthwise convolution on the CPU, NHWC: forward, and the gradients of input and weight. Every channel has a kernel of its own, so
//! the vector lanes are channels. `tiles.rs` has forward and input gradient of the kernels that networks use, `weight.rs` their
//! weight gradient, `any.rs` all three for every other size and step.
//!
//! Each output element is summed by one thread in an order that depends on the shape alone: results are the same for any number of
//! threads.
//!
//! What it took (EPYC Zen 3, two threads, N = 8): the weight gradient with sums in registers for a tile and not in memory for a pixel (480
//! channels, 14x14, 5x5, one thread: 2.4 ms to 1.0); its tasks by rows on large maps, since half of the channels of a row at a time read
//! memory at 4 GB/s (144 channels, 56x56, 3x3, one thread: 10.3 ms, two threads by rows: 4.6); rows fetched ahead there (the same: 2.6),
//! which costs up to a fifth where the image is in the cache. Copying rows with their border would be a load and a store for nine products:
//! tiles at the border leave out what lies outside instead. What is left on large maps is memory: 3x3 on 112x112 and 56x56 moves its bytes
//! at 40 to 70 % of the copy rate.

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
