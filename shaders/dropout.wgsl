// Dropout; the mask is made from counters, see src/ops/dropout.rs.

struct DropoutParams {
    len: u32,
    threshold: u32,
    scale: f32,
    seed_low: u32,
    seed_high: u32,
    step: u32,
    op: u32,
}

@group(0) @binding(0) var<uniform> p: DropoutParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// One invocation four elements: one call of Philox gives four words.
@compute @workgroup_size(64)
fn dropout_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let block = flat_id(gid, groups, 64u);
    let first = block * 4u;
    if first >= p.len { return; }
    let words = philox4x32_10(vec2u(p.seed_low, p.seed_high), vec4u(block, 0u, p.step, p.op));
    for (var k = 0u; k < min(4u, p.len - first); k++) {
        y[first + k] = select(0.0, x[first + k] * p.scale, words[k] >= p.threshold);
    }
}
