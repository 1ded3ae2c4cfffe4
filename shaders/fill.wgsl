// y = value, elementwise. One invocation an element; memory-bound.

struct Params { len: u32, value: f32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn fill_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y[i] = p.value; }
}
