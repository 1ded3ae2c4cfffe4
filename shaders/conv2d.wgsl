// 2D convolution, NHWC, as implicit matrix products: every invocation keeps a small tile of sums in registers and
// reads its operands where they lie. Each invocation of a workgroup takes other pixels (weight gradient: other weight
// columns) but the same output channels, so half of the loads are the same for the whole workgroup; where there are few pixels,
// rows of eight invocations share channels instead. The vec4 variants want channel counts that are multiples of 4; the others take
// any. All sums are gathered, in a fixed order. conv2d_wide.wgsl has variants for software, conv2d_tiled.wgsl for hardware.

@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> a4: array<vec4f>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read> b4: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// Invocations a workgroup, pixels and channels an invocation.
const LANES = 64u;
const PIXELS = 4u;
const CHANNELS = 8u;
// Invocations beside each other that take pixels where there are few.
const FEW = 8u;

// Invocations of a workgroup along the pixels, of which there are so many; the rows of others take further channels. As `lanes` in
// src/ops/conv2d/tiles.rs.
fn lanes_for(pixels: u32) -> u32 {
    return select(LANES, FEW, pixels <= LANES * PIXELS / 2u);
}

// The same for the pixels of y.
fn lanes_of_y() -> u32 {
    return lanes_for(p.n * p.p * p.q);
}

// The first channel of an invocation that takes `channels`.
fn first_channel(wg: vec3u, lane: u32, lanes: u32, channels: u32) -> u32 {
    return (wg.y * (LANES / lanes) + lane / lanes) * channels;
}

// Four pixels of an image, or of a phase of it.
struct Quad { index: vec4u, image: vec4u, row: vec4i, col: vec4i, inside: vec4<bool> }

// Pixels first, first + lanes, ... of `images` images of rows x cols pixels; those past the last are marked.
fn quad(first: u32, lanes: u32, images: u32, rows: u32, cols: u32) -> Quad {
    let index = vec4u(first) + lanes * vec4u(0u, 1u, 2u, 3u);
    let inside = index < vec4u(images * rows * cols);
    let at = select(vec4u(0u), index, inside);
    let rest = at % (rows * cols);
    return Quad(at, at / (rows * cols), vec4i(rest / cols), vec4i(rest % cols), inside);
}

// The first of this invocation's pixels; workgroups go on along z where x is full.
fn first_pixel(wg: vec3u, groups: vec3u, lane: u32, lanes: u32) -> u32 {
    return (wg.z * groups.x + wg.x) * lanes * PIXELS + lane % lanes;
}

// This invocation's pixels of y.
fn quad_of_y(wg: vec3u, groups: vec3u, lane: u32) -> Quad {
    let lanes = lanes_of_y();
    return quad(first_pixel(wg, groups, lane, lanes), lanes, p.n, p.p, p.q);
}

fn within(row: vec4i, col: vec4i, rows: u32, cols: u32) -> vec4<bool> {
    return (row >= vec4i(0)) & (row < vec4i(i32(rows))) & (col >= vec4i(0)) & (col < vec4i(i32(cols)));
}

// Forward: y[pixel, o] = bias[o] + sum over r, s, c of x[pixel under (r, s), c] * w[o, r, s, c].

// Where the four pixels under tap (r, s) start in x, in units of a pixel; zero where the tap lies in the border.
fn taps(t: Quad, r: u32, s: u32, valid: ptr<function, vec4<bool>>) -> vec4u {
    let row = t.row * i32(p.stride_h) + vec4i(i32(r) - i32(p.pad_h));
    let col = t.col * i32(p.stride_w) + vec4i(i32(s) - i32(p.pad_w));
    let ok = t.inside & within(row, col, p.h, p.w);
    *valid = ok;
    return select(vec4u(0u), (t.image * p.h + vec4u(row)) * p.w + vec4u(col), ok);
}

fn starting_bias(o: u32) -> vec4f {
    var v = vec4f(0.0);
    if p.bias == 1u {
        let last = p.o - 1u;
        v = vec4f(bias[min(o, last)], bias[min(o + 1u, last)], bias[min(o + 2u, last)], bias[min(o + 3u, last)]);
    }
    return v;
}

// Where the weights of 4 outputs start; past the last output, the last one's.
fn weight_rows(o: u32, row: u32) -> vec4u {
    return min(vec4u(o) + vec4u(0u, 1u, 2u, 3u), vec4u(p.o - 1u)) * row;
}

