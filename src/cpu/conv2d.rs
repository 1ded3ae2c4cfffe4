//! 2D convolution on the CPU, NHWC: forward, and the gradients of input, weight and bias.
//!
//! **Forward** is an indirect matrix product: rows of A are output pixels, columns of B output channels. The input rows a task needs are copied, with their zero
//! border, into the thread's scratch (they then sit in its L2 cache); there, the `kw * C` numbers under a row of the kernel are contiguous, so a pixel's row of A is
//! `kh` runs and no im2col is made. The weight is packed once per call into panels `[kh * kw * C][16]`.
//!
//! **Input gradient**: pixels of dx with equal remainder modulo the stride form a phase; each is a plain stride-1 correlation of dy with the flipped taps that hit
//! it, so the forward's code does it, for any stride.
//!
//! **Weight gradient**: dW[o, tap, c] = sum over pixels of dy[pixel, o] * x[pixel under tap, c]: a matrix product with the pixels as inner dimension, summed in blocks
//! of fixed size in fixed order.
//!
//! Each output element is summed by one thread in an order that depends on the shape alone: results are the same for any number of threads.

use rayon::prelude::*;

use super::gemm::{COLS, ROWS, Sum, tile, tile_narrow};
use super::simd::fast;
use super::threads::{SharedMut, with_scratch};

/// Shape of a convolution; the parameter block of all its kernels. All counts are elements or pixels.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Conv2dParams {
    /// Images.
    pub n: u32,
    /// Input rows.
    pub h: u32,
    /// Input columns.
    pub w: u32,
    /// Input channels.
    pub c: u32,
    /// Output channels.
    pub o: u32,
    /// Kernel rows.
    pub kh: u32,
    /// Kernel columns.
    pub kw: u32,
    /// Output rows.
    pub p: u32,
    /// Output columns.
    pub q: u32,
    /// Vertical stride.
    pub stride_h: u32,
    /// Horizontal stride.
    pub stride_w: u32,
    /// Rows of zeros above (and below).
    pub pad_h: u32,
    /// Columns of zeros left (and right).
    pub pad_w: u32,
    /// 1 where there is a bias.
    pub bias: u32,
}

/// [`Conv2dParams`] as `usize`.
#[derive(Clone, Copy)]
struct Dims {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    o: usize,
    kh: usize,
    kw: usize,
    p: usize,
    q: usize,
    stride: (usize, usize),
    pad: (usize, usize),
}

impl Dims {
    fn new(s: &Conv2dParams) -> Self {
        let u = |v: u32| v as usize;
        Dims {
            n: u(s.n),
            h: u(s.h),
            w: u(s.w),
            c: u(s.c),
            o: u(s.o),
            kh: u(s.kh),
            kw: u(s.kw),
            p: u(s.p),
            q: u(s.q),
            stride: (u(s.stride_h), u(s.stride_w)),
            pad: (u(s.pad_h), u(s.pad_w)),
        }
    }

    /// 1x1, stride 1, no border: every pixel for itself, wherever it lies in the image.
    fn pointwise(&self) -> bool {
        (self.kh, self.kw, self.stride, self.pad) == (1, 1, (1, 1), (0, 0))
    }
}

/// y[n,p,q,o] = bias[o] + sum over r,s,c of x[n, p*stride+r-pad, q*stride+s-pad, c] * w[o,r,s,c].
pub(crate) fn forward(
    params: &Conv2dParams,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let d = Dims::new(params);
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
    let depth = d.kh * d.kw * d.c;
    with_scratch(d.o.div_ceil(COLS) * depth * COLS, |packed| {
        packed
            .par_chunks_exact_mut((depth * COLS).max(1))
            .enumerate()
            .for_each(|(j, panel)| pack_rows(w, depth, j * COLS, d.o, panel));
        job.flattened(d.pointwise()).run(x, packed, bias, y);
    });
}

