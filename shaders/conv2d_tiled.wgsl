// Convolutions of conv2d.wgsl and conv2d_ends.wgsl (put before this text) for hardware: the same implicit matrix products, but the
// operands come to a workgroup once, in tiles that it shares. Channel counts (weight and input gradient: both) are multiples of 4.
//
// Who owns what. A workgroup of 128 invocations owns 64 x 64 sums: pixels by channels, in the weight gradient outputs by columns of the
// weight. Invocation (ty, tx) of 8 x 16 owns 8 x 4 of them in registers. The sum runs in steps of 16 numbers: while a step is
// multiplied, every invocation holds its two vec4s of each operand's next step.
//
// A tile is [64 places][16 numbers], `along` the sum where the operand is contiguous so in memory (x and dy by pixel, the weight by
// output), else [16 numbers][64 places], places `beside` each other. Rows of the first kind have five vec4s, of which the last is
// empty: so eight neighbours, which read the same vec4 of eight rows, take eight different groups of four banks.
//
// Reads: a workgroup reads 2 x 64 x 16 numbers a step and does 64 x 64 x 16 multiply-adds with them, 32 for each number read, where an
// invocation of the base does 2 2/3 (4 pixels x 8 channels, 12 numbers for 32), out of the cache at best. Of workgroup memory an invocation
// reads 12 vec4s for 128 multiply-adds, eight of them the same for the 16 invocations of a row. Workgroup memory: 10 KiB.
//
// Limits: a tile of which less than half along either side is used is left to the base, by src/ops/conv2d/tiles.rs. In the weight gradient a
// border's zeros are multiplied with dy, so that an infinite dy gives NaN there; the base leaves them out.
//
// Never timed on a GPU yet. Right on any adapter; in software, where workgroup memory is memory, slower than the base.

const SIDE = 64u;
// Vec4s of a step along the sum, and from one row of a tile that lies along the sum to the next.
const STEP = 4u;
const ROW = 5u;
const QUADS = 16u;

var<workgroup> left: array<vec4f, 320>;
var<workgroup> right: array<vec4f, 320>;

@group(0) @binding(3) var<storage, read_write> gradient4: array<vec4f>;

// The sums of rows ty, ty + 8, ...; a vec4 has those of an invocation's four columns.
struct Tile { s0: vec4f, s1: vec4f, s2: vec4f, s3: vec4f, s4: vec4f, s5: vec4f, s6: vec4f, s7: vec4f }

fn filled(v: vec4f) -> Tile {
    return Tile(v, v, v, v, v, v, v, v);
}

// A step of a product of which both operands lie along the sum: columns tx, tx + 16, tx + 32, tx + 48.
fn rows_by_rows(sums: Tile, ty: u32, tx: u32) -> Tile {
    var s = sums;
    for (var k = 0u; k < STEP; k++) {
        let m = mat4x4f(right[tx * ROW + k], right[(tx + 16u) * ROW + k], right[(tx + 32u) * ROW + k], right[(tx + 48u) * ROW + k]);
        s.s0 += left[ty * ROW + k] * m;
        s.s1 += left[(ty + 8u) * ROW + k] * m;
        s.s2 += left[(ty + 16u) * ROW + k] * m;
        s.s3 += left[(ty + 24u) * ROW + k] * m;
        s.s4 += left[(ty + 32u) * ROW + k] * m;
        s.s5 += left[(ty + 40u) * ROW + k] * m;
        s.s6 += left[(ty + 48u) * ROW + k] * m;
        s.s7 += left[(ty + 56u) * ROW + k] * m;
    }
    return s;
}

// The same where the right one's places lie beside each other: columns 4 tx to 4 tx + 3.
fn rows_by_columns(sums: Tile, ty: u32, tx: u32) -> Tile {
    var s = sums;
    for (var k = 0u; k < STEP; k++) {
        let at = 4u * k * QUADS + tx;
        let m = mat4x4f(right[at], right[at + QUADS], right[at + 2u * QUADS], right[at + 3u * QUADS]);
        s.s0 += m * left[ty * ROW + k];
        s.s1 += m * left[(ty + 8u) * ROW + k];
        s.s2 += m * left[(ty + 16u) * ROW + k];
        s.s3 += m * left[(ty + 24u) * ROW + k];
        s.s4 += m * left[(ty + 32u) * ROW + k];
        s.s5 += m * left[(ty + 40u) * ROW + k];
        s.s6 += m * left[(ty + 48u) * ROW + k];
        s.s7 += m * left[(ty + 56u) * ROW + k];
    }
    return s;
}

