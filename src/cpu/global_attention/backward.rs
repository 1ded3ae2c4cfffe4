//! Backward in one pass over the tiles: probabilities again from scores and log-sum-exp, then five products a tile.
//!
//! With P = 2^(s - lse) and dS = P * (dO V^T - delta), where delta = rowsum(dO * O):
//!   dV += P^T dO,  dK += scale dS^T Q,  dQ += scale dS K,
//!   dbias[a, b] += dS,  and with R_h[q, a] = sum of dS over keys in the row at offset a (R_w likewise for columns):
//!   dQ += R_h rel_h + R_w rel_w,  drel_h += R_h^T Q,  drel_w += R_w^T Q.
//!
//! A task owns the keys of its stretch: their dK and dV are finished in it. Where a head has several tasks, each writes a
//! dQ of its own, and these are added in order at the end; so are the table gradients of all tasks.

use super::*;
use rayon::prelude::*;
use std::cell::RefCell;

/// What backward reads, in tensors `[N, H, W, G, d]`; `stats` is `[N, H, W, G, 2]`: log-sum-exp and delta.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) dy: &'a [f32],
    pub(crate) stats: &'a [f32],
    pub(crate) tables: &'a [f32],
}

#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    key_columns: Vec<f32>,
    q_columns: Vec<f32>,
    dy_columns: Vec<f32>,
    rel_h: Vec<f32>,
    rel_w: Vec<f32>,
    rel_h_columns: Vec<f32>,
    rel_w_columns: Vec<f32>,
    by_offset: ByOffset,
    sums: ByOffset,
    tile: Vec<f32>,
    dtile: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// dq, dk, dv and the gradients of the packed tables (`dtables` in the tables' layout; untouched where there are none).
pub(crate) fn backward(
    p: &Params,
    x: Inputs<'_>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    dtables: &mut [f32],
) {
    let tasks = tasks(p, COLS);
    let pieces = tasks.len() / (p.n * p.g).max(1) as usize;
    let grads = TableGrads::layout(p);
    let mut partial_tables = vec![0.0; tasks.len() * grads.len.max(1)];
    let mut partial_dq = vec![0.0; if pieces > 1 { pieces * dq.len() } else { 0 }];
    {
        let total = dq.len();
        let dq = SharedMut::new(if pieces > 1 { &mut partial_dq } else { &mut *dq });
        let (dk, dv) = (SharedMut::new(dk), SharedMut::new(dv));
        let partial = partial_tables.par_chunks_mut(grads.len.max(1));
        tasks.par_iter().zip(partial).enumerate().for_each(|(i, (task, partial))| {
            let outputs = Outputs { dq: &dq, dq_at: i % pieces * total, dk: &dk, dv: &dv };
            SCRATCH.with_borrow_mut(|s| piece(p, task, x, &outputs, &grads, partial, s));
        });
    }
    if pieces > 1 {
        let total = dq.len();
        dq.par_iter_mut().enumerate().for_each(|(i, dq)| {
            *dq = (0..pieces).map(|piece| partial_dq[piece * total + i]).sum();
        });
    }
    if grads.len > 0 {
        grads.reduce(p, &tasks, &partial_tables, dtables);
    }
}

/// Where a task puts its results; its dQ starts `dq_at` further on.
struct Outputs<'a> {
    dq: &'a SharedMut<'a>,
    dq_at: usize,
    dk: &'a SharedMut<'a>,
    dv: &'a SharedMut<'a>,
}

