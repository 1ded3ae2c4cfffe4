// Backward of global attention on tensor cores in f16 and bf16; the formula stands in global_attention_mma.cu, tiles and position terms
// in global_attention_mma.cuh.
//
//   P = exp(logit - lse)   dS = P (dy.v - delta)   delta = y.dy
//   dq = sum over keys of dS (scale k + rel_h[a] + rel_w[b])   dk = scale * sum over queries of dS q   dv = sum of P dy
//
// Who owns what: for dq a block of four warps owns 64 queries, a warp 16 of them, and walks over the keys 64 at a time; for dk and
// dv it owns 64 keys and walks over the queries. P and dS are made again in registers and rounded as the left sides of the next
// products. The next tile is copied while this one is multiplied (heads of 128 have one stage: the tile is waited for). What dS
// contributes through the tables is first summed up for each map row and column of the keys, by a product with zeros and ones,
// and then multiplied by the tables' rows: (2h + 2w) T d instead of T^2 d. Nothing is added by two owners: no atomics. Maps of one
// tile have both walks in one launch, as two blocks.
//
// Maps with a side of more than 56 that has a table keep no terms of the whole map; dq then walks over the keys twice, the second
// time for the tables' share.
//
// Flop: dq 6, dk and dv 8 T^2 d a head, in whole tiles. Bytes: for dq its own tile of q, dy once, k and v once for each tile of
// queries; for dk and dv likewise. Shared memory: 256 D bytes a stage, 272 bytes for each row and column with terms, for dq twice.
// Limits: heads of up to 128 numbers.
//
// Predicted, not timed (no GPU): the scores of 32 columns at a time are in registers, so that heads of 64 leave room for two (dk, dv)
// or three (dq, with a few bytes spilled) blocks a multiprocessor; all 64 at a time took 255 and spilled. In maps with tables dk
// and dv make the column terms of every tile of queries again, 2 (w + 15) products of d beside 4 * 64: their costliest part in maps
// of 56 x 56.

#include "global_attention_bwd_mma.cuh"

// ------------------------------------------------------------------------------------------------ dq

template <int D> DEVICE void scale_rows(float scale, float (&out)[D / 8][4]) {
    UNROLL for (int n = 0; n < D / 8; n++) {
        UNROLL for (int i = 0; i < 4; i++) out[n][i] *= scale;
    }
}

template <int D> DEVICE void query_gradient(
    const Params &p, const Given &in, const Head &head, u32 q0, Real *dq, unsigned char *shared) {
    constexpr u32 STAGE = 2 * TILE * D;
    u32 at = threadIdx.x / 32 * 16, lines = row_lines(p) + column_lines(p);
    Terms<1> terms(p, shared);
    Real *stages = reinterpret_cast<Real *>(terms.end(p) + lines * LINE);
    QueryRows<D> rows;
    rows.first = q0 + at;
    rows.row_sums = terms.end(p) + at;
    rows.load(p, in, head);
    clear_lines(lines, rows.row_sums);
    __syncwarp();
    auto copy = [&](u32 k0, u32 stage) {
        fetch<D>(p, head, in.k, k0, stages + stage * STAGE);
        fetch<D>(p, head, in.v, k0, stages + stage * STAGE + TILE * D);
        terms.describe(p, k0, stage);
        copy_async_commit();
    };
    float out[1][D / 8][4] = {};
    // The first walk is for k, the last one for the tables.
    u32 walks = by_tile(p) ? 2 : 1;
    for (u32 walk = 1; walk <= walks; walk++) {
        u32 stage = 0;
        __syncthreads();
        if (STAGES<D> == 2) copy(0, 0);
        for (u32 k0 = 0; k0 < head.tokens; k0 += TILE) {
            if (STAGES<D> == 1) {
                __syncthreads();
                copy(k0, 0);
            }
            copy_async_wait(0);
            __syncthreads();
            if (STAGES<D> == 2 && k0 + TILE < head.tokens) copy(k0 + TILE, stage ^ 1);
            terms.fill(p, head, in.tables, rows.q[0], q0, at, k0, k0 > 0 || walk > 1, false);
            __syncwarp();
            const Real *k = stages + stage * STAGE;
            const uint2 *keys = terms.keys + stage * TILE;
            for (u32 from = 0; from < TILE && k0 + from < head.tokens; from += COLUMNS) {
                Weights<COLUMNS / 8> ds[1];
                rows.weights(p, in, head, terms, keys, k, k0, from, ds);
                if (walk == 1) apply<D>(ds, k, from, out);
                if (walk == walks) rows.add(p, head, keys, k0, from, ds[0]);
            }
            __syncwarp();
            if (walk == 2) rows.flush(p, in, head, k0, out[0]);
            if (STAGES<D> == 2) stage ^= 1;
        }
        if (walk == 1) scale_rows<D>(p.scale, out[0]);
    }
    if (walks == 1 && lines > 0) rows.flush(p, in, head, 0, out[0]);
    const float one[2] = {1.0f, 1.0f};
    put_rows<D>(p, head, dq, rows.first, one, out[0]);
}

