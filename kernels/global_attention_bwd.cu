// Backward of global attention; the formula stands in global_attention.cu, the tiles in attention_tiles.cuh.
//
//   P = exp(logit - lse)   dS = P (dy.v - delta)   delta = y.dy
//   dq = sum over keys of dS (scale k + rel_h[a] + rel_w[b])   dk = scale * sum over queries of dS q   dv = sum of P dy
//   drel_h[a] = sum of dS q over the pairs with row offset a, drel_w[b] likewise   dbias[a, b] = sum of dS
//
// Who owns what: for dq a block owns 64 queries and walks over the keys, for dk and dv it owns 64 keys and walks over the queries;
// the tables' gradients are made in global_attention_tables.cu. Nothing is added by two owners and every sum runs in a fixed order:
// no atomics. Maps of one tile (up to 64 places) have dq, dk and dv in one launch.
//
// Flop: dq 6, dk and dv 8 T^2 d a head. Extra memory: stats [N, T, G, 2].

#include "common.cuh"
#include "attention_tiles.cuh"

// ------------------------------------------------------------------------------------------------ dq

// Sums of dS over the keys of each map row of the tile, and, added up over tiles, of each map column: who owns a line and a query
// adds them. Threads meet before; those that read meet after.
DEVICE void sum_scores(const Params &p, const Head &head, const Keys &keys, Memory m) {
    u32 end = least(keys.first + TILE, head.tokens);
    __syncthreads();
    for (u32 i = threadIdx.x; p.has_rel_h && i < keys.rows * TILE; i += 256) {
        u32 row = keys.row + i / TILE, from = row * p.w, to = least(from + p.w, end);
        float sum = 0.0f;
        for (u32 key = from < keys.first ? keys.first : from; key < to; key++) {
            sum += m.scores[(key - keys.first) * LINE + i % TILE];
        }
        m.row_sums[i] = sum;
    }
    for (u32 i = threadIdx.x; p.has_rel_w && i < keys.columns * TILE; i += 256) {
        float sum = keys.first == 0 || keys.wide ? 0.0f : m.column_sums[i];
        u32 column = i / TILE, step = keys.wide ? TILE : p.w;
        u32 key = keys.wide ? keys.first + column : keys.first + (column + p.w - keys.first % p.w) % p.w;
        for (; key < end; key += step) sum += m.scores[(key - keys.first) * LINE + i % TILE];
        m.column_sums[i] = sum;
    }
}

// out[i] += sums of the row (or column) lines times the table's rows.
template <int D> DEVICE void apply_rows(const Params &p, const Head &head, const Keys &keys, u32 q0, u32 chunk,
    const float *tables, Memory m, float (&out)[4][D / 16]) {
    u32 ty = threadIdx.x / 16;
    for (u32 r = 0; p.has_rel_h && r < keys.rows; r++) {
        UNROLL for (int i = 0; i < 4; i++) {
            u32 query = least(q0 + 4 * ty + i, head.tokens - 1), a = keys.row + r + p.h - 1 - query / p.w;
            const float *row = rel_h_row(p, tables, head.g, a);
            float sum = m.row_sums[r * TILE + 4 * ty + i];
            UNROLL for (int j = 0; j < D / 16; j++) {
                u32 c = chunk + column_of<D>(j);
                if (c < p.d) out[i][j] += sum * row[c];
            }
        }
    }
}

template <int D> DEVICE void apply_columns(const Params &p, const Head &head, const Keys &keys, u32 q0, u32 chunk,
    const float *tables, Memory m, float (&out)[4][D / 16]) {
    u32 ty = threadIdx.x / 16;
    for (u32 column = 0; p.has_rel_w && column < keys.columns; column++) {
        UNROLL for (int i = 0; i < 4; i++) {
            u32 query = least(q0 + 4 * ty + i, head.tokens - 1), b = keys.column_of(p, column) + p.w - 1 - query % p.w;
            const float *row = rel_w_row(p, tables, head.g, b);
            float sum = m.column_sums[column * TILE + 4 * ty + i];
            UNROLL for (int j = 0; j < D / 16; j++) {
                u32 c = chunk + column_of<D>(j);
                if (c < p.d) out[i][j] += sum * row[c];
            }
        }
    }
}

