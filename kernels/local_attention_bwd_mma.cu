// Backward of local attention in f16 and bf16 on tensor cores; the formula stands in local_attention_bwd.cu, who owns what in
// local_attention_mma.cuh, limits in local_attention_mma.cu.
//
// dq: a warp owns a patch of queries and walks over their keys; S = q k^T and dP = dy v^T by mma, P = 2^(S - lse), dS = P (dP - delta),
// rounded as operand of dS k. What the tables add takes dS summed over the columns and over the rows of the halo: two more products,
// with rows of ones and zeros made in registers, which are moved to the offsets of each query and multiplied by the tables.
//
// dk, dv: a warp owns a patch of keys and walks over the queries that see them, which is the halo again, with offsets negated. It
// computes the transposed products, S^T = k q^T and dP^T = v dy^T, so that P^T and dS^T come as left operands of P^T dy and
// dS^T q. Position terms are made for each chunk of 16 queries by mma with the tables as left operand.
//
// Nothing is added by two owners, every sum runs in a fixed order. P and dS are rounded to 16 bits, sums are in f32. Small maps have
// both passes in one launch, side by side along y of the grid.
//
// Flop for each of the padded places a row: 6 d (dq) and 8 d (dk, dv), with rel tables 64 and 4 d ceil((kh + kw) / 16) more. Bytes: dq
// reads q, dy once and k, v as forward does out of the cache; dk, dv the other way round. Predicted, not timed (no GPU): for 64
// images of 56 x 56, 2 heads of 32, 7 x 7, 11 tensors make 94 us of memory traffic on an H100, 350 instructions for 16 places of a
// patch 66 us of instruction issue: bound by memory.

#include "local_attention_bwd_mma.cuh"

// ------------------------------------------------------------------------------------------------ dq

// out += dS summed by the offsets of each query, from the warp's scratch, times the tables.
template <int D> DEVICE void apply_tables(const Params &p, const Patch<D> &at, const Memory<D> &m, float (&out)[D / 8][4]) {
    for (u32 first = 0; first < term_rows(p); first += 16) {
        u32 a[4];
        UNROLL for (int i = 0; i < 4; i++) {
            u32 row = at.g + i % 2 * 8, offset = first + i / 2 * 8 + 2 * at.t;
            a[i] = pair_of<Real>(Margins::of(p, m.terms, row, offset), Margins::of(p, m.terms, row, offset + 1));
        }
        apply<D>(out, a, m.high + first * Patch<D>::ROW + left_start<D>(at.lane));
    }
}

template <int D> DEVICE void query_gradient(const Params &p, const Given &in, Real *dq, unsigned char *shared) {
    Patch<D> at(p);
    Memory<D> m(p, shared, at.columns, 2, 0);
    stage_tables<D>(p, at.head.g, in.tables, m);
    float out[D / 8][4] = {};
    Margins margins;
    score_gradients(p, at, m, in, [&](const u32 (&ds)[4], const Chunk &chunk) {
        // The rows of k once more, as columns.
        apply<D>(out, ds, m.a + chunk.as_columns);
        if (term_rows(p) > 0) margins.add(ds, chunk, at.g);
    });
    if (!at.there) return;
    UNROLL for (int n = 0; n < D / 8; n++) {
        UNROLL for (int i = 0; i < 4; i++) out[n][i] *= p.scale;
    }
    if (term_rows(p) > 0) {
        margins.put(m.terms, at.g, at.t);
        apply_tables<D>(p, at, m, out);
    }
    at.put(p, out, 1.0f, 1.0f, m.own, dq);
}

// ------------------------------------------------------------------------------------------------ dk, dv

// Position terms of a chunk of queries, [32, TURNED]: a row for each row of the tables. `rows` as `multiply` takes them.
template <int D> DEVICE void turned_terms(const Params &p, const Patch<D> &at, const Memory<D> &m, const Real *rows) {
    __syncwarp();
    for (u32 first = 0; first < term_rows(p); first += 16) {
        float s[2][4] = {};
        UNROLL for (int step = 0; step < D / 16; step++) {
            u32 low[4], high[4], both[4];
            load_matrices(low, m.low + first * Patch<D>::ROW + left_start<D>(at.lane) + 16 * step);
            load_matrices(high, m.high + first * Patch<D>::ROW + left_start<D>(at.lane) + 16 * step);
            load_matrices(both, rows + 16 * step);
            u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
            mma16(s[0], low, left, Real{});
            mma16(s[1], low, right, Real{});
            mma16(s[0], high, left, Real{});
            mma16(s[1], high, right, Real{});
        }
        UNROLL for (int i = 0; i < 8; i++) {
            m.terms[(first + at.g + i % 4 / 2 * 8) * TURNED + i / 4 * 8 + 2 * at.t + i % 2] = LOG2E * s[i / 4][i % 4];
        }
    }
    __syncwarp();
}

