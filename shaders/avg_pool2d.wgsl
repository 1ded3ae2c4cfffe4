// Average pooling; the rules are in src/ops/avg_pool2d.rs. One invocation an element: of the output (forward), or of the input's
// gradient (backward, which asks every window that covers it). Memory-bound: x about once out of the cache.

struct AvgPool2dParams {
    n: u32, h: u32, w: u32, c: u32,
    oh: u32, ow: u32,
    kh: u32, kw: u32,
    sh: u32, sw: u32,
    ph: u32, pw: u32,
    include_pad: u32,
}

@group(0) @binding(0) var<uniform> p: AvgPool2dParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// The number of places of the window at (row, column) of the output that count.
fn places(row: u32, column: u32) -> f32 {
    if p.include_pad != 0u { return f32(p.kh * p.kw); }
    let rows = inside(row * p.sh, p.ph, p.kh, p.h);
    let columns = inside(column * p.sw, p.pw, p.kw, p.w);
    return f32((rows.y - rows.x) * (columns.y - columns.x));
}

@compute @workgroup_size(256)
fn avg_pool2d_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let e = flat_id(gid, groups, 256u);
    if e >= p.n * p.oh * p.ow * p.c { return; }
    let c = e % p.c;
    let column = (e / p.c) % p.ow;
    let row = (e / (p.c * p.ow)) % p.oh;
    let n = e / (p.c * p.ow * p.oh);
    let rows = inside(row * p.sh, p.ph, p.kh, p.h);
    let columns = inside(column * p.sw, p.pw, p.kw, p.w);
    var sum = 0.0;
    for (var i = rows.x; i < rows.y; i++) {
        for (var j = columns.x; j < columns.y; j++) {
            sum += x[((n * p.h + row * p.sh + i - p.ph) * p.w + column * p.sw + j - p.pw) * p.c + c];
        }
    }
    y[e] = sum / places(row, column);
}

@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(256)
fn avg_pool2d_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
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
            sum += dy[((n * p.oh + row) * p.ow + col) * p.c + c] / places(row, col);
        }
    }
    dx[i] = sum;
}
