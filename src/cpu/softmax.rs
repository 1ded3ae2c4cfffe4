//! CPU kernels of [`crate::ops::softmax`].

use super::lanes::exp;
use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::softmax::SoftmaxParams;

/// `y = e^(x - max) / sum of the same`, row by row.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: SoftmaxParams = a.params();
    let (x, c) = (a.f32(0), p.columns as usize);
    let slab = rows::slab_len(c);
    rows::each!(a.f32_mut(1), slab, x.len(), |number, y| {
        for (y, x) in y.chunks_exact_mut(c).zip(x[number * slab..].chunks_exact(c)) {
            let max = row_max(x);
            for (y, &x) in y.iter_mut().zip(x) {
                *y = exp(x - max);
            }
            let scale = 1.0 / rows::sum_by(c, |i| y[i]);
            y.iter_mut().for_each(|y| *y *= scale);
        }
    });
}

/// `dx = y * (dy - sum(y * dy))`, row by row.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: SoftmaxParams = a.params();
    let (y, dy, c) = (a.f32(0), a.f32(1), p.columns as usize);
    let slab = rows::slab_len(c);
    rows::each!(a.f32_mut(2), slab, y.len(), |number, dx| {
        let start = number * slab;
        let input = y[start..].chunks_exact(c).zip(dy[start..].chunks_exact(c));
        for (dx, (y, dy)) in dx.chunks_exact_mut(c).zip(input) {
            let dot = rows::sum_by(c, |i| y[i] * dy[i]);
            for i in 0..c {
                dx[i] = y[i] * (dy[i] - dot);
            }
        }
    });
}

/// The largest element; in eight lanes, which the compiler would not make of a plain fold.
#[inline(always)]
pub(crate) fn row_max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let mut eights = x.chunks_exact(8);
    for eight in &mut eights {
        for (lane, &v) in lanes.iter_mut().zip(eight) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(eights.remainder()).fold(f32::NEG_INFINITY, |m, &v| m.max(v))
}
