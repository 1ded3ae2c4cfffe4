//! Weight gradient: dW[o, tap, c] = sum over pixels of dy[pixel, o] * x[pixel under tap, c]: a matrix product with
//! the pixels as inner dimension, summed in blocks of fixed size in fixed order. Rows of A are outputs, columns of B
//! the weight's columns, so that the result lies as the weight does; both are packed, for their rows are a whole
//! pixel apart.

use super::Dims;
use crate::cpu::gemm::{COLS, ROWS, Sum, tile, tile_narrow};
use crate::cpu::threads::{SharedMut, with_scratch};
use crate::ops::conv2d::Conv2dParams;
use rayon::prelude::*;

/// Pixels a block of the weight gradient sums over: 16 columns of them are 16 KiB and stay in L1.
const BLOCK: usize = 256;
/// Floats of dy packed at a time: 1 MiB.
const PACKED_DY: usize = 256 * 1024;

/// dw[o,r,s,c] = sum over n,p,q of dy[n,p,q,o] * x[n, p*stride+r-pad, q*stride+s-pad, c].
pub(super) fn weight_gradient(params: &Conv2dParams, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let mut d = Dims::new(params);
    if d.pointwise() {
        d = Dims { n: 1, h: 1, w: d.n * d.h * d.w, p: 1, q: d.n * d.p * d.q, ..d };
    }
    gradient(&d, x, dy, dw);
}

/// dw `[o, c]` = sum over rows of dy[row, o] * x[row, c].
pub(crate) fn pointwise_weight_gradient(
    rows: usize,
    (c, o): (usize, usize),
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
) {
    let (one, none) = ((1, 1), (0, 0));
    let d = Dims { n: 1, h: 1, w: rows, c, o, kh: 1, kw: 1, p: 1, q: rows, stride: one, pad: none };
    gradient(&d, x, dy, dw);
}

fn gradient(d: &Dims, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let (pixels, depth) = (d.n * d.p * d.q, d.kh * d.kw * d.c);
    if pixels == 0 || dw.is_empty() {
        return dw.fill(0.0);
    }
    let part_len = d.o.div_ceil(ROWS) * ROWS * BLOCK;
    // A task takes the columns of `group` panels from each block of pixels while that lies in its cache.
    let panels = depth.div_ceil(COLS);
    let group = panels.div_ceil(4 * rayon::current_num_threads());
    let step = (PACKED_DY / (part_len)).max(1) * BLOCK;
    let dw = SharedMut::new(dw);
    for first in (0..pixels).step_by(step) {
        let blocks: Vec<_> = (first..pixels.min(first + step))
            .step_by(BLOCK)
            .map(|a| a..pixels.min(a + BLOCK))
            .collect();
        with_scratch(blocks.len() * part_len, |packed| {
            let parts = packed.par_chunks_exact_mut(part_len);
            parts.zip(&blocks).for_each(|(part, block)| {
                pack_dy(&dy[block.start * d.o..block.end * d.o], d.o, part)
            });
            (0..panels.div_ceil(group)).into_par_iter().with_max_len(1).for_each(|task| {
                let first = task * group;
                with_scratch(BLOCK * COLS, |patches| {
                    for (block, part) in blocks.iter().zip(packed.chunks_exact(part_len)) {
                        for j in first..panels.min(first + group) {
                            pack_patches(d, x, block.clone(), j * COLS, patches);
                            let begun = block.start > 0;
                            add_block(d, block.len(), begun, j * COLS, part, patches, dw);
                        }
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

/// patches[pixel][0..16] = what dw's columns `first..first + 16` (counted through r, s, c) see of x at that pixel:
/// zero in the border.
fn pack_patches(
    d: &Dims,
    x: &[f32],
    pixels: std::ops::Range<usize>,
    first: usize,
    patches: &mut [f32],
) {
    let width = d.kw * d.c;
    let end = (first + COLS).min(d.kh * width);
    let mut column = first;
    while column < end {
        // Columns of one kernel row are as contiguous in x as they are in dw.
        let (r, under) = (column / width, column % width);
        let len = (end - column).min(width - under);
        let mut pixel = pixels.start;
        while pixel < pixels.end {
            // A run of pixels in one output row.
            let (row, q) = (pixel / d.q, pixel % d.q);
            let run = (pixels.end - pixel).min(d.q - q);
            let out = &mut patches[(pixel - pixels.start) * COLS..][..run * COLS];
            pack_run(d, x, row, q, r, under..under + len, column - first, out);
            pixel += run;
        }
        column += len;
    }
}

/// Columns from `column` on of the patches of a run of pixels in output row `row` (counted through all images), from
/// pixel `q` on: what lies at `under` below kernel row `r`.
fn pack_run(
    d: &Dims,
    x: &[f32],
    row: usize,
    q: usize,
    r: usize,
    under: std::ops::Range<usize>,
    column: usize,
    patches: &mut [f32],
) {
    let (image, p) = (row / d.p, row % d.p);
    let h = (p * d.stride.0 + r).wrapping_sub(d.pad.0);
    // The row of x; where it lies in the border it is empty, and all is zero.
    let x = if h < d.h { &x[(image * d.h + h) * d.w * d.c..][..d.w * d.c] } else { &[] };
    for (i, patch) in patches.chunks_exact_mut(COLS).enumerate() {
        let patch = &mut patch[column..column + under.len()];
        // Positions in the row, shifted by the border so that they cannot be negative.
        let border = d.pad.1 * d.c;
        let from = (q + i) * d.stride.1 * d.c + under.start;
        if from >= border && from - border + patch.len() <= x.len() {
            copy_short(&x[from - border..], patch);
        } else {
            for (j, v) in patch.iter_mut().enumerate() {
                *v = x.get((from + j).wrapping_sub(border)).copied().unwrap_or(0.0);
            }
        }
    }
}

/// Copies at most 16 numbers as a few overlapping vectors: a call of `memcpy` would cost more than they do.
#[inline]
fn copy_short(from: &[f32], to: &mut [f32]) {
    let len = to.len();
    let from = &from[..len];
    match len {
        16 => to.copy_from_slice(&from[..16]),
        8..16 => {
            to[..8].copy_from_slice(&from[..8]);
            to[len - 8..].copy_from_slice(&from[len - 8..]);
        }
        4..8 => {
            to[..4].copy_from_slice(&from[..4]);
            to[len - 4..].copy_from_slice(&from[len - 4..]);
        }
        _ => (0..len).for_each(|i| to[i] = from[i]),
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
        // SAFETY: a part holds BLOCK pixels of 6, the patches BLOCK pixels of 16; these columns of dw belong to this
        // task alone.
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
