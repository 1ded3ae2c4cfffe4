//! CPU kernels of [`crate::ops::grouped`]: convolutions by groups, any number of channels and outputs a group. Plain loops over the
//! contiguous channels of a group; sums in an order that depends on the shape alone.

use super::conv2d::Dims;
use super::rows;
use super::threads::with_scratch;
use crate::kernel::CpuArgs;
use crate::ops::conv2d::Conv2dParams;
use std::ops::Range;

/// x, w, bias -> y.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: Conv2dParams = a.params();
    let bias = (p.bias == 1).then(|| a.f32(2));
    forward(&Group::new(&p), a.f32(0), a.f32(1), bias, a.f32_mut(3));
}

/// dy, w -> dx.
pub(crate) fn dgrad(a: &CpuArgs<'_>) {
    input_gradient(&Group::new(&a.params()), a.f32(0), a.f32(1), a.f32_mut(2));
}

/// x, dy -> dw: needs no parts.
pub(crate) fn wgrad(a: &CpuArgs<'_>) {
    weight_gradient(&Group::new(&a.params()), a.f32(0), a.f32(1), a.f32_mut(2));
}

/// A convolution by groups: its sizes, and channels and outputs of a group.
struct Group {
    d: Dims,
    channels: usize,
    outputs: usize,
}

impl Group {
    fn new(p: &Conv2dParams) -> Self {
        let (d, groups) = (Dims::new(p), p.groups as usize);
        Self { d, channels: d.c / groups, outputs: d.o / groups }
    }

    /// The first channel that output o sees.
    #[inline(always)]
    fn first_channel(&self, o: usize) -> usize {
        o / self.outputs * self.channels
    }
}

/// The taps of a kernel of `kernel`, for output `out`, that fall on `0..size`; tap t falls on `out * stride + t - pad`.
#[inline(always)]
pub(super) fn taps(
    out: usize,
    stride: usize,
    pad: usize,
    kernel: usize,
    size: usize,
) -> Range<usize> {
    let start = out * stride;
    pad.saturating_sub(start)..kernel.min((size + pad).saturating_sub(start))
}

/// The outputs, of `outs`, one of whose taps falls on input `at`.
#[inline(always)]
pub(super) fn covering(
    at: usize,
    stride: usize,
    pad: usize,
    kernel: usize,
    outs: usize,
) -> Range<usize> {
    let end = at + pad;
    (end + 1).saturating_sub(kernel).div_ceil(stride)..(end / stride + 1).min(outs)
}

fn forward(g: &Group, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let d = &g.d;
    let row = d.q * d.o;
    rows::each!(y, row, x.len(), |number, y| {
        let (image, p) = (number / d.p, number % d.p);
        let image = &x[image * d.h * d.w * d.c..][..d.h * d.w * d.c];
        let kernel_rows = taps(p, d.stride.0, d.pad.0, d.kh, d.h);
        for (q, y) in y.chunks_exact_mut(d.o).enumerate() {
            let columns = taps(q, d.stride.1, d.pad.1, d.kw, d.w);
            for (o, y) in y.iter_mut().enumerate() {
                let mut sum = bias.map_or(0.0, |b| b[o]);
                for r in kernel_rows.clone() {
                    for s in columns.clone() {
                        let (h, v) = (p * d.stride.0 + r - d.pad.0, q * d.stride.1 + s - d.pad.1);
                        let x = &image[(h * d.w + v) * d.c + g.first_channel(o)..][..g.channels];
                        let w = &w[((o * d.kh + r) * d.kw + s) * g.channels..][..g.channels];
                        for (x, w) in x.iter().zip(w) {
                            sum += x * w;
                        }
                    }
                }
                *y = sum;
            }
        }
    });
}

fn input_gradient(g: &Group, dy: &[f32], w: &[f32], dx: &mut [f32]) {
    let d = &g.d;
    let size = dx.len();
    rows::each!(dx, d.w * d.c, size, |number, dx| {
        let (image, h) = (number / d.h, number % d.h);
        let rows = covering(h, d.stride.0, d.pad.0, d.kh, d.p);
        dx.fill(0.0);
        for (v, dx) in dx.chunks_exact_mut(d.c).enumerate() {
            let columns = covering(v, d.stride.1, d.pad.1, d.kw, d.q);
            for p in rows.clone() {
                for q in columns.clone() {
                    let (r, s) = (h + d.pad.0 - p * d.stride.0, v + d.pad.1 - q * d.stride.1);
                    let dy = &dy[((image * d.p + p) * d.q + q) * d.o..][..d.o];
                    for (o, dy) in dy.iter().enumerate() {
                        let w = &w[((o * d.kh + r) * d.kw + s) * g.channels..][..g.channels];
                        let dx = &mut dx[g.first_channel(o)..][..g.channels];
                        for (dx, w) in dx.iter_mut().zip(w) {
                            *dx += dy * w;
                        }
                    }
                }
            }
        }
    });
}

/// A task has the weights of one group. The sum over a row of pixels is added to those before, which keeps the error of long sums small.
fn weight_gradient(g: &Group, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let d = &g.d;
    let len = g.outputs * d.kh * d.kw * g.channels;
    rows::each!(dw, len, x.len() + dy.len(), |group, dw| {
        dw.fill(0.0);
        with_scratch(len, |sum| {
            for row in 0..d.n * d.p {
                sum.fill(0.0);
                add_row(g, group, row, x, dy, sum);
                dw.iter_mut().zip(sum.iter()).for_each(|(dw, sum)| *dw += sum);
            }
        });
    });
}

/// What the pixels of an output row (counted through all images) give to the weights of a group.
#[inline(always)]
fn add_row(g: &Group, group: usize, row: usize, x: &[f32], dy: &[f32], sum: &mut [f32]) {
    let d = &g.d;
    let (image, p) = (row / d.p, row % d.p);
    for q in 0..d.q {
        let dy = &dy[(row * d.q + q) * d.o + group * g.outputs..][..g.outputs];
        for r in taps(p, d.stride.0, d.pad.0, d.kh, d.h) {
            for s in taps(q, d.stride.1, d.pad.1, d.kw, d.w) {
                let (h, v) = (p * d.stride.0 + r - d.pad.0, q * d.stride.1 + s - d.pad.1);
                let from = ((image * d.h + h) * d.w + v) * d.c + group * g.channels;
                let x = &x[from..][..g.channels];
                for (o, dy) in dy.iter().enumerate() {
                    let sum = &mut sum[((o * d.kh + r) * d.kw + s) * g.channels..][..g.channels];
                    for (sum, x) in sum.iter_mut().zip(x) {
                        *sum += dy * x;
                    }
                }
            }
        }
    }
}
