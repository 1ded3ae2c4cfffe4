// Elementwise ops: y = f(a, b). One invocation an element; one read of each input, one write; memory-bound.

struct Params { len: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> y1: array<f32>;
@group(0) @binding(3) var<storage, read_write> y2: array<f32>;

@compute @workgroup_size(256)
fn add_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y2[i] = a[i] + b[i]; }
}

@compute @workgroup_size(256)
fn relu_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y1[i] = select(a[i], 0.0, a[i] < 0.0); }
}

// a = y, b = dy
@compute @workgroup_size(256)
fn relu_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y2[i] = select(0.0, b[i], a[i] > 0.0); }
}
