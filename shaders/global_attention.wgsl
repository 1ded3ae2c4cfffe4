// Global attention of a feature map, flash style: every place attends to every place.
//
//   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   offset (a, b) = key - query,   y = softmax(logit) v
//
// q, k, v, y are [N, H, W, G, d] with d a multiple of 4 (the op pads other widths); T = H W.
//
// Who owns what. Forward and dq: an invocation owns a query of a head and walks over its keys, eight at a time, with the softmax
// online (forward) or from the saved log-sum-exp (dq). dk, dv: an invocation owns a key and walks over the queries. Table
// gradients: an invocation owns an offset (a, b) of a head and walks over the pairs at that offset; a second launch sums. So
// nothing is added by two invocations, sums run in a fixed order, and no barrier and no workgroup memory are needed: the
// invocations of a workgroup read the same keys at the same time, out of the cache.
//
// These kernels run on any adapter. Hardware takes those of global_attention_tiled.wgsl, but for the tables' gradients, and software those
// of global_attention_wide.wgsl where there are no tables.
//
// Position terms. Where there are tables, the eight keys lie in one row of the map, and the rows are the inner loop: the
// products with rel_w are made once for eight columns, those with rel_h once for eight keys.
//
// Work: forward 4 T^2 d flop a head (times more where d > 4 CHUNK: each chunk of the output makes the scores again), dq 6, dk and
// dv 8, tables 6. Bytes: each tensor once, if K and V of a head fit the cache (T d 8 bytes). Extra memory: lse, and in backward
// [N, H, W, G, 2] and the sums by offset [pieces, G, 2H-1, 2W-1, d + 4]; no scores.

struct GlobalAttentionParams {
    n: u32,
    h: u32,
    w: u32,
    g: u32,
    d: u32,
    has_rel_h: u32,
    has_rel_w: u32,
    has_bias: u32,
    scale: f32,
    pieces: u32,
    part: u32,
    by_axis: u32,
}

@group(0) @binding(0) var<uniform> p: GlobalAttentionParams;

fn table_rows() -> u32 {
    return 2u * p.h - 1u;
}

fn table_columns() -> u32 {
    return 2u * p.w - 1u;
}

fn any_table() -> bool {
    return p.has_rel_h + p.has_rel_w + p.has_bias > 0u;
}

// Rows and columns of the walk over the other tokens: without tables their place does not matter, and the map is one long row.
fn walk() -> vec2u {
    return select(vec2u(1u, p.h * p.w), vec2u(p.h, p.w), any_table());
}

// The keys x0.. of a row; past the last the last again, which callers mask.
fn column(x0: u32, j: u32, columns: u32) -> u32 {
    return min(x0 + j, columns - 1u);
}

// q . rel_w[b] for the keys x0.. of a row, or 0 where there is no such table.
fn column_terms(at: Place, x0: u32) -> Block {
    var sums = Block();
    if p.has_rel_w != 0u {
        for (var c = 0u; c < p.d / 4u; c++) {
            let query = q[at.base + at.t * at.stride + c];
            for (var j = 0u; j < BLOCK; j++) {
                let row = rel_w_row(at.g, column(x0, j, p.w) + p.w - 1u - at.x);
                sums[j] += dot(query, tables[row + c]);
            }
        }
    }
    return sums;
}

// The products of a query with the keys x0.. of row `row` of the walk.
fn query_keys(at: Place, row: u32, x0: u32, columns: u32) -> Block {
    var sums = Block();
    for (var c = 0u; c < p.d / 4u; c++) {
        let query = q[at.base + at.t * at.stride + c];
        for (var j = 0u; j < BLOCK; j++) {
            let key = row * columns + column(x0, j, columns);
            sums[j] += dot(query, k[at.base + key * at.stride + c]);
        }
    }
    return sums;
}

// The logits of these keys; what stands past the last column means nothing.
fn logits(at: Place, row: u32, x0: u32, columns: u32, column_term: Block) -> Block {
    var s = query_keys(at, row, x0, columns);
    for (var j = 0u; j < BLOCK; j++) {
        s[j] *= p.scale;
    }
    if any_table() {
        let a = row + p.h - 1u - at.y;
        let row_term = row_term(at, a);
        for (var j = 0u; j < BLOCK; j++) {
            let b = column(x0, j, columns) + p.w - 1u - at.x;
            s[j] += row_term + column_term[j] + bias_of(at.g, a, b);
        }
    }
    return s;
}

// Output of a query, CHUNK vec4s from `chunk` on, and its log-sum-exp.
struct Forward {
    out: Chunk,
    lse: f32,
}

fn forward_chunk(at: Place, chunk: u32) -> Forward {
    let walk = walk();
    var out = Chunk();
    var largest = -3.0e38;
    var sum = 0.0;
    for (var x0 = 0u; x0 < walk.y; x0 += BLOCK) {
        let column_term = column_terms(at, x0);
        for (var row = 0u; row < walk.x; row++) {
            var s = logits(at, row, x0, walk.y, column_term);
            var next = largest;
            for (var j = 0u; j < BLOCK; j++) {
                if x0 + j < walk.y {
                    next = max(next, s[j]);
                }
            }
            let factor = exp(largest - next);
            largest = next;
            sum *= factor;
            for (var j = 0u; j < BLOCK; j++) {
                s[j] = select(0.0, exp(s[j] - next), x0 + j < walk.y);
                sum += s[j];
            }
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    var o = out[c] * factor;
                    for (var j = 0u; j < BLOCK; j++) {
                        let key = row * walk.y + column(x0, j, walk.y);
                        o += s[j] * v[at.base + key * at.stride + chunk + c];
                    }
                    out[c] = o;
                }
            }
        }
    }
    for (var c = 0u; c < CHUNK; c++) {
        out[c] /= sum;
    }
    return Forward(out, largest + log(sum));
}

@compute @workgroup_size(64)
fn global_attention_fwd_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.n * p.g * p.h * p.w {
        return;
    }
    let at = place_of(i);
    for (var chunk = 0u; chunk < p.d / 4u; chunk += CHUNK) {
        let done = forward_chunk(at, chunk);
        for (var c = 0u; c < min(CHUNK, p.d / 4u - chunk); c++) {
            y[at.base + at.t * at.stride + chunk + c] = done.out[c];
        }
        lse[at.stat + at.t * p.g] = done.lse;
    }
}