// The same where the places of both do: rows 4 ty to 4 ty + 3 and these + 32.
fn columns_by_columns(sums: Tile, ty: u32, tx: u32) -> Tile {
    var s = sums;
    for (var k = 0u; k < 4u * STEP; k++) {
        let low = left[k * QUADS + ty];
        let high = left[k * QUADS + ty + 8u];
        let r = right[k * QUADS + tx];
        s.s0 += low.x * r; s.s1 += low.y * r; s.s2 += low.z * r; s.s3 += low.w * r;
        s.s4 += high.x * r; s.s5 += high.y * r; s.s6 += high.z * r; s.s7 += high.w * r;
    }
    return s;
}

// Where a walk over taps (r, s) and their channels is.
struct Walk { r: u32, s: u32, c: u32 }

fn walked(start: Walk, by: u32, channels: u32, columns: u32) -> Walk {
    var at = Walk(start.r, start.s, start.c + by);
    while at.c >= channels {
        at.c -= channels;
        at.s += 1u;
        if at.s == columns {
            at.s = 0u;
            at.r += 1u;
        }
    }
    return at;
}

// ------------------------------------------------------------------------------------------------ forward
// Rows are pixels of y, columns output channels; the sum runs over taps and input channels.

// What a pixel of y sees: where its image starts in x (vec4s), and its first row and column, which have wrapped to something large
// where they lie above or left of the image.
struct Window { start: u32, row: u32, col: u32, inside: bool }

fn window(pixel: u32) -> Window {
    let inside = pixel < p.n * p.p * p.q;
    let at = select(0u, pixel, inside);
    let rest = at % (p.p * p.q);
    let start = at / (p.p * p.q) * p.h * p.w * (p.c / 4u);
    return Window(start, rest / p.q * p.stride_h - p.pad_h, rest % p.q * p.stride_w - p.pad_w, inside);
}

fn seen(by: Window, k: Walk) -> vec4f {
    let row = by.row + k.r;
    let col = by.col + k.s;
    var v = vec4f(0.0);
    if by.inside && k.r < p.kh && row < p.h && col < p.w { v = a4[by.start + (row * p.w + col) * (p.c / 4u) + k.c]; }
    return v;
}

// Vec4 k of the `length` that an output's weights are.
fn filter_of(o: u32, k: u32, length: u32) -> vec4f {
    var v = vec4f(0.0);
    if o < p.o && k < length { v = b4[o * length + k]; }
    return v;
}

// The first pixel of y of a workgroup.
fn tile_start(wg: vec3u, groups: vec3u) -> u32 {
    return (wg.z * groups.x + wg.x) * SIDE;
}

fn tile_of_y(first: u32, wg: vec3u, lane: u32, start: vec4f) -> Tile {
    let c4 = p.c / 4u;
    let length = p.kh * p.kw * c4;
    let place = lane / STEP;
    let other = place + SIDE / 2u;
    let low = window(first + place);
    let high = window(first + other);
    let o = wg.y * SIDE;
    var k = lane % STEP;
    let at = k;
    var walk = walked(Walk(), k, c4, p.kw);
    var l0 = seen(low, walk);
    var l1 = seen(high, walk);
    var r0 = filter_of(o + place, k, length);
    var r1 = filter_of(o + other, k, length);
    var s = filled(start);
    for (var step = 0u; step < length; step += STEP) {
        workgroupBarrier();
        left[place * ROW + at] = l0;
        left[other * ROW + at] = l1;
        right[place * ROW + at] = r0;
        right[other * ROW + at] = r1;
        workgroupBarrier();
        if step + STEP < length {
            k += STEP;
            walk = walked(walk, STEP, c4, p.kw);
            l0 = seen(low, walk);
            l1 = seen(high, walk);
            r0 = filter_of(o + place, k, length);
            r1 = filter_of(o + other, k, length);
        }
        s = rows_by_rows(s, lane / 16u, lane % 16u);
    }
    return s;
}

// The first output channel of an invocation; the others lie 16, 32 and 48 after it.
fn tile_channel(wg: vec3u, lane: u32) -> u32 {
    return wg.y * SIDE + lane % 16u;
}

