//! CPU kernels of [`crate::ops::batch_norm`].

use super::elementwise::{relu, silu, silu_slope};
use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::batch_norm::{ACT_RELU, ACT_SILU, BatchNormParams};

/// Floats of a chunk that is read twice by the statistics: half of a first-level cache.
const CHUNK: usize = 4096;

/// Mean and sum of squared deviations of each block of rows: `x [rows, C] -> part [blocks, 2, C]`.
pub(crate) fn stats(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let (x, c) = (a.f32(0), p.channels as usize);
    let block = p.rows_per_block as usize * c;
    rows::each(a.f32_mut(1), 2 * c, x.len(), |i, part| {
        let x = &x[i * block..];
        block_stats(&x[..block.min(x.len())], c, part);
    });
}

/// Chunk by chunk: the chunk's own mean, then the squared deviations from it, then both merged into the block's by Chan,
/// Golub and LeVeque's rule. So a large mean costs no accuracy, and memory is read once.
#[inline(always)]
fn block_stats(x: &[f32], c: usize, part: &mut [f32]) {
    let chunk_rows = (CHUNK / c).clamp(8, 64);
    let (mean, m2) = part.split_at_mut(c);
    let m2 = &mut m2[..c];
    mean.fill(0.0);
    m2.fill(0.0);
    let mut scratch = vec![0.0f32; 2 * c];
    let (chunk_mean, chunk_m2) = scratch.split_at_mut(c);
    let mut seen = 0.0f32;
    for chunk in x.chunks(chunk_rows * c) {
        let n = (chunk.len() / c) as f32;
        chunk_mean.fill(0.0);
        chunk_m2.fill(0.0);
        rows::fold(chunk, chunk_mean, |sum, x, _| *sum += x);
        for m in chunk_mean.iter_mut() {
            *m /= n;
        }
        let means = &chunk_mean[..c];
        rows::fold(chunk, chunk_m2, |sum, x, i| {
            let d = x - means[i];
            *sum = d.mul_add(d, *sum);
        });
        let (to_mean, to_m2) = (n / (seen + n), seen * n / (seen + n));
        for i in 0..c {
            let delta = chunk_mean[i] - mean[i];
            mean[i] = delta.mul_add(to_mean, mean[i]);
            m2[i] += (delta * delta).mul_add(to_m2, chunk_m2[i]);
        }
        seen += n;
    }
}

/// Merges the blocks, updates the running statistics and writes the table of the normalisation (see
/// [`crate::ops::batch_norm`]): `part, weight, bias, running_mean, running_var -> table [4, C]`.
pub(crate) fn finish(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let (mean, var) = merge(&p, a.f32(0));
    let rows = f64::from(p.rows);
    // The batch is normalised with the biased variance; the running one takes the unbiased, as PyTorch does.
    let unbiased = if p.rows > 1 { rows / (rows - 1.0) } else { f64::NAN };
    let momentum = f64::from(p.momentum);
    let (running_mean, running_var) = (a.f32_mut(3), a.f32_mut(4));
    for i in 0..p.channels as usize {
        running_mean[i] += (momentum * (mean[i] - f64::from(running_mean[i]))) as f32;
        running_var[i] += (momentum * (var[i] * unbiased - f64::from(running_var[i]))) as f32;
    }
    write_table(&p, a.f32(1), a.f32(2), |i| (mean[i], var[i]), a.f32_mut(5));
}

/// The table from the running statistics, for inference.
pub(crate) fn table(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let (mean, var) = (a.f32(2), a.f32(3));
    let stats = |i: usize| (f64::from(mean[i]), f64::from(var[i]));
    write_table(&p, a.f32(0), a.f32(1), stats, a.f32_mut(4));
}

/// Rows of the table: mean, 1 / sqrt(var + eps), weight / sqrt(var + eps), bias.
fn write_table(
    p: &BatchNormParams,
    weight: &[f32],
    bias: &[f32],
    stats: impl Fn(usize) -> (f64, f64),
    table: &mut [f32],
) {
    let c = p.channels as usize;
    for i in 0..c {
        let (mean, var) = stats(i);
        let inv_std = 1.0 / (var + f64::from(p.eps)).sqrt();
        table[i] = mean as f32;
        table[c + i] = inv_std as f32;
        table[2 * c + i] = (f64::from(weight[i]) * inv_std) as f32;
        table[3 * c + i] = bias[i];
    }
}

/// Mean and biased variance of each channel from those of the blocks.
fn merge(p: &BatchNormParams, part: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (c, rows) = (p.channels as usize, p.rows as usize);
    let (mut mean, mut m2) = (vec![0.0f64; c], vec![0.0f64; c]);
    let mut seen = 0.0;
    for (b, part) in part.chunks_exact(2 * c).enumerate() {
        let first = b * p.rows_per_block as usize;
        let n = (rows - first).min(p.rows_per_block as usize) as f64;
        let (block_mean, block_m2) = part.split_at(c);
        for i in 0..c {
            let delta = f64::from(block_mean[i]) - mean[i];
            mean[i] += delta * n / (seen + n);
            m2[i] += f64::from(block_m2[i]) + delta * delta * seen * n / (seen + n);
        }
        seen += n;
    }
    m2.iter_mut().for_each(|v| *v /= rows as f64);
    (mean, m2)
}

