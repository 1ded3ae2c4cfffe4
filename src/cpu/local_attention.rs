//! CPU kernels of local attention: eight (image, head) pairs side by side, one to a vector lane.
//!
//! All pairs have the same window at the same place of the map, so with a pair in each lane the walk over a window has no
//! masks and no shuffles: a score is one vector multiply-add a channel for eight pairs at once, and a key outside the map
//! is skipped for all eight. A task packs its rows of q, k, v as `[place][channel]` of such vectors and walks over pairs
//! of a query row and a key row; two small loops do the arithmetic: [`dots`] (one vector with up to 8 neighbours, which
//! makes scores) and [`combine`] (a weighted sum of up to 8 neighbours, which makes outputs and all gradients). Both
//! keep their sums in registers and read each operand once, so they run near the rate of the multiply-add units.
//!
//! Position tables cost kh + kw dot products a query: q.rel_h[a] and q.rel_w[b] are made once for a row of queries.
//! Backward sums the score gradients over the window's rows and columns in the same form before they meet the tables.
//!
//! Work a query, pair and channel: forward 4 kh kw flop, backward 10 kh kw. Bytes: each tensor once, packed and unpacked.
//! Scratch: the packed rows of a task and thread, never a window. Fewer than eight pairs leave lanes idle.
//!
//! Sums run in an order that depends on the shape alone: the same bits with any number of threads.

use super::lanes::{F32x8, LANES};
use super::simd::vector_fn;
use super::threads::SharedMut;
use crate::kernel::CpuArgs;
use crate::ops::local_attention::LocalAttentionParams as Params;
use std::ops::Range;

mod backward;
mod forward;
mod split;

use backward::{Inputs, backward};
use forward::forward;
pub(crate) use split::{dkv, dq, tables, tables_sum};

/// [`forward`]: q, k, v, tables -> y, lse.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    forward(&a.params(), [a.f32(0), a.f32(1), a.f32(2)], a.f32(3), a.f32_mut(4), a.f32_mut(5));
}

/// [`backward`]: q, k, v, tables, dy, stats -> dq, dk, dv and the tables' gradients, packed in one buffer.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (dq, rest) = a.f32_mut(6).split_at_mut(p.part as usize);
    let (dk, rest) = rest.split_at_mut(p.part as usize);
    let (dv, dtables) = rest.split_at_mut(p.part as usize);
    let len = a.f32(0).len();
    backward(&p, inputs(a), [&mut dq[..len], &mut dk[..len], &mut dv[..len]], dtables);
}

/// The first six bindings of every backward kernel.
fn inputs<'a>(a: &CpuArgs<'a>) -> Inputs<'a> {
    let [q, k, v, tables, dy, stats] = [0, 1, 2, 3, 4, 5].map(|i| a.f32(i));
    Inputs { q, k, v, dy, stats, tables }
}

/// Eight (image, head) pairs and the rows of the map that a task answers for.
struct Task {
    /// Where token 0 of each pair starts in tensors `[N, H, W, G, d]`; lanes without a pair repeat the last one.
    base: [usize; LANES],
    /// The same in tensors `[N, H, W, G]`.
    row: [usize; LANES],
    /// The head of each lane.
    head: [usize; LANES],
    /// Lanes that have a pair.
    live: usize,
    /// Rows of the map.
    rows: Range<usize>,
}

/// The tasks of a problem: eight pairs at a time, their rows cut into bands so that there are at least `least` tasks and
/// a band's packed tensors (`tensors` of them) stay within a few MiB, but no lower than the halo that a band costs.
fn tasks(p: &Params, least: usize, tensors: usize) -> Vec<Task> {
    const SCRATCH: usize = 8 << 20;
    let (h, w, g, d) = (p.h as usize, p.w as usize, p.g as usize, p.d as usize);
    let pairs = p.n as usize * g;
    let groups = pairs.div_ceil(LANES);
    let row_bytes = tensors * w * d * size_of::<F32x8>();
    let most = (SCRATCH / row_bytes).max(2 * p.kh as usize);
    let band = h.div_ceil(least.div_ceil(groups)).max(p.kh as usize - 1).min(most).min(h);
    let mut tasks = Vec::new();
    for first in (0..pairs).step_by(LANES) {
        let live = LANES.min(pairs - first);
        let pair: [usize; LANES] = std::array::from_fn(|l| first + l.min(live - 1));
        let row = pair.map(|i| i / g * h * w * g + i % g);
        let (base, head) = (row.map(|r| r * d), pair.map(|i| i % g));
        for y in (0..h).step_by(band) {
            tasks.push(Task { base, row, head, live, rows: y..h.min(y + band) });
        }
    }
    tasks
}

