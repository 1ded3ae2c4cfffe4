//! Backward in one walk over pairs of a query row and a key row: probabilities again from scores and log-sum-exp, then
//! five products.
//!
//! With P = exp(s - lse) and dS = P * (dy.v - delta), where delta = rowsum(dy * y):
//!   dv += P dy,  dk += scale dS q,  dq += scale dS k,
//!   dbias[a, b] += dS,  and with R_h[q, a] = sum of dS over row a of the window (R_w likewise for columns):
//!   dq += R_h rel_h + R_w rel_w,  drel_h += R_h q,  drel_w += R_w q.
//!
//! A task owns rows of the map: it finishes dq of their queries and gathers dk and dv of their keys from all queries that
//! see them. A pair of rows that two tasks own one of each is walked by both: no gradient is added up by two threads.

use super::*;
use crate::cpu::lanes::exp_all;
use crate::cpu::simd::vector_fn;
use rayon::prelude::*;
use std::cell::RefCell;

/// Tasks that bands make where there are fewer pairs. Few, because the halo of a band is computed twice.
const MIN_TASKS: usize = 8;

/// What backward reads, in tensors `[N, H, W, G, d]`; `stats` is `[N, H, W, G, 2]`: log-sum-exp and delta.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) dy: &'a [f32],
    pub(super) stats: &'a [f32],
    pub(super) tables: &'a [f32],
}

#[derive(Default)]
struct Scratch {
    q: Vec<F32x8>,
    k: Vec<F32x8>,
    v: Vec<F32x8>,
    dy: Vec<F32x8>,
    dq: Vec<F32x8>,
    dk: Vec<F32x8>,
    dv: Vec<F32x8>,
    stats: Vec<F32x8>,
    p: Vec<F32x8>,
    ds: Vec<F32x8>,
    tables: Tables,
    by_offset: ByOffset,
    sums: ByOffset,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A task's table gradients: `rel_h [kh][d]`, `rel_w [kw][d]`, `bias [kh][kw]`, absent ones taking no place. Their starts
/// and the end.
fn partial_layout(p: &Params) -> [usize; 4] {
    let (kh, kw, d) = (p.kh as usize, p.kw as usize, p.d as usize);
    let has = p.layout().has;
    let h = has[0] as usize * kh * d;
    let w = h + has[1] as usize * kw * d;
    [0, h, w, w + has[2] as usize * kh * kw]
}

/// dq, dk, dv and the packed tables' gradients.
pub(super) fn backward(
    p: &Params,
    x: Inputs<'_>,
    [dq, dk, dv]: [&mut [f32]; 3],
    dtables: &mut [f32],
) {
    let outputs = [SharedMut::new(dq), SharedMut::new(dk), SharedMut::new(dv)];
    let tasks = tasks(p, MIN_TASKS, 7);
    let len = partial_layout(p)[3];
    // A vector more a task, so that there is a chunk for each also without tables.
    let mut partial = vec![F32x8::ZERO; tasks.len() * (len + 1)];
    tasks.par_iter().zip(partial.par_chunks_exact_mut(len + 1)).for_each(|(task, partial)| {
        SCRATCH.with_borrow_mut(|s| {
            band(p, task, x, &outputs, &mut partial[..len], s);
        });
    });
    reduce(p, &tasks, &partial, dtables);
}

vector_fn! {
    /// All row pairs that a task owns the queries or the keys of.
    fn band(
        p: &Params,
        task: &Task,
        x: Inputs<'_>,
        outputs: &[SharedMut<'_>; 3],
        partial: &mut [F32x8],
        s: &mut Scratch,
    ) {
        let (w, d) = (p.w as usize, p.d as usize);
        let reach = halo(p, &task.rows);
        let q = pack(p, task, x.q, &reach, 1.0, &mut s.q);
        let dy = pack(p, task, x.dy, &reach, 1.0, &mut s.dy);
        let k = pack(p, task, x.k, &reach, p.scale, &mut s.k);
        let v = pack(p, task, x.v, &reach, 1.0, &mut s.v);
        let stats = pack_stats(p, task, x.stats, &reach, &mut s.stats);
        s.tables.fill(p, task, x.tables);
        let any = s.tables.any();
        let own = |row: usize| task.rows.contains(&row).then(|| (row - task.rows.start) * w * d);
        let size = task.rows.len() * w * d;
        let [dq, dk, dv] = [&mut s.dq, &mut s.dk, &mut s.dv].map(|out| room(out, size));
        for out in [&mut *dq, &mut *dk, &mut *dv] {
            out.fill(F32x8::ZERO);
        }
        let probs = room(&mut s.p, w * p.kw as usize);
        let ds = room(&mut s.ds, w * p.kw as usize);
        for row in reach.clone() {
            let at = (row - reach.start) * w * d;
            let queries = Queries {
                q: &q[at..][..w * d],
                dy: &dy[at..][..w * d],
                stats: &stats[at / d * 2..][..2 * w],
            };
            let own_queries = own(row);
            s.by_offset.products(p, &s.tables, queries.q);
            s.sums.clear(p);
            for a in 0..p.kh as usize {
                let key = key_row(p, row, a);
                let own_keys = key.and_then(own);
                let outside_matters = key.is_none() && p.zero_border != 0 && any;
                if own_keys.is_none() && (own_queries.is_none() || key.is_none() && !outside_matters) {
                    continue;
                }
                let keys = key.map(|key| (key - reach.start) * w * d);
                let keys = keys.map(|at| (&k[at..][..w * d], &v[at..][..w * d]));
                score_gradients(p, &s.tables, &s.by_offset, a, &queries, keys, probs, ds);
                if let Some(at) = own_queries {
                    if let Some((k, _)) = keys {
                        to_queries(p, ds, k, &mut dq[at..][..w * d]);
                    }
                    if any {
                        collect(p, a, ds, &mut s.sums, &mut partial[partial_layout(p)[2]..]);
                    }
                }
                if let Some(at) = own_keys {
                    to_keys(p, ds, queries.q, &mut dk[at..][..w * d]);
                    to_keys(p, probs, queries.dy, &mut dv[at..][..w * d]);
                }
            }
            if let Some(at) = own_queries.filter(|_| any) {
                finish_queries(p, &s.tables, &s.sums, queries.q, &mut dq[at..][..w * d], partial);
            }
        }
        let scales = [1.0, p.scale, 1.0];
        for ((out, packed), scale) in outputs.iter().zip([dq, dk, dv]).zip(scales) {
            // SAFETY: this task alone writes the rows of its map and pairs.
            unsafe { unpack(p, task, packed, scale, out) };
        }
    }
}

/// A row of queries: q and dy `[W][d]`, stats `[W][2]`.
struct Queries<'a> {
    q: &'a [F32x8],
    dy: &'a [F32x8],
    stats: &'a [F32x8],
}

/// (log-sum-exp, delta) of each place of the rows.
#[inline(always)]
fn pack_stats<'s>(
    p: &Params,
    task: &Task,
    stats: &[f32],
    rows: &Range<usize>,
    out: &'s mut Vec<F32x8>,
) -> &'s [F32x8] {
    let (w, g) = (p.w as usize, p.g as usize);
    let out = room(out, rows.len() * w * 2);
    for (i, out) in out.chunks_exact_mut(2).enumerate() {
        let at = (rows.start * w + i) * g;
        for (j, out) in out.iter_mut().enumerate() {
            *out = F32x8(task.row.map(|row| stats[2 * (row + at) + j]));
        }
    }
    out
}