// Of four pixels, each of eight channels.
struct Sums { s00: vec4f, s01: vec4f, s10: vec4f, s11: vec4f, s20: vec4f, s21: vec4f, s30: vec4f, s31: vec4f }

fn store_y(pixel: u32, inside: bool, o: u32, v: vec4f) {
    if inside {
        for (var j = 0u; j < 4u; j++) {
            if o + j < p.o { y[pixel * p.o + o + j] = v[j]; }
        }
    }
}

fn store_sums(t: Quad, o: u32, s: Sums) {
    store_y(t.index.x, t.inside.x, o, s.s00); store_y(t.index.x, t.inside.x, o + 4u, s.s01);
    store_y(t.index.y, t.inside.y, o, s.s10); store_y(t.index.y, t.inside.y, o + 4u, s.s11);
    store_y(t.index.z, t.inside.z, o, s.s20); store_y(t.index.z, t.inside.z, o + 4u, s.s21);
    store_y(t.index.w, t.inside.w, o, s.s30); store_y(t.index.w, t.inside.w, o + 4u, s.s31);
}

// The sums of channels o to o + 8, begun with `low` and `high`.
fn sums_vec4(t: Quad, o: u32, low: vec4f, high: vec4f) -> Sums {
    let c4 = p.c / 4u;
    let w0 = weight_rows(o, p.kh * p.kw * c4);
    let w1 = weight_rows(o + 4u, p.kh * p.kw * c4);
    var s00 = low; var s01 = high; var s10 = low; var s11 = high; var s20 = low; var s21 = high; var s30 = low; var s31 = high;
    for (var tap = 0u; tap < p.kh * p.kw; tap++) {
        var valid: vec4<bool>;
        let x = taps(t, tap / p.kw, tap % p.kw, &valid) * c4;
        let u0 = w0 + tap * c4;
        let u1 = w1 + tap * c4;
        for (var c = 0u; c < c4; c++) {
            let m0 = mat4x4f(b4[u0.x + c], b4[u0.y + c], b4[u0.z + c], b4[u0.w + c]);
            let m1 = mat4x4f(b4[u1.x + c], b4[u1.y + c], b4[u1.z + c], b4[u1.w + c]);
            let x0 = select(vec4f(0.0), a4[x.x + c], valid.x);
            let x1 = select(vec4f(0.0), a4[x.y + c], valid.y);
            let x2 = select(vec4f(0.0), a4[x.z + c], valid.z);
            let x3 = select(vec4f(0.0), a4[x.w + c], valid.w);
            s00 += x0 * m0; s01 += x0 * m1;
            s10 += x1 * m0; s11 += x1 * m1;
            s20 += x2 * m0; s21 += x2 * m1;
            s30 += x3 * m0; s31 += x3 * m1;
        }
    }
    return Sums(s00, s01, s10, s11, s20, s21, s30, s31);
}

fn sums_any(t: Quad, o: u32, low: vec4f, high: vec4f) -> Sums {
    let w0 = weight_rows(o, p.kh * p.kw * p.c);
    let w1 = weight_rows(o + 4u, p.kh * p.kw * p.c);
    var s00 = low; var s01 = high; var s10 = low; var s11 = high; var s20 = low; var s21 = high; var s30 = low; var s31 = high;
    for (var tap = 0u; tap < p.kh * p.kw; tap++) {
        var valid: vec4<bool>;
        let x = taps(t, tap / p.kw, tap % p.kw, &valid) * p.c;
        let u0 = w0 + tap * p.c;
        let u1 = w1 + tap * p.c;
        for (var c = 0u; c < p.c; c++) {
            let v0 = vec4f(b[u0.x + c], b[u0.y + c], b[u0.z + c], b[u0.w + c]);
            let v1 = vec4f(b[u1.x + c], b[u1.y + c], b[u1.z + c], b[u1.w + c]);
            let xs = select(vec4f(0.0), vec4f(a[x.x + c], a[x.y + c], a[x.z + c], a[x.w + c]), valid);
            s00 += xs.x * v0; s01 += xs.x * v1;
            s10 += xs.y * v0; s11 += xs.y * v1;
            s20 += xs.z * v0; s21 += xs.z * v1;
            s30 += xs.w * v0; s31 += xs.w * v1;
        }
    }
    return Sums(s00, s01, s10, s11, s20, s21, s30, s31);
}

@compute @workgroup_size(64)
fn conv2d_fwd_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = first_channel(wg, lane, lanes_of_y(), CHANNELS);
    store_sums(t, o, sums_vec4(t, o, starting_bias(o), starting_bias(o + 4u)));
}

