//! CPU kernels of global attention: flash style, one head at a time, every product through the small [`gemm`].
//!
//! A task is one head (n, g), or a stretch of its tokens where there are few heads. It packs what it multiplies with: as
//! "token panels" (16 tokens side by side, a `[d, 16]` matrix each) for Q K^T and dO V^T, and as "column panels" (16
//! channels side by side, `[tokens, 16]` each) for P V, dS K and the like. Then it walks tiles of queries times keys; a tile
//! of probabilities and one of score gradients stay in the nearest cache, and nothing of size (H W)^2 exists. Scores are
//! kept in base 2 (log2(e) is folded into the packed keys), which saves the exponential a multiplication.
//!
//! Position tables cost one small product for each tile of queries: `q . rel_h[a]` for all 2H-1 offsets a, likewise for
//! `rel_w`; a score then adds two numbers of these. Backward sums the score gradients along rows and columns of the map,
//! and two small products turn the sums into dq and the tables' gradients.
//!
//! Sums run in an order that depends on the shape alone: the same bits with any number of threads.

use super::gemm::{COLS, gemm};
use super::lanes::{F32x8, LANES};
use super::pack::{pack_columns, pack_rows};
use super::simd::vector_fn;
use super::threads::SharedMut;
use crate::kernel::CpuArgs;
use crate::ops::global_attention::GlobalAttentionParams as Params;
use std::f32::consts::LOG2_E;
use std::ops::Range;

mod backward;
mod forward;
mod split;

pub(crate) use backward::{Inputs, backward};
pub(crate) use forward::{forward, one_head};
pub(crate) use split::{dkv, dq, tables, tables_sum};

/// [`forward`]: q, k, v, tables -> y, lse.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    forward(&a.params(), a.f32(0), a.f32(1), a.f32(2), a.f32(3), a.f32_mut(4), a.f32_mut(5));
}

/// [`backward`]: q, k, v, tables, dy, stats -> dq, dk, dv and the tables' gradients, packed in one buffer.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (dq, rest) = a.f32_mut(6).split_at_mut(p.part as usize);
    let (dk, rest) = rest.split_at_mut(p.part as usize);
    let (dv, dtables) = rest.split_at_mut(p.part as usize);
    let len = p.len();
    backward(&p, inputs(a), &mut dq[..len], &mut dk[..len], &mut dv[..len], dtables);
}

/// The first six bindings of every backward kernel.
fn inputs<'a>(a: &CpuArgs<'a>) -> Inputs<'a> {
    let [q, k, v, tables, dy, stats] = [0, 1, 2, 3, 4, 5].map(|i| a.f32(i));
    Inputs { q, k, v, dy, stats, tables }
}

/// Queries of a tile: a multiple of the 6 rows that `gemm` keeps in registers. Timed with 24..96 queries times 64..128 keys
/// (14x14 and 28x28 places, d = 32 and 64): all within 5 %, as long as a tile fits the second-level cache; 54 leaves no tile of a
/// few queries at the end of 7x7 and 14x14 places.
const TILE_Q: usize = 54;
/// Keys of a tile.
const TILE_K: usize = 128;
/// Row length of a tile: a little more, so that a column of it does not fall on few cache sets.
const WIDTH: usize = TILE_K + COLS;

/// Fewer heads than this are cut into stretches of tokens, so that many threads find work with a batch of one.
const MIN_TASKS: usize = 16;

/// Where one head lies in tensors `[N, H, W, G, d]`: token t starts at `base + t * stride`.
#[derive(Clone, Copy)]
struct Head {
    n: usize,
    g: usize,
    base: usize,
    stride: usize,
    d: usize,
}

/// One head and the tokens a task answers for.
struct Task {
    head: Head,
    tokens: Range<usize>,
}

/// The tasks of a problem: all heads, in stretches that are multiples of `step` tokens. Depends on the shape alone.
fn tasks(p: &Params, step: usize) -> Vec<Task> {
    let (tokens, groups, d) = (p.tokens(), p.g as usize, p.d as usize);
    let heads = p.n as usize * groups;
    let pieces = MIN_TASKS.div_ceil(heads.max(1));
    let stretch = tokens.div_ceil(pieces).next_multiple_of(step);
    let mut tasks = Vec::new();
    for n in 0..p.n as usize {
        for g in 0..groups {
            let (base, stride) = ((n * tokens * groups + g) * d, groups * d);
            let head = Head { n, g, base, stride, d };
            let starts = (0..tokens).step_by(stretch);
            tasks.extend(starts.map(|t| Task { head, tokens: t..tokens.min(t + stretch) }));
        }
    }
    tasks
}

