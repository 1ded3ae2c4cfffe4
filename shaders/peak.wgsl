// y[i] = i, then `rounds` times y[i] = a y[i] + b: what the multiply-add units do at most. Not an op: `attn2d bench` measures
// its ceiling with it. An invocation owns 16 neighbouring chains.

struct Params { len: u32, rounds: u32, a: f32, b: f32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

fn put(first: u32, v: vec4f) {
    for (var k = 0u; k < 4u; k++) {
        if first + k < p.len {
            y[first + k] = v[k];
        }
    }
}

@compute @workgroup_size(256)
fn peak_fma_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let first = 16u * flat_id(gid, groups, 256u);
    let start = vec4f(f32(first)) + vec4f(0.0, 1.0, 2.0, 3.0);
    var v0 = start;
    var v1 = start + 4.0;
    var v2 = start + 8.0;
    var v3 = start + 12.0;
    let a = vec4f(p.a);
    let b = vec4f(p.b);
    for (var r = 0u; r < p.rounds; r++) {
        v0 = fma(a, v0, b);
        v1 = fma(a, v1, b);
        v2 = fma(a, v2, b);
        v3 = fma(a, v3, b);
    }
    put(first, v0);
    put(first + 4u, v1);
    put(first + 8u, v2);
    put(first + 12u, v3);
}
