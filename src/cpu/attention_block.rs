//! CPU kernels of the fused attention block. Forward is one pass over (some images, head): the head's q, k and v of these
//! images go to the thread's scratch by the packed product of `gemm.rs`, and attention reads them there, out of its cache. A head's
//! weights are packed once a call, and the tasks of a head follow one another.
//!
//! Images of a task: as many as put some 256 KiB of x under each panel of 16 weights, which then stays in the nearest cache; a
//! map of 7x7 alone would leave a row of sums that fills a sixth of a tile. How many there are changes no bit of the result: each
//! number is summed over the channels in order, whoever does it.

use super::conv2d::pointwise_weight_gradient;
use super::gemm::{COLS, gemm};
use super::global_attention::one_head;
use super::pack::{pack_columns, pack_rows};
use super::threads::{SharedMut, with_scratch};
use crate::kernel::CpuArgs;
use crate::ops::attention_block::AttentionBlockParams as Params;
use rayon::prelude::*;
use std::ops::Range;

/// Numbers of x that the rows of a task aim at.
const BAND: usize = 64 * 1024;

/// [`forward`]: x, three weights, tables -> q, k and v (where they are wanted), attended, lse.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let weights = [1, 2, 3].map(|i| a.f32(i));
    let (qkv, attended, lse) = (a.f32_mut(5), a.f32_mut(6), a.f32_mut(7));
    forward(&a.params(), a.f32(0), weights, a.f32(4), qkv, attended, lse);
}

/// y = attended Wo^T, plus x where there is a residual.
pub(crate) fn proj(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (depth, outputs, w) = (p.depth(), p.o as usize, a.f32(1));
    let start = (p.residual == 1).then(|| a.f32(2));
    with_scratch(outputs.div_ceil(COLS) * depth * COLS, |packed| {
        let panels = packed.par_chunks_exact_mut(depth * COLS).enumerate();
        panels.for_each(|(j, panel)| {
            let rows = COLS.min(outputs - j * COLS);
            pack_rows(&w[j * COLS * depth..], depth, (rows, depth), 1.0, panel);
        });
        products(&[(a.f32(0), depth, packed)], outputs, start, a.f32_mut(3));
    });
}

/// dx = dq Wq + dk Wk + dv Wv, plus dy where there is a residual.
pub(crate) fn dgrad(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (depth, c, part) = (p.depth(), p.c as usize, p.attention.part as usize);
    let (grads, start) = (a.f32(0), (p.residual == 1).then(|| a.f32(4)));
    let weights = [1, 2, 3].map(|i| a.f32(i));
    let each = c.div_ceil(COLS) * depth * COLS;
    with_scratch(3 * each, |packed| {
        let panels = packed.par_chunks_exact_mut(depth * COLS).enumerate();
        let count = each / (depth * COLS);
        panels.for_each(|(i, panel)| {
            let first = i % count * COLS;
            pack_columns(&weights[i / count][first..], c, COLS.min(c - first), 1.0, panel);
        });
        let source =
            |i: usize| (&grads[i * part..][..p.rows() * depth], depth, &packed[i * each..][..each]);
        products(&[source(0), source(1), source(2)], c, start, a.f32_mut(5));
    });
}

/// dWq, dWk and dWv, `weight` apart.
pub(crate) fn wgrad(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (rows, c, depth) = (p.rows(), p.c as usize, p.depth());
    let (x, grads) = (a.f32(0), a.f32(1).chunks(p.attention.part as usize));
    for (dw, grad) in a.f32_mut(2).chunks_exact_mut(p.weight as usize).zip(grads) {
        let grad = &grad[..rows * depth];
        pointwise_weight_gradient(rows, (c, depth), x, grad, &mut dw[..depth * c]);
    }
}

/// out `[rows, columns]` = start + the products of all sources (A `[rows, k]`, k, B in panels `[k][16]`).
///
/// A task has a band of about a hundred rows, because a panel is read anew for each band, and some of the panels. It sums in its
/// scratch, where the last panel is as wide as the others.
fn products(
    sources: &[(&[f32], usize, &[f32])],
    columns: usize,
    start: Option<&[f32]>,
    out: &mut [f32],
) {
    const MOST: usize = 126;
    let (rows, panels) = (out.len() / columns, columns.div_ceil(COLS));
    let bands = rows.div_ceil(MOST);
    let band = rows.div_ceil(bands).next_multiple_of(6);
    let groups = (4 * rayon::current_num_threads()).div_ceil(bands).min(panels);
    let group = panels.div_ceil(groups);
    let out = SharedMut::new(out);
    (0..bands * groups).into_par_iter().with_max_len(1).for_each(|task| {
        let (from, first) = (task / groups * band, task % groups * group);
        let (rows, count) =
            (band.min(rows.saturating_sub(from)), group.min(panels.saturating_sub(first)));
        if rows == 0 || count == 0 {
            return;
        }
        let width = count * COLS;
        with_scratch(rows * width, |sums| {
            sum_panels(sources, from..from + rows, first..first + count, sums);
            let here = width.min(columns - first * COLS);
            for (i, sums) in sums.chunks_exact(width).enumerate() {
                let at = (from + i) * columns + first * COLS;
                // SAFETY: these columns of these rows are this task's alone.
                let row = unsafe { out.slice(at, here) };
                match start {
                    Some(start) => {
                        let both = sums.iter().zip(&start[at..at + here]);
                        row.iter_mut().zip(both).for_each(|(y, (sum, x))| *y = x + sum);
                    }
                    None => row.copy_from_slice(&sums[..here]),
                }
            }
        });
    });
}

