//! Forward and input gradient for kernels 3 or 5 wide at steps 1 and 2: tiles of up to eight neighbouring pixels of a row of the
//! output. For eight channels their sums stay in registers while the input's pixels pass by: each is loaded once for all of the
//! tile's outputs that it feeds.
//!
//! **Input gradient** at step 1 is the forward over dy with the taps of a row turned round; at step 2 it is the same walk with another
//! map from pixels to sums ([`place`]), so that no product with a zero is made.

use crate::cpu::conv2d::Dims;
use crate::cpu::grouped::{covering, taps};
use crate::cpu::lanes::{F32x8, LANES};
use rayon::prelude::*;
use std::ops::Range;

/// The most pixels of a tile: their sums, the taps of a row and a pixel fit 16 registers.
pub(super) const TILE: usize = 8;

/// How the pixels of a row of the input feed those of the output, as a parameter of [`place`]. Down: an output for each pixel, or each
/// second. Up: two outputs for each pixel, the first of a tile an even or odd number of places from the border's edge.
pub(super) const STEP_1: usize = 1;
pub(super) const STEP_2: usize = 2;
const UP_EVEN: usize = 3;
const UP_ODD: usize = 4;

/// Which output of a tile the tile's pixel `i` feeds through tap `s`; a large number where there is none.
#[inline(always)]
pub(super) const fn place(map: usize, i: usize, s: usize) -> usize {
    match map {
        UP_EVEN | UP_ODD if 2 * i + map - UP_EVEN >= s => 2 * i + map - UP_EVEN - s,
        STEP_1 | STEP_2 if i >= s && (i - s).is_multiple_of(map) => (i - s) / map,
        _ => usize::MAX,
    }
}

/// The tile's pixel that feeds output `q` through tap `s`; a large number where there is none.
#[inline(always)]
const fn source(map: usize, q: usize, s: usize) -> usize {
    match map {
        UP_EVEN | UP_ODD if (q + s + map).is_multiple_of(2) => usize::MAX,
        UP_EVEN | UP_ODD => (q + s - (map - UP_EVEN)) / 2,
        _ => q * map + s,
    }
}

/// Pixels of the input that feed a tile of `q` outputs.
#[inline(always)]
pub(super) const fn reach(map: usize, q: usize, taps: usize) -> usize {
    match map {
        UP_EVEN | UP_ODD => (q + taps - 2 - (map - UP_EVEN)) / 2 + 1,
        _ => (q - 1) * map + taps,
    }
}

/// The body for `$i` from 0 to 18 pixels, 7 outputs, 4 taps or 2 rows of taps: written out, so that arrays indexed by it are registers whatever the compiler thinks of
/// unrolling.
macro_rules! unrolled {
    (pixel $i:ident $body:block) => {
        unrolled!(@ $i $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18)
    };
    (output $i:ident $body:block) => { unrolled!(@ $i $body 0 1 2 3 4 5 6 7) };
    (tap $i:ident $body:block) => { unrolled!(@ $i $body 0 1 2 3 4) };
    (row $i:ident $body:block) => { unrolled!(@ $i $body 0 1 2) };
    (@ $i:ident $body:block $($n:literal)*) => { $({ let $i: usize = $n; $body })* };
}
pub(super) use unrolled;

/// Whether there is code for the kernel's width and step along a row, and for this CPU.
pub(super) fn fit(d: &Dims) -> bool {
    #[cfg(target_arch = "x86_64")]
    if !crate::cpu::simd::has_avx2_fma() {
        return false;
    }
    matches!(d.kw, 3 | 5) && matches!(d.stride.1, 1 | 2)
}

/// What all tiles of a call have in common.
struct Job<'a> {
    d: &'a Dims,
    /// Forward: x. Input gradient: dy.
    from: &'a [f32],
    /// `[kh][kw][C]`; for the input gradient with each row turned round.
    taps: &'a [f32],
    bias: Option<&'a [f32]>,
    /// Columns of the input and of the output.
    columns: (usize, usize),
    gradient: bool,
}