template <int D> DEVICE void query_gradient(
    const Params &p, const Given &in, const Head &head, u32 q0, u32 chunk, float *dq, Memory m) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float out[4][D / 16] = {}, lse[4], delta[4];
    UNROLL for (int i = 0; i < 4; i++) {
        u32 at = head.stat + least(q0 + 4 * ty + i, head.tokens - 1) * p.g;
        lse[i] = in.stats[2 * at];
        delta[i] = in.stats[2 * at + 1];
    }
    for (u32 k0 = 0; k0 < head.tokens; k0 += TILE) {
        Keys keys(p, k0);
        if (k0 == 0 || keys.wide) fill_column_terms(p, head, keys, q0, in.q, in.tables, m);
        fill_row_terms(p, head, keys, q0, in.q, in.tables, m);
        float s[4][4], dp[4][4];
        multiply(p, head, in.q, q0, in.k, k0, m, s);
        multiply(p, head, in.dy, q0, in.v, k0, m, dp);
        UNROLL for (int i = 0; i < 4; i++) {
            u32 at = 4 * ty + i, query = q0 + at;
            UNROLL for (int j = 0; j < 4; j++) {
                u32 key = k0 + 4 * tx + j;
                float ds = 0.0f;
                if (query < head.tokens && key < head.tokens) {
                    float logit = with_terms(p, head, keys, query, key, at, in.tables, m, p.scale * s[i][j]);
                    ds = expf(logit - lse[i]) * (dp[i][j] - delta[i]);
                }
                s[i][j] = ds;
            }
        }
        put_scores(m, s);
        if (p.has_rel_h || p.has_rel_w) sum_scores(p, head, keys, m);
        apply<D>(p, head, in.k, k0, chunk, p.scale, m, out);
        apply_rows<D>(p, head, keys, q0, chunk, in.tables, m, out);
        if (keys.wide || k0 + TILE >= head.tokens) apply_columns<D>(p, head, keys, q0, chunk, in.tables, m, out);
    }
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    put_rows<D>(p, head, dq, q0, chunk, one, out);
}

// ------------------------------------------------------------------------------------------------ dk, dv

template <int D> DEVICE void key_gradients(
    const Params &p, const Given &in, const Head &head, u32 k0, u32 chunk, float *dk, float *dv, Memory m) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum_k[4][D / 16] = {}, sum_v[4][D / 16] = {};
    Keys keys(p, k0);
    for (u32 q0 = 0; q0 < head.tokens; q0 += TILE) {
        fill_column_terms(p, head, keys, q0, in.q, in.tables, m);
        fill_row_terms(p, head, keys, q0, in.q, in.tables, m);
        // Rows are keys, columns are queries.
        float s[4][4], dp[4][4];
        multiply(p, head, in.k, k0, in.q, q0, m, s);
        multiply(p, head, in.v, k0, in.dy, q0, m, dp);
        UNROLL for (int j = 0; j < 4; j++) {
            u32 at = 4 * tx + j, query = q0 + at, stat = head.stat + least(query, head.tokens - 1) * p.g;
            float lse = in.stats[2 * stat], delta = in.stats[2 * stat + 1];
            UNROLL for (int i = 0; i < 4; i++) {
                u32 key = k0 + 4 * ty + i;
                float prob = 0.0f;
                if (query < head.tokens && key < head.tokens) {
                    prob = expf(with_terms(p, head, keys, query, key, at, in.tables, m, p.scale * s[i][j]) - lse);
                }
                s[i][j] = prob;
                dp[i][j] = prob * (dp[i][j] - delta);
            }
        }
        put_scores(m, s);
        apply<D>(p, head, in.dy, q0, chunk, 1.0f, m, sum_v);
        put_scores(m, dp);
        apply<D>(p, head, in.q, q0, chunk, p.scale, m, sum_k);
    }
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    put_rows<D>(p, head, dk, k0, chunk, one, sum_k);
    put_rows<D>(p, head, dv, k0, chunk, one, sum_v);
}