@compute @workgroup_size(64)
fn conv2d_fwd_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = first_channel(wg, lane, lanes_of_y(), CHANNELS);
    store_sums(t, o, sums_any(t, o, starting_bias(o), starting_bias(o + 4u)));
}

// Input gradient: dx[h, w, c] = sum over the taps with h = p * stride + r - pad (and so in width) and over o of dy[p,
// q, o] * w[o, r, s, c]. Pixels of dx with equal remainder modulo the stride (a phase) are hit by the same taps: a
// workgroup takes pixels of one phase only.

// The phase of a workgroup, its first tap and its extent. Along z: pixel blocks past those in x, then phases.
struct Phase { row: u32, col: u32, r: u32, s: u32, rows: u32, cols: u32 }

fn phase(index: u32) -> Phase {
    let row = index / p.stride_w;
    let col = index % p.stride_w;
    // (size - remainder) / stride, rounded up; zero where the image is smaller than the stride.
    let rows = (p.h + p.stride_h - 1u - row) / p.stride_h;
    let cols = (p.w + p.stride_w - 1u - col) / p.stride_w;
    return Phase(row, col, (row + p.pad_h) % p.stride_h, (col + p.pad_w) % p.stride_w, rows, cols);
}

// Where the four pixels of dy that tap (r, s) carries to the phase's pixels start, in units of a pixel.
fn sources(t: Quad, f: Phase, r: u32, s: u32, valid: ptr<function, vec4<bool>>) -> vec4u {
    // Exact division: the tap belongs to the phase. The difference may be negative, a multiple of the stride still.
    let row = t.row + vec4i((i32(f.row + p.pad_h) - i32(r)) / i32(p.stride_h));
    let col = t.col + vec4i((i32(f.col + p.pad_w) - i32(s)) / i32(p.stride_w));
    let ok = t.inside & within(row, col, p.p, p.q);
    *valid = ok;
    return select(vec4u(0u), (t.image * p.p + vec4u(row)) * p.q + vec4u(col), ok);
}

// Invocations along the pixels of a phase: by the largest phase, as the grid is.
fn lanes_of_dx() -> u32 {
    let rows = (p.h + p.stride_h - 1u) / p.stride_h;
    return lanes_for(p.n * rows * ((p.w + p.stride_w - 1u) / p.stride_w));
}

// This invocation's pixels of a phase of dx.
fn quad_of_dx(wg: vec3u, groups: vec3u, lane: u32, f: Phase) -> Quad {
    let lanes = lanes_of_dx();
    let block = vec3u(wg.xy, wg.z / (p.stride_h * p.stride_w));
    return quad(first_pixel(block, groups, lane, lanes), lanes, p.n, f.rows, f.cols);
}

fn store_dx(t: Quad, k: u32, f: Phase, c: u32, v: vec4f) {
    if t.inside[k] {
        let row = u32(t.row[k]) * p.stride_h + f.row;
        let col = u32(t.col[k]) * p.stride_w + f.col;
        let at = ((t.image[k] * p.h + row) * p.w + col) * p.c + c;
        for (var j = 0u; j < 4u; j++) {
            if c + j < p.c { gradient[at + j] = v[j]; }
        }
    }
}

fn store_all_dx(t: Quad, f: Phase, c: u32, s: Sums) {
    store_dx(t, 0u, f, c, s.s00); store_dx(t, 0u, f, c + 4u, s.s01);
    store_dx(t, 1u, f, c, s.s10); store_dx(t, 1u, f, c + 4u, s.s11);
    store_dx(t, 2u, f, c, s.s20); store_dx(t, 2u, f, c + 4u, s.s21);
    store_dx(t, 3u, f, c, s.s30); store_dx(t, 3u, f, c + 4u, s.s31);
}