/// y from x: see [`super::forward`]. `taps` is `[kh][kw][C]`.
pub(super) fn forward(d: &Dims, x: &[f32], taps: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let job = Job { d, from: x, taps, bias, columns: (d.w, d.q), gradient: false };
    match (d.kw, d.stride.1) {
        (3, 1) => job.run::<3, STEP_1>(y),
        (3, _) => job.run::<3, STEP_2>(y),
        (_, 1) => job.run::<5, STEP_1>(y),
        (_, _) => job.run::<5, STEP_2>(y),
    }
}

/// dx from dy: see [`super::input_gradient`]. `taps` is `[kh][kw][C]` with each row turned round.
pub(super) fn input_gradient(d: &Dims, dy: &[f32], taps: &[f32], dx: &mut [f32]) {
    let job = Job { d, from: dy, taps, bias: None, columns: (d.q, d.w), gradient: true };
    match (d.kw, d.stride.1, d.pad.1 % 2) {
        (3, 1, _) => job.run::<3, STEP_1>(dx),
        (3, _, 0) => job.run::<3, UP_EVEN>(dx),
        (3, _, _) => job.run::<3, UP_ODD>(dx),
        (_, 1, _) => job.run::<5, STEP_1>(dx),
        (_, _, 0) => job.run::<5, UP_EVEN>(dx),
        (_, _, _) => job.run::<5, UP_ODD>(dx),
    }
}

/// A row of the output: the rows of the input that feed it, from `input` on (counted through all images), and the kernel row of the first
/// of them, from which the others follow by `step`.
#[derive(Clone, Copy)]
struct Rows {
    input: usize,
    count: usize,
    kernel: usize,
    step: isize,
}

impl Job<'_> {
    /// Bands of rows of the output go to the threads; a band is done for as many channels at a time as fit the first cache.
    fn run<const KW: usize, const MAP: usize>(&self, out: &mut [f32]) {
        // A band stays in a second-level cache, but for wide rows; fewer elements than a thread is worth are one band.
        const BAND: usize = 192 * 1024 / 4;
        const SMALL: usize = 16 * 1024;
        let row = self.columns.1 * self.d.c;
        let input = self.columns.0 * self.d.c * if self.gradient { 1 } else { self.d.stride.0 };
        let rows = out.len() / row;
        let most = if out.len() <= SMALL { rows } else { rows.div_ceil(8) };
        let band = (BAND / (row + input)).max(4).min(most.max(1));
        let chunk = self.channels_at_once::<KW, MAP>();
        out.par_chunks_mut(band * row).enumerate().for_each(|(i, out)| {
            for first in (0..self.d.c).step_by(chunk) {
                let channels = first..self.d.c.min(first + chunk);
                for (number, out) in out.chunks_exact_mut(row).enumerate() {
                    self.row::<KW, MAP>(i * band + number, channels.clone(), out);
                }
            }
        });
    }

    /// Channels whose taps and pixels under a tile fit the first cache; a multiple of a cache line.
    fn channels_at_once<const KW: usize, const MAP: usize>(&self) -> usize {
        const CACHE: usize = 24 * 1024 / 4;
        const LINE: usize = 16;
        let each = self.d.kh * (reach(MAP, TILE, KW) + KW);
        let chunks = self.d.c.div_ceil((CACHE / each).max(2 * LINE));
        self.d.c.div_ceil(chunks).next_multiple_of(LINE)
    }

    fn rows(&self, number: usize) -> Rows {
        let d = self.d;
        if self.gradient {
            let (image, h) = (number / d.h, number % d.h);
            let under = covering(h, d.stride.0, d.pad.0, d.kh, d.p);
            let kernel = (h + d.pad.0).saturating_sub(under.start * d.stride.0);
            let step = -(d.stride.0 as isize);
            Rows { input: image * d.p + under.start, count: under.len(), kernel, step }
        } else {
            let (image, p) = (number / d.p, number % d.p);
            let taps = taps(p, d.stride.0, d.pad.0, d.kh, d.h);
            let top = (image * d.h + p * d.stride.0 + taps.start).saturating_sub(d.pad.0);
            Rows { input: top, count: taps.len(), kernel: taps.start, step: 1 }
        }
    }

    /// Where the input of the tile that begins at output `first` begins, perhaps left of the image.
    fn left<const KW: usize, const MAP: usize>(&self, first: usize) -> isize {
        let (first, pad, taps) = (first as isize, self.d.pad.1 as isize, KW as isize);
        match (MAP, self.gradient) {
            (UP_EVEN | UP_ODD, _) => (first + pad) / 2 - (taps - 1 - (MAP - UP_EVEN) as isize) / 2,
            (_, true) => first + pad - (taps - 1),
            (_, false) => first * MAP as isize - pad,
        }
    }

    /// Fetches what the row below will see first under this tile: the pixels come from far apart, which the CPU does not foresee.
    fn fetch_next(&self, tile: &Tile<'_>, len: usize) {
        let (step_h, step_w) = if self.gradient { (1, 1) } else { self.d.stride };
        let start = tile.left.max(0) as usize;
        for row in 0..step_h {
            let row = (tile.rows.input + tile.rows.count + row) * self.columns.0;
            fetch(self.from, self.d.c, row + start, len * step_w, &tile.channels);
        }
    }

    /// `channels` of row `number` of the output.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_unsafe))]
    fn row<const KW: usize, const MAP: usize>(
        &self,
        number: usize,
        channels: Range<usize>,
        out: &mut [f32],
    ) {
        let (c, rows, width) = (self.d.c, self.rows(number), self.columns.1);
        let tiles = width.div_ceil(TILE);
        // Up, every tile has to begin at an even place.
        let even = if matches!(MAP, UP_EVEN | UP_ODD) { 2 } else { 1 };
        let len = width.div_ceil(tiles).next_multiple_of(even);
        for first in (0..width).step_by(len) {
            let len = len.min(width - first);
            let left = self.left::<KW, MAP>(first);
            let inside = (-left).max(0)..(self.columns.0 as isize - left);
            let edge = inside.start > 0 || inside.end < reach(MAP, len, KW) as isize;
            let tile = Tile {
                job: self,
                rows,
                left,
                inside: inside.start as usize..inside.end.max(0) as usize,
                channels: channels.clone(),
            };
            if far(self.d, self.from) {
                self.fetch_next(&tile, len);
            }
            let out = &mut out[first * c..][..len * c];
            // SAFETY: `fit` has seen the CPU's features.
            unsafe { tile.run::<KW, MAP>(len, edge, out) }
        }
    }
}

