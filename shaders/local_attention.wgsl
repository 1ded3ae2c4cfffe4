// Local attention of a feature map: every place attends to the kh x kw window around it. Put after attention_common.wgsl.
//
//   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   offset (a, b) = key - query,   y = softmax(logit) v
//
// q, k, v, y are [N, H, W, G, d] with d a multiple of 4 (the op pads other widths); kh and kw are odd, at most 13. A key outside
// the map leaves the softmax, or (zero_border) stays with k = v = 0.
//
// Who owns what. Forward and dq: an invocation owns a query of a head and walks over its window, a row of up to eight keys at a
// time, with the softmax online (forward) or from the saved log-sum-exp (dq). dk, dv: an invocation owns a key and gathers from
// the queries that see it: the same window by symmetry, offsets negated. Table gradients: an invocation owns an offset of a head
// and walks over all queries of its piece of the batch; a second launch sums. So nothing is added by two invocations, sums run
// in a fixed order, and no barrier and no workgroup memory are needed: neighbouring invocations read the same keys, out of the
// cache.
//
// Position terms. The products with rel_w are made once for eight columns of the window, those with rel_h once for eight keys.
//
// Work: forward 4 kh kw d flop a query and head (times more where d > 4 CHUNK: each chunk of the output makes the scores again),
// dq 6, dk and dv 8, tables 6. Bytes: each tensor once, if kh rows of K and V of a head fit the cache. Extra memory: lse, and in
// backward [N, H, W, G, 2] and the sums by offset [pieces, G, kh, kw, d + 4]; nothing of the size of a window a query.

struct LocalAttentionParams {
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
    kh: u32,
    kw: u32,
    zero_border: u32,
    by_row: u32,
}

@group(0) @binding(0) var<uniform> p: LocalAttentionParams;

fn table_rows() -> u32 {
    return p.kh;
}

fn table_columns() -> u32 {
    return p.kw;
}

// The column of the window in slot j of the columns from b0 on; past the last the last again, which callers mask.
fn window_column(b0: u32, j: u32) -> u32 {
    return min(b0 + j, p.kw - 1u);
}

// Row y of a place moved by the window's offset a: wraps round below 0, so that `< p.h` says whether it lies in the map.
fn moved_row(y: u32, a: u32) -> u32 {
    return y + a - p.kh / 2u;
}

fn moved_column(x: u32, b: u32) -> u32 {
    return x + b - p.kw / 2u;
}

// q . rel_w[b] for the columns b0.. of the window, or 0 where there is no such table.
fn column_terms(at: Place, b0: u32) -> Block {
    var sums = Block();
    if p.has_rel_w != 0u {
        for (var c = 0u; c < p.d / 4u; c++) {
            let query = q[at.base + at.t * at.stride + c];
            for (var j = 0u; j < BLOCK; j++) {
                sums[j] += dot(query, tables[rel_w_row(at.g, window_column(b0, j)) + c]);
            }
        }
    }
    return sums;
}

// Eight keys of a window's row: their tokens, which of them lie in the map, and which take part in the softmax.
struct Keys {
    token: array<u32, BLOCK>,
    inside: array<bool, BLOCK>,
    counts: array<bool, BLOCK>,
}

fn keys_of(at: Place, a: u32, b0: u32) -> Keys {
    var keys = Keys();
    let y = moved_row(at.y, a);
    for (var j = 0u; j < BLOCK; j++) {
        let x = moved_column(at.x, b0 + j);
        let inside = y < p.h && x < p.w;
        // A token that may be read, whatever it means.
        keys.token[j] = select(at.t, y * p.w + x, inside);
        keys.inside[j] = inside && b0 + j < p.kw;
        keys.counts[j] = b0 + j < p.kw && (inside || p.zero_border != 0u);
    }
    return keys;
}

// The logits of these keys; what does not count means nothing.
fn logits(at: Place, keys: Keys, a: u32, b0: u32, column_term: Block) -> Block {
    var s = Block();
    for (var c = 0u; c < p.d / 4u; c++) {
        let query = q[at.base + at.t * at.stride + c];
        for (var j = 0u; j < BLOCK; j++) {
            s[j] += dot(query, k[at.base + keys.token[j] * at.stride + c]);
        }
    }
    let row_term = row_term(at, a);
    for (var j = 0u; j < BLOCK; j++) {
        s[j] = select(0.0, p.scale * s[j], keys.inside[j]);
        s[j] += row_term + column_term[j] + bias_of(at.g, a, window_column(b0, j));
    }
    return s;
}

// Output of a query, CHUNK vec4s from `chunk` on, and its log-sum-exp.
struct Forward {
    out: Chunk,
    lse: f32,
}

fn forward_chunk(at: Place, chunk: u32) -> Forward {
    var out = Chunk();
    var largest = -3.0e38;
    var sum = 0.0;
    for (var b0 = 0u; b0 < p.kw; b0 += BLOCK) {
        let column_term = column_terms(at, b0);
        for (var a = 0u; a < p.kh; a++) {
            let keys = keys_of(at, a, b0);
            var s = logits(at, keys, a, b0, column_term);
            var next = largest;
            for (var j = 0u; j < BLOCK; j++) {
                if keys.counts[j] {
                    next = max(next, s[j]);
                }
            }
            let factor = exp(largest - next);
            largest = next;
            sum *= factor;
            for (var j = 0u; j < BLOCK; j++) {
                let e = select(0.0, exp(s[j] - next), keys.counts[j]);
                sum += e;
                s[j] = select(0.0, e, keys.inside[j]);
            }
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    var o = out[c] * factor;
                    for (var j = 0u; j < BLOCK; j++) {
                        o += s[j] * v[at.base + keys.token[j] * at.stride + chunk + c];
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
fn local_attention_fwd_f32(
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