@compute @workgroup_size(64)
fn conv2d_dgrad_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let f = phase(wg.z % (p.stride_h * p.stride_w));
    let t = quad_of_dx(wg, groups, lane, f);
    let c = first_channel(wg, lane, lanes_of_dx(), CHANNELS);
    let c4 = p.c / 4u;
    let o4 = p.o / 4u;
    // Past the last channels: the last ones again, not stored.
    let c0 = min(c / 4u, c4 - 1u);
    let c1 = min(c / 4u + 1u, c4 - 1u);
    let row = p.kh * p.kw * c4;
    var s00 = vec4f(0.0); var s01 = s00; var s10 = s00; var s11 = s00; var s20 = s00; var s21 = s00; var s30 = s00; var s31 = s00;
    for (var r = f.r; r < p.kh; r += p.stride_h) {
        for (var s = f.s; s < p.kw; s += p.stride_w) {
            var valid: vec4<bool>;
            let x = sources(t, f, r, s, &valid) * o4;
            var u = (r * p.kw + s) * c4;
            for (var o = 0u; o < o4; o++) {
                let m0 = mat4x4f(b4[u + c0], b4[u + row + c0], b4[u + 2u * row + c0], b4[u + 3u * row + c0]);
                let m1 = mat4x4f(b4[u + c1], b4[u + row + c1], b4[u + 2u * row + c1], b4[u + 3u * row + c1]);
                u += 4u * row;
                let x0 = select(vec4f(0.0), a4[x.x + o], valid.x);
                let x1 = select(vec4f(0.0), a4[x.y + o], valid.y);
                let x2 = select(vec4f(0.0), a4[x.z + o], valid.z);
                let x3 = select(vec4f(0.0), a4[x.w + o], valid.w);
                s00 += m0 * x0; s01 += m1 * x0;
                s10 += m0 * x1; s11 += m1 * x1;
                s20 += m0 * x2; s21 += m1 * x2;
                s30 += m0 * x3; s31 += m1 * x3;
            }
        }
    }
    store_all_dx(t, f, c, Sums(s00, s01, s10, s11, s20, s21, s30, s31));
}

@compute @workgroup_size(64)
fn conv2d_dgrad_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let f = phase(wg.z % (p.stride_h * p.stride_w));
    let t = quad_of_dx(wg, groups, lane, f);
    let c = first_channel(wg, lane, lanes_of_dx(), CHANNELS);
    let k0 = min(vec4u(c) + vec4u(0u, 1u, 2u, 3u), vec4u(p.c - 1u));
    let k1 = min(vec4u(c) + vec4u(4u, 5u, 6u, 7u), vec4u(p.c - 1u));
    var s00 = vec4f(0.0); var s01 = s00; var s10 = s00; var s11 = s00; var s20 = s00; var s21 = s00; var s30 = s00; var s31 = s00;
    for (var r = f.r; r < p.kh; r += p.stride_h) {
        for (var s = f.s; s < p.kw; s += p.stride_w) {
            var valid: vec4<bool>;
            let x = sources(t, f, r, s, &valid) * p.o;
            var u = (r * p.kw + s) * p.c;
            for (var o = 0u; o < p.o; o++) {
                let v0 = vec4f(b[u + k0.x], b[u + k0.y], b[u + k0.z], b[u + k0.w]);
                let v1 = vec4f(b[u + k1.x], b[u + k1.y], b[u + k1.z], b[u + k1.w]);
                u += p.kh * p.kw * p.c;
                let xs = select(vec4f(0.0), vec4f(a[x.x + o], a[x.y + o], a[x.z + o], a[x.w + o]), valid);
                s00 += xs.x * v0; s01 += xs.x * v1;
                s10 += xs.y * v0; s11 += xs.y * v1;
                s20 += xs.z * v0; s21 += xs.z * v1;
                s30 += xs.w * v0; s31 += xs.w * v1;
            }
        }
    }
    store_all_dx(t, f, c, Sums(s00, s01, s10, s11, s20, s21, s30, s31));
}

// Weight gradient: dw[o, r, s, c] = sum over pixels of dy[pixel, o] * x[pixel under (r, s), c]. The pixels are cut
// into `parts` equal parts, one a workgroup along z, so that small weights occupy a large GPU too; conv2d_sum_f32
// adds the parts up.

// The pixel of x under a tap for output pixel i; false in the border.
fn under(i: u32, r: u32, s: u32, at: ptr<function, u32>) -> bool {
    let q = i % p.q;
    let rest = i / p.q;
    // Wraps to something large in the border above and to the left.
    let row = (rest % p.p) * p.stride_h + r - p.pad_h;
    let col = q * p.stride_w + s - p.pad_w;
    let ok = row < p.h && col < p.w;
    *at = select(0u, (rest / p.p * p.h + row) * p.w + col, ok);
    return ok;
}

// dw's element (o, column) of a part; 4 columns of one tap an invocation of the vec4 variant.
fn store_dw(part: u32, o: u32, column: u32, v: vec4f) {
    let columns = p.kh * p.kw * p.c;
    if o < p.o {
        let at = (part * p.o + o) * columns + column;
        for (var j = 0u; j < 4u; j++) { gradient[at + j] = v[j]; }
    }
}

