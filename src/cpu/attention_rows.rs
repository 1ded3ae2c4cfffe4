//! Rows of attention's tensors: other widths, and rowsum(dy * y).

use super::simd::vectorise;
use crate::kernel::CpuArgs;
use crate::ops::attention::TableLayout;
use crate::ops::attention_rows::RowParams;
use rayon::prelude::*;

/// x -> padded: rows of `p.from` numbers as rows of `p.to`, zeros past the shorter.
pub(crate) fn pad(a: &CpuArgs<'_>) {
    let p: RowParams = a.params();
    let rows =
        a.f32_mut(1).chunks_exact_mut(p.to as usize).zip(a.f32(0).chunks_exact(p.from as usize));
    for (out, x) in rows {
        let both = out.len().min(x.len());
        out[..both].copy_from_slice(&x[..both]);
        out[both..].fill(0.0);
    }
}

/// [`rows_delta`]: y, dy, lse -> stats.
pub(crate) fn delta(a: &CpuArgs<'_>) {
    let p: RowParams = a.params();
    rows_delta(p.from as usize, a.f32(0), a.f32(1), a.f32(2), a.f32_mut(3));
}

/// `stats[.., 0] = lse`, `stats[.., 1] = sum over d of y * dy`.
pub(crate) fn rows_delta(d: usize, y: &[f32], dy: &[f32], lse: &[f32], stats: &mut [f32]) {
    const ROWS: usize = 256;
    let rows = stats.par_chunks_mut(2 * ROWS).zip(lse.par_chunks(ROWS));
    rows.zip(y.par_chunks(ROWS * d)).zip(dy.par_chunks(ROWS * d)).for_each(|(((s, l), y), dy)| {
        vectorise!(|| {
            let rows = s.chunks_exact_mut(2).zip(l).zip(y.chunks_exact(d).zip(dy.chunks_exact(d)));
            for ((s, &lse), (y, dy)) in rows {
                (s[0], s[1]) = (lse, dot(y, dy));
            }
        })
    });
}

#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    let mut lanes = [0.0f32; 8];
    for (x, y) in x.iter().zip(y) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane = x.mul_add(*y, *lane);
        }
    }
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The sums of a table pass `[pieces, G, rows, columns, width]` -> the packed tables' gradients: `rel_h` sums over the
/// pieces and the column offsets, `rel_w` over the pieces and the row offsets, `bias` over the pieces.
pub(crate) fn sum_tables(layout: &TableLayout, partial: &[f32], out: &mut [f32]) {
    let [h, w, b, end] = layout.offsets();
    let TableLayout { rows, columns, heads, d, has } = *layout;
    let width = layout.partial_width();
    out[..end].fill(0.0);
    for (i, sums) in partial.chunks_exact(width).enumerate() {
        let (column, row, g) = (i % columns, i / columns % rows, i / columns / rows % heads);
        for (present, at) in [(has[0], h + row * heads * d), (has[1], w + column * heads * d)] {
            if present {
                let out = &mut out[at + g * d..][..d];
                out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
            }
        }
        if has[2] {
            out[b + (g * rows + row) * columns + column] += sums[width - 4];
        }
    }
}
