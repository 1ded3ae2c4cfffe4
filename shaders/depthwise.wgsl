// Depthwise convolution, NHWC: every channel has a kernel of its own.
//   y[n,p,q,c] = bias[c] + sum over r, s of x[n, p * stride + r - pad, q * stride + s - pad, c] * w[c,r,s]
//
// vec4 variants, for channels that are multiples of 4: an invocation owns four channels of eight neighbouring outputs of a row
// (input gradient: of eight pixels a stride apart, which the same taps meet). Under a row of the kernel, eight pixels form a window that
// moves on by one for each tap of equal remainder modulo the stride: a load for eight products, for any kernel and stride.
// Weight gradient: an invocation owns four channels of up to five taps of a kernel row and walks over one part of the pixels, x under
// the taps in a window that moves with the pixel. The others take any channels, a number an invocation. All sums are gathered, in a fixed
// order; no shared memory.
//
// Loads for each output and tap, in vec4: 1/8 of x, and 4/8 numbers of the weight. Limits: those of buffers.

@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> a4: array<vec4f>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read> dy4: array<vec4f>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx4: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> y4: array<vec4f>;

const TILE = 8u;

// The weights of channels 4 c4 .. 4 c4 + 4 under a tap.
fn tap_of(c4: u32, tap: u32) -> vec4f {
    let taps = p.kh * p.kw;
    let at = 4u * c4 * taps + tap;
    return vec4f(w[at], w[at + taps], w[at + 2u * taps], w[at + 3u * taps]);
}

// Four channels of column `col` of a row of `width` pixels that begins at a4[row]; zero outside, where a negative column is a large number.
fn pixel(row: u32, col: u32, width: u32, c4: u32) -> vec4f {
    if col >= width { return vec4f(0.0); }
    return a4[row + col * (p.c / 4u) + c4];
}

@compute @workgroup_size(64)
fn depthwise_fwd_vec4_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    let packs = p.c / 4u;
    let tiles = (p.q + TILE - 1u) / TILE;
    if i >= p.n * p.p * tiles * packs { return; }
    let c4 = i % packs;
    let first = i / packs % tiles * TILE;
    let line = i / (packs * tiles);
    let image = line / p.p;
    let step = p.stride_w;
    var s0 = vec4f(0.0);
    if p.bias == 1u { s0 = vec4f(bias[4u * c4], bias[4u * c4 + 1u], bias[4u * c4 + 2u], bias[4u * c4 + 3u]); }
    var s1 = s0; var s2 = s0; var s3 = s0; var s4 = s0; var s5 = s0; var s6 = s0; var s7 = s0;
    for (var r = 0u; r < p.kh; r++) {
        let h = line % p.p * p.stride_h + r - p.pad_h;
        if h >= p.h { continue; }
        let row = (image * p.h + h) * p.w * packs;
        for (var phase = 0u; phase < min(step, p.kw); phase++) {
            var col = first * step + phase - p.pad_w;
            var x0 = pixel(row, col, p.w, c4);
            var x1 = pixel(row, col + step, p.w, c4);
            var x2 = pixel(row, col + 2u * step, p.w, c4);
            var x3 = pixel(row, col + 3u * step, p.w, c4);
            var x4 = pixel(row, col + 4u * step, p.w, c4);
            var x5 = pixel(row, col + 5u * step, p.w, c4);
            var x6 = pixel(row, col + 6u * step, p.w, c4);
            col += 7u * step;
            for (var s = phase; s < p.kw; s += step) {
                let x7 = pixel(row, col, p.w, c4);
                let t = tap_of(c4, r * p.kw + s);
                s0 += x0 * t; s1 += x1 * t; s2 += x2 * t; s3 += x3 * t;
                s4 += x4 * t; s5 += x5 * t; s6 += x6 * t; s7 += x7 * t;
                x0 = x1; x1 = x2; x2 = x3; x3 = x4; x4 = x5; x5 = x6; x6 = x7;
                col += step;
            }
        }
    }
    let out = (line * p.q + first) * packs + c4;
    y4[out] = s0;
    let left = p.q - first;
    if left > 1u { y4[out + packs] = s1; }
    if left > 2u { y4[out + 2u * packs] = s2; }
    if left > 3u { y4[out + 3u * packs] = s3; }
    if left > 4u { y4[out + 4u * packs] = s4; }
    if left > 5u { y4[out + 5u * packs] = s5; }
    if left > 6u { y4[out + 6u * packs] = s6; }
    if left > 7u { y4[out + 7u * packs] = s7; }
}

