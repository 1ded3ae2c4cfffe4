// Backward of local attention; the formula and the groups of lanes are explained in local_attention.cu.
//
//   P = exp(logit - lse)   dS = P (dy.v - delta)   delta = y.dy
//   dq = sum over keys of dS (scale k + rel_h[a] + rel_w[b])   dk = scale * sum over queries of dS q   dv = sum of P dy
//   drel_h[a] = sum of dS q over the pairs with row offset a, drel_w[b] likewise   dbias[a, b] = sum of dS
//
// Who owns what: for dq a group owns R queries and walks over their windows; for dk and dv it owns R keys and gathers from the
// queries that see them, which is the same window with offsets negated; for the tables a warp owns an offset of a head, and its
// lanes share the pairs. Nothing is added by two owners and every sum runs in a fixed order: no atomics. Small maps have dq, dk and
// dv in one launch.
//
// Flop: dq 6, dk and dv 8, tables 6 kh kw d a query and head. Extra memory: stats [N, H, W, G, 2], sums by offset
// [pieces, G, kh, kw, d + 4]. Shared memory: 8 R kw bytes a group, at most 26 KiB.

#include "common.cuh"
#include "local_attention.cuh"

template <int L, int M, int R> DEVICE void query_gradient(const Params &p, const Given &in, Real *dq, float *shared) {
    Group<L, M, R> at(p);
    // q . rel_w, and the sums of dS by column of the window: [R, kw] each, the group's own.
    float *terms = shared + threadIdx.x / L * 2 * R * p.kw, *by_column = terms + R * p.kw;
    Piece<M> query[R], dy[R], out[R];
    float lse[R], delta[R];
    UNROLL for (int r = 0; r < R; r++) {
        query[r] = at.piece(p, in.q, at.y, at.x + r);
        dy[r] = at.piece(p, in.dy, at.y, at.x + r);
        out[r] = Piece<M>();
        lse[r] = in.stats[2 * at.stat(p, r)];
        delta[r] = in.stats[2 * at.stat(p, r) + 1];
    }
    for (u32 i = at.lane; i < R * p.kw; i += L) by_column[i] = 0.0f;
    __syncwarp();
    at.column_terms(p, query, in.tables, terms);
    for (u32 a = 0; a < p.kh; a++) {
        float row_term[R], by_row[R] = {};
        at.row_terms(p, query, in.tables, a, row_term);
        u32 row = at.y + a - p.kh / 2;
        for (u32 j = 0; j < p.kw + R - 1; j++) {
            u32 column = at.x + j - p.kw / 2;
            Piece<M> key = at.piece(p, in.k, row, column), value = at.piece(p, in.v, row, column);
            UNROLL for (int r = 0; r < R; r++) {
                float s = at.sum(dot(query[r], key)), dp = at.sum(dot(dy[r], value));
                u32 b = j - r;
                if (b >= p.kw || !(p.zero_border || at.in_map(p, row, column))) continue;
                s = p.scale * s + row_term[r] + (p.has_rel_w ? terms[r * p.kw + b] : 0.0f)
                    + bias_of(p, in.tables, at.head.g, a, b);
                float ds = expf(s - lse[r]) * (dp - delta[r]);
                by_row[r] += ds;
                if (at.lane == 0) by_column[r * p.kw + b] += ds;
                add(out[r], p.scale * ds, key);
            }
        }
        if (p.has_rel_h) {
            Piece<M> table = at.of_row(p, rel_h_row(p, in.tables, at.head.g, a));
            UNROLL for (int r = 0; r < R; r++) add(out[r], by_row[r], table);
        }
    }
    __syncwarp();
    for (u32 b = 0; p.has_rel_w && b < p.kw; b++) {
        Piece<M> table = at.of_row(p, rel_w_row(p, in.tables, at.head.g, b));
        UNROLL for (int r = 0; r < R; r++) add(out[r], by_column[r * p.kw + b], table);
    }
    UNROLL for (int r = 0; r < R; r++) at.put(p, dq, r, out[r]);
}

