//! Forward and input gradient.
//!
//! **Forward** is an indirect matrix product: rows of A are output pixels, columns of B output channels. The input
//! rows a task needs are copied, with their zero border, into the thread's scratch (they then sit in its L2 cache);
//! there, the `kw * C` numbers under a row of the kernel are contiguous, so a pixel's row of A is `kh` runs and no
//! im2col is made. The weight is packed once per call into panels `[kh * kw * C][16]`.
//!
//! **Input gradient**: pixels of dx with equal remainder modulo the stride form a phase; each is a plain stride-1
//! correlation of dy with the flipped taps that hit it, so the forward's code does it, for any stride.

use super::Dims;
use super::ends::{End, Sums};
use crate::cpu::gemm::{COLS, ROWS, Sum, tile, tile_narrow};
use crate::cpu::pack::pack_rows;
use crate::cpu::threads::{SharedMut, with_scratch};
use crate::ops::conv2d::Conv2dParams;
use rayon::prelude::*;

/// y[n,p,q,o] = end(sum over r,s,c of x[n, p*stride+r-pad, q*stride+s-pad, c] * w[o,r,s,c]).
pub(super) fn forward(params: &Conv2dParams, x: &[f32], w: &[f32], end: End<'_>, y: &mut [f32]) {
    let d = Dims::new(params);
    let depth = d.kh * d.kw * d.c;
    with_scratch(d.o.div_ceil(COLS) * depth * COLS, |packed| {
        packed.par_chunks_exact_mut((depth * COLS).max(1)).enumerate().for_each(|(j, panel)| {
            let rows = COLS.min(d.o - j * COLS);
            pack_rows(&w[j * COLS * depth..], depth, (rows, depth), 1.0, panel);
        });
        forward_job(&d).run(x, packed, end, y);
    });
}

fn forward_job(d: &Dims) -> Correlation {
    let job = Correlation {
        images: d.n,
        input: (d.h, d.w, d.c),
        taps: (d.kh, d.kw),
        step: d.stride,
        origin: (-(d.pad.0 as isize), -(d.pad.1 as isize)),
        output: (d.p, d.q, d.o),
        y_start: 0,
        y_strides: (d.p * d.q * d.o, d.q * d.o, d.o),
    };
    job.flattened(d.pointwise())
}

/// Output pixels of a band of the forward, whose statistics are one part of [`End::Stats`]; the last band may have fewer.
pub(super) fn band_pixels(params: &Conv2dParams) -> usize {
    let job = forward_job(&Dims::new(params));
    job.band() * job.output.1
}

/// dx[n,h,w,c] = sum over the r,s,p,q with h = p*stride+r-pad (and the same in width) and o of dy[n,p,q,o] *
/// w[o,r,s,c].
pub(super) fn input_gradient(params: &Conv2dParams, dy: &[f32], w: &[f32], dx: &mut [f32]) {
    let d = Dims::new(params);
    if d.kh < d.stride.0 || d.kw < d.stride.1 {
        dx.fill(0.0); // phases that no tap hits
    }
    for row in 0..d.stride.0.min(d.h) {
        for col in 0..d.stride.1.min(d.w) {
            let (v, u) = (
                Phase::new(row, d.stride.0, d.pad.0, d.kh, d.h),
                Phase::new(col, d.stride.1, d.pad.1, d.kw, d.w),
            );
            let depth = v.taps * u.taps * d.o;
            if depth == 0 {
                continue;
            }
            let job = Correlation {
                images: d.n,
                input: (d.p, d.q, d.o),
                taps: (v.taps, u.taps),
                step: (1, 1),
                origin: (v.origin, u.origin),
                output: (v.len, u.len, d.c),
                y_start: (row * d.w + col) * d.c,
                y_strides: (d.h * d.w * d.c, d.stride.0 * d.w * d.c, d.stride.1 * d.c),
            };
            with_scratch(d.c.div_ceil(COLS) * depth * COLS, |packed| {
                packed
                    .par_chunks_exact_mut(depth * COLS)
                    .enumerate()
                    .for_each(|(j, panel)| pack_flipped(&d, w, &v, &u, j * COLS, panel));
                job.flattened(d.pointwise()).run(dy, packed, End::Bias(None), dx);
            });
        }
    }
}