// dx[h,v,c] = sum over the taps with h = row * stride + r - pad (and so in width) of dy[row,col,c] * w[c,r,s].
@compute @workgroup_size(64)
fn depthwise_dgrad_vec4_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    let packs = p.c / 4u;
    let step = p.stride_w;
    let tiles = step * ((p.w + step * TILE - 1u) / (step * TILE));
    if i >= p.n * p.h * tiles * packs { return; }
    let c4 = i % packs;
    // The tile's pixels: first, first + step, ...
    let tile = i / packs % tiles;
    let first = tile / step * step * TILE + tile % step;
    let line = i / (packs * tiles);
    let image = line / p.h;
    let below = line % p.h + p.pad_h;
    let right = first + p.pad_w;
    var s0 = vec4f(0.0);
    var s1 = s0; var s2 = s0; var s3 = s0; var s4 = s0; var s5 = s0; var s6 = s0; var s7 = s0;
    for (var r = below % p.stride_h; r < min(p.kh, below + 1u); r += p.stride_h) {
        let h = (below - r) / p.stride_h;
        if h >= p.p { continue; }
        let row = (image * p.p + h) * p.q * packs;
        // Under the first tap; each further tap lies a pixel more to the left.
        var col = right / step;
        var x1 = pixel(row, col + 1u, p.q, c4);
        var x2 = pixel(row, col + 2u, p.q, c4);
        var x3 = pixel(row, col + 3u, p.q, c4);
        var x4 = pixel(row, col + 4u, p.q, c4);
        var x5 = pixel(row, col + 5u, p.q, c4);
        var x6 = pixel(row, col + 6u, p.q, c4);
        var x7 = pixel(row, col + 7u, p.q, c4);
        for (var s = right % step; s < p.kw; s += step) {
            let x0 = pixel(row, col, p.q, c4);
            let t = tap_of(c4, r * p.kw + s);
            s0 += x0 * t; s1 += x1 * t; s2 += x2 * t; s3 += x3 * t;
            s4 += x4 * t; s5 += x5 * t; s6 += x6 * t; s7 += x7 * t;
            x7 = x6; x6 = x5; x5 = x4; x4 = x3; x3 = x2; x2 = x1; x1 = x0;
            col -= 1u;
        }
    }
    if first >= p.w { return; }
    let out = (line * p.w + first) * packs + c4;
    let next = step * packs;
    // Pixels that there are.
    let left = (p.w - first + step - 1u) / step;
    dx4[out] = s0;
    if left > 1u { dx4[out + next] = s1; }
    if left > 2u { dx4[out + 2u * next] = s2; }
    if left > 3u { dx4[out + 3u * next] = s3; }
    if left > 4u { dx4[out + 4u * next] = s4; }
    if left > 5u { dx4[out + 5u * next] = s5; }
    if left > 6u { dx4[out + 6u * next] = s6; }
    if left > 7u { dx4[out + 7u * next] = s7; }
}

// Five sums of four channels, to [c][tap] of a part.
fn store_taps(part: u32, c4: u32, tap: u32, count: u32, s: array<vec4f, 5>) {
    let taps = p.kh * p.kw;
    let at = (part * p.c + 4u * c4) * taps + tap;
    var sums = s;
    for (var t = 0u; t < count; t++) {
        for (var k = 0u; k < 4u; k++) { dx[at + k * taps + t] = sums[t][k]; }
    }
}

