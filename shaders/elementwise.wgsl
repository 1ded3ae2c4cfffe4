// Elementwise ops: y = f(a) or y = f(a, b). One invocation an element; memory-bound.
//
// Functions of one tensor have their output at binding 2, those of two at binding 3. In a backward, a is what was saved
// and b is dy.

struct Params { len: u32 }
struct AddBiasParams { len: u32, channels: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(0) var<uniform> p_bias: AddBiasParams;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> y1: array<f32>;
@group(0) @binding(3) var<storage, read_write> y2: array<f32>;

// Written so that no power overflows: WGSL promises nothing about infinities.
fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

// The standard normal distribution function, by its upper tail at |x|: `normal_tail` of src/cpu/vmath.rs.
fn normal_cdf(x: f32) -> f32 {
    let z = min(abs(x), 14.0);
    let t = 1.0 / (0.28 * z + 1.0);
    var s = 0.021008056;
    s = s * t - 0.074773245;
    s = s * t + 0.052199695;
    s = s * t + 0.040743675;
    s = s * t + 0.039661884;
    s = s * t + 0.0978088;
    s = s * t + 0.09947921;
    s = s * t + 0.11219643;
    s = s * t + 0.11167551;
    let tail = s * t * exp(-0.5 * z * z);
    return select(tail, 1.0 - tail, x > 0.0);
}

@compute @workgroup_size(256)
fn add_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y2[i] = a[i] + b[i]; }
}

@compute @workgroup_size(256)
fn mul_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y2[i] = a[i] * b[i]; }
}

@compute @workgroup_size(256)
fn add_bias_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p_bias.len { y2[i] = a[i] + b[i % p_bias.channels]; }
}

@compute @workgroup_size(256)
fn relu_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y1[i] = select(a[i], 0.0, a[i] < 0.0); }
}

@compute @workgroup_size(256)
fn relu_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y2[i] = select(0.0, b[i], a[i] > 0.0); }
}

@compute @workgroup_size(256)
fn sigmoid_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y1[i] = sigmoid(a[i]); }
}

@compute @workgroup_size(256)
fn sigmoid_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y2[i] = b[i] * a[i] * (1.0 - a[i]); }
}

@compute @workgroup_size(256)
fn silu_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y1[i] = a[i] * sigmoid(a[i]); }
}

@compute @workgroup_size(256)
fn silu_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len {
        let s = sigmoid(a[i]);
        y2[i] = b[i] * s * (1.0 + a[i] * (1.0 - s));
    }
}

@compute @workgroup_size(256)
fn gelu_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y1[i] = a[i] * normal_cdf(a[i]); }
}

@compute @workgroup_size(256)
fn gelu_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len {
        let z = min(abs(a[i]), 14.0);
        let density = 0.3989422804 * exp(-0.5 * z * z);
        y2[i] = b[i] * (normal_cdf(a[i]) + a[i] * density);
    }
}