template <int L, int M, int R> DEVICE void key_gradients(const Params &p, const Given &in, Real *dk, Real *dv) {
    Group<L, M, R> at(p);
    Piece<M> key[R], value[R], sum_k[R], sum_v[R];
    UNROLL for (int r = 0; r < R; r++) {
        key[r] = at.piece(p, in.k, at.y, at.x + r);
        scale(key[r], p.scale);
        value[r] = at.piece(p, in.v, at.y, at.x + r);
        sum_k[r] = sum_v[r] = Piece<M>();
    }
    for (u32 a = 0; a < p.kh; a++) {
        // The queries that see row y at offset a.
        u32 row = at.y + p.kh / 2 - a;
        Piece<M> table_row;
        if (p.has_rel_h) table_row = at.of_row(p, rel_h_row(p, in.tables, at.head.g, a));
        for (u32 j = 0; j < p.kw + R - 1; j++) {
            u32 column = at.x + j - p.kw / 2;
            bool inside = at.in_map(p, row, column);
            Piece<M> query = at.piece(p, in.q, row, column), dy = at.piece(p, in.dy, row, column);
            float lse = 0.0f, delta = 0.0f, row_term = p.has_rel_h ? at.sum(dot(query, table_row)) : 0.0f;
            if (inside) {
                u32 stat = at.head.stat + (row * p.w + column) * p.g;
                lse = in.stats[2 * stat];
                delta = in.stats[2 * stat + 1];
            }
            UNROLL for (int r = 0; r < R; r++) {
                // Key r's column of this query's window; past the window it has wrapped to something large.
                u32 b = r + p.kw - 1 - j;
                Piece<M> other = key[r];
                if (p.has_rel_w) add(other, 1.0f, at.of_row(p, rel_w_row(p, in.tables, at.head.g, least(b, p.kw - 1))));
                float s = at.sum(dot(query, other)), dp = at.sum(dot(dy, value[r]));
                if (b >= p.kw || !inside) continue;
                float prob = expf(s + row_term + bias_of(p, in.tables, at.head.g, a, b) - lse);
                add(sum_v[r], prob, dy);
                add(sum_k[r], p.scale * prob * (dp - delta), query);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        at.put(p, dk, r, sum_k[r]);
        at.put(p, dv, r, sum_v[r]);
    }
}

// dq, dk and dv `p.part` apart in one buffer.
template <int L, int M, int R> DEVICE void both(const Params &p, const Given &in, Real *grads, float *shared) {
    query_gradient<L, M, R>(p, in, grads, shared);
    key_gradients<L, M, R>(p, in, grads + p.part, grads + 2 * p.part);
}

KERNEL(128) OF(local_attention_bwd)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(float, shared);
    both<16 / WIDTH, 1, 4>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(local_attention_bwd_d32)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(float, shared);
    both<4, 8 / WIDTH, 4>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(local_attention_bwd_d64)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(float, shared);
    both<4, 16 / WIDTH, 2>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(local_attention_bwd_wide)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(float, shared);
    both<32, 16 / WIDTH, 1>(p, GIVEN, grads, shared);
}

KERNEL(128) OF(local_attention_bwd_dq)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(float, shared);
    query_gradient<16 / WIDTH, 1, 4>(p, GIVEN, dq, shared);
}
KERNEL(128) OF(local_attention_bwd_dq_d32)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(float, shared);
    query_gradient<4, 8 / WIDTH, 4>(p, GIVEN, dq, shared);
}
KERNEL(128) OF(local_attention_bwd_dq_d64)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(float, shared);
    query_gradient<4, 16 / WIDTH, 2>(p, GIVEN, dq, shared);
}
KERNEL(128) OF(local_attention_bwd_dq_wide)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(float, shared);
    query_gradient<32, 16 / WIDTH, 1>(p, GIVEN, dq, shared);
}

