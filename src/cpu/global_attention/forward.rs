//! Forward: online softmax over tiles of keys, output and log-sum-exp.

use super::*;
use rayon::prelude::*;
use std::cell::RefCell;
use std::f32::consts::LN_2;

#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    rel_h: Vec<f32>,
    rel_w: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    by_offset: ByOffset,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// y and log-sum-exp (natural, `[N, H, W, G]`) of q, k, v and the packed tables.
pub(crate) fn forward(
    p: &Params,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tables: &[f32],
    y: &mut [f32],
    lse: &mut [f32],
) {
    let (y, lse) = (SharedMut::new(y), SharedMut::new(lse));
    tasks(p, TILE_Q).into_par_iter().for_each(|task| {
        let to = (task.head.base, task.head.stride);
        SCRATCH.with_borrow_mut(|scratch| head(p, &task, [q, k, v], tables, to, &y, &lse, scratch));
    });
}

/// Head g of image n, whose rows of q, k and v lie `stride` apart in slices of their own; y and log-sum-exp as in [`forward`].
/// No other thread may have this head's rows of y and lse.
pub(crate) fn one_head(
    p: &Params,
    (n, g): (usize, usize),
    qkv: [&[f32]; 3],
    stride: usize,
    tables: &[f32],
    y: &SharedMut<'_>,
    lse: &SharedMut<'_>,
) {
    let (tokens, heads, d) = (p.tokens(), p.g as usize, p.d as usize);
    let task = Task { head: Head { n, g, base: 0, stride, d }, tokens: 0..tokens };
    let to = ((n * tokens * heads + g) * d, heads * d);
    SCRATCH.with_borrow_mut(|scratch| head(p, &task, qkv, tables, to, y, lse, scratch));
}

/// All query tiles of one task; `to`: where the first row of y lies and how far apart they are.
fn head(
    p: &Params,
    task: &Task,
    [q, k, v]: [&[f32]; 3],
    tables: &[f32],
    (y_base, y_stride): (usize, usize),
    y: &SharedMut<'_>,
    lse: &SharedMut<'_>,
    scratch: &mut Scratch,
) {
    let Head { base, stride, d, g, n } = task.head;
    let tokens = p.tokens();
    let tables = Tables::of_head(p, tables, g);
    let keys = pack_tokens(&k[base..], stride, tokens, d, p.scale * LOG2_E, &mut scratch.keys);
    let values = pack_channels(&v[base..], stride, tokens, d, 1.0, &mut scratch.values);
    let rel = PackedRel::new(p, &tables, &mut scratch.rel_h, &mut scratch.rel_w);
    let scores = room(&mut scratch.scores, TILE_Q * WIDTH);
    let out_width = panels(d) * COLS;
    let out = room(&mut scratch.out, TILE_Q * out_width);
    for first in task.tokens.clone().step_by(TILE_Q) {
        let rows = TILE_Q.min(task.tokens.end - first);
        let q = &q[base + first * stride..];
        rel.times(p, rows, q, stride, &mut scratch.by_offset);
        let mut state = [(f32::NEG_INFINITY, 0.0); TILE_Q];
        for key in (0..tokens).step_by(TILE_K) {
            let tile = key..tokens.min(key + TILE_K);
            let scores = &mut scores[..rows * WIDTH];
            let panel = &keys[panels(key) * d * COLS..][..panels(tile.len()) * d * COLS];
            times_tokens(rows, d, q, stride, panel, scores, WIDTH);
            if tables.any() {
                let by_offset = &scratch.by_offset;
                add_positions(p, &tables, by_offset, first, tile.clone(), scores);
            }
            softmax(scores, tile.len(), &mut state, key == 0, out, out_width);
            times_columns(rows, (scores, WIDTH, 1), values, tokens, tile, key > 0, out, out_width);
        }
        for i in 0..rows {
            let row = y_base + (first + i) * y_stride;
            // SAFETY: this task alone writes the rows of its head and tokens.
            let (y, lse) = unsafe {
                (y.slice(row, d), lse.slice((n * tokens + first + i) * p.g as usize + g, 1))
            };
            let (max, sum) = state[i];
            let inverse = 1.0 / sum;
            y.iter_mut().zip(&out[i * out_width..]).for_each(|(y, o)| *y = o * inverse);
            lse[0] = LN_2 * (max + sum.log2());
        }
    }
}

vector_fn! {
    /// A tile of scores of `keys` keys becomes probabilities not yet divided by their sums. A query's `state` is the maximum and the sum so
    /// far; `out` holds what earlier tiles gave, if this is not the first.
    fn softmax(
        scores: &mut [f32],
        keys: usize,
        state: &mut [(f32, f32); TILE_Q],
        first: bool,
        out: &mut [f32],
        width: usize,
    ) {
        let rows = scores.chunks_exact_mut(WIDTH).zip(out.chunks_exact_mut(width));
        for ((scores, out), (max, sum)) in rows.zip(state) {
            softmax_step(scores, keys, max, sum, (!first).then_some(out));
        }
    }
}

/// One row of scores becomes `2^(score - max)` with the maximum so far; the sum, and the output of earlier tiles where
/// there is one, are brought to the new maximum.
#[inline(always)]
fn softmax_step(
    scores: &mut [f32],
    keys: usize,
    max: &mut f32,
    sum: &mut f32,
    out: Option<&mut [f32]>,
) {
    let scores = &mut scores[..panels(keys) * COLS];
    // Columns past the last key: 2^-126 each, and no product reads them.
    scores[keys..].fill(f32::NEG_INFINITY);
    let (scores, _) = scores.as_chunks_mut::<COLS>();
    let mut lanes = [*max; COLS];
    for chunk in scores.iter() {
        for (m, &s) in lanes.iter_mut().zip(chunk) {
            *m = if s > *m { s } else { *m };
        }
    }
    let new = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0.0f32; COLS];
    for chunk in scores.iter_mut() {
        for (l, s) in lanes.iter_mut().zip(chunk) {
            *s = exp2(*s - new);
            *l += *s;
        }
    }
    let factor = exp2(*max - new);
    *sum = *sum * factor + lanes.iter().sum::<f32>();
    *max = new;
    if let Some(out) = out {
        out.iter_mut().for_each(|o| *o *= factor);
    }
}