/// The rows of the map that windows round `rows` reach.
fn halo(p: &Params, rows: &Range<usize>) -> Range<usize> {
    let reach = p.kh as usize / 2;
    rows.start.saturating_sub(reach)..(p.h as usize).min(rows.end + reach)
}

/// The window's columns `b` whose keys lie in the map, for a query in column x.
#[inline(always)]
fn columns(p: &Params, x: usize) -> Range<usize> {
    let (w, kw) = (p.w as usize, p.kw as usize);
    (kw / 2).saturating_sub(x)..kw.min(w + kw / 2 - x)
}

/// The map's row that the window's row `a` of a query in row y falls on.
#[inline(always)]
fn key_row(p: &Params, y: usize, a: usize) -> Option<usize> {
    (y + a).checked_sub(p.kh as usize / 2).filter(|row| *row < p.h as usize)
}

/// Scratch memory that only grows: the first n vectors of `buffer`, whatever they hold.
fn room(buffer: &mut Vec<F32x8>, n: usize) -> &mut [F32x8] {
    if buffer.len() < n {
        buffer.resize(n, F32x8::ZERO);
    }
    &mut buffer[..n]
}

/// Rows of the map as `[place][channel]`, a pair in each lane, times `scale`.
#[inline(always)]
fn pack<'s>(
    p: &Params,
    task: &Task,
    x: &[f32],
    rows: &Range<usize>,
    scale: f32,
    out: &'s mut Vec<F32x8>,
) -> &'s [F32x8] {
    let (w, d, stride) = (p.w as usize, p.d as usize, (p.g * p.d) as usize);
    let out = room(out, rows.len() * w * d);
    for (i, out) in out.chunks_exact_mut(d).enumerate() {
        let at = (rows.start * w + i) * stride;
        let lanes = task.base.map(|base| &x[base + at..][..d]);
        for (c, out) in out.iter_mut().enumerate() {
            for l in 0..LANES {
                out.0[l] = scale * lanes[l][c];
            }
        }
    }
    out
}

/// The way back: `out = scale * packed` for the task's rows and live lanes.
///
/// # Safety
/// No other thread touches the task's rows and pairs of `out`.
#[inline(always)]
unsafe fn unpack(p: &Params, task: &Task, packed: &[F32x8], scale: f32, out: &SharedMut<'_>) {
    let (w, d, stride) = (p.w as usize, p.d as usize, (p.g * p.d) as usize);
    for (i, packed) in packed.chunks_exact(d).enumerate() {
        let at = (task.rows.start * w + i) * stride;
        for (l, base) in task.base[..task.live].iter().enumerate() {
            // SAFETY: passed on to the caller.
            let out = unsafe { out.slice(base + at, d) };
            for (out, x) in out.iter_mut().zip(packed) {
                *out = scale * x.0[l];
            }
        }
    }
}

/// The products of x with M neighbours of `d` channels each.
#[inline(always)]
fn dots_of<const M: usize>(x: &[F32x8], neighbours: &[F32x8]) -> [F32x8; M] {
    let d = x.len();
    let rows: [&[F32x8]; M] = std::array::from_fn(|m| &neighbours[m * d..][..d]);
    let mut sums = [F32x8::ZERO; M];
    for c in 0..d {
        for m in 0..M {
            sums[m] = x[c].mul_add(rows[m][c], sums[m]);
        }
    }
    sums
}

/// `out += sum over m of weights[m] * neighbour m`, M of them.
#[inline(always)]
fn combine_of<const M: usize>(weights: &[F32x8], neighbours: &[F32x8], out: &mut [F32x8]) {
    let d = out.len();
    let weights: [F32x8; M] = std::array::from_fn(|m| weights[m]);
    let rows: [&[F32x8]; M] = std::array::from_fn(|m| &neighbours[m * d..][..d]);
    for c in 0..d {
        let mut sum = out[c];
        for m in 0..M {
            sum = weights[m].mul_add(rows[m][c], sum);
        }
        out[c] = sum;
    }
}

/// Calls a function of one to eight neighbours with their number known to the compiler, so that sums stay in registers.
macro_rules! of_count {
    ($count:expr, $call:ident $arguments:tt) => {
        of_count!(@ $count, $call $arguments, 1 2 3 4 5 6 7)
    };
    (@ $count:expr, $call:ident $arguments:tt, $($m:literal)+) => {
        match $count {
            $($m => $call::<$m> $arguments,)+
            _ => $call::<8> $arguments,
        }
    };
}

#[inline(always)]
fn add_dots<const M: usize>(x: &[F32x8], neighbours: &[F32x8], sums: &mut [F32x8]) {
    for (sum, dot) in sums.iter_mut().zip(dots_of::<M>(x, neighbours)) {
        *sum = sum.add(dot);
    }
}

