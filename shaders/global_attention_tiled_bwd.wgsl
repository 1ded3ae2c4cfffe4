// Backward of global_attention_tiled.wgsl.

fn fetch(x: u32, at: u32) -> vec4f {
    var row = vec4f();
    switch x {
        case OF_Q: { row = q[at]; }
        case OF_K: { row = k[at]; }
        case OF_V: { row = v[at]; }
        case OF_DY: { row = dy[at]; }
        default: { row = tables[at]; }
    }
    return row;
}

// The statistics of a token.
fn stat_of(map: Map, head: Place, at: vec2u, r: u32) -> vec2f {
    return stats[head.stat + token(map, at, r) * p.g];
}

// ------------------------------------------------------------------------------------------------ dq

// The sums of the scores of queries 4 tx + i over `count` keys, from the tile's key `first` on, `step` apart.
fn sum_of_scores(me: Lane, first: u32, step: u32, count: u32) -> vec4f {
    var sum = vec4f();
    for (var i = 0u; i < count; i++) {
        sum += tile[SCORES + LINE * (first + i * step) + me.tx];
    }
    return sum;
}

// What such sums, which lie in rows of eight from `slot` on by the keys' place along an axis, give for query 4 tx + i and line l.
fn sum_at_line(map: Map, me: Lane, slot: u32, axis: u32, l: u32, i: u32) -> f32 {
    let key = l + cell(map, 4u * me.tx + i)[axis] + 1u - map.side[axis];
    if key >= map.side[axis] {
        return 0.0;
    }
    return tile[slot + 8u * key + me.tx][i];
}

// Puts line l in its row of the scores, for `apply`.
fn put_line(map: Map, me: Lane, slot: u32, axis: u32, l: u32) {
    tile[SCORES + LINE * l + me.tx] = vec4f(sum_at_line(map, me, slot, axis, l, 0u), sum_at_line(map, me, slot, axis, l, 1u),
        sum_at_line(map, me, slot, axis, l, 2u), sum_at_line(map, me, slot, axis, l, 3u));
}

// dS of queries 4 ty + i and a key; `stat` has their log-sum-exps and deltas.
fn key_scores(map: Map, me: Lane, keys: vec2u, key: u32, stat: mat2x4f, product: vec4f, dp: vec4f) -> vec4f {
    let prob = exp(logits_of_key(map, me, key, product) - stat[0]);
    return select(vec4f(), prob * (dp - stat[1]), inside(map, keys, key));
}

// dq of 32 queries: dS = P (dy.v - delta), dq = sum of dS (scale k + rel_h[a] + rel_w[b]). Rows past the last query hold anything.
fn query_gradient(map: Map, me: Lane, head: Place, queries: vec2u, piece: u32) -> Rows {
    let own = starts_of(map, me, head, queries);
    let r = 4u * me.ty;
    let stat = transpose(mat4x2f(stat_of(map, head, queries, r), stat_of(map, head, queries, r + 1u),
        stat_of(map, head, queries, r + 2u), stat_of(map, head, queries, r + 3u)));
    var out = Rows();
    for (var long = 0u; long < map.size.y; long += map.side.y) {
        if any_rel() {
            fill_terms(map, me, head.g, own, first_offset(map, queries, vec2u(0u, long)), false);
        }
        // Sums by the keys' place along the long axis: ty, and ty + 8.
        var low = vec4f();
        var high = vec4f();
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
            let s = mat4x4f(
                key_scores(map, me, keys, me.tx, stat, product.s[0], dp[0]),
                key_scores(map, me, keys, me.tx + 8u, stat, product.s[1], dp[1]),
                key_scores(map, me, keys, me.tx + 16u, stat, product.s[2], dp[2]),
                key_scores(map, me, keys, me.tx + 24u, stat, product.s[3], dp[3]));
            workgroupBarrier();
            put_scores(me, s);
            if any_rel() {
                workgroupBarrier();
                low += sum_of_scores(me, me.ty, map.side.y, select(0u, map.side.x, me.ty < map.side.y));
                high += sum_of_scores(me, me.ty + 8u, map.side.y, select(0u, map.side.x, me.ty + 8u < map.side.y));
                let by_short = sum_of_scores(me, me.ty * map.side.y, 1u, select(0u, map.side.y, me.ty < map.side.x));
                tile[EXTRA + 8u * me.ty + me.tx] = by_short;
            }
            out = apply(me, out, OF_K, others, piece, p.scale, TOKENS);
            if any_rel() {
                workgroupBarrier();
                put_line(map, me, EXTRA, 0u, me.ty);
                out = apply(me, out, OF_TABLES, table_starts(map, me, 0u, head.g, first), piece, 1.0, 2u * map.side.x - 1u);
            }
        }
        if any_rel() {
            workgroupBarrier();
            tile[RIGHT + 8u * me.ty + me.tx] = low;
            tile[RIGHT + 8u * me.ty + 64u + me.tx] = high;
            workgroupBarrier();
            put_line(map, me, RIGHT, 1u, me.ty);
            put_line(map, me, RIGHT, 1u, me.ty + 8u);
            put_line(map, me, RIGHT, 1u, me.ty + 16u);
            put_line(map, me, RIGHT, 1u, me.ty + 24u);
            let first = first_offset(map, queries, vec2u(0u, long));
            out = apply(me, out, OF_TABLES, table_starts(map, me, 1u, head.g, first), piece, 1.0, 2u * map.side.y - 1u);
        }
    }
    return out;
}