KERNEL(128) OF(local_attention_bwd_dkv)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    key_gradients<16 / WIDTH, 1, 4>(p, GIVEN, dk, dv);
}
KERNEL(128) OF(local_attention_bwd_dkv_d32)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    key_gradients<4, 8 / WIDTH, 4>(p, GIVEN, dk, dv);
}
KERNEL(128) OF(local_attention_bwd_dkv_d64)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    key_gradients<4, 16 / WIDTH, 2>(p, GIVEN, dk, dv);
}
KERNEL(128) OF(local_attention_bwd_dkv_wide)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    key_gradients<32, 16 / WIDTH, 1>(p, GIVEN, dk, dv);
}

// partial [pieces, G, kh, kw, width]; a warp owns an offset of a head and of a piece of the batch's rows.
KERNEL(256) OF(local_attention_bwd_tables)(LocalAttentionParams p, INPUTS, float *partial) {
    u32 i = flat_id() / 32, lane = threadIdx.x % 32;
    if (i >= p.pieces * p.g * p.kh * p.kw) return;
    u32 b = i % p.kw, a = i / p.kw % p.kh, g = i / p.kw / p.kh % p.g, piece = i / p.kw / p.kh / p.g;
    u32 all = p.n * p.h, rows = (all + p.pieces - 1) / p.pieces, first = least(piece * rows, all);
    u32 pairs = (least(first + rows, all) - first) * p.w, rel = rel_width(p);
    for (u32 chunk = 0; chunk == 0 || chunk < rel; chunk += OFFSET_NUMBERS) {
        u32 width = chunk < rel ? least(OFFSET_NUMBERS, rel - chunk) : 0;
        OffsetSums sums;
        for (u32 pair = lane; pair < pairs; pair += 32) {
            u32 row = first + pair / p.w, y = row % p.h, x = pair % p.w;
            // Wraps to something large above and left of the map.
            u32 key_y = y + a - p.kh / 2, key_x = x + b - p.kw / 2;
            bool inside = key_y < p.h && key_x < p.w;
            if (!inside && !p.zero_border) continue;
            Head head(p, row / p.h, g);
            u32 query = y * p.w + x;
            float ds = pair_gradient(p, GIVEN, head, query, key_y * p.w + key_x, inside, a, b);
            sums.add(ds, q + head.base + query * head.stride + chunk, width);
        }
        sums.put(p, partial + i * partial_width(p), chunk, width);
    }
}

// As sum_tables, of what local_attention_tables_mma.cu wrote: sums by row of the tables, then by bias, in the same room.
DEVICE void sum_rows(const Params &p, const float *partial, float *dtables) {
    u32 offsets = p.kh * p.kw, row = p.g * p.d, i = flat_id(), second = rel_w_start(p), bias = bias_start(p);
    if (i >= bias + aligned(p.has_bias * p.g * offsets)) return;
    u32 g = 0, at = 0;
    bool gap = false;
    if (i < bias) {
        u32 first = i < second ? 0 : second, rows = i < second ? p.kh : p.kw, c = (i - first) % row;
        g = c / p.d;
        at = ((i - first) / row + (i < second ? 0 : p.kh)) * p.d + c % p.d;
        gap = (i - first) / row >= rows;
    } else {
        g = (i - bias) / offsets;
        at = (rel_width(p) > 0 ? (p.kh + p.kw) * p.d : 0) + (i - bias) % offsets;
        gap = g >= p.g;
    }
    float sum = 0.0f;
    u32 room = offsets * partial_width(p);
    for (u32 piece = 0; piece < p.pieces && !gap; piece++) sum += partial[(piece * p.g + g) * room + at];
    dtables[i] = sum;
}

KERNEL(256) local_attention_bwd_tables_sum_f32(LocalAttentionParams p, const float *partial, float *dtables) {
    if (p.by_row) sum_rows(p, partial, dtables);
    else sum_tables(p, partial, dtables);
}