/// `y = act((x - mean) * scale + bias + residual)`: `x, residual, table -> y`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let (x, res, table, y) = (a.f32(0), a.f32(1), a.f32(2), a.f32_mut(3));
    let c = p.channels as usize;
    match (p.act, p.residual != 0) {
        (ACT_RELU, false) => apply(c, x, x, table, y, |z, _| relu(z)),
        (ACT_RELU, true) => apply(c, x, res, table, y, |z, r| relu(z + r)),
        (ACT_SILU, false) => apply(c, x, x, table, y, |z, _| silu(z)),
        (ACT_SILU, true) => apply(c, x, res, table, y, |z, r| silu(z + r)),
        (_, false) => apply(c, x, x, table, y, |z, _| z),
        (_, true) => apply(c, x, res, table, y, |z, r| z + r),
    }
}

fn apply(
    c: usize,
    x: &[f32],
    res: &[f32],
    table: &[f32],
    y: &mut [f32],
    act: impl Fn(f32, f32) -> f32 + Sync,
) {
    let slab = rows::slab_len(c);
    rows::each(y, slab, x.len(), |i, y| {
        let t = Table::new(table, c);
        let input = x[i * slab..].chunks_exact(c).zip(res[i * slab..].chunks_exact(c));
        for (y, (x, res)) in y.chunks_exact_mut(c).zip(input) {
            for i in 0..c {
                y[i] = act(normalise(x[i], t.mean[i], t.scale[i], t.bias[i]), res[i]);
            }
        }
    });
}

#[inline(always)]
fn normalise(x: f32, mean: f32, scale: f32, bias: f32) -> f32 {
    (x - mean).mul_add(scale, bias)
}

/// What one element's gradient is made from. `third` is y for ReLU with a residual and the residual for SiLU with one.
#[derive(Clone, Copy)]
struct Row<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    third: &'a [f32],
}

/// The table's rows.
#[derive(Clone, Copy)]
struct Table<'a> {
    mean: &'a [f32],
    inv_std: &'a [f32],
    scale: &'a [f32],
    bias: &'a [f32],
}

impl<'a> Table<'a> {
    #[inline(always)]
    fn new(table: &'a [f32], c: usize) -> Self {
        let row = |i: usize| &table[i * c..][..c];
        Self { mean: row(0), inv_std: row(1), scale: row(2), bias: row(3) }
    }
}

/// `g = dy * act'(z)`, the gradient before the activation. `MODE` is 2 * act + residual, a constant so that each of the
/// six loops compiles to its own vector code.
#[inline(always)]
fn before_act<const MODE: u32>(r: &Row<'_>, t: &Table<'_>, i: usize) -> f32 {
    const RELU: u32 = 2 * ACT_RELU;
    const RELU_RES: u32 = RELU + 1;
    const SILU: u32 = 2 * ACT_SILU;
    const SILU_RES: u32 = SILU + 1;
    let z = || normalise(r.x[i], t.mean[i], t.scale[i], t.bias[i]);
    match MODE {
        // Without a residual the sign of y follows from x, which is being read anyway.
        RELU => {
            if z() > 0.0 {
                r.dy[i]
            } else {
                0.0
            }
        }
        RELU_RES => {
            if r.third[i] > 0.0 {
                r.dy[i]
            } else {
                0.0
            }
        }
        SILU => r.dy[i] * silu_slope(z()),
        SILU_RES => r.dy[i] * silu_slope(z() + r.third[i]),
        _ => r.dy[i],
    }
}

/// Calls `$f` with its constant set to this launch's activation and residual.
macro_rules! with_mode {
    ($p:expr, $f:ident ( $($arg:expr),* )) => {
        match 2 * $p.act + $p.residual {
            2 => $f::<2>($($arg),*),
            3 => $f::<3>($($arg),*),
            4 => $f::<4>($($arg),*),
            5 => $f::<5>($($arg),*),
            _ => $f::<0>($($arg),*),
        }
    };
}

/// Sums of g and g * xhat over each block of rows: `x, dy, third, table -> part [blocks, 2, C]`.
pub(crate) fn bwd_sums(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let third = if p.has_third() { a.f32(2) } else { a.f32(0) };
    with_mode!(p, sums(&p, [a.f32(0), a.f32(1), third], a.f32(3), a.f32_mut(4)));
}

