// subgroups: what follows is left out where the adapter has none.
//
// Convolutions of conv2d.wgsl and conv2d_ends.wgsl (put before this text) for adapters that read memory invocation by invocation, which
// is software: there a read that is the same for a subgroup costs as much as eight different ones. So what eight outputs need of
// the weight (weight gradient: of dy) is read once by eight invocations, invocation j the j-th part, and broadcast; an invocation takes
// 16 channels. A subgroup has eight invocations: where there are few pixels, rows of eight take different channels.
//
// Tried on llvmpipe, one core, GFLOP/s for 3x3, 256 channels, 14 x 14, one image (Mesa 25 / Mesa 22): forward 2.3 / 0.4 without
// broadcasts, 4 pixels x 8 channels 7.1 / 1.0, x 16 12.4 / 1.7, 8 pixels x 8 2.2 / 0.6, x 16 3.4 / 0.9. Input gradient 1.4 / 0.3 before;
// with whole 4x4 matrices of weights 4.8 / 1.1. Weight gradient 1.8 / 0.4 before; a pixel at a time 4.4 / 1.2.

const WIDE = 16u;

// Of four pixels, each of sixteen channels.
struct WideSums { low: Sums, high: Sums }

// From sums of channels, each of four pixels, to sums of pixels.
fn by_pixel(a: mat4x4f, b: mat4x4f) -> Sums {
    let l = transpose(a);
    let h = transpose(b);
    return Sums(l[0], h[0], l[1], h[1], l[2], h[2], l[3], h[3]);
}

fn with_bias(s: Sums, o: u32) -> Sums {
    let l = starting_bias(o);
    let h = starting_bias(o + 4u);
    return Sums(s.s00 + l, s.s01 + h, s.s10 + l, s.s11 + h, s.s20 + l, s.s21 + h, s.s30 + l, s.s31 + h);
}

// The first channel of y of an invocation.
fn wide_channel(wg: vec3u, lane: u32) -> u32 {
    return first_channel(wg, lane, lanes_of_y(), WIDE);
}

// The sums of channels o to o + 16.
fn wide_vec4(t: Quad, o: u32, id: u32) -> WideSums {
    let c4 = p.c / 4u;
    let row = p.kh * p.kw * c4;
    let w0 = min(o + id, p.o - 1u) * row;
    let w1 = min(o + 8u + id, p.o - 1u) * row;
    var r0 = vec4f(0.0); var r1 = r0; var r2 = r0; var r3 = r0; var r4 = r0; var r5 = r0; var r6 = r0; var r7 = r0;
    var r8 = r0; var r9 = r0; var r10 = r0; var r11 = r0; var r12 = r0; var r13 = r0; var r14 = r0; var r15 = r0;
    for (var tap = 0u; tap < p.kh * p.kw; tap++) {
        var valid: vec4<bool>;
        let x = taps(t, tap / p.kw, tap % p.kw, &valid) * c4;
        for (var c = 0u; c < c4; c++) {
            let u0 = b4[w0 + tap * c4 + c];
            let u1 = b4[w1 + tap * c4 + c];
            let x0 = select(vec4f(0.0), a4[x.x + c], valid.x);
            let x1 = select(vec4f(0.0), a4[x.y + c], valid.y);
            let x2 = select(vec4f(0.0), a4[x.z + c], valid.z);
            let x3 = select(vec4f(0.0), a4[x.w + c], valid.w);
            let m = mat4x4f(x0, x1, x2, x3);
            r0 += subgroupBroadcast(u0, 0u) * m; r1 += subgroupBroadcast(u0, 1u) * m;
            r2 += subgroupBroadcast(u0, 2u) * m; r3 += subgroupBroadcast(u0, 3u) * m;
            r4 += subgroupBroadcast(u0, 4u) * m; r5 += subgroupBroadcast(u0, 5u) * m;
            r6 += subgroupBroadcast(u0, 6u) * m; r7 += subgroupBroadcast(u0, 7u) * m;
            r8 += subgroupBroadcast(u1, 0u) * m; r9 += subgroupBroadcast(u1, 1u) * m;
            r10 += subgroupBroadcast(u1, 2u) * m; r11 += subgroupBroadcast(u1, 3u) * m;
            r12 += subgroupBroadcast(u1, 4u) * m; r13 += subgroupBroadcast(u1, 5u) * m;
            r14 += subgroupBroadcast(u1, 6u) * m; r15 += subgroupBroadcast(u1, 7u) * m;
        }
    }
    return WideSums(by_pixel(mat4x4f(r0, r1, r2, r3), mat4x4f(r4, r5, r6, r7)), by_pixel(mat4x4f(r8, r9, r10, r11), mat4x4f(r12, r13, r14, r15)));
}