// ------------------------------------------------------------------------------------------------ dk, dv

// What the walk over the queries reads of each: log-sum-exp (in powers of two) and delta; where its biases are counted from.
struct Queries {
    float2 *stats;
    u32 *bias;

    // Those from q0 on. Seen after a barrier.
    DEVICE void describe(const Params &p, const Given &in, const Head &head, u32 q0, u32 stage) {
        if (threadIdx.x >= TILE) return;
        u32 t = q0 + threadIdx.x, query = least(t, head.tokens - 1), stat = 2 * (head.stat + query * p.g);
        // No probability is left of a query past the last.
        float lse = t < head.tokens ? in.stats[stat] * LOG2E : INFINITY;
        stats[stage * TILE + threadIdx.x] = make_float2(lse, in.stats[stat + 1]);
        bias[stage * TILE + threadIdx.x] = bias_at(p, head.g, query);
    }
};

// 16 keys of a warp: their rows of k and v, in registers or, of heads of 128, in shared memory.
template <int D> struct KeyRows {
    Rows<D> k[1], v[1];
    const Real *tile;
    uint2 keys[2];

    // P and dS with COLUMNS queries from `from` on of a tile of q and dy. Rows are keys, columns are queries.
    DEVICE void weights(const Params &p, const Given &in, const Terms<1> &terms, const Queries &queries, const Real *q, u32 from,
        Weights<COLUMNS / 8> (&prob)[1], Weights<COLUMNS / 8> (&ds)[1]) {
        float s[1][COLUMNS / 8][4], dp[1][COLUMNS / 8][4];
        if constexpr (D == 128) k[0].load(tile, threadIdx.x / 32 * 16);
        multiply(k, q, from, s);
        if constexpr (D == 128) v[0].load(tile + TILE * D, threadIdx.x / 32 * 16);
        multiply(v, q + TILE * D, from, dp);
        UNROLL for (int j = 0; j < COLUMNS / 8; j++) {
            UNROLL for (int i = 0; i < 4; i++) {
                u32 query = from + j * 8 + lane_column() + i % 2;
                float x = s[0][j][i] * (p.scale * LOG2E);
                if (has_terms(p)) x += terms.of(p, in.tables, keys[i / 2], query, queries.bias[query]);
                float2 stats = queries.stats[query];
                s[0][j][i] = exp2_fast(x - stats.x);
                dp[0][j][i] = s[0][j][i] * (dp[0][j][i] - stats.y);
            }
        }
        prob[0].round(s[0]);
        ds[0].round(dp[0]);
    }
};