/// panel[k][0..16] = w[first + 0..16][k], zeros past the last row.
fn pack_rows(w: &[f32], depth: usize, first: usize, rows: usize, panel: &mut [f32]) {
    let cols = COLS.min(rows - first);
    if cols < COLS {
        panel.fill(0.0);
    }
    // Blocks of 16 columns keep a cache line of each row and the lines written in L1.
    for k0 in (0..depth).step_by(16) {
        let len = 16.min(depth - k0);
        for j in 0..cols {
            let row = &w[(first + j) * depth + k0..][..len];
            for (i, &v) in row.iter().enumerate() {
                panel[(k0 + i) * COLS + j] = v;
            }
        }
    }
}

/// dx[n,h,w,c] = sum over the r,s,p,q with h = p*stride+r-pad (and the same in width) and o of dy[n,p,q,o] * w[o,r,s,c].
pub(crate) fn input_gradient(params: &Conv2dParams, dy: &[f32], w: &[f32], dx: &mut [f32]) {
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
                job.flattened(d.pointwise()).run(dy, packed, None, dx);
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

    fn run(&self, x: &[f32], packed: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
        if y.is_empty() || packed.is_empty() {
            return y.fill(0.0);
        }
        let rows = self.images * self.output.0;
        let panels = self.output.2.div_ceil(COLS);
        // Bands of whole output rows; where they are too few to go round, tasks share a band and take some of the panels each.
        let band = (BAND / (self.step.0 * self.width() * self.input.2)).clamp(1, rows);
        let bands = rows.div_ceil(band);
        let groups = (4 * rayon::current_num_threads()).div_ceil(bands).min(panels);
        let group = panels.div_ceil(groups);
        let y = SharedMut::new(y);
        (0..bands * groups).into_par_iter().with_max_len(1).for_each(|task| {
            let (band_index, first) = (task / groups, task % groups * group);
            let rows = band_index * band..rows.min((band_index + 1) * band);
            self.task(rows, first..panels.min(first + group), x, packed, bias, y);
        });
    }

    /// The output rows `rows` (counted through all images), for the channels of `panels`.
    fn task(
        &self,
        rows: std::ops::Range<usize>,
        panels: std::ops::Range<usize>,
        x: &[f32],
        packed: &[f32],
        bias: Option<&[f32]>,
        y: SharedMut,
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
            self.product(&at, self.input.1, panels, x, packed, bias, y);
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
                self.product(&at, width, panels, padded, packed, bias, y);
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

    /// Notes where the pixels of output rows `from..to` of an image start in the (padded) input, of which `start` is the first, and in y.
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
        bias: Option<&[f32]>,
        y: SharedMut,
    ) {
        let (c, o) = (self.input.2, self.output.2);
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
            let cols = COLS.min(o - j * COLS);
            for (a_rows, y_rows) in at.input.chunks(ROWS).zip(at.output.chunks(ROWS)) {
                let rows = a_rows.len();
                if let Some(bias) = bias {
                    for &row in y_rows {
                        // SAFETY: these channels of these pixels belong to this task alone.
                        unsafe { y.slice(row + j * COLS, cols) }
                            .copy_from_slice(&bias[j * COLS..j * COLS + cols]);
                    }
                }
                let y = y.ptr().wrapping_add(j * COLS);
                // SAFETY: the offsets lie in x and y by construction (`task`), the last tap of the last pixel ends inside x, the panel holds `depth` rows
                // of 16, and no other task has these pixels and channels.
                unsafe {
                    if cols == COLS {
                        tile(&sum, rows, x.as_ptr(), a_rows, panel.as_ptr(), y, y_rows);
                    } else {
                        tile_narrow(
                            &sum,
                            rows,
                            cols,
                            x.as_ptr(),
                            a_rows,
                            panel.as_ptr(),
                            y,
                            y_rows,
                        );
                    }
                }
            }
        }
    }
}

/// Where the pixels of a task start, in the input and in the output.
#[derive(Default)]
struct Offsets {
    input: Vec<usize>,
    output: Vec<usize>,
}

/// Pixels a block of the weight gradient sums over: 16 columns of them are 24 KiB and stay in L1.
const BLOCK: usize = 384;
/// Floats of dy packed at a time: 1 MiB.
const PACKED_DY: usize = 256 * 1024;