/// One axis of a phase of the input gradient: pixels `remainder`, `remainder + stride`, ... of dx.
struct Phase {
    /// The taps that hit the phase: `first`, `first + stride`, ...
    first: usize,
    taps: usize,
    /// Pixels of dx in the phase.
    len: usize,
    /// The pixel of dy under the last tap for the phase's first pixel of dx; the flipped kernel starts there.
    origin: isize,
    stride: usize,
}

impl Phase {
    fn new(remainder: usize, stride: usize, pad: usize, kernel: usize, size: usize) -> Self {
        let first = (remainder + pad) % stride;
        let taps = kernel.saturating_sub(first).div_ceil(stride);
        let origin = ((remainder + pad) / stride) as isize - taps as isize + 1;
        Phase { first, taps, len: (size - remainder).div_ceil(stride), origin, stride }
    }

    /// Kernel position of the i-th flipped tap.
    fn tap(&self, i: usize) -> usize {
        self.first + self.stride * (self.taps - 1 - i)
    }
}

/// panel[(i, j, o)][0..16] = w[o, tap i, tap j, first_channel + 0..16].
fn pack_flipped(d: &Dims, w: &[f32], v: &Phase, u: &Phase, channel: usize, panel: &mut [f32]) {
    let cols = COLS.min(d.c - channel);
    let mut rows = panel.chunks_exact_mut(COLS);
    for i in 0..v.taps {
        for j in 0..u.taps {
            let from = (v.tap(i) * d.kw + u.tap(j)) * d.c + channel;
            for (o, row) in (0..d.o).zip(&mut rows) {
                row[..cols].copy_from_slice(&w[o * d.kh * d.kw * d.c + from..][..cols]);
                row[cols..].fill(0.0);
            }
        }
    }
}

/// A correlation of an image with packed weights: the product that both forward and input gradient are made of.
#[derive(Clone, Copy)]
struct Correlation {
    images: usize,
    /// Rows, columns, channels of the input.
    input: (usize, usize, usize),
    taps: (usize, usize),
    /// Input pixels from an output pixel to the next.
    step: (usize, usize),
    /// The input pixel under tap (0, 0) for output pixel (0, 0); negative in the border.
    origin: (isize, isize),
    /// Rows, columns, channels of what is computed.
    output: (usize, usize, usize),
    /// Where output pixel (0, 0) of image 0 lies in y, and how far apart images, rows and columns are.
    y_start: usize,
    y_strides: (usize, usize, usize),
}

/// Floats of padded input a task aims at: 256 KiB, half of a small L2 cache.
const BAND: usize = 64 * 1024;

impl Correlation {
    /// A pointwise convolution does not care where a pixel lies: one column of pixels cuts into bands best.
    fn flattened(mut self, pointwise: bool) -> Self {
        if pointwise {
            let (h, w, c) = self.input;
            self.input = (self.images * h * w, 1, c);
            self.output = (self.input.0, 1, self.output.2);
            self.y_strides = (self.input.0 * self.output.2, self.output.2, self.output.2);
            self.images = 1;
        }
        self
    }

    /// Input columns under a row of outputs.
    fn width(&self) -> usize {
        (self.output.1 - 1) * self.step.1 + self.taps.1
    }

    /// Input rows under `rows` rows of outputs.
    fn height(&self, rows: usize) -> usize {
        (rows - 1) * self.step.0 + self.taps.0
    }

    /// Whether all taps of all outputs lie inside the input, so that it can be read in place.
    fn inside(&self) -> bool {
        let fits = |origin: isize, extent: usize, size: usize| {
            origin >= 0 && origin as usize + extent <= size
        };
        fits(self.origin.0, self.height(self.output.0), self.input.0)
            && fits(self.origin.1, self.width(), self.input.1)
    }

