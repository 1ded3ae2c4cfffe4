// Forward of global_attention_tiled.wgsl.

fn fetch(x: u32, at: u32) -> vec4f {
    var row = vec4f();
    switch x {
        case OF_Q: { row = q[at]; }
        case OF_K: { row = k[at]; }
        case OF_V: { row = v[at]; }
        default: { row = tables[at]; }
    }
    return row;
}

// The largest and the sum of what the eight invocations of a row have, each for four queries. The first needs all reads of the slots
// done.
fn largest_of_row(me: Lane, mine: vec4f) -> vec4f {
    tile[EXTRA + 8u * me.tx + me.ty] = mine;
    workgroupBarrier();
    var whole = tile[EXTRA + me.ty];
    for (var i = 1u; i < 8u; i++) {
        whole = max(whole, tile[EXTRA + 8u * i + me.ty]);
    }
    return whole;
}

fn sum_of_row(me: Lane, mine: vec4f) -> vec4f {
    tile[EXTRA + 8u * me.tx + me.ty] = mine;
    workgroupBarrier();
    var whole = vec4f();
    for (var i = 0u; i < 8u; i++) {
        whole += tile[EXTRA + 8u * i + me.ty];
    }
    return whole;
}

// Rows times a number each.
fn rescaled(rows: mat4x4f, by: vec4f) -> mat4x4f {
    return mat4x4f(by.x * rows[0], by.y * rows[1], by.z * rows[2], by.w * rows[3]);
}

// Writes what this invocation has of query r, where there is one.
fn put_row(map: Map, me: Lane, head: Place, queries: vec2u, piece: u32, r: u32, near: vec4f, far: vec4f, log_sum: f32) {
    let start = start_of(map, head, queries, r);
    if start == NONE {
        return;
    }
    let c = piece + me.tx;
    if c < p.d / 4u {
        y[start + c] = near;
    }
    if c + 8u < p.d / 4u {
        y[start + c + 8u] = far;
    }
    if c == 0u {
        lse[head.stat + token(map, queries, r) * p.g] = log_sum;
    }
}

fn forward(map: Map, me: Lane, head: Place, queries: vec2u, piece: u32) {
    let own = starts_of(map, me, head, queries);
    var out = Rows();
    var largest = vec4f(-3.0e38);
    var sum = vec4f();
    for (var long = 0u; long < map.size.y; long += map.side.y) {
        if any_rel() {
            fill_terms(map, me, head.g, own, first_offset(map, queries, vec2u(0u, long)), false);
        }
        for (var short = 0u; short < map.size.x; short += map.side.x) {
            let keys = vec2u(short, long);
            let first = first_offset(map, queries, keys);
            let others = starts_of(map, me, head, keys);
            fill_biases(map, me, head.g, first);
            let product = multiply(me, OF_Q, own, OF_K, others, table_start(map, 0u, head.g, first, me.ty), any_rel());
            if any_rel() {
                put_terms(me, 32u, product.extra);
            }
            workgroupBarrier();
            let none = vec4f(-3.0e38);
            let here = vec4<bool>(inside(map, keys, me.tx), inside(map, keys, me.tx + 8u),
                inside(map, keys, me.tx + 16u), inside(map, keys, me.tx + 24u));
            var s = mat4x4f(
                select(none, logits_of_key(map, me, me.tx, product.s[0]), here.x),
                select(none, logits_of_key(map, me, me.tx + 8u, product.s[1]), here.y),
                select(none, logits_of_key(map, me, me.tx + 16u, product.s[2]), here.z),
                select(none, logits_of_key(map, me, me.tx + 24u, product.s[3]), here.w));
            let next = max(largest, largest_of_row(me, max(max(s[0], s[1]), max(s[2], s[3]))));
            let factor = exp(largest - next);
            largest = next;
            // A query whose logits are all -infinity gives NaN, and no number that depends on how many places a tile has.
            let zero = vec4f();
            s = mat4x4f(select(zero, exp(s[0] - next), here.x), select(zero, exp(s[1] - next), here.y),
                select(zero, exp(s[2] - next), here.z), select(zero, exp(s[3] - next), here.w));
            sum = sum * factor + (s[0] + s[1]) + (s[2] + s[3]);
            out = Rows(rescaled(out.near, factor), rescaled(out.far, factor));
            put_scores(me, s);
            out = apply(me, out, OF_V, others, piece, 1.0, TOKENS);
        }
    }
    let whole = sum_of_row(me, sum);
    let near = rescaled(out.near, 1.0 / whole);
    let far = rescaled(out.far, 1.0 / whole);
    let log_sum = largest + log(whole);
    let r = 4u * me.ty;
    put_row(map, me, head, queries, piece, r, near[0], far[0], log_sum.x);
    put_row(map, me, head, queries, piece, r + 1u, near[1], far[1], log_sum.y);
    put_row(map, me, head, queries, piece, r + 2u, near[2], far[2], log_sum.z);
    put_row(map, me, head, queries, piece, r + 3u, near[3], far[3], log_sum.w);
}

@compute @workgroup_size(64)
fn global_attention_fwd_tiled_f32(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) id: u32,
) {
    let map = map_of(groups);
    for (var z = group.z; z < p.n * p.g * pieces_of_head(); z += groups.z) {
        forward(map, Lane(id % 8u, id / 8u), head_of(z), group.yx * map.side, piece_of(z));
    }
}