template <int D> DEVICE void key_gradients(const Params &p, const Given &in, Real *dk, Real *dv, unsigned char *shared) {
    Patch<D> at(p);
    Memory<D> m(p, shared, at.columns, 2, 1);
    at.stage_own(p, in.k, m.own);
    at.stage_own(p, in.v, m.other);
    stage_tables<D>(p, at.head.g, in.tables, m);
    Left<D> key, value;
    float sum_k[D / 8][4] = {}, sum_v[D / 8][4] = {};
    // Queries outside the map see nothing, whatever the border.
    Window seen(p, at, true);
    auto stage = [&](u32 from, u32 rows) {
        at.stage_band(p, in.q, in.dy, from, rows, m.a, m.b);
        for (u32 i = threadIdx.x; i < rows * at.columns; i += blockDim.x) {
            u32 row = i / at.columns, y = at.block_y + from + row - p.kh / 2, x = at.block_x + i - row * at.columns - p.kw / 2;
            bool there = y < p.h && x < p.w;
            const float *stat = in.stats + 2 * (at.head.stat + (there ? y * p.w + x : 0) * p.g);
            m.stats[i] = make_float2(LOG2E * stat[0], stat[1]);
        }
    };
    auto begin = [&]() {
        key.take(m.own, at.lane);
        value.take(m.other, at.lane);
    };
    walk(p, at, stage, begin, [&](const Chunk &chunk) {
        float s[2][4] = {}, dp[2][4] = {};
        multiply<D>(s, key, m.a + chunk.as_rows);
        multiply<D>(dp, value, m.b + chunk.as_rows);
        if (term_rows(p) > 0) turned_terms<D>(p, at, m, m.a + chunk.as_rows);
        UNROLL for (int k = 0; k < 4; k++) {
            float2 stat = m.stats[chunk.place[k]];
            bool column = seen.column(chunk.column[k]);
            UNROLL for (int r = 0; r < 2; r++) {
                float &x = s[k / 2][2 * r + k % 2], &change = dp[k / 2][2 * r + k % 2];
                if (column && seen.row(r, chunk.row[k])) {
                    // The offset of the key from the query.
                    u32 a = at.g / 4 + 2 * r + p.kh - 1 - chunk.row[k], b = at.g % 4 + p.kw - 1 - chunk.column[k];
                    const float *term = m.terms + k / 2 * 8 + 2 * at.t + k % 2;
                    x *= LOG2E * p.scale;
                    if (term_rows(p) > 0) x += term[a * TURNED] + term[(p.kh + b) * TURNED];
                    if (p.has_bias) x += m.bias[a * p.kw + b];
                    x = exp2_fast(x - stat.x);
                    change = x * (change - stat.y);
                } else {
                    x = change = 0.0f;
                }
            }
        }
        u32 probabilities[4], ds[4];
        as_left(s, probabilities);
        as_left(dp, ds);
        apply<D>(sum_v, probabilities, m.b + chunk.as_columns);
        apply<D>(sum_k, ds, m.a + chunk.as_columns);
    });
    if (!at.there) return;
    at.put(p, sum_k, p.scale, p.scale, m.own, dk);
    at.put(p, sum_v, 1.0f, 1.0f, m.own, dv);
}

// ------------------------------------------------------------------------------------------------ entries

// dq, dk and dv `p.part` apart in one buffer: dq by the blocks at y = 0, dk and dv by those at y = 1.
template <int D> DEVICE void both(const Params &p, const Given &in, Real *grads, unsigned char *shared) {
    if (blockIdx.y == 0) query_gradient<D>(p, in, grads, shared);
    else key_gradients<D>(p, in, grads + p.part, grads + 2 * p.part, shared);
}

KERNEL(128) OF(local_attention_bwd_mma_d16)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    both<16>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(local_attention_bwd_mma_d32)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    both<32>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(local_attention_bwd_mma_d64)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    both<64>(p, GIVEN, grads, shared);
}
KERNEL(128) OF(local_attention_bwd_mma_d128)(LocalAttentionParams p, INPUTS, Real *grads) {
    DYN_SMEM(unsigned char, shared);
    both<128>(p, GIVEN, grads, shared);
}

KERNEL(128) OF(local_attention_bwd_dq_mma_d16)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    query_gradient<16>(p, GIVEN, dq, shared);
}
KERNEL(128) OF(local_attention_bwd_dq_mma_d32)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    query_gradient<32>(p, GIVEN, dq, shared);
}
KERNEL(128) OF(local_attention_bwd_dq_mma_d64)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    query_gradient<64>(p, GIVEN, dq, shared);
}
KERNEL(128) OF(local_attention_bwd_dq_mma_d128)(LocalAttentionParams p, INPUTS, Real *dq) {
    DYN_SMEM(unsigned char, shared);
    query_gradient<128>(p, GIVEN, dq, shared);
}

KERNEL(128) OF(local_attention_bwd_dkv_mma_d16)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    key_gradients<16>(p, GIVEN, dk, dv, shared);
}
KERNEL(128) OF(local_attention_bwd_dkv_mma_d32)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    key_gradients<32>(p, GIVEN, dk, dv, shared);
}
KERNEL(128) OF(local_attention_bwd_dkv_mma_d64)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    key_gradients<64>(p, GIVEN, dk, dv, shared);
}
KERNEL(128) OF(local_attention_bwd_dkv_mma_d128)(LocalAttentionParams p, INPUTS, Real *dk, Real *dv) {
    DYN_SMEM(unsigned char, shared);
    key_gradients<128>(p, GIVEN, dk, dv, shared);
}
