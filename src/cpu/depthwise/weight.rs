//! Weight gradient for kernels 3 or 5 wide at steps 1 and 2. A task has some channels of some rows of the output, and walks over them in
//! tiles of up to eight pixels as [`super::tiles`] does: for eight channels, dy under the tile and the sums of a row of taps stay in
//! registers while the pixels of x pass by, each loaded once for all taps; three rows of 3x3 and two of 5x5 at once, so that there are sums enough
//! to wait for. What the tasks have summed is then added in order.

use super::tiles::{STEP_1, STEP_2, TILE, far, fetch, load, place, reach, store, unrolled};
use crate::cpu::conv2d::Dims;
use crate::cpu::grouped::taps;
use crate::cpu::lanes::{F32x8, LANES};
use crate::cpu::threads::with_scratch;
use rayon::prelude::*;
use std::ops::Range;

/// How the work is cut: channels and rows of the output (counted through all images) of a task, channels at a time.
struct Cut {
    channels: usize,
    rows: usize,
    chunk: usize,
}

impl Cut {
    /// Channels at a time whose sums, x and dy under a tile fit the first cache. Where there are many, a task has so many and all rows:
    /// nothing is left to add. Else it has all channels of some rows, since those of a large map should be read in one go.
    fn new(d: &Dims) -> Self {
        const CACHE: usize = 24 * 1024 / 4;
        const LINE: usize = 16;
        // Chunks that keep a few threads busy, else parts that do; and pixels that a sum is no less accurate for.
        const CHUNKS: usize = 8;
        const PARTS: usize = 16;
        const LONGEST: usize = 8192;
        let each = d.kh * ((TILE - 1) * d.stride.1 + 2 * d.kw) + TILE;
        let chunks = d.c.div_ceil((CACHE / each).max(2 * LINE));
        let chunk = d.c.div_ceil(chunks).next_multiple_of(LINE);
        let (channels, parts) = if chunks < CHUNKS { (d.c, PARTS) } else { (chunk, 1) };
        let rows = (d.n * d.p).div_ceil(parts).min(LONGEST.div_ceil(d.q));
        Self { channels, rows, chunk }
    }
}

/// dw from x and dy: see [`super::weight_gradient`].
pub(super) fn gradient(d: &Dims, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let (cut, taps) = (Cut::new(d), d.kh * d.kw);
    let parts = (d.n * d.p).div_ceil(cut.rows);
    let len = taps * cut.channels;
    with_scratch(d.c.div_ceil(cut.channels) * parts * len, |sums| {
        sums.par_chunks_exact_mut(len).enumerate().for_each(|(task, sums)| {
            let first = task / parts * cut.channels;
            let part = Part { d, x, dy, channels: first..d.c.min(first + cut.channels) };
            let row = task % parts * cut.rows;
            part.add(row..(d.n * d.p).min(row + cut.rows), cut.chunk, sums);
        });
        let chunks = dw.par_chunks_mut(cut.channels * taps);
        chunks.zip(sums.par_chunks_exact_mut(parts * len)).for_each(|(dw, sums)| {
            let width = dw.len() / taps;
            let (total, rest) = sums.split_at_mut(width * taps);
            for part in 1..parts {
                let part = &rest[part * len - total.len()..][..total.len()];
                total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
            }
            super::transpose(total, taps, dw);
        });
    });
}

/// What a task sums over: sums are `[tap][channel]`.
struct Part<'a> {
    d: &'a Dims,
    x: &'a [f32],
    dy: &'a [f32],
    channels: Range<usize>,
}

/// Neighbouring pixels of a row of the output.
struct Tile {
    /// The first of them, in pixels of dy, and the pixel of x under its first tap in the first kernel row that meets the image: perhaps left of it.
    pixel: usize,
    left: usize,
    /// The pixels of x under the tile, counted from there, that lie in the image.
    inside: Range<usize>,
    /// The kernel's rows that meet the image.
    kernel: Range<usize>,
    channels: Range<usize>,
}

