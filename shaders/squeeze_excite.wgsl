// Squeeze and excitation; formulas in src/ops/squeeze_excite.rs. x [images, pixels, channels], part [images, blocks, channels], mean,
// gate, u and dmean [images, channels], hidden [images, 2, squeezed] (z, then silu(z)), v [images, squeezed].
//
// Sums and products over the image: neighbouring invocations take neighbouring channels. The two layers: one workgroup an image, which
// reads again what it wrote to memory before a barrier.

struct SqueezeExciteParams {
    images: u32,
    pixels: u32,
    channels: u32,
    squeezed: u32,
    pixels_per_block: u32,
    blocks: u32,
}

@group(0) @binding(0) var<uniform> p: SqueezeExciteParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums_part: array<f32>;
@group(0) @binding(2) var<storage, read> sums_dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> bwd_sums_part: array<f32>;

// The first element of block i / channels in the channel of i, and the number of its pixels.
fn block_of(i: u32) -> vec2u {
    let number = i / p.channels;
    let first = (number % p.blocks) * p.pixels_per_block;
    let start = (number / p.blocks) * p.pixels + first;
    return vec2u(start * p.channels + i % p.channels, min(p.pixels_per_block, p.pixels - first));
}

// One invocation a channel of a block of pixels.
@compute @workgroup_size(64)
fn squeeze_excite_sums_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.images * p.blocks * p.channels { return; }
    let block = block_of(i);
    var sum = 0.0;
    for (var k = 0u; k < block.y; k++) { sum += x[block.x + k * p.channels]; }
    sums_part[i] = sum;
}

@compute @workgroup_size(64)
fn squeeze_excite_bwd_sums_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.images * p.blocks * p.channels { return; }
    let block = block_of(i);
    var sum = 0.0;
    for (var k = 0u; k < block.y; k++) {
        let at = block.x + k * p.channels;
        sum += x[at] * sums_dy[at];
    }
    bwd_sums_part[i] = sum;
}

// ------------------------------------------------------------------------------------------------ the two layers

fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

const GROUP = 256u;
var<workgroup> shares: array<f32, GROUP>;

// Adds the values of invocations that lie `apart`, 2 `apart`, .. one after the other, `count` (a power of two) together: the sum is
// with the first of them. All must call it.
fn sum_apart(me: u32, value: f32, apart: u32, count: u32) -> f32 {
    workgroupBarrier();
    shares[me] = value;
    for (var half = count / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (me / apart) % count < half { shares[me] += shares[me + half * apart]; }
    }
    workgroupBarrier();
    return shares[me];
}

@group(0) @binding(1) var<storage, read> part: array<f32>;
@group(0) @binding(2) var<storage, read> w1: array<f32>;
@group(0) @binding(3) var<storage, read> b1: array<f32>;
@group(0) @binding(4) var<storage, read> w2: array<f32>;
@group(0) @binding(5) var<storage, read> b2: array<f32>;
@group(0) @binding(6) var<storage, read_write> mean: array<f32>;
@group(0) @binding(7) var<storage, read_write> hidden: array<f32>;
@group(0) @binding(8) var<storage, read_write> gate: array<f32>;

// The sum of an image's blocks.
fn total(image: u32, c: u32) -> f32 {
    var sum = 0.0;
    for (var b = 0u; b < p.blocks; b++) { sum += part[(image * p.blocks + b) * p.channels + c]; }
    return sum;
}

@compute @workgroup_size(256)
fn squeeze_excite_gate_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let image = group.y * groups.x + group.x;
    if image >= p.images { return; }
    let at = image * p.channels;
    for (var c = me; c < p.channels; c += GROUP) { mean[at + c] = total(image, c) / f32(p.pixels); }
    storageBarrier();
    // 32 invocations a row of w1.
    for (var first = 0u; first < p.squeezed; first += 8u) {
        let s = first + me / 32u;
        var sum = 0.0;
        if s < p.squeezed {
            for (var c = me % 32u; c < p.channels; c += 32u) { sum += w1[s * p.channels + c] * mean[at + c]; }
        }
        sum = sum_apart(me, sum, 1u, 32u);
        if me % 32u == 0u && s < p.squeezed {
            let z = sum + b1[s];
            hidden[2u * image * p.squeezed + s] = z;
            hidden[(2u * image + 1u) * p.squeezed + s] = z * sigmoid(z);
        }
    }
    storageBarrier();
    for (var c = me; c < p.channels; c += GROUP) {
        var sum = b2[c];
        for (var s = 0u; s < p.squeezed; s++) { sum += w2[c * p.squeezed + s] * hidden[(2u * image + 1u) * p.squeezed + s]; }
        gate[at + c] = sigmoid(sum);
    }
}