fn tile_bias(o: u32) -> vec4f {
    var v = vec4f(0.0);
    if p.bias == 1u {
        let last = p.o - 1u;
        v = vec4f(bias[min(o, last)], bias[min(o + 16u, last)], bias[min(o + 32u, last)], bias[min(o + 48u, last)]);
    }
    return v;
}

fn put_y(pixel: u32, o: u32, v: vec4f) {
    if pixel < p.n * p.p * p.q {
        for (var j = 0u; j < 4u; j++) {
            if o + 16u * j < p.o { y[pixel * p.o + o + 16u * j] = v[j]; }
        }
    }
}

fn put_tile(pixel: u32, o: u32, s: Tile) {
    put_y(pixel, o, s.s0); put_y(pixel + 8u, o, s.s1); put_y(pixel + 16u, o, s.s2); put_y(pixel + 24u, o, s.s3);
    put_y(pixel + 32u, o, s.s4); put_y(pixel + 40u, o, s.s5); put_y(pixel + 48u, o, s.s6); put_y(pixel + 56u, o, s.s7);
}

@compute @workgroup_size(128)
fn conv2d_fwd_tiled_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first = tile_start(wg, groups);
    let o = tile_channel(wg, lane);
    put_tile(first + lane / 16u, o, tile_of_y(first, wg, lane, tile_bias(o)));
}

// ------------------------------------------------------------------------------------------------ statistics, norm
// As in conv2d_ends.wgsl; a part of the statistics is 64 pixels.

// The sum over the eight rows of invocations, for all of them.
fn over_rows(lane: u32, v: vec4f) -> vec4f {
    workgroupBarrier();
    left[lane] = v;
    for (var half = 64u; half >= 16u; half /= 2u) {
        workgroupBarrier();
        if lane < half { left[lane] += left[lane + half]; }
    }
    workgroupBarrier();
    return left[lane % 16u];
}

fn tile_statistics(first: u32, lane: u32, o: u32, s: Tile) {
    let pixels = p.n * p.p * p.q;
    let row = min(first, pixels) + lane / 16u;
    let count = f32(min(SIDE, pixels - min(first, pixels)));
    let low = vec4u(row) + vec4u(0u, 8u, 16u, 24u) < vec4u(pixels);
    let high = vec4u(row) + vec4u(32u, 40u, 48u, 56u) < vec4u(pixels);
    let sum = ((counted(low.x, s.s0) + counted(low.y, s.s1)) + (counted(low.z, s.s2) + counted(low.w, s.s3)))
        + ((counted(high.x, s.s4) + counted(high.y, s.s5)) + (counted(high.z, s.s6) + counted(high.w, s.s7)));
    let mean = over_rows(lane, sum) / count;
    let squares = ((square(low.x, s.s0, mean) + square(low.y, s.s1, mean)) + (square(low.z, s.s2, mean) + square(low.w, s.s3, mean)))
        + ((square(high.x, s.s4, mean) + square(high.y, s.s5, mean)) + (square(high.z, s.s6, mean) + square(high.w, s.s7, mean)));
    let m2 = over_rows(lane, squares);
    if lane >= 16u || first >= pixels { return; }
    for (var j = 0u; j < 4u; j++) {
        let channel = o + 16u * j;
        if channel < p.o {
            part[first / SIDE * 2u * p.o + channel] = mean[j];
            part[first / SIDE * 2u * p.o + p.o + channel] = m2[j];
        }
    }
}

@compute @workgroup_size(128)
fn conv2d_stats_tiled_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first = tile_start(wg, groups);
    let o = tile_channel(wg, lane);
    let s = tile_of_y(first, wg, lane, vec4f(0.0));
    put_tile(first + lane / 16u, o, s);
    tile_statistics(first, lane, o, s);
}

fn put_norm(pixel: u32, o: u32, v: vec4f) {
    let inside = pixel < p.n * p.p * p.q;
    for (var j = 0u; j < 4u; j++) { store_one_norm(pixel, inside, o + 16u * j, v[j]); }
}