impl Part<'_> {
    /// The sums over rows of the output, `chunk` channels at a time: in bands of rows, which a second-level cache keeps for all chunks.
    fn add(&self, rows: Range<usize>, chunk: usize, sums: &mut [f32]) {
        const BAND: usize = 192 * 1024 / 4;
        let d = self.d;
        let row = self.channels.len() * (d.q + d.stride.0 * d.w);
        let band = (BAND / row).max(1);
        sums.fill(0.0);
        for start in rows.clone().step_by(band) {
            for first in self.channels.clone().step_by(chunk) {
                let channels = first..self.channels.end.min(first + chunk);
                for row in start..rows.end.min(start + band) {
                    match (d.kw, d.stride.1) {
                        (3, 1) => self.row::<3, STEP_1, 3>(row, &channels, sums),
                        (3, _) => self.row::<3, STEP_2, 3>(row, &channels, sums),
                        (_, 1) => self.row::<5, STEP_1, 2>(row, &channels, sums),
                        (_, _) => self.row::<5, STEP_2, 2>(row, &channels, sums),
                    }
                }
            }
        }
    }

    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_unsafe))]
    fn row<const KW: usize, const MAP: usize, const R: usize>(
        &self,
        row: usize,
        channels: &Range<usize>,
        sums: &mut [f32],
    ) {
        let d = self.d;
        let (image, p) = (row / d.p, row % d.p);
        let kernel = taps(p, d.stride.0, d.pad.0, d.kh, d.h);
        let top = (image * d.h + p * d.stride.0 + kernel.start).saturating_sub(d.pad.0);
        let len = d.q.div_ceil(d.q.div_ceil(TILE));
        for first in (0..d.q).step_by(len) {
            let len = len.min(d.q - first);
            let start = first * MAP;
            let end = (d.w + d.pad.1).saturating_sub(start);
            let tile = Tile {
                pixel: row * d.q + first,
                left: (top * d.w + start).wrapping_sub(d.pad.1),
                inside: d.pad.1.saturating_sub(start)..end,
                kernel: kernel.clone(),
                channels: channels.clone(),
            };
            if far(d, self.x) {
                self.fetch_next(&tile, len);
            }
            // SAFETY: `super::tiles::fit` has seen the CPU's features.
            unsafe { self.tile::<KW, MAP, R>(&tile, len, sums) }
        }
    }

    /// Fetches what the row below will see first under this tile.
    fn fetch_next(&self, tile: &Tile, len: usize) {
        let (d, channels) = (self.d, &tile.channels);
        let below = tile.left.wrapping_add(tile.kernel.len() * d.w + tile.inside.start);
        for row in 0..d.stride.0 {
            fetch(self.x, d.c, below + row * d.w, len * d.stride.1, channels);
        }
        fetch(self.dy, d.c, tile.pixel + d.q, len, channels);
    }

    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    fn tile<const KW: usize, const MAP: usize, const R: usize>(
        &self,
        tile: &Tile,
        len: usize,
        sums: &mut [f32],
    ) {
        let edge = tile.inside.start > 0 || tile.inside.end < reach(MAP, len, KW);
        match (len, edge) {
            (8, false) => self.sum::<KW, MAP, R, 8, false>(tile, sums),
            (7, false) => self.sum::<KW, MAP, R, 7, false>(tile, sums),
            (6, false) => self.sum::<KW, MAP, R, 6, false>(tile, sums),
            (8, true) => self.sum::<KW, MAP, R, 8, true>(tile, sums),
            (7, true) => self.sum::<KW, MAP, R, 7, true>(tile, sums),
            (6, true) => self.sum::<KW, MAP, R, 6, true>(tile, sums),
            (5, _) => self.sum::<KW, MAP, R, 5, true>(tile, sums),
            (4, _) => self.sum::<KW, MAP, R, 4, true>(tile, sums),
            (3, _) => self.sum::<KW, MAP, 1, 3, true>(tile, sums),
            (2, _) => self.sum::<KW, MAP, 1, 2, true>(tile, sums),
            (_, _) => self.sum::<KW, MAP, 1, 1, true>(tile, sums),
        }
    }

    /// Adds what Q pixels give, R rows of the kernel at a time. Without EDGE all that lies under them lies in the image.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    fn sum<const KW: usize, const MAP: usize, const R: usize, const Q: usize, const EDGE: bool>(
        &self,
        tile: &Tile,
        sums: &mut [f32],
    ) {
        let whole = tile.channels.end - tile.channels.len() % LANES;
        for at in (tile.channels.start..whole).step_by(LANES) {
            let mut r = tile.kernel.start;
            while r + R <= tile.kernel.end {
                self.rows::<KW, MAP, R, Q, EDGE>(tile, at, r, sums);
                r += R;
            }
            while r < tile.kernel.end {
                self.rows::<KW, MAP, 1, Q, EDGE>(tile, at, r, sums);
                r += 1;
            }
        }
        for at in whole..tile.channels.end {
            self.one::<MAP>(tile, Q, at, sums);
        }
    }

    /// Channels `at..at + 8` of rows `r..r + R` of the kernel.
    #[inline]
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    fn rows<const KW: usize, const MAP: usize, const R: usize, const Q: usize, const EDGE: bool>(
        &self,
        tile: &Tile,
        at: usize,
        r: usize,
        sums: &mut [f32],
    ) {
        let (c, width, x, dy) = (self.d.c, self.channels.len(), self.x, self.dy);
        let under: [usize; R] =
            std::array::from_fn(|k| self.under(tile, r + k).wrapping_mul(c).wrapping_add(at));
        let pixel = tile.pixel * c + at;
        let sums = &mut sums[r * KW * width..][..R * KW * width];
        let first = at - self.channels.start;
        let mut sum: [[F32x8; KW]; R] = std::array::from_fn(|k| {
            // SAFETY: channels `at..at + 8` of R rows of KW taps.
            std::array::from_fn(|s| unsafe { load(sums, (k * KW + s) * width + first) })
        });
        // SAFETY: the tile's pixels are pixels of dy.
        let dy: [F32x8; Q] = std::array::from_fn(|q| unsafe { load(dy, pixel + q * c) });
        unrolled!(pixel i {
            if i < reach(MAP, Q, KW) && (!EDGE || tile.inside.contains(&i)) {
                unrolled!(row k {
                    if k < R {
                        // SAFETY: row r + k of the kernel meets the image, and pixel i lies inside.
                        let x = unsafe { load(x, under[k].wrapping_add(i * c)) };
                        unrolled!(tap s {
                            if s < KW && place(MAP, i, s) < Q {
                                sum[k][s] = x.mul_add(dy[place(MAP, i, s)], sum[k][s]);
                            }
                        });
                    }
                });
            }
        });
        unrolled!(row k {
            unrolled!(tap s {
                if k < R && s < KW {
                    // SAFETY: as where they were loaded.
                    unsafe { store(sums, (k * KW + s) * width + first, sum[k][s]) }
                }
            });
        });
    }

    /// The pixel of x under the tile's first pixel and the first tap of the kernel's row r.
    #[inline(always)]
    fn under(&self, tile: &Tile, r: usize) -> usize {
        tile.left.wrapping_add((r - tile.kernel.start) * self.d.w)
    }

    /// Channel `at` of a tile of `len` pixels.
    fn one<const MAP: usize>(&self, tile: &Tile, len: usize, at: usize, sums: &mut [f32]) {
        let (d, width) = (self.d, self.channels.len());
        for r in tile.kernel.clone() {
            let x = self.under(tile, r);
            for s in 0..d.kw {
                let sum = &mut sums[(r * d.kw + s) * width + at - self.channels.start];
                for q in 0..len {
                    let i = q * MAP + s;
                    if tile.inside.contains(&i) {
                        let x = self.x[x.wrapping_add(i).wrapping_mul(d.c).wrapping_add(at)];
                        *sum = x.mul_add(self.dy[(tile.pixel + q) * d.c + at], *sum);
                    }
                }
            }
        }
    }
}
