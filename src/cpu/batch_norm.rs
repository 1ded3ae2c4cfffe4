//! CPU kernels of [`crate::ops::batch_norm`].

use super::elementwise::{relu, silu, silu_slope};
use super::rows;
use super::simd::vector_fn;
use crate::kernel::CpuArgs;
use crate::ops::batch_norm::{ACT_RELU, ACT_SILU, BatchNormParams};

/// Floats of a chunk that is read twice by the statistics: half of a first-level cache.
const CHUNK: usize = 4096;
/// Channels handled together in a vector register.
const LANES: usize = 8;

// What a pass is compiled for: 2 * activation + residual, a constant so that each loop becomes vector code of its own.
const RES: u32 = 1;
const RELU: u32 = 2 * ACT_RELU;
const RELU_RES: u32 = RELU + 1;
const SILU: u32 = 2 * ACT_SILU;
const SILU_RES: u32 = SILU + 1;

/// Calls `$f` with its constant set to this launch's activation and residual.
macro_rules! with_mode {
    ($mode:expr, $f:ident ( $($arg:expr),* )) => {
        match $mode {
            RES => $f::<RES>($($arg),*),
            RELU => $f::<RELU>($($arg),*),
            RELU_RES => $f::<RELU_RES>($($arg),*),
            SILU => $f::<SILU>($($arg),*),
            SILU_RES => $f::<SILU_RES>($($arg),*),
            _ => $f::<0>($($arg),*),
        }
    };
}

/// Mean and sum of squared deviations of each block of rows: `x [rows, C] -> part [blocks, 2, C]`.
pub(crate) fn stats(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let (x, c) = (a.f32(0), p.channels as usize);
    let block = p.rows_per_block as usize * c;
    rows::each!(a.f32_mut(1), 2 * c, x.len(), |i, part| {
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
        let (to_mean, to_m2) = (n / (seen + n), seen * n / (seen + n));
        let (block_mean, block_m2) = part.split_at(c);
        for i in 0..c {
            let delta = f64::from(block_mean[i]) - mean[i];
            mean[i] += delta * to_mean;
            m2[i] += f64::from(block_m2[i]) + delta * delta * to_m2;
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
    with_mode!(2 * p.act + p.residual, apply(p.channels as usize, x, res, table, y));
}

fn apply<const MODE: u32>(c: usize, x: &[f32], res: &[f32], table: &[f32], y: &mut [f32]) {
    let slab = rows::slab_len(c);
    rows::each!(y, slab, x.len(), |i, y| {
        let t = Table::new(table, c);
        let input = x[i * slab..].chunks_exact(c).zip(res[i * slab..].chunks_exact(c));
        for (y, (x, res)) in y.chunks_exact_mut(c).zip(input) {
            for i in 0..c {
                let z = normalise(x[i], t.mean[i], t.scale[i], t.bias[i]);
                y[i] = end::<MODE>(z, res[i]);
            }
        }
    });
}

/// The activation of z, or of its sum with the residual.
#[inline(always)]
fn end<const MODE: u32>(z: f32, res: f32) -> f32 {
    activate::<MODE>(if MODE % 2 == RES { z + res } else { z })
}

/// The activation of z; `MODE` is 2 * activation + residual.
#[inline(always)]
pub(crate) fn activate<const MODE: u32>(z: f32) -> f32 {
    match MODE {
        RELU | RELU_RES => relu(z),
        SILU | SILU_RES => silu(z),
        _ => z,
    }
}

#[inline(always)]
pub(crate) fn normalise(x: f32, mean: f32, scale: f32, bias: f32) -> f32 {
    (x - mean).mul_add(scale, bias)
}

/// What one element's gradient is made from. `third` is y for ReLU with a residual, and for SiLU first the residual, if there is one, and then
/// the activation's slope: see [`slopes`].
#[derive(Clone, Copy)]
struct Row<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    third: &'a [f32],
}

impl<'a> Row<'a> {
    /// Row r of several.
    #[inline(always)]
    fn row(&self, c: usize, r: usize) -> Row<'a> {
        let at = r * c..(r + 1) * c;
        Row { x: &self.x[at.clone()], dy: &self.dy[at.clone()], third: &self.third[at] }
    }
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

/// `g = dy * act'(z)`, the gradient before the activation, of channels `i..i + L` of a row.
///
/// Lane by lane: of a plain loop over the channels the compiler makes no vectors, for it cannot see that a dozen slices do
/// not overlap (seen: the two backward passes of a ResNet18 took a sixth of the training step, now a fortieth).
#[inline(always)]
fn before_act<const L: usize, const MODE: u32>(r: &Row<'_>, t: &Table<'_>, i: usize) -> [f32; L] {
    let (x, dy, third) = (take::<L>(r.x, i), take::<L>(r.dy, i), take::<L>(r.third, i));
    let (mean, scale, bias) = (take::<L>(t.mean, i), take::<L>(t.scale, i), take::<L>(t.bias, i));
    std::array::from_fn(|l| {
        let z = || normalise(x[l], mean[l], scale[l], bias[l]);
        match MODE {
            // Without a residual the sign of y follows from x, which is being read anyway.
            RELU => select(z() > 0.0, dy[l]),
            RELU_RES => select(third[l] > 0.0, dy[l]),
            SILU | SILU_RES => dy[l] * third[l],
            _ => dy[l],
        }
    })
}

/// For SiLU, the slope at every z of a row goes to `out`, and takes `third`'s place. A pass of its own, for a flat loop is what the compiler makes
/// vectors of: among eight lanes of all else it left the exponential scalar (seen: 238 of the 530 ms of a step of EfficientNet-B0).
#[inline(always)]
fn slopes<'a, const MODE: u32>(row: Row<'a>, t: &Table<'_>, out: &'a mut [f32]) -> Row<'a> {
    if !matches!(MODE, SILU | SILU_RES) {
        return row;
    }
    let c = out.len();
    let (x, res) = (&row.x[..c], &row.third[..c]);
    let (mean, scale, bias) = (&t.mean[..c], &t.scale[..c], &t.bias[..c]);
    for i in 0..c {
        let z = normalise(x[i], mean[i], scale[i], bias[i]);
        out[i] = silu_slope(if MODE == SILU_RES { z + res[i] } else { z });
    }
    Row { third: out, ..row }
}