    /// Rows of outputs (counted through all images) of a band.
    fn band(&self) -> usize {
        let rows = (self.images * self.output.0).max(1);
        (BAND / (self.step.0 * self.width() * self.input.2).max(1)).clamp(1, rows)
    }

    fn run(&self, x: &[f32], packed: &[f32], end: End<'_>, y: &mut [f32]) {
        if y.is_empty() || packed.is_empty() {
            return y.fill(0.0);
        }
        let rows = self.images * self.output.0;
        let panels = self.output.2.div_ceil(COLS);
        // Bands of whole output rows; where they are too few to go round, tasks share a band and take some of the
        // panels each.
        let band = self.band();
        let bands = rows.div_ceil(band);
        let groups = (4 * rayon::current_num_threads()).div_ceil(bands).min(panels);
        let group = panels.div_ceil(groups);
        let y = SharedMut::new(y);
        (0..bands * groups).into_par_iter().with_max_len(1).for_each(|task| {
            let (band_index, first) = (task / groups, task % groups * group);
            let rows = band_index * band..rows.min((band_index + 1) * band);
            let out = Output { y, end, band: band_index };
            self.task(rows, first..panels.min(first + group), x, packed, &out);
        });
    }

    /// The output rows `rows` (counted through all images), for the channels of `panels`.
    fn task(
        &self,
        rows: std::ops::Range<usize>,
        panels: std::ops::Range<usize>,
        x: &[f32],
        packed: &[f32],
        out: &Output<'_>,
    ) {
        let mut at = Offsets::default();
        if self.inside() {
            let image_rows = self.input.0;
            self.each_image(rows, |image, from, to| {
                let start = image * image_rows + self.origin.0 as usize + from * self.step.0;
                self.offsets(
                    image,
                    from,
                    to,
                    (start * self.input.1 + self.origin.1 as usize) * self.input.2,
                    self.input.1,
                    &mut at,
                );
            });
            self.product(&at, self.input.1, panels, x, packed, out);
        } else {
            let (width, c) = (self.width(), self.input.2);
            let mut height = 0;
            self.each_image(rows.clone(), |_, from, to| height += self.height(to - from));
            with_scratch(height * width * c, |padded| {
                let mut start = 0;
                self.each_image(rows, |image, from, to| {
                    let height = self.height(to - from);
                    self.copy_padded(
                        image,
                        from,
                        x,
                        &mut padded[start * width * c..(start + height) * width * c],
                    );
                    self.offsets(image, from, to, start * width * c, width, &mut at);
                    start += height;
                });
                self.product(&at, width, panels, padded, packed, out);
            });
        }
    }

    /// Cuts a range of output rows at the borders of images: `f(image, first row, end row)`.
    fn each_image(&self, rows: std::ops::Range<usize>, mut f: impl FnMut(usize, usize, usize)) {
        let height = self.output.0;
        let mut row = rows.start;
        while row < rows.end {
            let image = row / height;
            let end = rows.end.min((image + 1) * height);
            f(image, row - image * height, end - image * height);
            row = end;
        }
    }

    /// Copies the input under output rows from `first` on, zeros where the border is, until `padded` is full.
    fn copy_padded(&self, image: usize, first: usize, x: &[f32], padded: &mut [f32]) {
        let (height, width, c) = self.input;
        let left = (-self.origin.1).clamp(0, self.width() as isize) as usize;
        let skip = self.origin.1.max(0) as usize;
        let copied = width.saturating_sub(skip).min(self.width() - left);
        for (i, row) in padded.chunks_exact_mut(self.width() * c).enumerate() {
            let h = self.origin.0 + (first * self.step.0 + i) as isize;
            if h < 0 || h as usize >= height || copied == 0 {
                row.fill(0.0);
                continue;
            }
            let from = ((image * height + h as usize) * width + skip) * c;
            row[..left * c].fill(0.0);
            row[left * c..(left + copied) * c].copy_from_slice(&x[from..from + copied * c]);
            row[(left + copied) * c..].fill(0.0);
        }
    }

