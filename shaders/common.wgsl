// Put before every shader text.

// The item of this invocation, for grids made by Plan::items: workgroups run on along y past 65,535 along x.
fn flat_id(gid: vec3u, groups: vec3u, group_size: u32) -> u32 {
    return gid.y * groups.x * group_size + gid.x;
}

// a * b as (high, low) words: WGSL has no 64-bit integers.
fn mul_wide(a: u32, b: u32) -> vec2u {
    let al = a & 0xffffu;
    let ah = a >> 16u;
    let bl = b & 0xffffu;
    let bh = b >> 16u;
    let mid = ah * bl + ((al * bl) >> 16u);
    let mid2 = al * bh + (mid & 0xffffu);
    return vec2u(ah * bh + (mid >> 16u) + (mid2 >> 16u), a * b);
}

// Philox 4x32-10 (Salmon et al. 2011): the same words as src/tensor/philox.rs.
fn philox4x32_10(key_in: vec2u, counter_in: vec4u) -> vec4u {
    var key = key_in;
    var c = counter_in;
    for (var round = 0u; round < 10u; round++) {
        if round > 0u {
            key += vec2u(0x9E3779B9u, 0xBB67AE85u);
        }
        let a = mul_wide(0xD2511F53u, c.x);
        let b = mul_wide(0xCD9E8D57u, c.z);
        c = vec4u(b.x ^ c.y ^ key.x, b.y, a.x ^ c.w ^ key.y, a.y);
    }
    return c;
}

// Uniform in [0, 1) for element i of the stream (seed, step, op).
fn philox_uniform(seed: vec2u, step: u32, op: u32, i: u32) -> f32 {
    let words = philox4x32_10(seed, vec4u(i / 4u, 0u, step, op));
    return f32(words[i % 4u] >> 8u) * (1.0 / 16777216.0);
}
