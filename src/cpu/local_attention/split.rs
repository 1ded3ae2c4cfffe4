//! The passes of backward one by one, as GPUs run them. The CPU does all of them in one walk ([`backward`]); these are here
//! for benchmarks and tests that ask for a pass by name.

use super::*;
use crate::cpu::attention_rows::sum_tables;

/// q, k, v, tables, dy, stats -> dq.
pub(crate) fn dq(a: &CpuArgs<'_>) {
    let (p, x): (Params, _) = (a.params(), inputs(a));
    let (mut dk, mut dv) = (vec![0.0; x.q.len()], vec![0.0; x.q.len()]);
    let mut dtables = vec![0.0; p.layout().offsets()[3]];
    backward(&p, x, [a.f32_mut(6), &mut dk, &mut dv], &mut dtables);
}

/// q, k, v, tables, dy, stats -> dk, dv.
pub(crate) fn dkv(a: &CpuArgs<'_>) {
    let (p, x): (Params, _) = (a.params(), inputs(a));
    let (mut dq, mut dtables) = (vec![0.0; x.q.len()], vec![0.0; p.layout().offsets()[3]]);
    backward(&p, x, [&mut dq, a.f32_mut(6), a.f32_mut(7)], &mut dtables);
}

/// q, k, v, tables, dy, stats -> partial `[pieces, G, kh, kw, width]`, the sums of one piece of the batch's rows over all
/// queries at offset (a, b): dS * q in the first d places where there are `rel` tables, dS in the first of the last four
/// where there is a `bias`.
pub(crate) fn tables(a: &CpuArgs<'_>) {
    let (p, x): (Params, _) = (a.params(), inputs(a));
    let partial = a.f32_mut(6);
    partial.fill(0.0);
    let (h, w, g, d) = (p.h as usize, p.w as usize, p.g as usize, p.d as usize);
    let (kh, kw) = (p.kh as usize, p.kw as usize);
    let (layout, width) = (p.layout(), p.layout().partial_width());
    let at = layout.offsets();
    let rows = (p.n as usize * h).div_ceil(p.pieces as usize);
    for i in 0..p.n as usize * h * w * g {
        let (head, column, row) = (i % g, i / g % w, i / g / w);
        let query = i * d..(i + 1) * d;
        for (a, b) in (0..kh * kw).map(|o| (o / kw, o % kw)) {
            let key_column = (column + b).checked_sub(kw / 2).filter(|x| *x < w);
            let key = key_row(&p, row % h, a).zip(key_column);
            if key.is_none() && p.zero_border == 0 {
                continue;
            }
            let key = key.map(|(ky, kx)| (((row / h * h + ky) * w + kx) * g + head) * d);
            let q = &x.q[query.clone()];
            let with_key = |t: &[f32], x: &[f32]| key.map_or(0.0, |k| dot(t, &x[k..]));
            let mut score = p.scale * with_key(q, x.k);
            for (i, table_row) in [(0, a), (1, b)] {
                if layout.has[i] {
                    score += dot(q, &x.tables[at[i] + (table_row * g + head) * d..]);
                }
            }
            if layout.has[2] {
                score += x.tables[at[2] + (head * kh + a) * kw + b];
            }
            let dp = with_key(&x.dy[query.clone()], x.v);
            let ds = (score - x.stats[2 * i]).exp() * (dp - x.stats[2 * i + 1]);
            let sums = ((row / rows * g + head) * kh + a) * kw + b;
            let sums = &mut partial[sums * width..][..width];
            if layout.has[0] || layout.has[1] {
                sums.iter_mut().zip(q).for_each(|(s, q)| *s += ds * q);
            }
            if layout.has[2] {
                sums[width - 4] += ds;
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
