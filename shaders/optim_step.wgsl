// Fused optimiser steps, in place, over flat buffers; formulas in src/ops/optim_step.rs. One invocation a parameter.
// Where there is a control, its second number multiplies each gradient, and 0 leaves everything as it is.

struct SgdParams { len: u32, masked: u32, controlled: u32, nesterov: u32, lr: f32, momentum: f32, weight_decay: f32 }
struct AdamWParams {
    len: u32,
    masked: u32,
    controlled: u32,
    lr: f32,
    step_size: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    inv_root: f32,
    eps: f32,
    weight_decay: f32,
}

@group(0) @binding(0) var<uniform> sgd: SgdParams;
@group(0) @binding(0) var<uniform> adamw: AdamWParams;
@group(0) @binding(1) var<storage, read> grad: array<f32>;
@group(0) @binding(2) var<storage, read> mask: array<f32>;
@group(0) @binding(3) var<storage, read> control: array<f32>;
@group(0) @binding(4) var<storage, read_write> param: array<f32>;
@group(0) @binding(5) var<storage, read_write> momentum: array<f32>;
@group(0) @binding(5) var<storage, read_write> mean: array<f32>;
@group(0) @binding(6) var<storage, read_write> square: array<f32>;

fn factor_of(controlled: u32) -> f32 {
    if controlled == 0u { return 1.0; }
    return control[1];
}

@compute @workgroup_size(256)
fn sgd_step_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= sgd.len { return; }
    let factor = factor_of(sgd.controlled);
    if factor == 0.0 { return; }
    var decay = sgd.weight_decay;
    if sgd.masked != 0u { decay *= mask[i]; }
    let g = factor * grad[i] + decay * param[i];
    let m = sgd.momentum * momentum[i] + g;
    momentum[i] = m;
    param[i] -= sgd.lr * select(m, g + sgd.momentum * m, sgd.nesterov != 0u);
}

@compute @workgroup_size(256)
fn adamw_step_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= adamw.len { return; }
    let factor = factor_of(adamw.controlled);
    if factor == 0.0 { return; }
    var decay = adamw.weight_decay;
    if adamw.masked != 0u { decay *= mask[i]; }
    let g = factor * grad[i];
    let kept = param[i] - adamw.lr * decay * param[i];
    let m = mean[i] + adamw.rest1 * (g - mean[i]);
    let v = adamw.beta2 * square[i] + adamw.rest2 * g * g;
    mean[i] = m;
    square[i] = v;
    param[i] = kept - adamw.step_size * m / (sqrt(v) * adamw.inv_root + adamw.eps);
}
