// A moving average, in place; formula in src/ops/ema_step.rs. One invocation an element.

struct EmaParams { len: u32, rest: f32 }

@group(0) @binding(0) var<uniform> p: EmaParams;
@group(0) @binding(1) var<storage, read> value: array<f32>;
@group(0) @binding(2) var<storage, read_write> average: array<f32>;

@compute @workgroup_size(256)
fn ema_step_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.len { return; }
    average[i] += p.rest * (value[i] - average[i]);
}
