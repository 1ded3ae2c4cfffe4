// Backward of global_attention_tiled.wgsl.

fn fetch(x: u32, at: u32) -> vec4f {
    switch x {
        case OF_Q: { return q[at]; }
        case OF_K: { return k[at]; }
        case OF_V: { return v[at]; }
        case OF_DY: { return dy[at]; }
        default: { return tables[at]; }
    }
}

// The statistics of a token.
fn stat_of(map: Map, head: Place, at: vec2u, r: u32) -> vec2f {
    return stats[head.stat + token(map, at, r) * p.g];
}

// exp(logits - lse) where all is `there`, else zero.
fn probabilities(logits: vec4f, less: vec4f, there: vec4<bool>) -> vec4f {
    return select(vec4f(), exp(logits - less), there);
}

// Which of rows 4 ty + i of a tile there are.
fn rows_inside(map: Map, me: Lane, at: vec2u) -> vec4<bool> {
    let r = 4u * me.ty;
    return vec4<bool>(inside(map, at, r), inside(map, at, r + 1u), inside(map, at, r + 2u), inside(map, at, r + 3u));
}

// ------------------------------------------------------------------------------------------------ dq

// The sum of scores of query r and `count` keys, from the tile's key `first` on, `step` apart.
fn sum_of_scores(r: u32, first: u32, step: u32, count: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < count; i++) {
        sum += tile[SCORES + LINE * (first + i * step) + r / 4u][r % 4u];
    }
    return sum;
}

// Sums of the scores of query r at line l: along the short axis over the keys of one place along it, and along the long one.
fn short_sum(map: Map, r: u32, l: u32) -> f32 {
    let key = l + cell(map, r).x + 1u - map.side.x;
    return sum_of_scores(r, key * map.side.y, 1u, select(0u, map.side.y, key < map.side.x));
}

fn long_sum(map: Map, r: u32, l: u32) -> f32 {
    let key = l + cell(map, r).y + 1u - map.side.y;
    return sum_of_scores(r, key, map.side.y, select(0u, map.side.x, key < map.side.y));
}

// The same for queries 4 tx + i; those of the tile's tokens alone have any.
fn short_sums(map: Map, me: Lane, l: u32) -> vec4f {
    let r = 4u * me.tx;
    return vec4f(short_sum(map, r, l), short_sum(map, r + 1u, l), short_sum(map, r + 2u, l), short_sum(map, r + 3u, l));
}

fn long_sums(map: Map, me: Lane, l: u32) -> vec4f {
    let r = 4u * me.tx;
    return vec4f(long_sum(map, r, l), long_sum(map, r + 1u, l), long_sum(map, r + 2u, l), long_sum(map, r + 3u, l));
}

// dq of 32 queries: dS = P (dy.v - delta), dq = sum of dS (scale k + rel_h[a] + rel_w[b]).
fn query_gradient(map: Map, me: Lane, head: Place, queries: vec2u, piece: u32) -> Rows {
    let own = starts_of(map, me, head, queries);
    let r = 4u * me.ty;
    let stat = transpose(mat4x2f(stat_of(map, head, queries, r), stat_of(map, head, queries, r + 1u),
        stat_of(map, head, queries, r + 2u), stat_of(map, head, queries, r + 3u)));
    let there = rows_inside(map, me, queries);
    var out = Rows();
    for (var long = 0u; long < map.size.y; long += map.side.y) {
        if any_rel() {
            fill_terms(map, me, head.g, own, first_offset(map, queries, vec2u(0u, long)), false);
        }
        // Lines ty + 8 j along the long axis.
        var by_long = mat4x4f();
        for (var short = 0u; short < map.size.x; short += map.side.x) {
            let keys = vec2u(short, long);
            let first = first_offset(map, queries, keys);
            let others = starts_of(map, me, head, keys);
            fill_biases(map, me, head.g, first);
            let product = multiply(me, OF_Q, own, OF_K, others, table_start(map, 0u, head.g, first, me.ty), any_rel());
            if any_rel() {
                put_terms(me, 32u, product.extra);
            }
            let dp = multiply(me, OF_DY, own, OF_V, others, NONE, false).s;
            var s = mat4x4f();
            for (var j = 0u; j < 4u; j++) {
                let key = me.tx + 8u * j;
                let prob = probabilities(logits_of_key(map, me, key, product.s[j]), stat[0], there & vec4<bool>(inside(map, keys, key)));
                s[j] = prob * (dp[j] - stat[1]);
            }
            workgroupBarrier();
            put_scores(me, s);
            var by_short = vec4f();
            if any_rel() {
                workgroupBarrier();
                by_short = short_sums(map, me, me.ty);
                by_long += mat4x4f(long_sums(map, me, me.ty), long_sums(map, me, me.ty + 8u), long_sums(map, me, me.ty + 16u),
                    long_sums(map, me, me.ty + 24u));
            }
            out = apply(me, out, OF_K, others, piece, p.scale, TOKENS);
            if any_rel() {
                workgroupBarrier();
                tile[SCORES + LINE * me.ty + me.tx] = by_short;
                out = apply(me, out, OF_TABLES, table_starts(map, me, 0u, head.g, first), piece, 1.0, 2u * map.side.x - 1u);
            }
        }
        if any_rel() {
            workgroupBarrier();
            let to = SCORES + LINE * me.ty + me.tx;
            tile[to] = by_long[0];
            tile[to + 8u * LINE] = by_long[1];
            tile[to + 16u * LINE] = by_long[2];
            tile[to + 24u * LINE] = by_long[3];
            let first = first_offset(map, queries, vec2u(0u, long));
            out = apply(me, out, OF_TABLES, table_starts(map, me, 1u, head.g, first), piece, 1.0, 2u * map.side.y - 1u);
        }
    }
    return out;
}