    /// Notes where the pixels of output rows `from..to` of an image start in the (padded) input, of which `start` is
    /// the first, and in y.
    fn offsets(
        &self,
        image: usize,
        from: usize,
        to: usize,
        start: usize,
        width: usize,
        at: &mut Offsets,
    ) {
        for p in from..to {
            for q in 0..self.output.1 {
                at.input.push(
                    start + ((p - from) * self.step.0 * width + q * self.step.1) * self.input.2,
                );
                at.output.push(
                    self.y_start
                        + image * self.y_strides.0
                        + p * self.y_strides.1
                        + q * self.y_strides.2,
                );
            }
        }
    }

    fn product(
        &self,
        at: &Offsets,
        width: usize,
        panels: std::ops::Range<usize>,
        x: &[f32],
        packed: &[f32],
        out: &Output<'_>,
    ) {
        let (c, o) = (self.input.2, self.output.2);
        let bias = if let End::Bias(bias) = out.end { bias } else { None };
        let sum = Sum {
            k: self.taps.1 * c,
            a_k: 1,
            segments: self.taps.0,
            a_segment: width * c,
            b_row: COLS,
            alpha: 1.0,
            accumulate: bias.is_some(),
        };
        let depth = self.taps.0 * sum.k;
        for j in panels {
            let panel = &packed[j * depth * COLS..(j + 1) * depth * COLS];
            let (first, cols) = (j * COLS, COLS.min(o - j * COLS));
            let mut sums = Sums::default();
            for (a_rows, y_rows) in at.input.chunks(ROWS).zip(at.output.chunks(ROWS)) {
                let rows = a_rows.len();
                if let Some(bias) = bias {
                    for &row in y_rows {
                        // SAFETY: these channels of these pixels belong to this task alone.
                        unsafe { out.y.slice(row + first, cols) }
                            .copy_from_slice(&bias[first..first + cols]);
                    }
                }
                let (a, b, y) = (x.as_ptr(), panel.as_ptr(), out.y.ptr().wrapping_add(first));
                // SAFETY: the offsets lie in x and y by construction (`task`), the last tap of the last pixel ends
                // inside x, the panel holds `depth` rows of 16, and no other task has these pixels and channels.
                unsafe {
                    if cols == COLS {
                        tile(&sum, rows, a, a_rows, b, y, y_rows);
                    } else {
                        tile_narrow(&sum, rows, cols, a, a_rows, b, y, y_rows);
                    }
                }
                if matches!(out.end, End::Bias(_)) {
                    continue;
                }
                let mut tile: [&mut [f32]; ROWS] = Default::default();
                for (row, offset) in tile.iter_mut().zip(y_rows) {
                    // SAFETY: as above.
                    *row = unsafe { out.y.slice(offset + first, cols) };
                }
                match out.end {
                    End::Stats(_) => sums.add(&mut tile[..rows]),
                    End::Norm(norm) => norm.apply(first, y_rows, &mut tile[..rows]),
                    End::Bias(_) => {}
                }
            }
            if let End::Stats(parts) = out.end {
                let (at, pixels) = (2 * out.band * o + first, at.output.len());
                // SAFETY: the statistics of these channels of this band belong to this task alone.
                let (mean, m2) = unsafe { (parts.slice(at, cols), parts.slice(at + o, cols)) };
                sums.finish(pixels, mean, m2);
            }
        }
    }
}

/// What a task writes, and how it ends.
struct Output<'a> {
    y: SharedMut<'a>,
    end: End<'a>,
    /// Which band of output rows.
    band: usize,
}

/// Where the pixels of a task start, in the input and in the output.
#[derive(Default)]
struct Offsets {
    input: Vec<usize>,
    output: Vec<usize>,
}