/// dw[o,r,s,c] = sum over n,p,q of dy[n,p,q,o] * x[n, p*stride+r-pad, q*stride+s-pad, c].
pub(crate) fn weight_gradient(params: &Conv2dParams, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let mut d = Dims::new(params);
    if d.pointwise() {
        d = Dims { n: 1, h: 1, w: d.n * d.h * d.w, p: 1, q: d.n * d.p * d.q, ..d };
    }
    let (pixels, depth) = (d.n * d.p * d.q, d.kh * d.kw * d.c);
    if pixels == 0 || dw.is_empty() {
        return dw.fill(0.0);
    }
    let tiles = d.o.div_ceil(ROWS);
    let step = (PACKED_DY / (tiles * ROWS * BLOCK)).max(1) * BLOCK;
    let dw = SharedMut::new(dw);
    for first in (0..pixels).step_by(step) {
        let blocks: Vec<_> = (first..pixels.min(first + step))
            .step_by(BLOCK)
            .map(|a| a..pixels.min(a + BLOCK))
            .collect();
        with_scratch(blocks.len() * tiles * ROWS * BLOCK, |packed| {
            let parts = packed.par_chunks_exact_mut(tiles * ROWS * BLOCK);
            parts.zip(&blocks).for_each(|(part, block)| {
                pack_dy(&dy[block.start * d.o..block.end * d.o], d.o, part)
            });
            (0..depth.div_ceil(COLS)).into_par_iter().with_max_len(1).for_each(|j| {
                with_scratch(BLOCK * COLS, |patches| {
                    for (block, part) in
                        blocks.iter().zip(packed.chunks_exact(tiles * ROWS * BLOCK))
                    {
                        pack_patches(&d, x, block.clone(), j * COLS, patches);
                        add_block(&d, block.len(), block.start > 0, j * COLS, part, patches, dw);
                    }
                });
            });
        });
    }
}

/// packed[tile][pixel][6] = dy[pixel][6 outputs of the tile].
fn pack_dy(dy: &[f32], o: usize, packed: &mut [f32]) {
    for (i, pixel) in dy.chunks_exact(o).enumerate() {
        let mut tiles = pixel.chunks_exact(ROWS);
        let mut at = i * ROWS;
        for six in &mut tiles {
            packed[at..at + ROWS].copy_from_slice(six);
            at += BLOCK * ROWS;
        }
        let rest = tiles.remainder();
        if !rest.is_empty() {
            packed[at..at + rest.len()].copy_from_slice(rest);
        }
    }
}

/// patches[pixel][0..16] = what dw's columns `first..first + 16` (counted through r, s, c) see of x at that pixel: zero in the border.
fn pack_patches(
    d: &Dims,
    x: &[f32],
    pixels: std::ops::Range<usize>,
    first: usize,
    patches: &mut [f32],
) {
    let end = (first + COLS).min(d.kh * d.kw * d.c);
    let mut column = first;
    while column < end {
        // A run of columns under one tap.
        let (tap, channel) = (column / d.c, column % d.c);
        let len = (end - column).min(d.c - channel);
        let mut pixel = pixels.start;
        while pixel < pixels.end {
            // A run of pixels in one output row.
            let (row, q) = (pixel / d.q, pixel % d.q);
            let run = (pixels.end - pixel).min(d.q - q);
            let out = &mut patches[(pixel - pixels.start) * COLS..][..run * COLS];
            pack_run(d, x, row, q, tap, channel, len, column - first, out);
            pixel += run;
        }
        column += len;
    }
}

