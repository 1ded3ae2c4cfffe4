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
}

struct PadParams {
    rows: u32,
    from_width: u32,
    to_width: u32,
}

@group(0) @binding(0) var<uniform> p: GlobalAttentionParams;
@group(0) @binding(0) var<uniform> pad: PadParams;

// Forward and every backward pass.
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> tables: array<vec4f>;
// Forward.
@group(0) @binding(5) var<storage, read_write> y: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
// Backward: (log-sum-exp, rowsum(dy * y)) of each query, then gradients.
@group(0) @binding(5) var<storage, read> dy: array<vec4f>;
@group(0) @binding(6) var<storage, read> stats: array<vec2f>;
@group(0) @binding(7) var<storage, read_write> grad: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> grad_v: array<vec4f>;
// delta.
@group(0) @binding(1) var<storage, read> saved_y: array<vec4f>;
@group(0) @binding(2) var<storage, read> given_dy: array<vec4f>;
@group(0) @binding(3) var<storage, read> saved_lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> new_stats: array<vec2f>;
// tables_sum and pad.
@group(0) @binding(1) var<storage, read> numbers: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;

// vec4s of output that an invocation holds.
const CHUNK = 8u;
// Keys (or queries) that it takes at a time.
const BLOCK = 8u;

alias Chunk = array<vec4f, CHUNK>;
alias Block = array<f32, BLOCK>;

// A token of a head: token t of the head starts at vec4 `base + t * stride`, its statistics lie at `stat + t * p.g`.
struct Place {
    t: u32,
    y: u32,
    x: u32,
    g: u32,
    base: u32,
    stride: u32,
    stat: u32,
}

fn place(n: u32, g: u32, t: u32) -> Place {
    let tokens = p.h * p.w;
    let first = n * tokens * p.g + g;
    return Place(t, t / p.w, t % p.w, g, first * (p.d / 4u), p.g * (p.d / 4u), first);
}

// Invocation i's token: the tokens of a head stand side by side.
fn place_of(i: u32) -> Place {
    let tokens = p.h * p.w;
    return place(i / tokens / p.g, i / tokens % p.g, i % tokens);
}

fn any_table() -> bool {
    return p.has_rel_h + p.has_rel_w + p.has_bias > 0u;
}

// Rows and columns of the walk over the other tokens: without tables their place does not matter, and the map is one long row.
fn walk() -> vec2u {
    return select(vec2u(1u, p.h * p.w), vec2u(p.h, p.w), any_table());
}

// Parts of the packed tables start at multiples of 64 numbers.
fn aligned(n: u32) -> u32 {
    return (n + 63u) / 64u * 64u;
}

fn rel_w_start() -> u32 {
    return aligned(p.has_rel_h * (2u * p.h - 1u) * p.g * p.d);
}

fn bias_start() -> u32 {
    return rel_w_start() + aligned(p.has_rel_w * (2u * p.w - 1u) * p.g * p.d);
}

// First vec4 of head g's part of a row of rel_h, of rel_w.
fn rel_h_row(g: u32, a: u32) -> u32 {
    return (a * p.g + g) * (p.d / 4u);
}

fn rel_w_row(g: u32, b: u32) -> u32 {
    return rel_w_start() / 4u + (b * p.g + g) * (p.d / 4u);
}

// A bias, or 0 where there is none.
fn bias_of(g: u32, a: u32, b: u32) -> f32 {
    if p.has_bias == 0u {
        return 0.0;
    }
    let i = bias_start() + (g * (2u * p.h - 1u) + a) * (2u * p.w - 1u) + b;
    return tables[i / 4u][i % 4u];
}

// q . rel_h[a], or 0 where there is no such table.
fn row_term(at: Place, a: u32) -> f32 {
    var sum = 0.0;
    if p.has_rel_h != 0u {
        let row = rel_h_row(at.g, a);
        for (var c = 0u; c < p.d / 4u; c++) {
            sum += dot(q[at.base + at.t * at.stride + c], tables[row + c]);
        }
    }
    return sum;
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

// Rows of one width as rows of another: cut, or filled with zeros.
@compute @workgroup_size(64)
fn global_attention_pad_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= pad.rows * pad.to_width {
        return;
    }
    let c = i % pad.to_width;
    var x = 0.0;
    if c < pad.from_width {
        x = numbers[i / pad.to_width * pad.from_width + c];
    }
    result[i] = x;
}