/// P and dS of a row of queries with row `a` of their windows: `[W][kw]`.
#[inline(always)]
fn score_gradients(
    p: &Params,
    tables: &Tables,
    by_offset: &ByOffset,
    a: usize,
    queries: &Queries<'_>,
    keys: Option<(&[F32x8], &[F32x8])>,
    probs: &mut [F32x8],
    ds: &mut [F32x8],
) {
    let (kw, d) = (p.kw as usize, p.d as usize);
    ds.fill(F32x8::ZERO);
    for (x, (s, dp)) in probs.chunks_exact_mut(kw).zip(ds.chunks_exact_mut(kw)).enumerate() {
        let lse = queries.stats[2 * x];
        by_offset.start(p, tables, (x, a), keys.is_none(), lse, s);
        if let Some((k, v)) = keys {
            let inside = columns(p, x);
            let first = (x + inside.start - kw / 2) * d;
            dots(&queries.q[x * d..][..d], &k[first..], &mut s[inside.clone()]);
            dots(&queries.dy[x * d..][..d], &v[first..], &mut dp[inside]);
        }
    }
    exp_all(probs);
    for (x, (s, dp)) in probs.chunks_exact(kw).zip(ds.chunks_exact_mut(kw)).enumerate() {
        let delta = queries.stats[2 * x + 1];
        for (s, dp) in s.iter().zip(dp) {
            *dp = s.mul(dp.sub(delta));
        }
    }
}

