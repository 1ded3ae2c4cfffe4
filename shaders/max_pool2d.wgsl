// Max pooling; the rules are in src/ops/max_pool2d.rs. places[e] is i * kw + j of the element that output e took: one
// byte each, four to a word, or one word each where p.wide is set.

struct MaxPool2dParams {
    n: u32, h: u32, w: u32, c: u32,
    oh: u32, ow: u32,
    kh: u32, kw: u32,
    sh: u32, sw: u32,
    ph: u32, pw: u32,
    wide: u32,
}

@group(0) @binding(0) var<uniform> p: MaxPool2dParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> places_out: array<u32>;

// By its bits: a compiler may take a float to be no NaN.
fn is_nan(v: f32) -> bool {
    return (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u;
}

// The place that output e takes; also writes y.
fn largest(e: u32) -> u32 {
    let c = e % p.c;
    let q = (e / p.c) % p.ow;
    let row = (e / (p.c * p.ow)) % p.oh;
    let n = e / (p.c * p.ow * p.oh);
    let top = row * p.sh;
    let left = q * p.sw;
    let rows = inside(top, p.ph, p.kh, p.h);
    let columns = inside(left, p.pw, p.kw, p.w);
    let image = n * p.h;
    var place = rows.x * p.kw + columns.x;
    var best = x[((image + top + rows.x - p.ph) * p.w + left + columns.x - p.pw) * p.c + c];
    for (var i = rows.x; i < rows.y; i++) {
        for (var j = columns.x; j < columns.y; j++) {
            let v = x[((image + top + i - p.ph) * p.w + left + j - p.pw) * p.c + c];
            if v > best || is_nan(v) {
                best = v;
                place = i * p.kw + j;
            }
        }
    }
    y[e] = best;
    return place;
}

// One invocation four elements.
@compute @workgroup_size(64)
fn max_pool2d_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let word = flat_id(gid, groups, 64u);
    let len = p.n * p.oh * p.ow * p.c;
    if word * 4u >= len { return; }
    var packed = 0u;
    for (var k = 0u; k < 4u; k++) {
        let e = word * 4u + k;
        if e < len {
            let place = largest(e);
            packed |= (place & 255u) << (8u * k);
            if p.wide != 0u { places_out[e] = place; }
        }
    }
    if p.wide == 0u { places_out[word] = packed; }
}

@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read> places: array<u32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

fn place_of(e: u32) -> u32 {
    if p.wide != 0u { return places[e]; }
    return (places[e / 4u] >> (8u * (e % 4u))) & 255u;
}

// One invocation an input element: the windows that cover it are asked whether they took it.
@compute @workgroup_size(256)
fn max_pool2d_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.n * p.h * p.w * p.c { return; }
    let c = i % p.c;
    let right = (i / p.c) % p.w + p.pw;
    let bottom = (i / (p.c * p.w)) % p.h + p.ph;
    let n = i / (p.c * p.w * p.h);
    let rows = covering(bottom, p.sh, p.kh, p.oh);
    let columns = covering(right, p.sw, p.kw, p.ow);
    var sum = 0.0;
    for (var row = rows.x; row < rows.y; row++) {
        for (var col = columns.x; col < columns.y; col++) {
            let e = ((n * p.oh + row) * p.ow + col) * p.c + c;
            let place = (bottom - row * p.sh) * p.kw + right - col * p.sw;
            if place_of(e) == place { sum += dy[e]; }
        }
    }
    dx[i] = sum;
}