@group(0) @binding(3) var<storage, read> bwd_w2: array<f32>;
@group(0) @binding(4) var<storage, read> bwd_hidden: array<f32>;
@group(0) @binding(5) var<storage, read> bwd_gate: array<f32>;
@group(0) @binding(6) var<storage, read_write> u: array<f32>;
@group(0) @binding(7) var<storage, read_write> v: array<f32>;
@group(0) @binding(8) var<storage, read_write> dmean: array<f32>;

@compute @workgroup_size(256)
fn squeeze_excite_bwd_gate_f32(
    @builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let image = group.y * groups.x + group.x;
    if image >= p.images { return; }
    let at = image * p.channels;
    for (var c = me; c < p.channels; c += GROUP) {
        let g = bwd_gate[at + c];
        u[at + c] = total(image, c) * g * (1.0 - g);
    }
    storageBarrier();
    // As many columns of w2 side by side as there are, at most 32.
    var lanes = 32u;
    while lanes / 2u >= p.squeezed && lanes > 1u { lanes /= 2u; }
    for (var first = 0u; first < p.squeezed; first += lanes) {
        let s = first + me % lanes;
        var sum = 0.0;
        if s < p.squeezed {
            for (var c = me / lanes; c < p.channels; c += GROUP / lanes) {
                sum += u[at + c] * bwd_w2[c * p.squeezed + s];
            }
        }
        sum = sum_apart(me, sum, lanes, GROUP / lanes);
        if me < lanes && s < p.squeezed {
            let z = bwd_hidden[2u * image * p.squeezed + s];
            let g = sigmoid(z);
            v[image * p.squeezed + s] = sum * g * (1.0 + z * (1.0 - g));
        }
    }
    storageBarrier();
    for (var c = me; c < p.channels; c += GROUP) {
        var sum = 0.0;
        for (var s = 0u; s < p.squeezed; s++) { sum += v[image * p.squeezed + s] * w1[s * p.channels + c]; }
        dmean[at + c] = sum / f32(p.pixels);
    }
}

@group(0) @binding(1) var<storage, read> w_u: array<f32>;
@group(0) @binding(2) var<storage, read> w_v: array<f32>;
@group(0) @binding(3) var<storage, read> w_mean: array<f32>;
@group(0) @binding(4) var<storage, read> w_hidden: array<f32>;
@group(0) @binding(5) var<storage, read_write> dw1: array<f32>;
@group(0) @binding(6) var<storage, read_write> db1: array<f32>;
@group(0) @binding(7) var<storage, read_write> dw2: array<f32>;
@group(0) @binding(8) var<storage, read_write> db2: array<f32>;

// One invocation an element of dw1, then of dw2; the first of a row has the bias too.
@compute @workgroup_size(256)
fn squeeze_excite_bwd_weights_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    let len = p.channels * p.squeezed;
    if i >= 2u * len { return; }
    var sum = 0.0;
    var bias = 0.0;
    if i < len {
        let s = i / p.channels;
        let c = i % p.channels;
        for (var n = 0u; n < p.images; n++) {
            let d = w_v[n * p.squeezed + s];
            bias += d;
            sum += d * w_mean[n * p.channels + c];
        }
        dw1[i] = sum;
        if c == 0u { db1[s] = bias; }
    } else {
        let c = (i - len) / p.squeezed;
        let s = (i - len) % p.squeezed;
        for (var n = 0u; n < p.images; n++) {
            let d = w_u[n * p.channels + c];
            bias += d;
            sum += d * w_hidden[(2u * n + 1u) * p.squeezed + s];
        }
        dw2[i - len] = sum;
        if s == 0u { db2[c] = bias; }
    }
}

// ------------------------------------------------------------------------------------------------ the image

@group(0) @binding(2) var<storage, read> fwd_gate: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> bwd_dmean: array<f32>;
@group(0) @binding(4) var<storage, read_write> dx: array<f32>;

// One invocation an element.
@compute @workgroup_size(256)
fn squeeze_excite_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.images * p.pixels * p.channels { return; }
    y[i] = x[i] * fwd_gate[i / (p.pixels * p.channels) * p.channels + i % p.channels];
}

// Here x is dy.
@compute @workgroup_size(256)
fn squeeze_excite_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.images * p.pixels * p.channels { return; }
    let at = i / (p.pixels * p.channels) * p.channels + i % p.channels;
    dx[i] = x[i] * fwd_gate[at] + bwd_dmean[at];
}
