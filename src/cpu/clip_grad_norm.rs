//! CPU kernels of [`crate::ops::clip_grad_norm`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::clip_grad_norm::{FinishParams, PartsParams};

/// Sums of squares of pieces: `grad -> parts`.
pub(crate) fn parts(a: &CpuArgs<'_>) {
    let p: PartsParams = a.params();
    let (grad, piece, scale) = (a.f32(0), p.piece as usize, p.inv_scale);
    rows::each!(a.f32_mut(1), 1, grad.len(), |i, part| {
        let grad = &grad[i * piece..grad.len().min((i + 1) * piece)];
        let square = |i: usize| (grad[i] * scale) * (grad[i] * scale);
        part[0] = rows::sum_by(grad.len(), square);
    });
}

/// `parts -> control`: norm and factor.
pub(crate) fn finish(a: &CpuArgs<'_>) {
    let p: FinishParams = a.params();
    let parts = a.f32(0);
    let norm = rows::sum_by(parts.len(), |i| parts[i]).sqrt();
    let clip = if p.max_norm > 0.0 { (p.max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
    let control = a.f32_mut(1);
    control[0] = norm;
    control[1] = if norm.is_finite() { p.inv_scale * clip } else { 0.0 };
}
