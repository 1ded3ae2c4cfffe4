// The class token and positions of a vision transformer; formulas in src/ops/tokens.rs. One invocation an element of the output.
// p.tokens counts the class token. Memory-bound: each tensor once.

struct TokenParams { images: u32, tokens: u32, channels: u32 }

@group(0) @binding(0) var<uniform> p: TokenParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> cls: array<f32>;
@group(0) @binding(3) var<storage, read> pos: array<f32>;
@group(0) @binding(4) var<storage, read_write> embedded: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn embed_tokens_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    let image = p.tokens * p.channels;
    if i >= p.images * image { return; }
    let at = i % image;
    var v = pos[at];
    if at < p.channels { v += cls[at]; } else { v += x[i - (i / image + 1u) * p.channels]; }
    embedded[i] = v;
}

@compute @workgroup_size(256)
fn embed_tokens_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    let image = (p.tokens - 1u) * p.channels;
    if i >= p.images * image { return; }
    y[i] = x[i + (i / image + 1u) * p.channels];
}

@compute @workgroup_size(256)
fn first_token_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.images * p.channels { return; }
    y[i] = x[i / p.channels * p.tokens * p.channels + i % p.channels];
}

@compute @workgroup_size(256)
fn first_token_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    let image = p.tokens * p.channels;
    if i >= p.images * image { return; }
    var v = 0.0;
    if i % image < p.channels { v = x[i / image * p.channels + i % image]; }
    y[i] = v;
}