@compute @workgroup_size(128)
fn conv2d_norm_tiled_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first = tile_start(wg, groups);
    let pixel = first + lane / 16u;
    let o = tile_channel(wg, lane);
    let s = tile_of_y(first, wg, lane, vec4f(0.0));
    put_norm(pixel, o, s.s0); put_norm(pixel + 8u, o, s.s1); put_norm(pixel + 16u, o, s.s2); put_norm(pixel + 24u, o, s.s3);
    put_norm(pixel + 32u, o, s.s4); put_norm(pixel + 40u, o, s.s5); put_norm(pixel + 48u, o, s.s6); put_norm(pixel + 56u, o, s.s7);
}

// ------------------------------------------------------------------------------------------------ input gradient
// Rows are pixels of a phase of dx (see conv2d.wgsl), columns input channels; the sum runs over the phase's taps and output channels.

// What reaches a pixel of dx: where its image starts in dy (vec4s), and the row and column that the phase's first tap carries to it; each
// further tap one before. Below zero they have wrapped.
struct Source { start: u32, row: u32, col: u32, inside: bool }

fn source(pixel: u32, f: Phase) -> Source {
    let inside = pixel < p.n * f.rows * f.cols;
    let at = select(0u, pixel, inside);
    let rest = at % max(f.rows * f.cols, 1u);
    let start = at / max(f.rows * f.cols, 1u) * p.p * p.q * (p.o / 4u);
    // The division is exact.
    let row = rest / max(f.cols, 1u) + (f.row + p.pad_h - f.r) / p.stride_h;
    let col = rest % max(f.cols, 1u) + (f.col + p.pad_w - f.s) / p.stride_w;
    return Source(start, row, col, inside);
}

fn carried(by: Source, k: Walk, taps: u32) -> vec4f {
    let row = by.row - k.r;
    let col = by.col - k.s;
    var v = vec4f(0.0);
    if by.inside && k.r < taps && row < p.p && col < p.q { v = a4[by.start + (row * p.q + col) * (p.o / 4u) + k.c]; }
    return v;
}

// Four input channels of the weight under the phase's tap and output channel that the walk is at.
fn spread(k: Walk, f: Phase, taps: u32, quad: u32) -> vec4f {
    var v = vec4f(0.0);
    if k.r < taps && quad < p.c / 4u {
        let tap = (f.r + k.r * p.stride_h) * p.kw + f.s + k.s * p.stride_w;
        v = b4[(k.c * p.kh * p.kw + tap) * (p.c / 4u) + quad];
    }
    return v;
}

fn put_dx(pixel: u32, f: Phase, quad: u32, v: vec4f) {
    if pixel < p.n * f.rows * f.cols && quad < p.c / 4u {
        let row = pixel / f.cols % f.rows * p.stride_h + f.row;
        let col = pixel % f.cols * p.stride_w + f.col;
        gradient4[((pixel / (f.rows * f.cols) * p.h + row) * p.w + col) * (p.c / 4u) + quad] = v;
    }
}

@compute @workgroup_size(128)
fn conv2d_dgrad_tiled_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let phases = p.stride_h * p.stride_w;
    let f = phase(wg.z % phases);
    // Taps of the phase, none where the kernel is smaller than the stride.
    let taps_s = (max(p.kw, f.s) - f.s + p.stride_w - 1u) / p.stride_w;
    let taps_r = select(0u, (max(p.kh, f.r) - f.r + p.stride_h - 1u) / p.stride_h, taps_s > 0u);
    let first = tile_start(vec3u(wg.xy, wg.z / phases), groups);
    let o4 = p.o / 4u;
    let length = taps_r * taps_s * o4;
    let place = lane / STEP;
    let other = place + SIDE / 2u;
    let low = source(first + place, f);
    let high = source(first + other, f);
    let quad = lane % QUADS;
    let number = lane / QUADS;
    let c = wg.y * QUADS;
    let at = lane % STEP;
    var walk = walked(Walk(), at, o4, taps_s);
    var near = walked(Walk(), number, p.o, taps_s);
    var far = walked(near, 8u, p.o, taps_s);
    var l0 = carried(low, walk, taps_r);
    var l1 = carried(high, walk, taps_r);
    var r0 = spread(near, f, taps_r, c + quad);
    var r1 = spread(far, f, taps_r, c + quad);
    var s = filled(vec4f(0.0));
    for (var step = 0u; step < length; step += STEP) {
        workgroupBarrier();
        left[place * ROW + at] = l0;
        left[other * ROW + at] = l1;
        right[number * QUADS + quad] = r0;
        right[(number + 8u) * QUADS + quad] = r1;
        workgroupBarrier();
        if step + STEP < length {
            walk = walked(walk, STEP, o4, taps_s);
            near = walked(near, 4u * STEP, p.o, taps_s);
            far = walked(far, 4u * STEP, p.o, taps_s);
            l0 = carried(low, walk, taps_r);
            l1 = carried(high, walk, taps_r);
            r0 = spread(near, f, taps_r, c + quad);
            r1 = spread(far, f, taps_r, c + quad);
        }
        s = rows_by_columns(s, lane / 16u, lane % 16u);
    }
    let pixel = first + lane / 16u;
    put_dx(pixel, f, c + quad, s.s0); put_dx(pixel + 8u, f, c + quad, s.s1); put_dx(pixel + 16u, f, c + quad, s.s2); put_dx(pixel + 24u, f, c + quad, s.s3);
    put_dx(pixel + 32u, f, c + quad, s.s4); put_dx(pixel + 40u, f, c + quad, s.s5); put_dx(pixel + 48u, f, c + quad, s.s6); put_dx(pixel + 56u, f, c + quad, s.s7);
}

