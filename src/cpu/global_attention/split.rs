//! The passes of backward one by one, as GPUs run them. The CPU does all of them in one walk ([`backward`]); these are here for
//! benchmarks and tests that ask for a pass by name.

use super::*;
use crate::cpu::attention_rows::sum_tables;

/// q, k, v, tables, dy, stats -> dq.
pub(crate) fn dq(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (mut dk, mut dv) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    let mut dtables = vec![0.0; p.layout().offsets()[3]];
    backward(&p, inputs(a), a.f32_mut(6), &mut dk, &mut dv, &mut dtables);
}

/// q, k, v, tables, dy, stats -> dk, dv.
pub(crate) fn dkv(a: &CpuArgs<'_>) {
    let p: Params = a.params();
    let (mut dq, mut dtables) = (vec![0.0; p.len()], vec![0.0; p.layout().offsets()[3]]);
    backward(&p, inputs(a), &mut dq, a.f32_mut(6), a.f32_mut(7), &mut dtables);
}

/// q, k, v, tables, dy, stats -> partial `[pieces, G, 2H-1, 2W-1, width]`, the sums of one piece of the batch over all pairs of
/// a query and a key at offset (a, b): dS * q in the first d places where there are `rel` tables, dS in the first of the
/// last four where there is a `bias`.
pub(crate) fn tables(a: &CpuArgs<'_>) {
    let (p, x): (Params, _) = (a.params(), inputs(a));
    let partial = a.f32_mut(6);
    partial.fill(0.0);
    let (tokens, d, width) = (p.tokens(), p.d as usize, p.layout().partial_width());
    let images = (p.n as usize).div_ceil(p.pieces as usize);
    for Task { head, .. } in tasks(&p, tokens) {
        let at = |t: usize| head.base + t * head.stride..head.base + t * head.stride + d;
        let tables = Tables::of_head(&p, x.tables, head.g);
        let first = (head.n / images * p.g as usize + head.g) * p.offsets_h();
        for t in 0..tokens {
            let stats = 2 * ((head.n * tokens + t) * p.g as usize + head.g);
            let (q, dy) = (&x.q[at(t)], &x.dy[at(t)]);
            for Run { a, b, at: key, len } in runs(&p, t, 0..tokens) {
                for (b, key) in (b..).zip(key..key + len) {
                    let mut score = p.scale * dot(q, &x.k[at(key)]);
                    for (table, row) in [(tables.rel_h, a), (tables.rel_w, b)] {
                        score += table.map_or(0.0, |t| dot(q, &t[row * head.stride..]));
                    }
                    score += tables.bias.map_or(0.0, |t| t[a * p.offsets_w() + b]);
                    let dp = dot(dy, &x.v[at(key)]);
                    let ds = (score - x.stats[stats]).exp() * (dp - x.stats[stats + 1]);
                    let sums = &mut partial[((first + a) * p.offsets_w() + b) * width..][..width];
                    if tables.rel_h.is_some() || tables.rel_w.is_some() {
                        sums.iter_mut().zip(q).for_each(|(s, q)| *s += ds * q);
                    }
                    if tables.bias.is_some() {
                        sums[width - 4] += ds;
                    }
                }
            }
        }
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// partial -> the tables' gradients.
pub(crate) fn tables_sum(a: &CpuArgs<'_>) {
    sum_tables(&a.params::<Params>().layout(), a.f32(0), a.f32_mut(1));
}