@compute @workgroup_size(64)
fn conv2d_wgrad_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(local_invocation_index) lane: u32) {
    let c4 = p.c / 4u;
    let o4 = p.o / 4u;
    let column = wg.x * LANES + lane;
    if column >= p.kh * p.kw * c4 { return; }
    let tap = column / c4;
    let c = column % c4;
    let o0 = wg.y * 2u;
    let o1 = min(o0 + 1u, o4 - 1u);
    let pixels = p.n * p.p * p.q;
    let part = (pixels + p.parts - 1u) / p.parts;
    var s0 = vec4f(0.0); var s1 = s0; var s2 = s0; var s3 = s0; var s4 = s0; var s5 = s0; var s6 = s0; var s7 = s0;
    for (var i = wg.z * part; i < min(pixels, (wg.z + 1u) * part); i++) {
        var at: u32;
        if under(i, tap / p.kw, tap % p.kw, &at) {
            let x = a4[at * c4 + c];
            let d0 = b4[i * o4 + o0];
            let d1 = b4[i * o4 + o1];
            s0 += d0.x * x; s1 += d0.y * x; s2 += d0.z * x; s3 += d0.w * x;
            s4 += d1.x * x; s5 += d1.y * x; s6 += d1.z * x; s7 += d1.w * x;
        }
    }
    let o = wg.y * CHANNELS;
    store_dw(wg.z, o, 4u * column, s0); store_dw(wg.z, o + 1u, 4u * column, s1);
    store_dw(wg.z, o + 2u, 4u * column, s2); store_dw(wg.z, o + 3u, 4u * column, s3);
    store_dw(wg.z, o + 4u, 4u * column, s4); store_dw(wg.z, o + 5u, 4u * column, s5);
    store_dw(wg.z, o + 6u, 4u * column, s6); store_dw(wg.z, o + 7u, 4u * column, s7);
}

@compute @workgroup_size(64)
fn conv2d_wgrad_f32(@builtin(workgroup_id) wg: vec3u, @builtin(local_invocation_index) lane: u32) {
    let columns = p.kh * p.kw * p.c;
    let column = wg.x * LANES + lane;
    if column >= columns { return; }
    let tap = column / p.c;
    let c = column % p.c;
    let o = wg.y * CHANNELS;
    let k0 = min(vec4u(o) + vec4u(0u, 1u, 2u, 3u), vec4u(p.o - 1u));
    let k1 = min(vec4u(o) + vec4u(4u, 5u, 6u, 7u), vec4u(p.o - 1u));
    let pixels = p.n * p.p * p.q;
    let part = (pixels + p.parts - 1u) / p.parts;
    var s0 = vec4f(0.0);
    var s1 = s0;
    for (var i = wg.z * part; i < min(pixels, (wg.z + 1u) * part); i++) {
        var at: u32;
        if under(i, tap / p.kw, tap % p.kw, &at) {
            let x = a[at * p.c + c];
            let d = i * p.o;
            s0 += x * vec4f(b[d + k0.x], b[d + k0.y], b[d + k0.z], b[d + k0.w]);
            s1 += x * vec4f(b[d + k1.x], b[d + k1.y], b[d + k1.z], b[d + k1.w]);
        }
    }
    for (var j = 0u; j < 4u; j++) {
        if o + j < p.o { gradient[(wg.z * p.o + o + j) * columns + column] = s0[j]; }
        if o + 4u + j < p.o { gradient[(wg.z * p.o + o + 4u + j) * columns + column] = s1[j]; }
    }
}

// Bias gradient: db[o] = sum over pixels of dy[pixel, o]; one invocation an output and part.
@compute @workgroup_size(64)
fn conv2d_dbias_f32(@builtin(workgroup_id) wg: vec3u, @builtin(local_invocation_index) lane: u32) {
    let o = wg.x * LANES + lane;
    if o >= p.o { return; }
    let pixels = p.n * p.p * p.q;
    let part = (pixels + p.parts - 1u) / p.parts;
    var sum = 0.0;
    for (var i = wg.y * part; i < min(pixels, (wg.y + 1u) * part); i++) { sum += a[i * p.o + o]; }
    sums[wg.y * p.o + o] = sum;
}

// out[i] = sum over parts of sums[part][i]: the second half of a weight or bias gradient whose pixels were cut into
// parts.
struct SumParams { len: u32, parts: u32 }
@group(0) @binding(0) var<uniform> whole: SumParams;

@compute @workgroup_size(256)
fn conv2d_sum_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= whole.len { return; }
    var sum = 0.0;
    for (var part = 0u; part < whole.parts; part++) { sum += a[part * whole.len + i]; }
    sums[i] = sum;
}
