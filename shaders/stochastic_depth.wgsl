// Stochastic depth fused with the residual sum, see src/ops/stochastic_depth.rs. One invocation four neighbouring elements; those of
// one image share a random word. Memory-bound: each tensor once.

struct StochasticDepthParams {
    len: u32,
    sample: u32,
    threshold: u32,
    scale: f32,
    seed_low: u32,
    seed_high: u32,
    step: u32,
    op: u32,
}

@group(0) @binding(0) var<uniform> p: StochasticDepthParams;
@group(0) @binding(1) var<storage, read> branch: array<f32>;
@group(0) @binding(2) var<storage, read> shortcut: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

// Whether an image keeps its branch.
fn keeps(image: u32) -> bool {
    let words = philox4x32_10(vec2u(p.seed_low, p.seed_high), vec4u(image / 4u, 0u, p.step, p.op));
    return words[image % 4u] >= p.threshold;
}

@compute @workgroup_size(64)
fn stochastic_depth_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let first = flat_id(gid, groups, 64u) * 4u;
    if first >= p.len { return; }
    var image = first / p.sample;
    var keep = keeps(image);
    for (var i = first; i < min(first + 4u, p.len); i++) {
        if i / p.sample != image {
            image = i / p.sample;
            keep = keeps(image);
        }
        var v = shortcut[i];
        if keep { v += branch[i] * p.scale; }
        y[i] = v;
    }
}

@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read_write> dbranch: array<f32>;

@compute @workgroup_size(64)
fn stochastic_depth_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let first = flat_id(gid, groups, 64u) * 4u;
    if first >= p.len { return; }
    var image = first / p.sample;
    var keep = keeps(image);
    for (var i = first; i < min(first + 4u, p.len); i++) {
        if i / p.sample != image {
            image = i / p.sample;
            keep = keeps(image);
        }
        dbranch[i] = select(0.0, dy[i] * p.scale, keep);
    }
}
