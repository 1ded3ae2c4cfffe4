//! CPU kernels of [`crate::ops::layer_norm`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::layer_norm::LayerNormParams;

/// `x, weight, bias -> y, stats [rows, 2]` (mean and 1 / sqrt(var + eps) of each row).
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: LayerNormParams = a.params();
    let c = p.channels as usize;
    let (x, weight, bias) = (a.f32(0), &a.f32(1)[..c], &a.f32(2)[..c]);
    let slab = rows::slab_len(c);
    let (y, stats) = ((a.f32_mut(3), slab), (a.f32_mut(4), slab / c * 2));
    rows::each2!(y, stats, x.len(), |number, y, stats| {
        let rows = y.chunks_exact_mut(c).zip(stats.chunks_exact_mut(2));
        for ((y, stats), x) in rows.zip(x[number * slab..].chunks_exact(c)) {
            let mean = rows::sum_by(c, |i| x[i]) / c as f32;
            let var = rows::sum_by(c, |i| (x[i] - mean) * (x[i] - mean)) / c as f32;
            let inv_std = 1.0 / (var + p.eps).sqrt();
            (stats[0], stats[1]) = (mean, inv_std);
            for i in 0..c {
                y[i] = ((x[i] - mean) * inv_std).mul_add(weight[i], bias[i]);
            }
        }
    });
}

/// `dx = inv_std * (g - mean(g) - xhat * mean(g * xhat))` with `g = dy * weight`: `x, dy, weight, stats -> dx`.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: LayerNormParams = a.params();
    let c = p.channels as usize;
    let (x, dy, weight, stats) = (a.f32(0), a.f32(1), &a.f32(2)[..c], a.f32(3));
    let slab = rows::slab_len(c);
    rows::each!(a.f32_mut(4), slab, x.len(), |number, dx| {
        let start = number * slab;
        let input = x[start..].chunks_exact(c).zip(dy[start..].chunks_exact(c));
        let input = input.zip(stats[start / c * 2..].chunks_exact(2));
        for (dx, ((x, dy), stats)) in dx.chunks_exact_mut(c).zip(input) {
            let (mean, inv_std) = (stats[0], stats[1]);
            let g_mean = rows::sum_by(c, |i| dy[i] * weight[i]) / c as f32;
            let gx_mean =
                rows::sum_by(c, |i| dy[i] * weight[i] * ((x[i] - mean) * inv_std)) / c as f32;
            for i in 0..c {
                let xhat = (x[i] - mean) * inv_std;
                dx[i] = inv_std * (dy[i].mul_add(weight[i], -g_mean) - xhat * gx_mean);
            }
        }
    });
}

/// Sums of dy and dy * xhat over each block of rows: `x, dy, stats -> part [blocks, 2, C]`.
pub(crate) fn bwd_sums(a: &CpuArgs<'_>) {
    let p: LayerNormParams = a.params();
    let (x, dy, stats) = (a.f32(0), a.f32(1), a.f32(2));
    let (c, block) = (p.channels as usize, p.rows_per_block as usize);
    rows::each!(a.f32_mut(3), 2 * c, x.len(), |number, part| {
        let (sum_dy, sum_dyx) = part.split_at_mut(c);
        let sum_dyx = &mut sum_dyx[..c];
        sum_dy.fill(0.0);
        sum_dyx.fill(0.0);
        let first = number * block;
        for r in first..(first + block).min(p.rows as usize) {
            let (x, dy) = (&x[r * c..][..c], &dy[r * c..][..c]);
            let (mean, inv_std) = (stats[2 * r], stats[2 * r + 1]);
            for i in 0..c {
                sum_dy[i] += dy[i];
                sum_dyx[i] = dy[i].mul_add((x[i] - mean) * inv_std, sum_dyx[i]);
            }
        }
    });
}

/// The sums over the blocks: `part -> dweight, dbias`.
pub(crate) fn bwd_finish(a: &CpuArgs<'_>) {
    let p: LayerNormParams = a.params();
    let c = p.channels as usize;
    let (dweight, dbias) = (a.f32_mut(1), a.f32_mut(2));
    dweight.fill(0.0);
    dbias.fill(0.0);
    for part in a.f32(0).chunks_exact(2 * c) {
        for i in 0..c {
            dbias[i] += part[i];
            dweight[i] += part[c + i];
        }
    }
}
