//! Forward: all scores of a row of queries, softmax, output and log-sum-exp.

use super::*;
use crate::cpu::lanes::exp_all;
use crate::cpu::simd::vector_fn;
use rayon::prelude::*;
use std::cell::RefCell;

/// Tasks that bands make where there are fewer pairs: a band's halo is only packed twice.
const MIN_TASKS: usize = 16;

#[derive(Default)]
struct Scratch {
    q: Vec<F32x8>,
    k: Vec<F32x8>,
    v: Vec<F32x8>,
    y: Vec<F32x8>,
    scores: Vec<F32x8>,
    tables: Tables,
    by_offset: ByOffset,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// y and log-sum-exp (natural, `[N, H, W, G]`) of q, k, v and the packed tables.
pub(super) fn forward(
    p: &Params,
    qkv: [&[f32]; 3],
    tables: &[f32],
    y: &mut [f32],
    lse: &mut [f32],
) {
    let (y, lse) = (SharedMut::new(y), SharedMut::new(lse));
    tasks(p, MIN_TASKS, 4).into_par_iter().for_each(|task| {
        SCRATCH.with_borrow_mut(|scratch| {
            band(p, &task, qkv, tables, &y, &lse, scratch);
        });
    });
}

vector_fn! {
    /// All queries of one task.
    fn band(
        p: &Params,
        task: &Task,
        qkv: [&[f32]; 3],
        tables: &[f32],
        y: &SharedMut<'_>,
        lse: &SharedMut<'_>,
        s: &mut Scratch,
    ) {
        let [q, k, v] = qkv;
        let (w, d, g) = (p.w as usize, p.d as usize, p.g as usize);
        let offsets = (p.kh * p.kw) as usize;
        let reach = halo(p, &task.rows);
        let q = pack(p, task, q, &task.rows, 1.0, &mut s.q);
        let k = pack(p, task, k, &reach, p.scale, &mut s.k);
        let v = pack(p, task, v, &reach, 1.0, &mut s.v);
        s.tables.fill(p, task, tables);
        let scores = room(&mut s.scores, w * offsets);
        let out = room(&mut s.y, task.rows.len() * w * d);
        out.fill(F32x8::ZERO);
        for (i, row) in task.rows.clone().enumerate() {
            let q = &q[i * w * d..][..w * d];
            let out = &mut out[i * w * d..][..w * d];
            s.by_offset.products(p, &s.tables, q);
            let keys = |a: usize| key_row(p, row, a).map(|key| (key - reach.start) * w * d);
            for a in 0..p.kh as usize {
                let keys = keys(a).map(|at| &k[at..][..w * d]);
                score_row(p, &s.tables, &s.by_offset, a, q, keys, scores);
            }
            for x in 0..w {
                let scores = &mut scores[x * offsets..][..offsets];
                let (max, sum) = softmax(scores);
                for l in 0..task.live {
                    // SAFETY: this task alone writes the rows of its map and pairs.
                    let lse = unsafe { lse.slice(task.row[l] + (row * w + x) * g, 1) };
                    lse[0] = max.0[l] + sum.0[l].ln();
                }
            }
            for a in 0..p.kh as usize {
                let Some(values) = keys(a).map(|at| &v[at..][..w * d]) else { continue };
                for (x, out) in out.chunks_exact_mut(d).enumerate() {
                    let inside = columns(p, x);
                    let weights = &scores[x * offsets + a * p.kw as usize..];
                    let first = (x + inside.start - p.kw as usize / 2) * d;
                    combine(&weights[inside], &values[first..], out);
                }
            }
        }
        // SAFETY: this task alone writes the rows of its map and pairs.
        unsafe { unpack(p, task, out, 1.0, y) };
    }
}

/// The scores of a row of queries with row `a` of their windows, which falls on `keys` unless that is outside the map.
#[inline(always)]
fn score_row(
    p: &Params,
    tables: &Tables,
    by_offset: &ByOffset,
    a: usize,
    q: &[F32x8],
    keys: Option<&[F32x8]>,
    scores: &mut [F32x8],
) {
    let (kw, d) = (p.kw as usize, p.d as usize);
    let all = scores.chunks_exact_mut((p.kh * p.kw) as usize);
    for (x, (q, scores)) in q.chunks_exact(d).zip(all).enumerate() {
        let scores = &mut scores[a * kw..][..kw];
        by_offset.start(p, tables, (x, a), keys.is_none(), F32x8::ZERO, scores);
        if let Some(keys) = keys {
            let inside = columns(p, x);
            let first = (x + inside.start - kw / 2) * d;
            dots(q, &keys[first..], &mut scores[inside]);
        }
    }
}

/// Scores become probabilities; their greatest and the sum of exponentials are returned.
#[inline(always)]
fn softmax(scores: &mut [F32x8]) -> (F32x8, F32x8) {
    let mut max = F32x8::splat(f32::NEG_INFINITY);
    for s in scores.iter() {
        max = max.max(*s);
    }
    scores.iter_mut().for_each(|s| *s = s.sub(max));
    exp_all(scores);
    let mut sum = F32x8::ZERO;
    for s in scores.iter() {
        sum = sum.add(*s);
    }
    let inverse = F32x8(sum.0.map(|s| 1.0 / s));
    scores.iter_mut().for_each(|s| *s = s.mul(inverse));
    (max, sum)
}