/// Columns `column..column + len` of the patches of a run of pixels in output row `row` (counted through all images), from pixel `q` on.
fn pack_run(
    d: &Dims,
    x: &[f32],
    row: usize,
    q: usize,
    tap: usize,
    channel: usize,
    len: usize,
    column: usize,
    patches: &mut [f32],
) {
    let (image, p) = (row / d.p, row % d.p);
    let (r, s) = (tap / d.kw, tap % d.kw);
    let h = (p * d.stride.0 + r).wrapping_sub(d.pad.0);
    let run = patches.len() / COLS;
    // Pixels q.. with 0 <= q * stride + s - pad < w.
    let inside_from = d.pad.1.saturating_sub(s).div_ceil(d.stride.1).clamp(q, q + run) - q;
    let inside_to = if h < d.h {
        (d.w + d.pad.1).saturating_sub(s).div_ceil(d.stride.1).clamp(q + inside_from, q + run) - q
    } else {
        inside_from
    };
    let (before, rest) = patches.split_at_mut(inside_from * COLS);
    let (inside, after) = rest.split_at_mut((inside_to - inside_from) * COLS);
    for pixel in before.chunks_exact_mut(COLS).chain(after.chunks_exact_mut(COLS)) {
        pixel[column..column + len].fill(0.0);
    }
    if inside.is_empty() {
        return;
    }
    let from =
        ((image * d.h + h) * d.w + (q + inside_from) * d.stride.1 + s - d.pad.1) * d.c + channel;
    let pixels = inside.chunks_exact_mut(COLS).zip(x[from..].chunks(d.stride.1 * d.c));
    if len == COLS {
        for (patch, x) in pixels {
            patch.copy_from_slice(&x[..COLS]);
        }
    } else {
        for (patch, x) in pixels {
            for (a, b) in patch[column..column + len].iter_mut().zip(&x[..len]) {
                *a = *b;
            }
        }
    }
}

/// Adds one block of pixels to columns `first..first + 16` of dw (or starts them with it).
fn add_block(
    d: &Dims,
    pixels: usize,
    accumulate: bool,
    first: usize,
    dy: &[f32],
    patches: &[f32],
    dw: SharedMut,
) {
    let depth = d.kh * d.kw * d.c;
    let cols = COLS.min(depth - first);
    let sum = Sum {
        k: pixels,
        a_k: ROWS,
        segments: 1,
        a_segment: 0,
        b_row: COLS,
        alpha: 1.0,
        accumulate,
    };
    let a_rows: [usize; ROWS] = std::array::from_fn(|i| i);
    for (six, part) in dy.chunks_exact(ROWS * BLOCK).enumerate() {
        let rows = ROWS.min(d.o - six * ROWS);
        let dw_rows: [usize; ROWS] = std::array::from_fn(|i| (six * ROWS + i) * depth);
        let dw = dw.ptr().wrapping_add(first);
        // SAFETY: a part holds BLOCK pixels of 6, the patches BLOCK pixels of 16; these columns of dw belong to this task alone.
        unsafe {
            if cols == COLS {
                tile(&sum, rows, part.as_ptr(), &a_rows, patches.as_ptr(), dw, &dw_rows);
            } else {
                tile_narrow(
                    &sum,
                    rows,
                    cols,
                    part.as_ptr(),
                    &a_rows,
                    patches.as_ptr(),
                    dw,
                    &dw_rows,
                );
            }
        }
    }
}

/// db[o] = sum over all pixels of dy[pixel, o]; `o` numbers a pixel.
///
/// Each thread sums blocks of 512 pixels; the blocks' sums are added in order, which also keeps the error of long sums small.
pub(crate) fn bias_gradient(o: usize, dy: &[f32], db: &mut [f32]) {
    const PIXELS: usize = 512;
    db.fill(0.0);
    if dy.is_empty() {
        return;
    }
    let blocks = dy.len().div_ceil(PIXELS * o);
    with_scratch(blocks * o, |sums| {
        sums.par_chunks_exact_mut(o).zip(dy.par_chunks(PIXELS * o)).for_each(|(sum, block)| {
            fast(|| {
                sum.fill(0.0);
                block.chunks_exact(o).for_each(|pixel| add_to(sum, pixel));
            });
        });
        sums.chunks_exact(o).for_each(|sum| add_to(db, sum));
    });
}