/// The number of 16-wide panels that hold n columns.
fn panels(n: usize) -> usize {
    n.div_ceil(COLS)
}

/// Scratch memory that only grows: the first n numbers of `buffer`, whatever they hold.
fn room(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if buffer.len() < n {
        buffer.resize(n, 0.0);
    }
    &mut buffer[..n]
}

/// Rows `[count, d]`, `stride` apart, as token panels: `out[t / 16][c][t % 16] = scale * x[t][c]`, zeros after the last.
fn pack_tokens<'a>(
    x: &[f32],
    stride: usize,
    count: usize,
    d: usize,
    scale: f32,
    out: &'a mut Vec<f32>,
) -> &'a [f32] {
    let out = room(out, panels(count) * d * COLS);
    for (panel, out) in out.chunks_exact_mut(d * COLS).enumerate() {
        let first = panel * COLS;
        let rows = COLS.min(count - first);
        pack_rows(&x[first * stride..], stride, (rows, d), scale, out);
    }
    out
}

/// Rows `[count, d]`, `stride` apart, as column panels: `out[c / 16][t][c % 16] = scale * x[t][c]`, zeros past d.
fn pack_channels<'a>(
    x: &[f32],
    stride: usize,
    count: usize,
    d: usize,
    scale: f32,
    out: &'a mut Vec<f32>,
) -> &'a [f32] {
    let out = room(out, panels(d) * count * COLS);
    for (panel, out) in out.chunks_exact_mut(count * COLS).enumerate() {
        let first = panel * COLS;
        pack_columns(&x[first..], stride, COLS.min(d - first), scale, out);
    }
    out
}

/// `out[i, 16 * j..] = A[i, ..] . panel j` for the token panels from `first` on: scores, or dO V^T.
fn times_tokens(
    rows: usize,
    d: usize,
    a: &[f32],
    stride: usize,
    panels: &[f32],
    out: &mut [f32],
    width: usize,
) {
    for (j, panel) in panels.chunks_exact(d * COLS).enumerate() {
        let out = &mut out[j * COLS..];
        gemm(rows, COLS, d, 1.0, a, stride, 1, panel, COLS, false, out, width);
    }
}

/// `out[i, ..] (+)= sum over t of A[i, t] * x[t, ..]` with x in column panels of `count` tokens, of which `range` are
/// summed; A is `a[i * a_row + t * a_k]`, t from 0.
fn times_columns(
    rows: usize,
    (a, a_row, a_k): (&[f32], usize, usize),
    x: &[f32],
    count: usize,
    range: Range<usize>,
    add: bool,
    out: &mut [f32],
    width: usize,
) {
    let k = range.len();
    for (j, panel) in x.chunks_exact(count * COLS).enumerate() {
        let (panel, out) = (&panel[range.start * COLS..], &mut out[j * COLS..]);
        gemm(rows, COLS, k, 1.0, a, a_row, a_k, panel, COLS, add, out, width);
    }
}

/// The packed tables' places in the one buffer that holds them: `rel_h [2H-1, G*d]`, `rel_w [2W-1, G*d]`,
/// `bias [G, 2H-1, 2W-1]`, one after another, absent ones taking no place.
struct Tables<'a> {
    rel_h: Option<&'a [f32]>,
    rel_w: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
}

impl<'a> Tables<'a> {
    /// What head g sees: its columns of `rel_h` and `rel_w` (rows stay G*d apart), its own bias table.
    fn of_head(p: &Params, tables: &'a [f32], g: usize) -> Self {
        let [h, w, b, _] = p.layout().offsets();
        let (skip, bias) = (g * p.d as usize, p.offsets_h() * p.offsets_w());
        Self {
            rel_h: (p.has_rel_h != 0).then(|| &tables[h + skip..w]),
            rel_w: (p.has_rel_w != 0).then(|| &tables[w + skip..b]),
            bias: (p.has_bias != 0).then(|| &tables[b + g * bias..][..bias]),
        }
    }

    fn any(&self) -> bool {
        self.rel_h.is_some() || self.rel_w.is_some() || self.bias.is_some()
    }
}

/// The products of a tile of queries with `rel_h` and `rel_w`, in base 2: `[queries, 2H-1]` and `[queries, 2W-1]` with
/// rows padded to whole panels; where there is only one table, zeros for the other. Backward holds the sums of score gradients in
/// the same form.
#[derive(Default)]
struct ByOffset {
    h: Vec<f32>,
    w: Vec<f32>,
}