fn sums<const MODE: u32>(
    p: &BatchNormParams,
    [x, dy, third]: [&[f32]; 3],
    table: &[f32],
    part: &mut [f32],
) {
    let c = p.channels as usize;
    let block = p.rows_per_block as usize * c;
    rows::each(part, 2 * c, x.len(), |i, part| {
        let range = i * block..((i + 1) * block).min(x.len());
        let all = Row { x: &x[range.clone()], dy: &dy[range.clone()], third: &third[range] };
        block_sums::<MODE>(c, all, Table::new(table, c), part);
    });
}

#[inline(always)]
fn block_sums<const MODE: u32>(c: usize, all: Row<'_>, t: Table<'_>, part: &mut [f32]) {
    let (sum_g, sum_gx) = part.split_at_mut(c);
    let sum_gx = &mut sum_gx[..c];
    sum_g.fill(0.0);
    sum_gx.fill(0.0);
    let rows = all.x.len() / c;
    let row = |r: usize| Row {
        x: &all.x[r * c..][..c],
        dy: &all.dy[r * c..][..c],
        third: &all.third[r * c..][..c],
    };
    let mut r = 0;
    // Four rows at a time, as in `rows::fold`.
    while r + 4 <= rows {
        let four = [row(r), row(r + 1), row(r + 2), row(r + 3)];
        for i in 0..c {
            let (mut s, mut sx) = (sum_g[i], sum_gx[i]);
            for one in &four {
                let g = before_act::<MODE>(one, &t, i);
                s += g;
                sx = g.mul_add((one.x[i] - t.mean[i]) * t.inv_std[i], sx);
            }
            (sum_g[i], sum_gx[i]) = (s, sx);
        }
        r += 4;
    }
    while r < rows {
        let one = row(r);
        for i in 0..c {
            let g = before_act::<MODE>(&one, &t, i);
            sum_g[i] += g;
            sum_gx[i] = g.mul_add((one.x[i] - t.mean[i]) * t.inv_std[i], sum_gx[i]);
        }
        r += 1;
    }
}

/// The sums over the blocks: `part -> dweight, dbias`.
pub(crate) fn bwd_finish(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let c = p.channels as usize;
    let mut total = vec![0.0f64; 2 * c];
    for part in a.f32(0).chunks_exact(2 * c) {
        for (total, &v) in total.iter_mut().zip(part) {
            *total += f64::from(v);
        }
    }
    let (dweight, dbias) = (a.f32_mut(1), a.f32_mut(2));
    for i in 0..c {
        (dbias[i], dweight[i]) = (total[i] as f32, total[c + i] as f32);
    }
}

/// `dx = scale * (g - mean(g) - xhat * mean(g * xhat))` in training, `scale * g` in inference, and the residual's
/// gradient g: `x, dy, third, table, dweight, dbias -> dx, dresidual`.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let third = if p.has_third() { a.f32(2) } else { a.f32(0) };
    let c = p.channels as usize;
    let table = Table::new(a.f32(3), c);
    // dx = scale * g - (x - mean) * slope - offset
    let mut lines = vec![0.0f32; 2 * c];
    if p.training != 0 {
        let per_row = 1.0 / p.rows as f32;
        for i in 0..c {
            lines[i] = table.scale[i] * a.f32(5)[i] * per_row;
            lines[c + i] = table.scale[i] * table.inv_std[i] * a.f32(4)[i] * per_row;
        }
    }
    let input = [a.f32(0), a.f32(1), third];
    let (dx, dres) = (a.f32_mut(6), if p.residual_grad != 0 { a.f32_mut(7) } else { &mut [] });
    with_mode!(p, gradient(input, table, &lines, dx, dres));
}

fn gradient<const MODE: u32>(
    [x, dy, third]: [&[f32]; 3],
    t: Table<'_>,
    lines: &[f32],
    dx: &mut [f32],
    dres: &mut [f32],
) {
    let c = t.mean.len();
    let slab = rows::slab_len(c);
    let row = |at: usize| Row { x: &x[at..][..c], dy: &dy[at..][..c], third: &third[at..][..c] };
    let (offset, slope) = lines.split_at(c);
    if dres.is_empty() {
        rows::each(dx, slab, x.len(), |number, dx| {
            for (r, dx) in dx.chunks_exact_mut(c).enumerate() {
                let row = row(number * slab + r * c);
                for i in 0..c {
                    let g = before_act::<MODE>(&row, &t, i);
                    let centred = (row.x[i] - t.mean[i]).mul_add(slope[i], offset[i]);
                    dx[i] = g.mul_add(t.scale[i], -centred);
                }
            }
        });
        return;
    }
    rows::each2((dx, slab), (dres, slab), x.len(), |number, dx, dres| {
        let both = dx.chunks_exact_mut(c).zip(dres.chunks_exact_mut(c));
        for (r, (dx, dres)) in both.enumerate() {
            let row = row(number * slab + r * c);
            for i in 0..c {
                let g = before_act::<MODE>(&row, &t, i);
                let centred = (row.x[i] - t.mean[i]).mul_add(slope[i], offset[i]);
                dx[i] = g.mul_add(t.scale[i], -centred);
                dres[i] = g;
            }
        }
    });
}