/// The keys of one task against all queries of its head.
fn piece(
    p: &Params,
    task: &Task,
    x: Inputs<'_>,
    outputs: &Outputs<'_>,
    grads: &TableGrads,
    partial: &mut [f32],
    s: &mut Scratch,
) {
    let Head { base, stride, d, g, n } = task.head;
    let (tokens, start, count) = (p.tokens(), task.tokens.start, task.tokens.len());
    let (k, v) = (&x.k[base + start * stride..], &x.v[base + start * stride..]);
    let tables = Tables::of_head(p, x.tables, g);
    let keys = pack_tokens(k, stride, count, d, p.scale * LOG2_E, &mut s.keys);
    let values = pack_tokens(v, stride, count, d, 1.0, &mut s.values);
    let key_columns = pack_channels(k, stride, count, d, p.scale, &mut s.key_columns);
    let q_columns = pack_channels(&x.q[base..], stride, tokens, d, 1.0, &mut s.q_columns);
    let dy_columns = pack_channels(&x.dy[base..], stride, tokens, d, 1.0, &mut s.dy_columns);
    let rel = PackedRel::new(p, &tables, &mut s.rel_h, &mut s.rel_w);
    let rel_columns = [
        (tables.rel_h, p.offsets_h(), &mut s.rel_h_columns),
        (tables.rel_w, p.offsets_w(), &mut s.rel_w_columns),
    ]
    .map(|(x, rows, out)| x.map(|x| pack_channels(x, stride, rows, d, 1.0, out)));
    let width = panels(d) * COLS;
    let (dk, dv) = (room(&mut s.dk, count * width), room(&mut s.dv, count * width));
    let dq = room(&mut s.dq, TILE_Q * width);
    let tile = room(&mut s.tile, TILE_Q * WIDTH);
    let dtile = room(&mut s.dtile, TILE_Q * WIDTH);
    for first in (0..tokens).step_by(TILE_Q) {
        let rows = TILE_Q.min(tokens - first);
        let queries = first..first + rows;
        let at = base + first * stride;
        let mut stats = [(0.0, 0.0); TILE_Q];
        for (i, (lse, delta)) in stats[..rows].iter_mut().enumerate() {
            let at = 2 * ((n * tokens + first + i) * p.g as usize + g);
            (*lse, *delta) = (x.stats[at] * LOG2_E, x.stats[at + 1]);
        }
        rel.times(p, rows, &x.q[at..], stride, &mut s.by_offset);
        grads.clear(p, &mut s.sums, rows);
        for key in (0..count).step_by(TILE_K) {
            let here = key..count.min(key + TILE_K);
            let panel = panels(key) * d * COLS..panels(here.end) * d * COLS;
            let (tile, dtile) = (&mut tile[..rows * WIDTH], &mut dtile[..rows * WIDTH]);
            times_tokens(rows, d, &x.q[at..], stride, &keys[panel.clone()], tile, WIDTH);
            times_tokens(rows, d, &x.dy[at..], stride, &values[panel], dtile, WIDTH);
            let map = start + here.start..start + here.end;
            score_gradients(p, &tables, &s.by_offset, first, map.clone(), &stats, tile, dtile);
            if tables.any() {
                collect(grads, p, &tables, first, map, dtile, &mut s.sums, partial);
            }
            let (add, out) = (first > 0, here.start * width);
            let keys = here.len();
            times_columns(
                keys,
                (tile, 1, WIDTH),
                dy_columns,
                tokens,
                queries.clone(),
                add,
                &mut dv[out..],
                width,
            );
            times_columns(
                keys,
                (dtile, 1, WIDTH),
                q_columns,
                tokens,
                queries.clone(),
                add,
                &mut dk[out..],
                width,
            );
            times_columns(rows, (dtile, WIDTH, 1), key_columns, count, here, key > 0, dq, width);
        }
        grads.finish_queries(p, &s.sums, rel_columns, q_columns, queries, partial, dq, width);
        for (i, dq) in dq.chunks_exact(width).take(rows).enumerate() {
            // SAFETY: this task alone writes this head's rows from `dq_at` on.
            let row = unsafe { outputs.dq.slice(outputs.dq_at + at + i * stride, d) };
            row.copy_from_slice(&dq[..d]);
        }
    }
    for i in 0..count {
        let at = base + (start + i) * stride;
        // SAFETY: this task alone writes the rows of its head and keys.
        let (dk_row, dv_row) = unsafe { (outputs.dk.slice(at, d), outputs.dv.slice(at, d)) };
        dk_row.iter_mut().zip(&dk[i * width..]).for_each(|(y, x)| *y = p.scale * x);
        dv_row.copy_from_slice(&dv[i * width..][..d]);
    }
}

vector_fn! {
    /// Scores of a tile, without their position terms, become probabilities, and dO V^T the gradient of the scores. `stats` are a
    /// query's log-sum-exp in base 2 and delta.
    fn score_gradients(
        p: &Params,
        tables: &Tables<'_>,
        by_offset: &ByOffset,
        first: usize,
        keys: Range<usize>,
        stats: &[(f32, f32); TILE_Q],
        scores: &mut [f32],
        dp: &mut [f32],
    ) {
        let width = panels(keys.len()) * COLS;
        if tables.any() {
            add_positions(p, tables, by_offset, first, keys, scores);
        }
        let rows = scores.chunks_exact_mut(WIDTH).zip(dp.chunks_exact_mut(WIDTH));
        for ((scores, dp), &(lse, delta)) in rows.zip(stats) {
            let (scores, _) = scores[..width].as_chunks_mut::<COLS>();
            let (dp, _) = dp[..width].as_chunks_mut::<COLS>();
            for (s, dp) in scores.iter_mut().zip(dp) {
                for (s, dp) in s.iter_mut().zip(dp) {
                    *s = exp2(*s - lse);
                    *dp = *s * (*dp - delta);
                }
            }
        }
    }
}