/// sums `[rows, panels * 16]` = the products of all sources, for some rows and panels.
fn sum_panels(
    sources: &[(&[f32], usize, &[f32])],
    rows: Range<usize>,
    panels: Range<usize>,
    sums: &mut [f32],
) {
    let (m, width) = (rows.len(), panels.len() * COLS);
    for (j, panel) in panels.enumerate() {
        for (i, &(a, k, packed)) in sources.iter().enumerate() {
            let (a, b) = (&a[rows.start * k..][..m * k], &packed[panel * k * COLS..][..k * COLS]);
            gemm(m, COLS, k, 1.0, a, k, 1, b, COLS, i > 0, &mut sums[j * COLS..], width);
        }
    }
}

/// q, k and v of every head, and its attention.
fn forward(
    p: &Params,
    x: &[f32],
    weights: [&[f32]; 3],
    tables: &[f32],
    qkv: &mut [f32],
    attended: &mut [f32],
    lse: &mut [f32],
) {
    let (n, g, d) = (p.attention.n as usize, p.attention.g as usize, p.attention.d as usize);
    let (c, tokens) = (p.c as usize, p.attention.tokens());
    // Panels of q, of k and of v of a head, and their numbers.
    let (count, panel) = (d.div_ceil(COLS), c * COLS);
    let (qkv, y, lse) = (SharedMut::new(qkv), SharedMut::new(attended), SharedMut::new(lse));
    with_scratch(g * 3 * count * panel, |packed| {
        packed.par_chunks_exact_mut(panel).enumerate().for_each(|(i, out)| {
            let (head, which, j) = (i / count / 3, i / count % 3, i % count);
            let first = j * COLS;
            let rows = &weights[which][(head * d + first) * c..];
            pack_rows(rows, c, (COLS.min(d - first), c), 1.0, out);
        });
        let tasks = 4 * rayon::current_num_threads();
        let images = (BAND / (tokens * c)).min(n * g / tasks).clamp(1, n);
        let groups = n.div_ceil(images);
        (0..groups * g).into_par_iter().with_max_len(1).for_each(|task| {
            let (head, first) = (task / groups, task % groups * images);
            let images = images.min(n - first);
            let packed = &packed[head * 3 * count * panel..][..3 * count * panel];
            let width = 3 * count * COLS;
            with_scratch(images * tokens * width, |rows| {
                project(p, &x[first * tokens * c..], packed, rows);
                if p.save == 1 {
                    // SAFETY: this task alone writes the rows of its head and images.
                    unsafe { put(p, rows, first * tokens, head, &qkv) };
                }
                for (i, rows) in rows.chunks_exact(tokens * width).enumerate() {
                    let part = |i: usize| &rows[i * count * COLS..];
                    let place = (first + i, head);
                    let qkv = [part(0), part(1), part(2)];
                    one_head(&p.attention, place, qkv, width, tables, &y, &lse);
                }
            });
        });
    });
}

/// rows `[.., 3, width]` = x times a head's weights, in panels.
fn project(p: &Params, x: &[f32], packed: &[f32], rows: &mut [f32]) {
    let c = p.c as usize;
    let width = packed.len() / c;
    let m = rows.len() / width;
    for (j, panel) in packed.chunks_exact(c * COLS).enumerate() {
        gemm(m, COLS, c, 1.0, &x[..m * c], c, 1, panel, COLS, false, &mut rows[j * COLS..], width);
    }
}

/// Copies a head's q, k and v to where backward reads them, from row `first` on.
///
/// # Safety
/// No other thread has the rows of this head.
unsafe fn put(p: &Params, rows: &[f32], first: usize, head: usize, out: &SharedMut<'_>) {
    let (g, d, part) = (p.attention.g as usize, p.attention.d as usize, p.attention.part as usize);
    let width = d.next_multiple_of(COLS);
    for (i, row) in rows.chunks_exact(3 * width).enumerate() {
        for (which, row) in row.chunks_exact(width).enumerate() {
            let at = which * part + ((first + i) * g + head) * d;
            // SAFETY: the caller's promise.
            unsafe { out.slice(at, d) }.copy_from_slice(&row[..d]);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::{AttentionBlock, attention_block};
    use crate::tensor::philox::Philox;
    use crate::{Device, Tensor};

    /// y and every gradient.
    fn everything(threads: usize) -> Vec<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let device = Device::cpu();
            let normal = |shape: &[usize], op| {
                let random = Philox { seed: 5, step: 0, op };
                Tensor::randn(&device, shape, random).unwrap().requires_grad()
            };
            let x = normal(&[9, 3, 5, 20], 0);
            let [q, k, v, proj] = [1, 2, 3, 4].map(|op| normal(&[20, 20], op));
            let (rel_h, rel_w) = (normal(&[5, 20], 5), normal(&[9, 20], 6));
            let block = AttentionBlock {
                heads: 4,
                scale: None,
                qkv: [&q, &k, &v],
                proj: Some(&proj),
                rel_h: Some(&rel_h),
                rel_w: Some(&rel_w),
                residual: true,
            };
            let y = attention_block(&x, block).unwrap();
            let grads = y.backward_with(&normal(y.shape(), 7).detach()).unwrap();
            let mut all = vec![y.to_f32().unwrap()];
            for leaf in [&x, &q, &k, &v, &proj, &rel_h, &rel_w] {
                all.push(grads.get(leaf).unwrap().to_f32().unwrap());
            }
            all
        })
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        assert!(everything(1) == everything(3), "one and three threads differ");
    }
}
