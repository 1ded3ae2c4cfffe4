//! CPU kernels of [`crate::ops::optim_step`].

use super::{rows, simd};
use crate::kernel::CpuArgs;
use crate::ops::optim_step::{AdamWParams, SgdParams};
use rayon::prelude::*;

/// `grad, mask, control, param, momentum -> param, momentum`, in place.
pub(crate) fn sgd(a: &CpuArgs<'_>) {
    let p: SgdParams = a.params();
    let (grad, mask, factor) = (a.f32(0), a.f32(1), factor(p.controlled, a.f32(2)));
    if factor == 0.0 {
        return;
    }
    let slab = rows::slab_len(1);
    let (param, buffer) = ((a.f32_mut(3), slab), (a.f32_mut(4), slab));
    rows::each2!(param, buffer, grad.len(), |number, param, buffer| {
        let start = number * slab;
        for (i, (param, buffer)) in param.iter_mut().zip(buffer).enumerate() {
            let decay = decay(p.weight_decay, p.masked, mask, start + i);
            let g = decay.mul_add(*param, factor * grad[start + i]);
            *buffer = p.momentum.mul_add(*buffer, g);
            let step = if p.nesterov != 0 { p.momentum.mul_add(*buffer, g) } else { *buffer };
            *param -= p.lr * step;
        }
    });
}

/// `grad, mask, control, param, mean, square -> param, mean, square`, in place.
pub(crate) fn adamw(a: &CpuArgs<'_>) {
    let p: AdamWParams = a.params();
    let (grad, mask, factor) = (a.f32(0), a.f32(1), factor(p.controlled, a.f32(2)));
    if factor == 0.0 {
        return;
    }
    let slab = rows::slab_len(1);
    let param = a.f32_mut(3).par_chunks_mut(slab);
    let state = a.f32_mut(4).par_chunks_mut(slab).zip(a.f32_mut(5).par_chunks_mut(slab));
    param.zip(state).enumerate().for_each(|(number, (param, (mean, square)))| {
        simd::vectorise!(|| {
            let start = number * slab;
            for (i, (param, (m, v))) in
                param.iter_mut().zip(mean.iter_mut().zip(square)).enumerate()
            {
                let g = factor * grad[start + i];
                let decay = decay(p.weight_decay, p.masked, mask, start + i);
                let kept = (-p.lr * decay).mul_add(*param, *param);
                *m = p.rest1.mul_add(g - *m, *m);
                *v = p.beta2.mul_add(*v, p.rest2 * g * g);
                *param = kept - p.step_size * *m / v.sqrt().mul_add(p.inv_root, p.eps);
            }
        });
    });
}

/// What gradients are multiplied by; 0 for a step that is not made.
fn factor(controlled: u32, control: &[f32]) -> f32 {
    if controlled != 0 { control[1] } else { 1.0 }
}

#[inline(always)]
fn decay(weight_decay: f32, masked: u32, mask: &[f32], i: usize) -> f32 {
    if masked != 0 { weight_decay * mask[i] } else { weight_decay }
}