vector_fn! {
    /// Adds a tile of score gradients to the sums by offset, and to the gradient of `bias`.
    fn collect(
        grads: &TableGrads,
        p: &Params,
        tables: &Tables<'_>,
        first: usize,
        keys: Range<usize>,
        dtile: &[f32],
        sums: &mut ByOffset,
        partial: &mut [f32],
    ) {
        let (row_h, row_w) = ByOffset::widths(p);
        let bias = &mut partial[grads.bias..];
        let rel = tables.rel_h.is_some() || tables.rel_w.is_some();
        for (i, ds) in dtile.chunks_exact(WIDTH).enumerate() {
            for Run { a, b, at, len } in runs(p, first + i, keys.clone()) {
                let ds = &ds[at..];
                if rel {
                    let (mut all, sums_w) = (F32x8::ZERO, &mut sums.w[i * row_w + b..]);
                    for at in (0..len).step_by(LANES) {
                        let ds = mask(len - at).of(eight(&ds[at..]));
                        all = all.add(ds);
                        let sum = eight(&sums_w[at..]).add(ds);
                        sums_w[at..at + LANES].copy_from_slice(&sum.0);
                    }
                    sums.h[i * row_h + a] += total(all);
                }
                if tables.bias.is_some() {
                    let bias = &mut bias[a * p.offsets_w() + b..][..len];
                    bias.iter_mut().zip(ds).for_each(|(s, d)| *s += d);
                }
            }
        }
    }
}

/// The sum of eight numbers, by halves.
#[inline(always)]
fn total(x: F32x8) -> f32 {
    let [a, b, c, d, e, f, g, h] = x.0;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// A task's table gradients lie one after another: `rel_h [2H-1, width]`, `rel_w [2W-1, width]`, `bias [2H-1, 2W-1]`,
/// absent ones taking no place.
struct TableGrads {
    width: usize,
    rel_w: usize,
    bias: usize,
    len: usize,
}

impl TableGrads {
    fn layout(p: &Params) -> Self {
        let width = panels(p.d as usize) * COLS;
        let rel_w = (p.has_rel_h != 0) as usize * p.offsets_h() * width;
        let bias = rel_w + (p.has_rel_w != 0) as usize * p.offsets_w() * width;
        let len = bias + (p.has_bias != 0) as usize * p.offsets_h() * p.offsets_w();
        Self { width, rel_w, bias, len }
    }

    /// Zeroes the sums of a tile of queries.
    fn clear(&self, p: &Params, sums: &mut ByOffset, rows: usize) {
        if self.bias > 0 {
            let (h, w) = sums.room(p, rows);
            h.fill(0.0);
            w.fill(0.0);
        }
    }

    /// The sums of a finished tile of queries, times the tables into dq, times the queries into the tables' gradients.
    fn finish_queries(
        &self,
        p: &Params,
        sums: &ByOffset,
        rel_columns: [Option<&[f32]>; 2],
        q_columns: &[f32],
        queries: Range<usize>,
        partial: &mut [f32],
        dq: &mut [f32],
        width: usize,
    ) {
        let (rel_h, rest) = partial.split_at_mut(self.rel_w);
        let (row_h, row_w) = ByOffset::widths(p);
        let tables =
            [(&sums.h, row_h, p.offsets_h(), rel_h), (&sums.w, row_w, p.offsets_w(), rest)];
        for ((sums, row, offsets, grad), rel) in tables.into_iter().zip(rel_columns) {
            let Some(rel) = rel else { continue };
            let rows = queries.len();
            times_columns(rows, (sums, row, 1), rel, offsets, 0..offsets, true, dq, width);
            let by_offset = (&sums[..], 1, row);
            times_columns(
                offsets,
                by_offset,
                q_columns,
                p.tokens(),
                queries.clone(),
                true,
                grad,
                width,
            );
        }
    }

    /// Adds up the tasks' gradients in order, into the tables' own layout.
    fn reduce(&self, p: &Params, tasks: &[Task], partial: &[f32], out: &mut [f32]) {
        let [h, w, b, end] = p.layout().offsets();
        let (d, row) = (p.d as usize, (p.g * p.d) as usize);
        let offsets = p.offsets_h() * p.offsets_w();
        out[..end].fill(0.0);
        for (task, partial) in tasks.iter().zip(partial.chunks_exact(self.len)) {
            let g = task.head.g;
            for (at, partial) in [(h, &partial[..self.rel_w]), (w, &partial[self.rel_w..self.bias])]
            {
                let rows = out[at..].chunks_exact_mut(row);
                for (out, partial) in rows.zip(partial.chunks_exact(self.width)) {
                    let out = &mut out[g * d..][..d];
                    out.iter_mut().zip(partial).for_each(|(o, x)| *o += x);
                }
            }
            if p.has_bias != 0 {
                let out = &mut out[b + g * offsets..][..offsets];
                out.iter_mut().zip(&partial[self.bias..]).for_each(|(o, x)| *o += x);
            }
        }
    }
}