impl ByOffset {
    /// Room for `rows` queries, whatever it holds: rows of `rel_h`'s offsets and of `rel_w`'s. Eight numbers past the last row may be touched.
    fn room(&mut self, p: &Params, rows: usize) -> (&mut [f32], &mut [f32]) {
        let (h, w) = Self::widths(p);
        (room(&mut self.h, rows * h), room(&mut self.w, rows * w + LANES))
    }

    /// The lengths of their rows.
    fn widths(p: &Params) -> (usize, usize) {
        (panels(p.offsets_h()) * COLS, panels(p.offsets_w()) * COLS)
    }
}

/// A head's `rel_h` and `rel_w` as token panels, times log2(e).
struct PackedRel<'a> {
    h: Option<&'a [f32]>,
    w: Option<&'a [f32]>,
    d: usize,
}

impl<'a> PackedRel<'a> {
    fn new(p: &Params, tables: &Tables<'_>, h: &'a mut Vec<f32>, w: &'a mut Vec<f32>) -> Self {
        let (stride, d) = ((p.g * p.d) as usize, p.d as usize);
        Self {
            h: tables.rel_h.map(|x| pack_tokens(x, stride, p.offsets_h(), d, LOG2_E, h)),
            w: tables.rel_w.map(|x| pack_tokens(x, stride, p.offsets_w(), d, LOG2_E, w)),
            d,
        }
    }

    /// The products of `rows` queries with both tables.
    fn times(&self, p: &Params, rows: usize, q: &[f32], stride: usize, out: &mut ByOffset) {
        if self.h.is_none() && self.w.is_none() {
            return;
        }
        let (h, w) = out.room(p, rows);
        for (table, out) in [(self.h, h), (self.w, w)] {
            match table {
                Some(x) => times_tokens(rows, self.d, q, stride, x, out, x.len() / self.d),
                None => out.fill(0.0),
            }
        }
    }
}

/// Keys of a query that stay in one row of the map: the row's offset index a, the first key's column offset index b, its place `at` in the
/// tile and how many there are.
#[derive(Clone, Copy)]
struct Run {
    a: usize,
    b: usize,
    at: usize,
    len: usize,
}

/// The runs of the keys `keys` of query `t`. An iterator and no function with a closure: see [`crate::cpu::simd::vectorise`] (seen: with a closure,
/// which was called at two places and so compiled apart, 196 tokens of 32 channels with both tables took 5.0 ms forward, now 4.2).
fn runs(p: &Params, t: usize, keys: Range<usize>) -> Runs {
    let (h, w) = (p.h as usize, p.w as usize);
    let (a, b) = (keys.start / w + h - 1 - t / w, keys.start % w + w - 1 - t % w);
    let first = Run { a, b, at: 0, len: (w - keys.start % w).min(keys.len()) };
    Runs { next: first, column: w - 1 - t % w, w, keys: keys.len() }
}

struct Runs {
    next: Run,
    /// b of a row's first key.
    column: usize,
    w: usize,
    keys: usize,
}

impl Iterator for Runs {
    type Item = Run;

    #[inline(always)]
    fn next(&mut self) -> Option<Run> {
        let run = self.next;
        let at = run.at + run.len;
        self.next = Run { a: run.a + 1, b: self.column, at, len: self.w.min(self.keys - at) };
        (run.len > 0).then_some(run)
    }
}

vector_fn! {
    /// Adds the position terms to a tile of base-2 scores: rows for the queries from `first` on, columns for `keys`.
    fn add_positions(
        p: &Params,
        tables: &Tables<'_>,
        by_offset: &ByOffset,
        first: usize,
        keys: Range<usize>,
        scores: &mut [f32],
    ) {
        let (row_h, row_w) = ByOffset::widths(p);
        let rel = tables.rel_h.is_some() || tables.rel_w.is_some();
        for (i, scores) in scores.chunks_exact_mut(WIDTH).enumerate() {
            for Run { a, b, at, len } in runs(p, first + i, keys.clone()) {
                let scores = &mut scores[at..];
                if rel {
                    let h = F32x8::splat(by_offset.h[i * row_h + a]);
                    let w = &by_offset.w[i * row_w + b..];
                    for at in (0..len).step_by(LANES) {
                        let add = mask(len - at).of(eight(&w[at..]).add(h));
                        let sum = eight(&scores[at..]).add(add);
                        scores[at..at + LANES].copy_from_slice(&sum.0);
                    }
                }
                if let Some(bias) = tables.bias {
                    let add = &bias[a * p.offsets_w() + b..][..len];
                    scores.iter_mut().zip(add).for_each(|(s, v)| *s += LOG2_E * v);
                }
            }
        }
    }
}