// ------------------------------------------------------------------------------------------------ launches

template <int D> DEVICE void bwd_dq(const Params &p, const Given &in, float *dq, float *shared) {
    u32 tiles = (p.h * p.w + TILE - 1) / TILE;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    query_gradient<D>(p, in, head, blockIdx.x % tiles * TILE, blockIdx.y * D, dq, Memory(p, shared));
}

template <int D> DEVICE void bwd_dkv(const Params &p, const Given &in, float *dk, float *dv, float *shared) {
    u32 tiles = (p.h * p.w + TILE - 1) / TILE;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    key_gradients<D>(p, in, head, blockIdx.x % tiles * TILE, blockIdx.y * D, dk, dv, Memory(p, shared));
}

// A map of one tile: dq, dk and dv `p.part` apart in one buffer.
template <int D> DEVICE void bwd(const Params &p, const Given &in, float *grads, float *shared) {
    Head head(p, blockIdx.x / p.g, blockIdx.x % p.g);
    Memory m(p, shared);
    query_gradient<D>(p, in, head, 0, blockIdx.y * D, grads, m);
    key_gradients<D>(p, in, head, 0, blockIdx.y * D, grads + p.part, grads + 2 * p.part, m);
}

KERNEL(256) global_attention_bwd_f32(GlobalAttentionParams p, INPUTS, float *grads) {
    DYN_SMEM(float, shared);
    bwd<32>(p, GIVEN, grads, shared);
}
KERNEL(256, 1) global_attention_bwd_d64_f32(GlobalAttentionParams p, INPUTS, float *grads) {
    DYN_SMEM(float, shared);
    bwd<64>(p, GIVEN, grads, shared);
}
KERNEL(256) global_attention_bwd_d128_f32(GlobalAttentionParams p, INPUTS, float *grads) {
    DYN_SMEM(float, shared);
    bwd<128>(p, GIVEN, grads, shared);
}

KERNEL(256) global_attention_bwd_dq_f32(GlobalAttentionParams p, INPUTS, float *dq) {
    DYN_SMEM(float, shared);
    bwd_dq<32>(p, GIVEN, dq, shared);
}
KERNEL(256) global_attention_bwd_dq_d64_f32(GlobalAttentionParams p, INPUTS, float *dq) {
    DYN_SMEM(float, shared);
    bwd_dq<64>(p, GIVEN, dq, shared);
}
KERNEL(256) global_attention_bwd_dq_d128_f32(GlobalAttentionParams p, INPUTS, float *dq) {
    DYN_SMEM(float, shared);
    bwd_dq<128>(p, GIVEN, dq, shared);
}

KERNEL(256) global_attention_bwd_dkv_f32(GlobalAttentionParams p, INPUTS, float *dk, float *dv) {
    DYN_SMEM(float, shared);
    bwd_dkv<32>(p, GIVEN, dk, dv, shared);
}
KERNEL(256) global_attention_bwd_dkv_d64_f32(GlobalAttentionParams p, INPUTS, float *dk, float *dv) {
    DYN_SMEM(float, shared);
    bwd_dkv<64>(p, GIVEN, dk, dv, shared);
}
KERNEL(256) global_attention_bwd_dkv_d128_f32(GlobalAttentionParams p, INPUTS, float *dk, float *dv) {
    DYN_SMEM(float, shared);
    bwd_dkv<128>(p, GIVEN, dk, dv, shared);
}