// ------------------------------------------------------------------------------------------------ dk, dv

struct KeyRows { dk: Rows, dv: Rows }

// dk and dv of 32 keys: dk = scale * sum of dS q, dv = sum of P dy.
fn key_gradients(map: Map, me: Lane, head: Place, keys: vec2u, piece: u32) -> KeyRows {
    let own = starts_of(map, me, head, keys);
    let there = rows_inside(map, me, keys);
    var out = KeyRows();
    for (var long = 0u; long < map.size.y; long += map.side.y) {
        for (var short = 0u; short < map.size.x; short += map.side.x) {
            let queries = vec2u(short, long);
            let first = first_offset(map, queries, keys);
            let others = starts_of(map, me, head, queries);
            fill_biases(map, me, head.g, first);
            if any_rel() {
                fill_terms(map, me, head.g, others, first, true);
            }
            // Rows are keys, columns are queries.
            var prob = multiply(me, OF_K, own, OF_Q, others, NONE, false).s;
            var ds = multiply(me, OF_V, own, OF_DY, others, NONE, false).s;
            for (var j = 0u; j < 4u; j++) {
                let query = me.tx + 8u * j;
                let stat = stat_of(map, head, queries, query);
                let both = there & vec4<bool>(inside(map, queries, query));
                prob[j] = probabilities(logits_of_query(map, me, query, prob[j]), vec4f(stat.x), both);
                ds[j] = prob[j] * (ds[j] - stat.y);
            }
            workgroupBarrier();
            put_scores(me, prob);
            out.dv = apply(me, out.dv, OF_DY, others, piece, 1.0, TOKENS);
            workgroupBarrier();
            put_scores(me, ds);
            out.dk = apply(me, out.dk, OF_Q, others, piece, p.scale, TOKENS);
        }
    }
    return out;
}

// ------------------------------------------------------------------------------------------------ launches

// Where this invocation's part of row 4 ty + i of an output lies, `near` (0) or `far` (8); NONE past the last token and channel.
fn output_at(map: Map, me: Lane, head: Place, at: vec2u, i: u32, c: u32) -> u32 {
    let start = start_of(map, head, at, 4u * me.ty + i);
    return select(start + c + me.tx, NONE, start == NONE || c + me.tx >= p.d / 4u);
}

@compute @workgroup_size(64)
fn global_attention_bwd_dq_tiled_f32(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) id: u32,
) {
    let map = map_of(groups);
    let me = Lane(id % 8u, id / 8u);
    let at = group.yx * map.side;
    for (var z = group.z; z < p.n * p.g * pieces_of_head(); z += groups.z) {
        let dq = query_gradient(map, me, head_of(z), at, piece_of(z));
        for (var i = 0u; i < 4u; i++) {
            let near = output_at(map, me, head_of(z), at, i, piece_of(z));
            let far = output_at(map, me, head_of(z), at, i, piece_of(z) + 8u);
            if near != NONE { grad[near] = dq.near[i]; }
            if far != NONE { grad[far] = dq.far[i]; }
        }
    }
}

@compute @workgroup_size(64)
fn global_attention_bwd_dkv_tiled_f32(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) id: u32,
) {
    let map = map_of(groups);
    let me = Lane(id % 8u, id / 8u);
    let at = group.yx * map.side;
    for (var z = group.z; z < p.n * p.g * pieces_of_head(); z += groups.z) {
        let done = key_gradients(map, me, head_of(z), at, piece_of(z));
        for (var i = 0u; i < 4u; i++) {
            let near = output_at(map, me, head_of(z), at, i, piece_of(z));
            let far = output_at(map, me, head_of(z), at, i, piece_of(z) + 8u);
            if near != NONE {
                grad[near] = done.dk.near[i];
                grad_v[near] = done.dv.near[i];
            }
            if far != NONE {
                grad[far] = done.dk.far[i];
                grad_v[far] = done.dv.far[i];
            }
        }
    }
}

// Small maps: dq of a tile as queries, then dk and dv of the same tile as keys, into one buffer: dq, dk, dv `p.part` apart.
@compute @workgroup_size(64)
fn global_attention_bwd_tiled_f32(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) id: u32,
) {
    let map = map_of(groups);
    let me = Lane(id % 8u, id / 8u);
    let at = group.yx * map.side;
    for (var z = group.z; z < p.n * p.g * pieces_of_head(); z += groups.z) {
        let dq = query_gradient(map, me, head_of(z), at, piece_of(z));
        let done = key_gradients(map, me, head_of(z), at, piece_of(z));
        for (var i = 0u; i < 4u; i++) {
            let near = output_at(map, me, head_of(z), at, i, piece_of(z));
            let far = output_at(map, me, head_of(z), at, i, piece_of(z) + 8u);
            if near != NONE {
                grad[near] = dq.near[i];
                grad[p.part / 4u + near] = done.dk.near[i];
                grad[p.part / 2u + near] = done.dv.near[i];
            }
            if far != NONE {
                grad[far] = dq.far[i];
                grad[p.part / 4u + far] = done.dk.far[i];
                grad[p.part / 2u + far] = done.dv.far[i];
            }
        }
    }
}