// ------------------------------------------------------------------------------------------------ weight gradient
// Rows are output channels, columns (tap, input channel); the sum runs over the pixels of a part.

fn upstream(pixel: u32, end: u32, quad: u32) -> vec4f {
    var v = vec4f(0.0);
    if pixel < end && quad < p.o / 4u { v = b4[pixel * (p.o / 4u) + quad]; }
    return v;
}

// Four channels of x that a pixel of y sees under the walk's tap, past the last of which there is nothing.
fn under_tap(pixel: u32, end: u32, k: Walk) -> vec4f {
    var v = vec4f(0.0);
    if pixel < end { v = seen(window(pixel), k); }
    return v;
}

fn put_dw(part: u32, o: u32, column: u32, v: vec4f) {
    let columns = p.kh * p.kw * (p.c / 4u);
    if o < p.o && column < columns { gradient4[(part * p.o + o) * columns + column] = v; }
}

@compute @workgroup_size(128)
fn conv2d_wgrad_tiled_f32(@builtin(workgroup_id) wg: vec3u, @builtin(local_invocation_index) lane: u32) {
    let pixels = p.n * p.p * p.q;
    let length = (pixels + p.parts - 1u) / p.parts;
    let end = min((wg.z + 1u) * length, pixels);
    let quad = lane % QUADS;
    let number = lane / QUADS;
    let o = wg.y * SIDE;
    let column = wg.x * QUADS + quad;
    let tap = Walk(column / (p.c / 4u) / p.kw, column / (p.c / 4u) % p.kw, column % (p.c / 4u));
    var pixel = wg.z * length + number;
    var l0 = upstream(pixel, end, o / 4u + quad);
    var l1 = upstream(pixel + 8u, end, o / 4u + quad);
    var r0 = under_tap(pixel, end, tap);
    var r1 = under_tap(pixel + 8u, end, tap);
    var s = filled(vec4f(0.0));
    for (var step = 0u; step < length; step += 4u * STEP) {
        workgroupBarrier();
        left[number * QUADS + quad] = l0;
        left[(number + 8u) * QUADS + quad] = l1;
        right[number * QUADS + quad] = r0;
        right[(number + 8u) * QUADS + quad] = r1;
        workgroupBarrier();
        if step + 4u * STEP < length {
            pixel += 4u * STEP;
            l0 = upstream(pixel, end, o / 4u + quad);
            l1 = upstream(pixel + 8u, end, o / 4u + quad);
            r0 = under_tap(pixel, end, tap);
            r1 = under_tap(pixel + 8u, end, tap);
        }
        s = columns_by_columns(s, lane / 16u, lane % 16u);
    }
    let row = o + 4u * (lane / 16u);
    put_dw(wg.z, row, column, s.s0); put_dw(wg.z, row + 1u, column, s.s1); put_dw(wg.z, row + 2u, column, s.s2); put_dw(wg.z, row + 3u, column, s.s3);
    put_dw(wg.z, row + 32u, column, s.s4); put_dw(wg.z, row + 33u, column, s.s5); put_dw(wg.z, row + 34u, column, s.s6); put_dw(wg.z, row + 35u, column, s.s7);
}