/// Which of eight numbers count.
#[derive(Clone, Copy)]
struct Mask([u32; LANES]);

/// The first 1 to 8 of eight.
const MASKS: [Mask; LANES] = {
    let mut masks = [Mask([0; LANES]); LANES];
    let mut n = 0;
    while n < LANES {
        let mut l = 0;
        while l <= n {
            masks[n].0[l] = u32::MAX;
            l += 1;
        }
        n += 1;
    }
    masks
};

impl Mask {
    /// x where it counts, else 0.
    #[inline(always)]
    fn of(&self, x: F32x8) -> F32x8 {
        let mut out = F32x8::ZERO;
        for l in 0..LANES {
            out.0[l] = f32::from_bits(x.0[l].to_bits() & self.0[l]);
        }
        out
    }
}

/// What counts of the next eight where `left` are left. Rows of a map are short, 7 or 14 or 28 places: a plain loop over so few is mostly
/// what is done one by one at its end.
#[inline(always)]
fn mask(left: usize) -> Mask {
    MASKS[left.min(LANES) - 1]
}

#[inline(always)]
fn eight(x: &[f32]) -> F32x8 {
    let x = &x[..LANES];
    F32x8([x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]])
}

/// 2^x for x up to 127, to 1.5 ulp; below -126 it stays 2^-126, NaN stays NaN. No branch, so loops over it vectorise.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -126.0 { -126.0 } else { x };
    let t = x + ROUND;
    let f = x - (t - ROUND);
    // 2^f on [-1/2, 1/2] at Chebyshev nodes, relative error 1.0e-7.
    let mut y = 1.339_086_3e-3f32;
    for c in [9.676_032e-3, 5.550_357e-2, 2.402_210_7e-1, 6.931_472e-1, 1.000_000_1] {
        y = y.mul_add(f, c);
    }
    f32::from_bits(y.to_bits().wrapping_add(t.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::attention_rows::rows_delta;
    use crate::tensor::philox::Philox;

    fn numbers(n: usize, op: u32) -> Vec<f32> {
        let random = Philox { seed: 7, step: 0, op };
        (0..n as u64).map(|i| random.normal(i)).collect()
    }

    /// One image and head: cut into stretches of keys, more than one tile each way.
    fn params() -> Params {
        Params {
            n: 1,
            h: 13,
            w: 17,
            g: 2,
            d: 12,
            has_rel_h: 1,
            has_rel_w: 1,
            has_bias: 1,
            scale: 0.3,
            pieces: 1,
            part: 0,
            by_axis: 0,
        }
    }

    /// y, lse, then dq, dk, dv and the tables' gradients.
    fn everything(p: &Params) -> Vec<Vec<f32>> {
        let [q, k, v, dy] = [0, 1, 2, 3].map(|i| numbers(p.len(), i));
        let tables = numbers(p.layout().offsets()[3], 4);
        let rows = p.len() / p.d as usize;
        let (mut y, mut lse, mut stats) =
            (vec![0.0; p.len()], vec![0.0; rows], vec![0.0; 2 * rows]);
        forward(p, &q, &k, &v, &tables, &mut y, &mut lse);
        rows_delta(p.d as usize, &y, &dy, &lse, &mut stats);
        let (mut dq, mut dk, mut dv) = (y.clone(), y.clone(), y.clone());
        let mut dtables = tables.clone();
        let x = Inputs { q: &q, k: &k, v: &v, dy: &dy, stats: &stats, tables: &tables };
        backward(p, x, &mut dq, &mut dk, &mut dv, &mut dtables);
        vec![y, lse, dq, dk, dv, dtables]
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| everything(&params()))
        };
        assert!(with(1) == with(3), "one and three threads differ");
    }

    #[test]
    fn few_heads_are_cut_and_many_are_not() {
        assert_eq!(tasks(&params(), COLS).len(), 2 * 7);
        let many = Params { n: 16, ..params() };
        assert_eq!(tasks(&many, COLS).len(), 32);
        let covered: usize = tasks(&params(), COLS).iter().map(|t| t.tokens.len()).sum();
        assert_eq!(covered, 2 * params().tokens());
    }

    #[test]
    fn exp2_is_close_and_keeps_nan() {
        for i in -12_500..12_600 {
            let x = i as f32 * 0.01;
            let error = f64::from(exp2(x)) / f64::from(x).exp2() - 1.0;
            assert!(error.abs() < 3e-7, "2^{x}: relative error {error:e}");
        }
        assert!(exp2(f32::NEG_INFINITY) < 2e-38 && exp2(f32::NAN).is_nan());
    }
}