template <int D> DEVICE void key_gradients(
    const Params &p, const Given &in, const Head &head, u32 k0, Real *dk, Real *dv, unsigned char *shared) {
    constexpr u32 STAGE = 2 * TILE * D;
    u32 at = threadIdx.x / 32 * 16;
    Terms<1> terms(p, shared);
    Queries queries;
    queries.stats = reinterpret_cast<float2 *>(terms.end(p));
    queries.bias = reinterpret_cast<u32 *>(queries.stats + 2 * TILE);
    Real *own = reinterpret_cast<Real *>(queries.bias + 2 * TILE), *stages = own + (D == 128 ? STAGE : 0);
    KeyRows<D> rows;
    rows.tile = own;
    if constexpr (D == 128) {
        fetch<D>(p, head, in.k, k0, own);
        fetch<D>(p, head, in.v, k0, own + TILE * D);
    } else {
        rows.k[0].load(p, head, in.k, k0 + at);
        rows.v[0].load(p, head, in.v, k0 + at);
    }
    terms.describe(p, k0, 0);
    __syncthreads();
    UNROLL for (int i = 0; i < 2; i++) rows.keys[i] = terms.keys[at + lane_row() + 8 * i];
    auto copy = [&](u32 q0, u32 stage) {
        fetch<D>(p, head, in.q, q0, stages + stage * STAGE);
        fetch<D>(p, head, in.dy, q0, stages + stage * STAGE + TILE * D);
        queries.describe(p, in, head, q0, stage);
        copy_async_commit();
    };
    float sum_k[1][D / 8][4] = {}, sum_v[1][D / 8][4] = {};
    u32 stage = 0;
    if (STAGES<D> == 2) copy(0, 0);
    for (u32 q0 = 0; q0 < head.tokens; q0 += TILE) {
        if (STAGES<D> == 1) {
            __syncthreads();
            copy(q0, 0);
        }
        copy_async_wait(0);
        __syncthreads();
        if (STAGES<D> == 2 && q0 + TILE < head.tokens) copy(q0 + TILE, stage ^ 1);
        const Real *q = stages + stage * STAGE;
        if (p.has_rel_h || p.has_rel_w) {
            Rows<D> own_queries;
            own_queries.load(q, at);
            terms.fill(p, head, in.tables, own_queries, q0, at, k0, false, true);
            __syncthreads();
        }
        Queries now = {queries.stats + stage * TILE, queries.bias + stage * TILE};
        for (u32 from = 0; from < TILE && q0 + from < head.tokens; from += COLUMNS) {
            Weights<COLUMNS / 8> prob[1], ds[1];
            rows.weights(p, in, terms, now, q, from, prob, ds);
            apply<D>(prob, q + TILE * D, from, sum_v);
            apply<D>(ds, q, from, sum_k);
        }
        if (STAGES<D> == 2) stage ^= 1;
    }
    const float one[2] = {1.0f, 1.0f}, scale[2] = {p.scale, p.scale};
    put_rows<D>(p, head, dk, k0 + at, scale, sum_k[0]);
    put_rows<D>(p, head, dv, k0 + at, one, sum_v[0]);
}

// ------------------------------------------------------------------------------------------------ launches

template <int D> DEVICE void bwd_dq(const Params &p, const Given &in, Real *dq, unsigned char *shared) {
    u32 tiles = (p.h * p.w + TILE - 1) / TILE;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    query_gradient<D>(p, in, head, blockIdx.x % tiles * TILE, dq, shared);
}

template <int D> DEVICE void bwd_dkv(const Params &p, const Given &in, Real *dk, Real *dv, unsigned char *shared) {
    u32 tiles = (p.h * p.w + TILE - 1) / TILE;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    key_gradients<D>(p, in, head, blockIdx.x % tiles * TILE, dk, dv, shared);
}

// A map of one tile: dq, dk and dv `p.part` apart in one buffer, dq by the blocks of blockIdx.y = 0.
template <int D> DEVICE void bwd(const Params &p, const Given &in, Real *grads, unsigned char *shared) {
    if (blockIdx.y == 0) bwd_dq<D>(p, in, grads, shared);
    else bwd_dkv<D>(p, in, grads + p.part, grads + 2 * p.part, shared);
}

KERNEL(128) OF(global_attention_bwd)(GlobalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    bwd<16>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(global_attention_bwd_d32)(GlobalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    bwd<32>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(global_attention_bwd_d64)(GlobalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    bwd<64>(p, GIVEN, grads, shared);
}
// Spills.
KERNEL(128) OF(global_attention_bwd_d128)(GlobalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    bwd<128>(p, GIVEN, grads, shared);
}

KERNEL(128) OF(global_attention_bwd_dq)(GlobalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    bwd_dq<16>(p, GIVEN, dq, shared);
}
KERNEL(128, 3) OF(global_attention_bwd_dq_d32)(GlobalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    bwd_dq<32>(p, GIVEN, dq, shared);
}
// Spills.
KERNEL(128, 3) OF(global_attention_bwd_dq_d64)(GlobalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    bwd_dq<64>(p, GIVEN, dq, shared);
}
// Spills.
KERNEL(128) OF(global_attention_bwd_dq_d128)(GlobalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    bwd_dq<128>(p, GIVEN, dq, shared);
}

KERNEL(128) OF(global_attention_bwd_dkv)(GlobalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    bwd_dkv<16>(p, GIVEN, dk, dv, shared);
}
KERNEL(128) OF(global_attention_bwd_dkv_d32)(GlobalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    bwd_dkv<32>(p, GIVEN, dk, dv, shared);
}
KERNEL(128) OF(global_attention_bwd_dkv_d64)(GlobalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    bwd_dkv<64>(p, GIVEN, dk, dv, shared);
}
KERNEL(128) OF(global_attention_bwd_dkv_d128)(GlobalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    bwd_dkv<128>(p, GIVEN, dk, dv, shared);
}
