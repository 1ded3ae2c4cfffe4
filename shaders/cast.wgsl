// y = x, stored otherwise: the rewriting of texts for f16 widens or rounds. One invocation an element; memory-bound, 6 bytes a number.

struct CastParams { len: u32 }

@group(0) @binding(0) var<uniform> p: CastParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn cast_to_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y[i] = x[i]; }
}

@compute @workgroup_size(256)
fn cast_from_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.len { y[i] = x[i]; }
}
