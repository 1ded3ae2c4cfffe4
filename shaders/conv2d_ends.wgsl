// Forward convolutions of conv2d.wgsl (put before this text) that end in more than a bias: with the statistics that a batch norm needs of
// y, or with a whole norm. They have no bias.

// ------------------------------------------------------------------------------------------------ statistics
// Mean and sum of squared deviations from it of each channel over a workgroup's pixels: part [blocks of 256 pixels (few: 32; conv2d_tiled.wgsl: 64), 2, o]. Both are taken of
// the sums in registers, one after the other, so a mean far from zero costs no accuracy. Pixels past the last do not count.

@group(0) @binding(3) var<storage, read_write> part: array<f32>;

var<workgroup> shares: array<vec4f, 128>;

struct Eight { low: vec4f, high: vec4f }

// The sum over the invocations that share channels, for all of them.
fn over_lanes(lane: u32, lanes: u32, v: Eight) -> Eight {
    shares[lane] = v.low;
    shares[lane + LANES] = v.high;
    for (var half = lanes / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane % lanes < half {
            shares[lane] += shares[lane + half];
            shares[lane + LANES] += shares[lane + LANES + half];
        }
    }
    workgroupBarrier();
    let first = lane / lanes * lanes;
    let sum = Eight(shares[first], shares[first + LANES]);
    workgroupBarrier();
    return sum;
}

fn counted(inside: bool, v: vec4f) -> vec4f {
    return select(vec4f(0.0), v, inside);
}

fn square(inside: bool, v: vec4f, mean: vec4f) -> vec4f {
    return counted(inside, (v - mean) * (v - mean));
}

// Of channels from `o` on.
fn statistics(block: u32, lane: u32, o: u32, t: Quad, s: Sums) {
    let pixels = p.n * p.p * p.q;
    let lanes = lanes_of_y();
    let first = min(block * lanes * PIXELS, pixels);
    let count = f32(min(lanes * PIXELS, pixels - first));
    let k = t.inside;
    let sum = over_lanes(lane, lanes, Eight(
        (counted(k.x, s.s00) + counted(k.y, s.s10)) + (counted(k.z, s.s20) + counted(k.w, s.s30)),
        (counted(k.x, s.s01) + counted(k.y, s.s11)) + (counted(k.z, s.s21) + counted(k.w, s.s31))));
    let low = sum.low / count;
    let high = sum.high / count;
    let m2 = over_lanes(lane, lanes, Eight(
        (square(k.x, s.s00, low) + square(k.y, s.s10, low)) + (square(k.z, s.s20, low) + square(k.w, s.s30, low)),
        (square(k.x, s.s01, high) + square(k.y, s.s11, high)) + (square(k.z, s.s21, high) + square(k.w, s.s31, high))));
    // One of the invocations that share them writes a channel; there are eight at least.
    let j = lane % lanes;
    if j >= CHANNELS || o + j >= p.o || first == pixels { return; }
    let at = block * 2u * p.o + o + j;
    if j < 4u {
        part[at] = low[j];
        part[at + p.o] = m2.low[j];
    } else {
        part[at] = high[j - 4u];
        part[at + p.o] = m2.high[j - 4u];
    }
}

@compute @workgroup_size(64)
fn conv2d_stats_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = first_channel(wg, lane, lanes_of_y(), CHANNELS);
    let s = sums_vec4(t, o, vec4f(0.0), vec4f(0.0));
    store_sums(t, o, s);
    statistics(wg.z * groups.x + wg.x, lane, o, t, s);
}

@compute @workgroup_size(64)
fn conv2d_stats_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = first_channel(wg, lane, lanes_of_y(), CHANNELS);
    let s = sums_any(t, o, vec4f(0.0), vec4f(0.0));
    store_sums(t, o, s);
    statistics(wg.z * groups.x + wg.x, lane, o, t, s);
}

// ------------------------------------------------------------------------------------------------ norm
// y = act((sum - mean) * scale + shift + residual), by a norm's table [4, o] (src/ops/batch_norm.rs).

@group(0) @binding(3) var<storage, read> table: array<f32>;
@group(0) @binding(4) var<storage, read> residual: array<f32>;
@group(0) @binding(5) var<storage, read_write> norm_y: array<f32>;

// Power that never overflows.
fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

fn store_one_norm(pixel: u32, inside: bool, o: u32, sum: f32) {
    if inside && o < p.o {
        var z = (sum - table[o]) * table[2u * p.o + o] + table[3u * p.o + o];
        if p.residual != 0u { z += residual[pixel * p.o + o]; }
        if p.act == 1u { z = select(z, 0.0, z < 0.0); }
        if p.act == 2u { z *= sigmoid(z); }
        norm_y[pixel * p.o + o] = z;
    }
}

fn store_norm(pixel: u32, inside: bool, o: u32, sums: vec4f) {
    for (var j = 0u; j < 4u; j++) { store_one_norm(pixel, inside, o + j, sums[j]); }
}

fn store_norms(t: Quad, o: u32, s: Sums) {
    store_norm(t.index.x, t.inside.x, o, s.s00); store_norm(t.index.x, t.inside.x, o + 4u, s.s01);
    store_norm(t.index.y, t.inside.y, o, s.s10); store_norm(t.index.y, t.inside.y, o + 4u, s.s11);
    store_norm(t.index.z, t.inside.z, o, s.s20); store_norm(t.index.z, t.inside.z, o + 4u, s.s21);
    store_norm(t.index.w, t.inside.w, o, s.s30); store_norm(t.index.w, t.inside.w, o + 4u, s.s31);
}

@compute @workgroup_size(64)
fn conv2d_norm_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = first_channel(wg, lane, lanes_of_y(), CHANNELS);
    store_norms(t, o, sums_vec4(t, o, vec4f(0.0), vec4f(0.0)));
}

@compute @workgroup_size(64)
fn conv2d_norm_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = first_channel(wg, lane, lanes_of_y(), CHANNELS);
    store_norms(t, o, sums_any(t, o, vec4f(0.0), vec4f(0.0)));
}