/// Whether the rows to come should be fetched by hand: where an image comes from memory, and there are so few taps that the arithmetic does not
/// hide it. Elsewhere the asking costs up to a fifth.
pub(super) fn far(d: &Dims, x: &[f32]) -> bool {
    const CACHED: usize = 8 << 20;
    d.kw == 3 && size_of_val(x) > CACHED
}

/// Asks for channels of `pixels` pixels of x from the one numbered `first` on, as far as there are any, to be brought into the second-level
/// cache.
#[inline(always)]
pub(super) fn fetch(x: &[f32], c: usize, first: usize, pixels: usize, channels: &Range<usize>) {
    // All channels are one run of memory.
    let (runs, len) = if channels.len() == c { (1, pixels * c) } else { (pixels, channels.len()) };
    for run in 0..runs {
        let start = (first + run) * c + channels.start;
        fetch_run(x, start..x.len().min(start + len));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_run(x: &[f32], run: Range<usize>) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // A cache line at a time.
    for at in run.step_by(16) {
        // SAFETY: any address may be given; this one lies inside the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().add(at).cast()) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fetch_run(_: &[f32], _: Range<usize>) {}

/// Neighbouring pixels of a row of the output.
struct Tile<'a> {
    job: &'a Job<'a>,
    rows: Rows,
    /// The column of the tile's first pixel of the input; those of its pixels that lie `inside` the image.
    left: isize,
    inside: Range<usize>,
    channels: Range<usize>,
}

impl Tile<'_> {
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    fn run<const KW: usize, const MAP: usize>(&self, len: usize, edge: bool, out: &mut [f32]) {
        match (len, edge) {
            (8, false) => self.sums::<KW, MAP, 8, false>(out),
            (7, false) => self.sums::<KW, MAP, 7, false>(out),
            (6, false) => self.sums::<KW, MAP, 6, false>(out),
            (8, true) => self.sums::<KW, MAP, 8, true>(out),
            (7, true) => self.sums::<KW, MAP, 7, true>(out),
            (6, true) => self.sums::<KW, MAP, 6, true>(out),
            (5, _) => self.sums::<KW, MAP, 5, true>(out),
            (4, _) => self.sums::<KW, MAP, 4, true>(out),
            (3, _) => self.sums::<KW, MAP, 3, true>(out),
            (2, _) => self.sums::<KW, MAP, 2, true>(out),
            (_, _) => self.sums::<KW, MAP, 1, true>(out),
        }
    }

    /// What channels `at..at + L` of every sum begin with.
    #[inline(always)]
    fn start<const L: usize>(&self, at: usize) -> [f32; L] {
        let mut start = [0.0; L];
        if let Some(bias) = self.job.bias {
            start.copy_from_slice(&bias[at..at + L]);
        }
        start
    }

    /// Where, in elements, channel `at` of the tile's first pixel lies in the k-th row of the input (perhaps before the image), and that of
    /// the first tap of the kernel's row that it meets.
    #[inline(always)]
    fn places(&self, k: usize, at: usize) -> (usize, usize) {
        let (d, rows) = (self.job.d, self.rows);
        let pixel = ((rows.input + k) * self.job.columns.0).wrapping_add_signed(self.left);
        let kernel = rows.kernel.wrapping_add_signed(k as isize * rows.step);
        (pixel.wrapping_mul(d.c).wrapping_add(at), kernel * d.kw * d.c + at)
    }

    /// Channel `at` of pixel q. Not inlined: it would be written out for every Q.
    #[inline(never)]
    fn one<const MAP: usize>(&self, q: usize, at: usize) -> f32 {
        let (d, [mut sum]) = (self.job.d, self.start(at));
        for k in 0..self.rows.count {
            let (x, w) = self.places(k, at);
            for s in 0..d.kw {
                let i = source(MAP, q, s);
                if self.inside.contains(&i) {
                    let x = self.job.from[x.wrapping_add(i * d.c)];
                    sum = x.mul_add(self.job.taps[w + s * d.c], sum);
                }
            }
        }
        sum
    }

    /// Q pixels, `out` from the first on. Without EDGE all of the input lies inside the image.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    fn sums<const KW: usize, const MAP: usize, const Q: usize, const EDGE: bool>(
        &self,
        out: &mut [f32],
    ) {
        let (c, from, taps) = (self.job.d.c, self.job.from, self.job.taps);
        let whole = self.channels.end - self.channels.len() % LANES;
        for at in (self.channels.start..whole).step_by(LANES) {
            let mut sum = [F32x8(self.start(at)); Q];
            for k in 0..self.rows.count {
                let (x, w) = self.places(k, at);
                // SAFETY: `rows` are rows of the input, or of the kernel, and `inside` columns of it.
                let w: [F32x8; KW] = std::array::from_fn(|s| unsafe { load(taps, w + s * c) });
                unrolled!(pixel i {
                    if i < reach(MAP, Q, KW) && (!EDGE || self.inside.contains(&i)) {
                        // SAFETY: as above.
                        let x = unsafe { load(from, x.wrapping_add(i * c)) };
                        unrolled!(tap s {
                            if s < KW && place(MAP, i, s) < Q {
                                let sum = &mut sum[place(MAP, i, s)];
                                *sum = x.mul_add(w[s], *sum);
                            }
                        });
                    }
                });
            }
            unrolled!(output q {
                if q < Q {
                    // SAFETY: `out` has Q pixels.
                    unsafe { store(out, q * c + at, sum[q]) }
                }
            });
        }
        for at in whole..self.channels.end {
            (0..Q).for_each(|q| out[q * c + at] = self.one::<MAP>(q, at));
        }
    }
}

/// Eight numbers from `at` on.
///
/// # Safety
/// They lie inside the slice.
#[inline(always)]
pub(super) unsafe fn load(from: &[f32], at: usize) -> F32x8 {
    debug_assert!(at + LANES <= from.len());
    // SAFETY: the caller's promise.
    F32x8(unsafe { from.as_ptr().add(at).cast::<[f32; LANES]>().read_unaligned() })
}

/// Writes eight numbers from `at` on.
///
/// # Safety
/// They lie inside the slice.
#[inline(always)]
pub(super) unsafe fn store(to: &mut [f32], at: usize, x: F32x8) {
    debug_assert!(at + LANES <= to.len());
    // SAFETY: the caller's promise.
    unsafe { to.as_mut_ptr().add(at).cast::<[f32; LANES]>().write_unaligned(x.0) }
}