/// `dq[x] += sum over b of dS[x][b] * k[x + b - kw/2]`.
#[inline(always)]
fn to_queries(p: &Params, ds: &[F32x8], k: &[F32x8], dq: &mut [F32x8]) {
    let (kw, d) = (p.kw as usize, p.d as usize);
    for (x, (ds, dq)) in ds.chunks_exact(kw).zip(dq.chunks_exact_mut(d)).enumerate() {
        let inside = columns(p, x);
        combine(&ds[inside.clone()], &k[(x + inside.start - kw / 2) * d..], dq);
    }
}

/// `out[x'] += sum over the queries x that see x' of weights[x][x' - x + kw/2] * rows[x]`.
#[inline(always)]
fn to_keys(p: &Params, weights: &[F32x8], rows: &[F32x8], out: &mut [F32x8]) {
    let (kw, d) = (p.kw as usize, p.d as usize);
    let mut seen = [F32x8::ZERO; crate::ops::MAX_WINDOW];
    for (key, out) in out.chunks_exact_mut(d).enumerate() {
        // By symmetry of the window these are the places that a query at x' sees.
        let inside = columns(p, key);
        let first = key + inside.start - kw / 2;
        let seen = &mut seen[..inside.len()];
        for (i, weight) in seen.iter_mut().enumerate() {
            let x = first + i;
            *weight = weights[x * kw + key + kw / 2 - x];
        }
        combine(seen, &rows[first * d..], out);
    }
}

/// Adds a row of score gradients to the sums by offset, and to the gradient of `bias`.
#[inline(always)]
fn collect(p: &Params, a: usize, ds: &[F32x8], sums: &mut ByOffset, bias: &mut [F32x8]) {
    let (kh, kw) = (p.kh as usize, p.kw as usize);
    for (x, ds) in ds.chunks_exact(kw).enumerate() {
        let mut row = F32x8::ZERO;
        for (sum, ds) in sums.w[x * kw..][..kw].iter_mut().zip(ds) {
            *sum = sum.add(*ds);
            row = row.add(*ds);
        }
        sums.h[x * kh + a] = row;
        if p.has_bias != 0 {
            let bias = &mut bias[a * kw..][..kw];
            bias.iter_mut().zip(ds).for_each(|(b, ds)| *b = b.add(*ds));
        }
    }
}

/// The sums of a finished row of queries, times the tables into dq, times the queries into the tables' gradients.
#[inline(always)]
fn finish_queries(
    p: &Params,
    tables: &Tables,
    sums: &ByOffset,
    q: &[F32x8],
    dq: &mut [F32x8],
    partial: &mut [F32x8],
) {
    let (w, d) = (p.w as usize, p.d as usize);
    let [_, rel_w, bias, _] = partial_layout(p);
    let (grad_h, rest) = partial.split_at_mut(rel_w);
    let grad_w = &mut rest[..bias - rel_w];
    let parts = [
        (&tables.rel_h, &sums.h, p.kh as usize, grad_h),
        (&tables.rel_w, &sums.w, p.kw as usize, grad_w),
    ];
    for (table, sums, offsets, grad) in parts {
        if table.is_empty() {
            continue;
        }
        for (sums, dq) in sums.chunks_exact(offsets).zip(dq.chunks_exact_mut(d)) {
            combine(sums, table, dq);
        }
        for first in (0..w).step_by(8) {
            let mut weights = [F32x8::ZERO; 8];
            let here = 8.min(w - first);
            for (o, grad) in grad.chunks_exact_mut(d).enumerate() {
                for (i, weight) in weights[..here].iter_mut().enumerate() {
                    *weight = sums[(first + i) * offsets + o];
                }
                combine(&weights[..here], &q[first * d..], grad);
            }
        }
    }
}

/// Adds up the tasks' table gradients in order, into the packed tables' own layout.
fn reduce(p: &Params, tasks: &[Task], partial: &[F32x8], out: &mut [f32]) {
    let (layout, starts) = (p.layout(), partial_layout(p));
    let at = layout.offsets();
    let (d, offsets) = (p.d as usize, (p.kh * p.kw) as usize);
    out[..at[3]].fill(0.0);
    for (task, partial) in tasks.iter().zip(partial.chunks_exact(starts[3] + 1)) {
        for (l, g) in task.head[..task.live].iter().enumerate() {
            for i in 0..2 {
                for (j, sum) in partial[starts[i]..starts[i + 1]].iter().enumerate() {
                    out[at[i] + (j / d * layout.heads + g) * d + j % d] += sum.0[l];
                }
            }
            for (j, sum) in partial[starts[2]..starts[3]].iter().enumerate() {
                out[at[2] + g * offsets + j] += sum.0[l];
            }
        }
    }
}