fn wide_any(t: Quad, o: u32, id: u32) -> WideSums {
    let row = p.kh * p.kw * p.c;
    let w0 = min(o + id, p.o - 1u) * row;
    let w1 = min(o + 8u + id, p.o - 1u) * row;
    var r0 = vec4f(0.0); var r1 = r0; var r2 = r0; var r3 = r0; var r4 = r0; var r5 = r0; var r6 = r0; var r7 = r0;
    var r8 = r0; var r9 = r0; var r10 = r0; var r11 = r0; var r12 = r0; var r13 = r0; var r14 = r0; var r15 = r0;
    for (var tap = 0u; tap < p.kh * p.kw; tap++) {
        var valid: vec4<bool>;
        let x = taps(t, tap / p.kw, tap % p.kw, &valid) * p.c;
        for (var c = 0u; c < p.c; c++) {
            let u0 = b[w0 + tap * p.c + c];
            let u1 = b[w1 + tap * p.c + c];
            let xs = select(vec4f(0.0), vec4f(a[x.x + c], a[x.y + c], a[x.z + c], a[x.w + c]), valid);
            r0 += subgroupBroadcast(u0, 0u) * xs; r1 += subgroupBroadcast(u0, 1u) * xs;
            r2 += subgroupBroadcast(u0, 2u) * xs; r3 += subgroupBroadcast(u0, 3u) * xs;
            r4 += subgroupBroadcast(u0, 4u) * xs; r5 += subgroupBroadcast(u0, 5u) * xs;
            r6 += subgroupBroadcast(u0, 6u) * xs; r7 += subgroupBroadcast(u0, 7u) * xs;
            r8 += subgroupBroadcast(u1, 0u) * xs; r9 += subgroupBroadcast(u1, 1u) * xs;
            r10 += subgroupBroadcast(u1, 2u) * xs; r11 += subgroupBroadcast(u1, 3u) * xs;
            r12 += subgroupBroadcast(u1, 4u) * xs; r13 += subgroupBroadcast(u1, 5u) * xs;
            r14 += subgroupBroadcast(u1, 6u) * xs; r15 += subgroupBroadcast(u1, 7u) * xs;
        }
    }
    return WideSums(by_pixel(mat4x4f(r0, r1, r2, r3), mat4x4f(r4, r5, r6, r7)), by_pixel(mat4x4f(r8, r9, r10, r11), mat4x4f(r12, r13, r14, r15)));
}

fn finish_fwd(t: Quad, o: u32, s: WideSums) {
    store_sums(t, o, with_bias(s.low, o));
    store_sums(t, o + 8u, with_bias(s.high, o + 8u));
}

fn finish_stats(block: u32, lane: u32, t: Quad, o: u32, s: WideSums) {
    store_sums(t, o, s.low);
    store_sums(t, o + 8u, s.high);
    statistics(block, lane, o, t, s.low);
    statistics(block, lane, o + 8u, t, s.high);
}

fn finish_norm(t: Quad, o: u32, s: WideSums) {
    store_norms(t, o, s.low);
    store_norms(t, o + 8u, s.high);
}

@compute @workgroup_size(64)
fn conv2d_fwd_wide_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = wide_channel(wg, lane);
    finish_fwd(t, o, wide_vec4(t, o, id));
}

@compute @workgroup_size(64)
fn conv2d_fwd_wide_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = wide_channel(wg, lane);
    finish_fwd(t, o, wide_any(t, o, id));
}

@compute @workgroup_size(64)
fn conv2d_stats_wide_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = wide_channel(wg, lane);
    finish_stats(wg.z * groups.x + wg.x, lane, t, o, wide_vec4(t, o, id));
}

@compute @workgroup_size(64)
fn conv2d_stats_wide_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = wide_channel(wg, lane);
    finish_stats(wg.z * groups.x + wg.x, lane, t, o, wide_any(t, o, id));
}

@compute @workgroup_size(64)
fn conv2d_norm_wide_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = wide_channel(wg, lane);
    finish_norm(t, o, wide_vec4(t, o, id));
}

