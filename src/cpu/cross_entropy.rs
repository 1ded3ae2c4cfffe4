//! CPU kernels of [`crate::ops::cross_entropy`].

use super::lanes::exp;
use super::rows;
use super::softmax::row_max;
use crate::kernel::CpuArgs;
use crate::ops::cross_entropy::CrossEntropyParams;

/// Per row: its loss, its weight and its log-sum-exp: `logits, labels, class_weight -> rows [N, 3]`. A label that is no
/// class makes its row NaN, and with it the loss.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: CrossEntropyParams = a.params();
    let (logits, labels, weights, k) = (a.f32(0), a.u32(1), a.f32(2), p.classes as usize);
    let weight = |i: usize| if p.weighted != 0 { weights[i] } else { 1.0 };
    rows::each!(a.f32_mut(3), 3, logits.len(), |n, row| {
        let x = &logits[n * k..][..k];
        let max = row_max(x);
        let lse = max + rows::sum_by(k, |i| exp(x[i] - max)).ln();
        let label = labels[n] as usize;
        if label >= k {
            row.copy_from_slice(&[f32::NAN, 1.0, lse]);
            return;
        }
        let mut loss = (1.0 - p.smoothing) * weight(label) * (lse - x[label]);
        if p.smoothing > 0.0 {
            loss += p.smoothing / k as f32 * rows::sum_by(k, |i| weight(i) * (lse - x[i]));
        }
        row.copy_from_slice(&[loss, weight(label), lse]);
    });
}

/// `loss = sum of the rows' losses / sum of their weights`; and `totals` = (that sum of weights, sum of all class
/// weights): `rows, class_weight -> loss [1], totals [2]`.
pub(crate) fn finish(a: &CpuArgs<'_>) {
    let p: CrossEntropyParams = a.params();
    let (row, weights) = (a.f32(0), a.f32(1));
    let column = |j: usize| row.iter().skip(j).step_by(3).map(|&v| f64::from(v)).sum::<f64>();
    let weight = column(1);
    a.f32_mut(2)[0] = (column(0) / weight) as f32;
    let totals = a.f32_mut(3);
    totals[0] = weight as f32;
    totals[1] = match p.weighted {
        0 => p.classes as f32,
        _ => weights[..p.classes as usize].iter().sum(),
    };
}

/// `logits, labels, class_weight, rows, totals, dloss -> dlogits`; the formula is in [`crate::ops::cross_entropy`].
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: CrossEntropyParams = a.params();
    let (logits, labels, weights, k) = (a.f32(0), a.u32(1), a.f32(2), p.classes as usize);
    let (row, totals) = (a.f32(3), a.f32(4));
    let scale = a.f32(5)[0] / totals[0];
    let smooth = p.smoothing / k as f32;
    rows::each!(a.f32_mut(6), k, logits.len(), |n, dx| {
        let (x, label) = (&logits[n * k..][..k], labels[n] as usize);
        let (own, lse) = (row[3 * n + 1] * (1.0 - p.smoothing), row[3 * n + 2]);
        for (i, (dx, &x)) in dx.iter_mut().zip(x).enumerate() {
            let weight = if p.weighted != 0 { weights[i] } else { 1.0 };
            let target = if i == label { own } else { 0.0 } + smooth * weight;
            *dx = scale * (exp(x - lse) * (own + smooth * totals[1]) - target);
        }
    });
}