vector_fn! {
    /// `sums[m] += x . neighbour m`.
    fn dots(x: &[F32x8], neighbours: &[F32x8], sums: &mut [F32x8]) {
        for (i, sums) in sums.chunks_mut(8).enumerate() {
            let neighbours = &neighbours[8 * i * x.len()..];
            of_count!(sums.len(), add_dots(x, neighbours, sums));
        }
    }
}

vector_fn! {
    /// `out += sum over m of weights[m] * neighbour m`.
    fn combine(weights: &[F32x8], neighbours: &[F32x8], out: &mut [F32x8]) {
        for (i, weights) in weights.chunks(8).enumerate() {
            let neighbours = &neighbours[8 * i * out.len()..];
            of_count!(weights.len(), combine_of(weights, neighbours, out));
        }
    }
}

/// The position tables as the lanes of a task see them, absent ones empty: `[kh][d]`, `[kw][d]`, `[kh][kw]`.
#[derive(Default)]
struct Tables {
    rel_h: Vec<F32x8>,
    rel_w: Vec<F32x8>,
    bias: Vec<F32x8>,
}

impl Tables {
    fn fill(&mut self, p: &Params, task: &Task, tables: &[f32]) {
        let layout = p.layout();
        let at = layout.offsets();
        let (kh, kw, d) = (p.kh as usize, p.kw as usize, p.d as usize);
        let rows = [(&mut self.rel_h, kh, 0), (&mut self.rel_w, kw, 1)];
        for (out, rows, i) in rows {
            out.clear();
            let rows = if layout.has[i] { rows } else { 0 };
            out.extend((0..rows * d).map(|j| {
                let row = at[i] + j / d * layout.heads * d + j % d;
                F32x8(task.head.map(|g| tables[row + g * d]))
            }));
        }
        self.bias.clear();
        let offsets = if layout.has[2] { kh * kw } else { 0 };
        self.bias.extend(
            (0..offsets).map(|o| F32x8(task.head.map(|g| tables[at[2] + g * kh * kw + o]))),
        );
    }

    fn any(&self) -> bool {
        !(self.rel_h.is_empty() && self.rel_w.is_empty() && self.bias.is_empty())
    }
}

/// For each query of a row, something for each row and each column of its window: its products with `rel_h` and `rel_w`,
/// or sums of score gradients. `[W][kh]` and `[W][kw]`.
#[derive(Default)]
struct ByOffset {
    h: Vec<F32x8>,
    w: Vec<F32x8>,
}

impl ByOffset {
    /// The products of a row of queries with both tables; zero where there is none.
    #[inline(always)]
    fn products(&mut self, p: &Params, tables: &Tables, q: &[F32x8]) {
        self.clear(p);
        let (kh, kw, d) = (p.kh as usize, p.kw as usize, p.d as usize);
        for (table, out, k) in [(&tables.rel_h, &mut self.h, kh), (&tables.rel_w, &mut self.w, kw)]
        {
            if !table.is_empty() {
                for (q, out) in q.chunks_exact(d).zip(out.chunks_exact_mut(k)) {
                    dots(q, table, out);
                }
            }
        }
    }

    #[inline(always)]
    fn clear(&mut self, p: &Params) {
        let w = p.w as usize;
        room(&mut self.h, w * p.kh as usize).fill(F32x8::ZERO);
        room(&mut self.w, w * p.kw as usize).fill(F32x8::ZERO);
    }

    /// Starts the scores of the query in column x with row `a` of its window: the position terms, less `less`; minus
    /// infinity for places that leave the softmax.
    #[inline(always)]
    fn start(
        &self,
        p: &Params,
        tables: &Tables,
        (x, a): (usize, usize),
        outside: bool,
        less: F32x8,
        scores: &mut [F32x8],
    ) {
        let (kh, kw) = (p.kh as usize, p.kw as usize);
        let row = self.h[x * kh + a].sub(less);
        let by_column = &self.w[x * kw..][..kw];
        for (s, w) in scores.iter_mut().zip(by_column) {
            *s = row.add(*w);
        }
        if !tables.bias.is_empty() {
            let bias = &tables.bias[a * kw..][..kw];
            scores.iter_mut().zip(bias).for_each(|(s, b)| *s = s.add(*b));
        }
        if p.zero_border == 0 {
            let inside = if outside { 0..0 } else { columns(p, x) };
            let nothing = F32x8::splat(f32::NEG_INFINITY);
            scores[..inside.start].fill(nothing);
            scores[inside.end..].fill(nothing);
        }
    }
}

#[cfg(test)]
mod tests;