#[inline(always)]
fn select(keep: bool, x: f32) -> f32 {
    if keep { x } else { 0.0 }
}

/// `x[i..i + L]` by value.
#[inline(always)]
fn take<const L: usize>(x: &[f32], i: usize) -> [f32; L] {
    let x = &x[i..][..L];
    std::array::from_fn(|l| x[l])
}

/// Sums of g and g * xhat over each block of rows: `x, dy, third, table -> part [blocks, 2, C]`.
pub(crate) fn bwd_sums(a: &CpuArgs<'_>) {
    let p: BatchNormParams = a.params();
    let third = if p.has_third() { a.f32(2) } else { a.f32(0) };
    with_mode!(
        2 * p.act + p.residual,
        sums(&p, [a.f32(0), a.f32(1), third], a.f32(3), a.f32_mut(4))
    );
}

fn sums<const MODE: u32>(
    p: &BatchNormParams,
    [x, dy, third]: [&[f32]; 3],
    table: &[f32],
    part: &mut [f32],
) {
    let c = p.channels as usize;
    let block = p.rows_per_block as usize * c;
    rows::share(part, 2 * c, x.len(), &|i, part| {
        let range = i * block..((i + 1) * block).min(x.len());
        let all = Row { x: &x[range.clone()], dy: &dy[range.clone()], third: &third[range] };
        block_sums::<MODE>(all, &Table::new(table, c), part);
    });
}

vector_fn! {
    fn block_sums<const MODE: u32>(all: Row<'_>, t: &Table<'_>, part: &mut [f32]) {
        let c = t.mean.len();
        let (sum_g, sum_gx) = part.split_at_mut(c);
        sum_g.fill(0.0);
        sum_gx.fill(0.0);
        let mut scratch = vec![0.0f32; 4 * c];
        let (rows, mut r) = (all.x.len() / c, 0);
        // Four rows at a time, as in `rows::fold`.
        while r + 4 <= rows {
            let (low, high) = scratch.split_at_mut(2 * c);
            let ((s0, s1), (s2, s3)) = (low.split_at_mut(c), high.split_at_mut(c));
            let row = |i: usize, out| slopes::<MODE>(all.row(c, r + i), t, out);
            let four = [row(0, s0), row(1, s1), row(2, s2), row(3, s3)];
            add_rows::<_, MODE>(four, t, sum_g, sum_gx);
            r += 4;
        }
        for r in r..rows {
            let row = slopes::<MODE>(all.row(c, r), t, &mut scratch[..c]);
            add_rows::<_, MODE>([row], t, sum_g, sum_gx);
        }
    }
}