// dw[part][c,r,s] = sum over the part's pixels of dy[pixel,c] * x[under the tap, c].
@compute @workgroup_size(64)
fn depthwise_wgrad_vec4_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    let packs = p.c / 4u;
    let fives = (p.kw + 4u) / 5u;
    if i >= p.parts * p.kh * fives * packs { return; }
    let c4 = i % packs;
    let s = i / packs % fives * 5u;
    let r = i / (packs * fives) % p.kh;
    let part = i / (packs * fives * p.kh);
    let step = p.stride_w;
    let pixels = p.n * p.p * p.q;
    let share = (pixels + p.parts - 1u) / p.parts;
    let end = min((part + 1u) * share, pixels);
    var s0 = vec4f(0.0);
    var s1 = s0; var s2 = s0; var s3 = s0; var s4 = s0;
    var at = part * share;
    while at < end {
        // A run of pixels in a row of the output.
        let q = at % p.q;
        let line = at / p.q;
        let run = min(end - at, p.q - q);
        let h = line % p.p * p.stride_h + r - p.pad_h;
        if h < p.h {
            let row = (line / p.p * p.h + h) * p.w * packs;
            var col = q * step + s - p.pad_w;
            var x0 = pixel(row, col, p.w, c4);
            var x1 = pixel(row, col + 1u, p.w, c4);
            var x2 = pixel(row, col + 2u, p.w, c4);
            var x3 = pixel(row, col + 3u, p.w, c4);
            for (var k = 0u; k < run; k++) {
                let x4 = pixel(row, col + 4u, p.w, c4);
                let d = dy4[(at + k) * packs + c4];
                s0 += x0 * d; s1 += x1 * d; s2 += x2 * d; s3 += x3 * d; s4 += x4 * d;
                col += step;
                if step == 1u {
                    x0 = x1; x1 = x2; x2 = x3; x3 = x4;
                } else if step == 2u {
                    x0 = x2; x1 = x3; x2 = x4;
                    x3 = pixel(row, col + 3u, p.w, c4);
                } else {
                    x0 = pixel(row, col, p.w, c4);
                    x1 = pixel(row, col + 1u, p.w, c4);
                    x2 = pixel(row, col + 2u, p.w, c4);
                    x3 = pixel(row, col + 3u, p.w, c4);
                }
            }
        }
        at += run;
    }
    store_taps(part, c4, r * p.kw + s, min(5u, p.kw - s), array<vec4f, 5>(s0, s1, s2, s3, s4));
}

@compute @workgroup_size(64)
fn depthwise_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.n * p.p * p.q * p.c { return; }
    let c = i % p.c;
    let col = i / p.c % p.q;
    let row = i / (p.c * p.q) % p.p;
    let image = i / (p.c * p.q * p.p);
    var sum = 0.0;
    if p.bias == 1u { sum = bias[c]; }
    for (var r = 0u; r < p.kh; r++) {
        let h = row * p.stride_h + r - p.pad_h;
        if h >= p.h { continue; }
        for (var s = 0u; s < p.kw; s++) {
            let v = col * p.stride_w + s - p.pad_w;
            if v < p.w { sum += a[((image * p.h + h) * p.w + v) * p.c + c] * w[(c * p.kh + r) * p.kw + s]; }
        }
    }
    y[i] = sum;
}

@compute @workgroup_size(64)
fn depthwise_dgrad_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.n * p.h * p.w * p.c { return; }
    let c = i % p.c;
    let right = i / p.c % p.w + p.pad_w;
    let below = i / (p.c * p.w) % p.h + p.pad_h;
    let image = i / (p.c * p.w * p.h);
    var sum = 0.0;
    for (var r = below % p.stride_h; r < min(p.kh, below + 1u); r += p.stride_h) {
        let row = (below - r) / p.stride_h;
        if row >= p.p { continue; }
        for (var s = right % p.stride_w; s < min(p.kw, right + 1u); s += p.stride_w) {
            let col = (right - s) / p.stride_w;
            if col < p.q { sum += a[((image * p.p + row) * p.q + col) * p.c + c] * w[(c * p.kh + r) * p.kw + s]; }
        }
    }
    dx[i] = sum;
}

@compute @workgroup_size(64)
fn depthwise_wgrad_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    let taps = p.kh * p.kw;
    if i >= p.parts * p.c * taps { return; }
    let c = i % p.c;
    let tap = i / p.c % taps;
    let part = i / (p.c * taps);
    let pixels = p.n * p.p * p.q;
    let share = (pixels + p.parts - 1u) / p.parts;
    var sum = 0.0;
    for (var at = part * share; at < min((part + 1u) * share, pixels); at++) {
        let h = at / p.q % p.p * p.stride_h + tap / p.kw - p.pad_h;
        let v = at % p.q * p.stride_w + tap % p.kw - p.pad_w;
        if h < p.h && v < p.w {
            let image = at / (p.q * p.p);
            sum += dy[at * p.c + c] * a[((image * p.h + h) * p.w + v) * p.c + c];
        }
    }
    dx[(part * p.c + c) * taps + tap] = sum;
}