@compute @workgroup_size(64)
fn conv2d_norm_wide_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let t = quad_of_y(wg, groups, lane);
    let o = wide_channel(wg, lane);
    finish_norm(t, o, wide_any(t, o, id));
}

// ------------------------------------------------------------------------------------------------ input gradient
// Invocation j of eight reads output j / 2 of four and vec4 j % 2 of two of the weight's channels.

// Component `e` of four outputs' weights, read as w: even invocations have the lower channels.
fn outputs_low(w: vec4f) -> mat4x4f {
    return transpose(mat4x4f(subgroupBroadcast(w, 0u), subgroupBroadcast(w, 2u), subgroupBroadcast(w, 4u), subgroupBroadcast(w, 6u)));
}

fn outputs_high(w: vec4f) -> mat4x4f {
    return transpose(mat4x4f(subgroupBroadcast(w, 1u), subgroupBroadcast(w, 3u), subgroupBroadcast(w, 5u), subgroupBroadcast(w, 7u)));
}

@compute @workgroup_size(64)
fn conv2d_dgrad_wide_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let f = phase(wg.z % (p.stride_h * p.stride_w));
    let t = quad_of_dx(wg, groups, lane, f);
    let c = first_channel(wg, lane, lanes_of_dx(), WIDE);
    let c4 = p.c / 4u;
    let o4 = p.o / 4u;
    let row = p.kh * p.kw * c4;
    // Past the last channels: the last ones again, not stored.
    let w0 = id / 2u * row + min(c / 4u + id % 2u, c4 - 1u);
    let w1 = id / 2u * row + min(c / 4u + 2u + id % 2u, c4 - 1u);
    var r0 = vec4f(0.0); var r1 = r0; var r2 = r0; var r3 = r0; var r4 = r0; var r5 = r0; var r6 = r0; var r7 = r0;
    var r8 = r0; var r9 = r0; var r10 = r0; var r11 = r0; var r12 = r0; var r13 = r0; var r14 = r0; var r15 = r0;
    for (var r = f.r; r < p.kh; r += p.stride_h) {
        for (var s = f.s; s < p.kw; s += p.stride_w) {
            var valid: vec4<bool>;
            let x = sources(t, f, r, s, &valid) * o4;
            var u = (r * p.kw + s) * c4;
            for (var o = 0u; o < o4; o++) {
                let u0 = b4[u + w0];
                let u1 = b4[u + w1];
                u += 4u * row;
                let x0 = select(vec4f(0.0), a4[x.x + o], valid.x);
                let x1 = select(vec4f(0.0), a4[x.y + o], valid.y);
                let x2 = select(vec4f(0.0), a4[x.z + o], valid.z);
                let x3 = select(vec4f(0.0), a4[x.w + o], valid.w);
                let m = mat4x4f(x0, x1, x2, x3);
                let m0 = outputs_low(u0);
                r0 += m0[0] * m; r1 += m0[1] * m; r2 += m0[2] * m; r3 += m0[3] * m;
                let m1 = outputs_high(u0);
                r4 += m1[0] * m; r5 += m1[1] * m; r6 += m1[2] * m; r7 += m1[3] * m;
                let m2 = outputs_low(u1);
                r8 += m2[0] * m; r9 += m2[1] * m; r10 += m2[2] * m; r11 += m2[3] * m;
                let m3 = outputs_high(u1);
                r12 += m3[0] * m; r13 += m3[1] * m; r14 += m3[2] * m; r15 += m3[3] * m;
            }
        }
    }
    store_all_dx(t, f, c, by_pixel(mat4x4f(r0, r1, r2, r3), mat4x4f(r4, r5, r6, r7)));
    store_all_dx(t, f, c + 8u, by_pixel(mat4x4f(r8, r9, r10, r11), mat4x4f(r12, r13, r14, r15)));
}

// ------------------------------------------------------------------------------------------------ weight gradient
// Four pixels at a time; invocation j of eight reads pixel j / 2 and vec4 j % 2 of two of dy's channels.

// A pixel of y; counted on, because divisions cost more than the four steps of sums.
struct Pixel { image: u32, row: u32, col: u32 }

