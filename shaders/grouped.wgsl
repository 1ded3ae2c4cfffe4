// Grouped convolution, NHWC, any number of channels and outputs a group, all groups in one launch. With Cg = C / groups and
// Og = O / groups, output o sees the channels of group o / Og:
//   y[n,p,q,o] = bias[o] + sum over r, s, i < Cg of x[n, p * stride + r - pad, q * stride + s - pad, o / Og * Cg + i] * w[o, r, s, i].
//
// An invocation owns one output (forward), one number of the input's gradient, or one weight over one part of the pixels; channels
// are innermost, so that neighbours read neighbours. Sums are gathered in a fixed order. Each number of x is read kh * kw * Og times
// out of the caches; no shared memory, no limits beyond the buffers'.

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn grouped_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.n * p.p * p.q * p.o { return; }
    let o = i % p.o;
    let col = i / p.o % p.q;
    let row = i / (p.o * p.q) % p.p;
    let image = i / (p.o * p.q * p.p);
    let cg = p.c / p.groups;
    let first = o / (p.o / p.groups) * cg;
    var sum = 0.0;
    if p.bias == 1u { sum = bias[o]; }
    for (var r = 0u; r < p.kh; r++) {
        // Wraps to a large number above and left of the image.
        let h = row * p.stride_h + r - p.pad_h;
        if h >= p.h { continue; }
        for (var s = 0u; s < p.kw; s++) {
            let v = col * p.stride_w + s - p.pad_w;
            if v >= p.w { continue; }
            let base = ((image * p.h + h) * p.w + v) * p.c + first;
            let tap = ((o * p.kh + r) * p.kw + s) * cg;
            for (var c = 0u; c < cg; c++) { sum += x[base + c] * w[tap + c]; }
        }
    }
    y[i] = sum;
}

// dx[h,v,c] = sum over the taps with h = row * stride + r - pad (and so in width) and the outputs o of c's group of dy[row,col,o] * w[o,r,s,c].
@group(0) @binding(1) var<storage, read> upstream: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(256)
fn grouped_dgrad_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.n * p.h * p.w * p.c { return; }
    let c = i % p.c;
    let right = i / p.c % p.w + p.pad_w;
    let below = i / (p.c * p.w) % p.h + p.pad_h;
    let image = i / (p.c * p.w * p.h);
    let cg = p.c / p.groups;
    let og = p.o / p.groups;
    let first = c / cg * og;
    var sum = 0.0;
    for (var r = below % p.stride_h; r < min(p.kh, below + 1u); r += p.stride_h) {
        let row = (below - r) / p.stride_h;
        if row >= p.p { continue; }
        for (var s = right % p.stride_w; s < min(p.kw, right + 1u); s += p.stride_w) {
            let col = (right - s) / p.stride_w;
            if col >= p.q { continue; }
            let base = ((image * p.p + row) * p.q + col) * p.o + first;
            let tap = ((first * p.kh + r) * p.kw + s) * cg + c % cg;
            for (var o = 0u; o < og; o++) { sum += upstream[base + o] * w[tap + o * p.kh * p.kw * cg]; }
        }
    }
    dx[i] = sum;
}

// dw[part][o,r,s,c] = sum over the part's pixels of dy[pixel,o] * x[under the tap, c].
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> dw: array<f32>;

@compute @workgroup_size(256)
fn grouped_wgrad_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    let cg = p.c / p.groups;
    let weights = p.o * p.kh * p.kw * cg;
    if i >= weights * p.parts { return; }
    let c = i % cg;
    let s = i / cg % p.kw;
    let r = i / (cg * p.kw) % p.kh;
    let o = i / (cg * p.kw * p.kh) % p.o;
    let first = o / (p.o / p.groups) * cg;
    let pixels = p.n * p.p * p.q;
    let share = (pixels + p.parts - 1u) / p.parts;
    let start = i / weights * share;
    var sum = 0.0;
    for (var pixel = start; pixel < min(start + share, pixels); pixel++) {
        let h = pixel / p.q % p.p * p.stride_h + r - p.pad_h;
        let v = pixel % p.q * p.stride_w + s - p.pad_w;
        if h < p.h && v < p.w {
            let image = pixel / (p.q * p.p);
            sum += dy[pixel * p.o + o] * x[((image * p.h + h) * p.w + v) * p.c + first + c];
        }
    }
    dw[i] = sum;
}