// ------------------------------------------------------------------------------------------------ dk, dv

struct KeyRows { dk: Rows, dv: Rows }

struct QueryScores { prob: vec4f, ds: vec4f }

// P and dS of keys 4 ty + i and a query.
fn query_scores(map: Map, me: Lane, head: Place, queries: vec2u, query: u32, product: vec4f, dp: vec4f) -> QueryScores {
    let stat = stat_of(map, head, queries, query);
    let prob = select(vec4f(), exp(logits_of_query(map, me, query, product) - stat.x), inside(map, queries, query));
    return QueryScores(prob, prob * (dp - stat.y));
}

// dk and dv of 32 keys: dk = scale * sum of dS q, dv = sum of P dy. Rows past the last key hold anything.
fn key_gradients(map: Map, me: Lane, head: Place, keys: vec2u, piece: u32) -> KeyRows {
    let own = starts_of(map, me, head, keys);
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
            let product = multiply(me, OF_K, own, OF_Q, others, NONE, false).s;
            let dp = multiply(me, OF_V, own, OF_DY, others, NONE, false).s;
            let a = query_scores(map, me, head, queries, me.tx, product[0], dp[0]);
            let b = query_scores(map, me, head, queries, me.tx + 8u, product[1], dp[1]);
            let c = query_scores(map, me, head, queries, me.tx + 16u, product[2], dp[2]);
            let e = query_scores(map, me, head, queries, me.tx + 24u, product[3], dp[3]);
            workgroupBarrier();
            put_scores(me, mat4x4f(a.prob, b.prob, c.prob, e.prob));
            out.dv = apply(me, out.dv, OF_DY, others, piece, 1.0, TOKENS);
            workgroupBarrier();
            put_scores(me, mat4x4f(a.ds, b.ds, c.ds, e.ds));
            out.dk = apply(me, out.dk, OF_Q, others, piece, p.scale, TOKENS);
        }
    }
    return out;
}

// ------------------------------------------------------------------------------------------------ launches

// Where this invocation's part of rows 4 ty + i of an output lies; NONE past the last token and channel.
struct Targets { near: vec4u, far: vec4u }

fn target_at(map: Map, head: Place, at: vec2u, r: u32, c: u32) -> u32 {
    let start = start_of(map, head, at, r);
    return select(start + c, NONE, start == NONE || c >= p.d / 4u);
}

fn targets_at(map: Map, me: Lane, head: Place, at: vec2u, c: u32) -> vec4u {
    let r = 4u * me.ty;
    return vec4u(target_at(map, head, at, r, c), target_at(map, head, at, r + 1u, c), target_at(map, head, at, r + 2u, c),
        target_at(map, head, at, r + 3u, c));
}

fn targets_of(map: Map, me: Lane, z: u32, at: vec2u) -> Targets {
    let c = piece_of(z) + me.tx;
    return Targets(targets_at(map, me, head_of(z), at, c), targets_at(map, me, head_of(z), at, c + 8u));
}

fn put_rows(to: vec4u, part: u32, rows: mat4x4f) {
    if to.x != NONE { grad[part + to.x] = rows[0]; }
    if to.y != NONE { grad[part + to.y] = rows[1]; }
    if to.z != NONE { grad[part + to.z] = rows[2]; }
    if to.w != NONE { grad[part + to.w] = rows[3]; }
}

fn put_rows_of_v(to: vec4u, rows: mat4x4f) {
    if to.x != NONE { grad_v[to.x] = rows[0]; }
    if to.y != NONE { grad_v[to.y] = rows[1]; }
    if to.z != NONE { grad_v[to.z] = rows[2]; }
    if to.w != NONE { grad_v[to.w] = rows[3]; }
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
        let to = targets_of(map, me, z, at);
        put_rows(to.near, 0u, dq.near);
        put_rows(to.far, 0u, dq.far);
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
        let to = targets_of(map, me, z, at);
        put_rows(to.near, 0u, done.dk.near);
        put_rows(to.far, 0u, done.dk.far);
        put_rows_of_v(to.near, done.dv.near);
        put_rows_of_v(to.far, done.dv.far);
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
        let to = targets_of(map, me, z, at);
        put_rows(to.near, 0u, dq.near);
        put_rows(to.far, 0u, dq.far);
        let done = key_gradients(map, me, head_of(z), at, piece_of(z));
        put_rows(to.near, p.part / 4u, done.dk.near);
        put_rows(to.far, p.part / 4u, done.dk.far);
        put_rows(to.near, p.part / 2u, done.dv.near);
        put_rows(to.far, p.part / 2u, done.dv.far);
    }
}