/// Adds g and g * xhat of a few rows, in order.
#[inline(always)]
fn add_rows<const R: usize, const MODE: u32>(
    rows: [Row<'_>; R],
    t: &Table<'_>,
    sum_g: &mut [f32],
    sum_gx: &mut [f32],
) {
    let mut i = 0;
    while i + LANES <= sum_g.len() {
        add_lanes::<LANES, MODE>(&rows, t, i, sum_g, sum_gx);
        i += LANES;
    }
    for i in i..sum_g.len() {
        add_lanes::<1, MODE>(&rows, t, i, sum_g, sum_gx);
    }
}

#[inline(always)]
fn add_lanes<const L: usize, const MODE: u32>(
    rows: &[Row<'_>],
    t: &Table<'_>,
    i: usize,
    sum_g: &mut [f32],
    sum_gx: &mut [f32],
) {
    let (mean, inv_std) = (take::<L>(t.mean, i), take::<L>(t.inv_std, i));
    let (mut s, mut sx) = (take::<L>(sum_g, i), take::<L>(sum_gx, i));
    for row in rows {
        let (x, g) = (take::<L>(row.x, i), before_act::<L, MODE>(row, t, i));
        for l in 0..L {
            s[l] += g[l];
            sx[l] = g[l].mul_add((x[l] - mean[l]) * inv_std[l], sx[l]);
        }
    }
    sum_g[i..][..L].copy_from_slice(&s);
    sum_gx[i..][..L].copy_from_slice(&sx);
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
    with_mode!(2 * p.act + p.residual, gradient(input, table, &lines, dx, dres));
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
    let rows = |i: usize, len: usize| {
        let range = i * slab..i * slab + len;
        Row { x: &x[range.clone()], dy: &dy[range.clone()], third: &third[range] }
    };
    if dres.is_empty() {
        rows::share(dx, slab, x.len(), &|i, dx| {
            gradient_rows::<MODE>(rows(i, dx.len()), &t, lines, dx, &mut []);
        });
    } else {
        rows::share2((dx, slab), (dres, slab), x.len(), &|i, dx, dres| {
            gradient_rows::<MODE>(rows(i, dx.len()), &t, lines, dx, dres);
        });
    }
}

vector_fn! {
    /// Rows of dx, and of dres where that is not empty.
    fn gradient_rows<const MODE: u32>(
        all: Row<'_>,
        t: &Table<'_>,
        lines: &[f32],
        dx: &mut [f32],
        dres: &mut [f32],
    ) {
        let c = t.mean.len();
        let mut scratch = vec![0.0f32; c];
        for (r, dx) in dx.chunks_exact_mut(c).enumerate() {
            let row = slopes::<MODE>(all.row(c, r), t, &mut scratch);
            let dres = if dres.is_empty() { &mut [] } else { &mut dres[r * c..][..c] };
            let mut i = 0;
            while i + LANES <= c {
                gradient_lanes::<LANES, MODE>(&row, t, lines, i, dx, dres);
                i += LANES;
            }
            for i in i..c {
                gradient_lanes::<1, MODE>(&row, t, lines, i, dx, dres);
            }
        }
    }
}

#[inline(always)]
fn gradient_lanes<const L: usize, const MODE: u32>(
    row: &Row<'_>,
    t: &Table<'_>,
    lines: &[f32],
    i: usize,
    dx: &mut [f32],
    dres: &mut [f32],
) {
    let (offset, slope) = (take::<L>(lines, i), take::<L>(lines, dx.len() + i));
    let (mean, scale) = (take::<L>(t.mean, i), take::<L>(t.scale, i));
    let (x, g) = (take::<L>(row.x, i), before_act::<L, MODE>(row, t, i));
    let image: [f32; L] = std::array::from_fn(|l| {
        let centred = (x[l] - mean[l]).mul_add(slope[l], offset[l]);
        g[l].mul_add(scale[l], -centred)
    });
    dx[i..][..L].copy_from_slice(&image);
    if !dres.is_empty() {
        dres[i..][..L].copy_from_slice(&g);
    }
}