#[inline(always)]
fn add_to(sum: &mut [f32], x: &[f32]) {
    for (s, v) in sum.iter_mut().zip(x) {
        *s += v;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    }

    fn params(
        x: [u32; 4],
        o: u32,
        k: (u32, u32),
        stride: (u32, u32),
        pad: (u32, u32),
    ) -> Conv2dParams {
        let [n, h, w, c] = x;
        let (p, q) = ((h + 2 * pad.0 - k.0) / stride.0 + 1, (w + 2 * pad.1 - k.1) / stride.1 + 1);
        Conv2dParams {
            n,
            h,
            w,
            c,
            o,
            kh: k.0,
            kw: k.1,
            p,
            q,
            stride_h: stride.0,
            stride_w: stride.1,
            pad_h: pad.0,
            pad_w: pad.1,
            bias: 0,
        }
    }

    /// Calls `f(output index, input index, weight index)` for every product of the convolution.
    fn every_product(d: &Conv2dParams, mut f: impl FnMut(usize, usize, usize)) {
        let d = Dims::new(d);
        for (n, p, q) in (0..d.n * d.p * d.q).map(|i| (i / (d.p * d.q), i / d.q % d.p, i % d.q)) {
            for (r, s) in (0..d.kh * d.kw).map(|i| (i / d.kw, i % d.kw)) {
                let (h, w) = (
                    (p * d.stride.0 + r).wrapping_sub(d.pad.0),
                    (q * d.stride.1 + s).wrapping_sub(d.pad.1),
                );
                if h >= d.h || w >= d.w {
                    continue;
                }
                for (o, c) in (0..d.o * d.c).map(|i| (i / d.c, i % d.c)) {
                    f(
                        ((n * d.p + p) * d.q + q) * d.o + o,
                        ((n * d.h + h) * d.w + w) * d.c + c,
                        ((o * d.kh + r) * d.kw + s) * d.c + c,
                    );
                }
            }
        }
    }

    fn close(got: &[f32], want: &[f64], what: &str) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((*g as f64 - w).abs() < 1e-4 * (1.0 + w.abs()), "{what} at {i}: {g} for {w}");
        }
    }

    fn shapes() -> Vec<Conv2dParams> {
        vec![
            params([2, 7, 9, 5], 7, (3, 3), (1, 1), (1, 1)),
            params([2, 8, 6, 16], 32, (3, 3), (1, 1), (1, 1)),
            params([3, 5, 7, 17], 33, (3, 3), (2, 2), (1, 1)),
            params([1, 23, 22, 3], 10, (7, 7), (2, 2), (3, 3)),
            params([2, 9, 8, 12], 20, (1, 1), (2, 2), (0, 0)),
            params([2, 5, 6, 20], 18, (1, 1), (1, 1), (0, 0)),
            params([1, 1, 1, 1], 1, (1, 1), (1, 1), (0, 0)),
            params([2, 1, 1, 33], 17, (3, 3), (1, 1), (1, 1)),
            params([1, 11, 6, 4], 5, (2, 5), (3, 1), (0, 2)),
            params([1, 6, 13, 2], 3, (4, 1), (1, 4), (3, 0)),
            params([2, 6, 6, 2], 3, (2, 2), (3, 3), (2, 2)),
            params([40, 7, 7, 48], 16, (3, 3), (1, 1), (0, 0)),
            params([1, 3, 2, 1], 129, (3, 2), (1, 1), (0, 0)),
        ]
    }

    #[test]
    fn all_passes_agree_with_plain_loops() {
        for d in shapes() {
            let x = numbers((d.n * d.h * d.w * d.c) as usize, 1);
            let w = numbers((d.o * d.kh * d.kw * d.c) as usize, 2);
            let dy = numbers((d.n * d.p * d.q * d.o) as usize, 3);
            let bias = numbers(d.o as usize, 4);
            let mut y: Vec<f64> = (0..dy.len()).map(|i| bias[i % bias.len()] as f64).collect();
            let (mut dx, mut dw) = (vec![0.0f64; x.len()], vec![0.0f64; w.len()]);
            every_product(&d, |iy, ix, iw| {
                y[iy] += x[ix] as f64 * w[iw] as f64;
                dx[ix] += dy[iy] as f64 * w[iw] as f64;
                dw[iw] += dy[iy] as f64 * x[ix] as f64;
            });
            let mut got = vec![f32::NAN; y.len()];
            forward(&d, &x, &w, Some(&bias), &mut got);
            close(&got, &y, &format!("y of {d:?}"));
            forward(&d, &x, &w, None, &mut got);
            for (i, v) in y.iter_mut().enumerate() {
                *v -= bias[i % bias.len()] as f64;
            }
            close(&got, &y, &format!("y without bias of {d:?}"));
            let mut got = vec![f32::NAN; x.len()];
            input_gradient(&d, &dy, &w, &mut got);
            close(&got, &dx, &format!("dx of {d:?}"));
            let mut got = vec![f32::NAN; w.len()];
            weight_gradient(&d, &x, &dy, &mut got);
            close(&got, &dw, &format!("dw of {d:?}"));
        }
    }

    #[test]
    fn bias_gradient_sums_pixels() {
        let dy = numbers(3 * 1300, 5);
        let mut db = [f32::NAN; 3];
        bias_gradient(3, &dy, &mut db);
        let want: Vec<f64> =
            (0..3).map(|o| dy.iter().skip(o).step_by(3).map(|&v| v as f64).sum()).collect();
        close(&db, &want, "db");
    }

    #[test]
    fn bits_do_not_depend_on_the_thread_count() {
        let d = params([3, 20, 21, 24], 40, (3, 3), (2, 1), (1, 1));
        let x = numbers((d.n * d.h * d.w * d.c) as usize, 1);
        let w = numbers((d.o * d.kh * d.kw * d.c) as usize, 2);
        let dy = numbers((d.n * d.p * d.q * d.o) as usize, 3);
        let all = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut dx, mut dw, mut db) = (
                    vec![0.0; dy.len()],
                    vec![0.0; x.len()],
                    vec![0.0; w.len()],
                    vec![0.0; d.o as usize],
                );
                forward(&d, &x, &w, None, &mut y);
                input_gradient(&d, &dy, &w, &mut dx);
                weight_gradient(&d, &x, &dy, &mut dw);
                bias_gradient(d.o as usize, &dy, &mut db);
                (y, dx, dw, db)
            })
        };
        assert_eq!(all(1), all(3));
    }

    /// `cargo test --lib conv2d_speed -- --nocapture` prints a table; as a test it only sees that every shape of ResNet18 runs.
    #[test]
    fn conv2d_speed() {
        for (name, d) in [
            ("64x56", params([8, 56, 56, 64], 64, (3, 3), (1, 1), (1, 1))),
            ("128x28", params([8, 28, 28, 128], 128, (3, 3), (1, 1), (1, 1))),
            ("256x14", params([8, 14, 14, 256], 256, (3, 3), (1, 1), (1, 1))),
            ("512x7", params([8, 7, 7, 512], 512, (3, 3), (1, 1), (1, 1))),
            ("stem", params([8, 224, 224, 3], 64, (7, 7), (2, 2), (3, 3))),
            ("3x3/2", params([8, 56, 56, 64], 128, (3, 3), (2, 2), (1, 1))),
            ("1x1/2", params([8, 56, 56, 64], 128, (1, 1), (2, 2), (0, 0))),
            ("1x1", params([8, 14, 14, 672], 112, (1, 1), (1, 1), (0, 0))),
        ] {
            let x = numbers((d.n * d.h * d.w * d.c) as usize, 1);
            let w = numbers((d.o * d.kh * d.kw * d.c) as usize, 2);
            let dy = numbers((d.n * d.p * d.q * d.o) as usize, 3);
            let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());
            let time = |f: &mut (dyn FnMut() + Send)| {
                rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| {
                    let cpu = || {
                        std::fs::read_to_string("/proc/thread-self/schedstat")
                            .unwrap()
                            .split(' ')
                            .next()
                            .unwrap()
                            .parse::<f64>()
                            .unwrap()
                            * 1e-6
                    };
                    (0..7)
                        .map(|_| {
                            std::thread::yield_now();
                            let t = cpu();
                            f();
                            std::thread::yield_now();
                            cpu() - t
                        })
                        .fold(f64::MAX, f64::min)
                })
            };
            let a = time(&mut || forward(&d, &x, &w, None, &mut y));
            let b = time(&mut || input_gradient(&d, &dy, &w, &mut dx));
            let c = time(&mut || weight_gradient(&d, &x, &dy, &mut dw));
            let gf = 2e-6 * dy.len() as f64 * (d.kh * d.kw * d.c) as f64;
            println!(
                "{name:8} fwd {a:6.2} ms ({:4.0} GF/s)  dx {b:6.2} ({:4.0})  dw {c:6.2} ({:4.0})  sum {:6.2}",
                gf / a,
                gf / b,
                gf / c,
                a + b + c
            );
        }
    }
}