// x under a tap for pixel `at`, which moves on by one; zero in the border, and where the pixel does not count.
fn under_next(at: ptr<function, Pixel>, counts: bool, tap: vec2u, c: u32) -> vec4f {
    let now = *at;
    // Wraps to something large in the border above and to the left.
    let row = now.row * p.stride_h + tap.x - p.pad_h;
    let col = now.col * p.stride_w + tap.y - p.pad_w;
    let ok = counts && row < p.h && col < p.w;
    let x = a4[select(0u, (now.image * p.h + row) * p.w + col, ok) * (p.c / 4u) + c];
    let end_of_row = now.col + 1u == p.q;
    let end_of_image = end_of_row && now.row + 1u == p.p;
    let next_row = now.row + select(0u, 1u, end_of_row);
    *at = Pixel(now.image + select(0u, 1u, end_of_image), select(next_row, 0u, end_of_image), select(now.col + 1u, 0u, end_of_row));
    return select(vec4f(0.0), x, ok);
}

@compute @workgroup_size(64)
fn conv2d_wgrad_wide_vec4_f32(@builtin(workgroup_id) wg: vec3u, @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) id: u32) {
    let c4 = p.c / 4u;
    let o4 = p.o / 4u;
    let column = wg.x * LANES + lane;
    // Past the last column: the last one again, not stored.
    let here = min(column, p.kh * p.kw * c4 - 1u);
    let tap = vec2u(here / c4 / p.kw, here / c4 % p.kw);
    let c = here % c4;
    let o = wg.y * WIDE;
    let d0 = min(o / 4u + id % 2u, o4 - 1u);
    let d1 = min(o / 4u + 2u + id % 2u, o4 - 1u);
    let pixels = p.n * p.p * p.q;
    let part = (pixels + p.parts - 1u) / p.parts;
    let first = wg.z * part;
    let end = min(pixels, first + part);
    var at = Pixel(first / (p.p * p.q), first / p.q % p.p, first % p.q);
    var r0 = vec4f(0.0); var r1 = r0; var r2 = r0; var r3 = r0; var r4 = r0; var r5 = r0; var r6 = r0; var r7 = r0;
    var r8 = r0; var r9 = r0; var r10 = r0; var r11 = r0; var r12 = r0; var r13 = r0; var r14 = r0; var r15 = r0;
    for (var i = first; i < end; i += 4u) {
        let mine = min(i + id / 2u, end - 1u) * o4;
        let v0 = b4[mine + d0];
        let v1 = b4[mine + d1];
        let x0 = under_next(&at, true, tap, c);
        let x1 = under_next(&at, i + 1u < end, tap, c);
        let x2 = under_next(&at, i + 2u < end, tap, c);
        let x3 = under_next(&at, i + 3u < end, tap, c);
        let m = mat4x4f(x0, x1, x2, x3);
        let m0 = outputs_low(v0);
        r0 += m * m0[0]; r1 += m * m0[1]; r2 += m * m0[2]; r3 += m * m0[3];
        let m1 = outputs_high(v0);
        r4 += m * m1[0]; r5 += m * m1[1]; r6 += m * m1[2]; r7 += m * m1[3];
        let m2 = outputs_low(v1);
        r8 += m * m2[0]; r9 += m * m2[1]; r10 += m * m2[2]; r11 += m * m2[3];
        let m3 = outputs_high(v1);
        r12 += m * m3[0]; r13 += m * m3[1]; r14 += m * m3[2]; r15 += m * m3[3];
    }
    if column >= p.kh * p.kw * c4 { return; }
    store_dw(wg.z, o, 4u * column, r0); store_dw(wg.z, o + 1u, 4u * column, r1);
    store_dw(wg.z, o + 2u, 4u * column, r2); store_dw(wg.z, o + 3u, 4u * column, r3);
    store_dw(wg.z, o + 4u, 4u * column, r4); store_dw(wg.z, o + 5u, 4u * column, r5);
    store_dw(wg.z, o + 6u, 4u * column, r6); store_dw(wg.z, o + 7u, 4u * column, r7);
    store_dw(wg.z, o + 8u, 4u * column, r8); store_dw(wg.z, o + 9u, 4u * column, r9);
    store_dw(wg.z, o + 10u, 4u * column, r10); store_dw(wg.z, o + 11u, 4u * column, r11);
    store_dw(wg.z, o + 12u, 4u * column, r12); store_dw(wg.z, o + 13u, 4u * column, r13);
    store_dw(wg.z, o + 14u, 4u * column, r14); store_dw(wg.z, o + 15u, 4u * column, r15);
}
