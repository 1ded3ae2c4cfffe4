// Global attention of a feature map, flash style, in f32 on CUDA cores: every place attends to every place.
//
//   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   offset (a, b) = key - query,   y = softmax(logit) v
//
// Who owns what: a block owns 64 queries of a head and D numbers of their output (D = 32, 64 or 128 by the head's width; wider
// heads take several blocks, each of which makes the scores again). It walks over the keys 64 at a time: scores in registers
// (attention_tiles.cuh), softmax online with the sixteen threads of a row joined by shuffles, then the product with v. The
// products with rel_h are made for the few map rows that 64 keys touch, those with rel_w once for all keys. A map of 7 x 7 is one
// tile, so one block an image and head.
//
// Flop: 4 T^2 d a head, in whole tiles. Bytes: q, y and tables once, k and v once for each 64 queries, mostly out of the L2
// cache. Extra memory: one log-sum-exp a query and head; no scores. Shared memory: 34 KiB and 256 B for each map row and column
// that has terms, at most 51 KiB.

#include "common.cuh"
#include "attention_tiles.cuh"

// Joins the sixteen threads of a row.
DEVICE float row_max(float v) {
    for (int lane = 8; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}
DEVICE float row_sum(float v) {
    for (int lane = 8; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

template <int D> DEVICE void forward(const Params &p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse, float *shared) {
    Memory m(p, shared);
    u32 tiles = (p.h * p.w + TILE - 1) / TILE, q0 = blockIdx.x % tiles * TILE, chunk = blockIdx.y * D;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float out[4][D / 16] = {}, largest[4], sum[4] = {};
    UNROLL for (int i = 0; i < 4; i++) largest[i] = -INFINITY;
    for (u32 k0 = 0; k0 < head.tokens; k0 += TILE) {
        Keys keys(p, k0);
        if (k0 == 0 || keys.wide) fill_column_terms(p, head, keys, q0, q, tables, m);
        fill_row_terms(p, head, keys, q0, q, tables, m);
        float s[4][4];
        multiply(p, head, q, q0, k, k0, m, s);
        UNROLL for (int i = 0; i < 4; i++) {
            u32 at = 4 * ty + i, query = least(q0 + at, head.tokens - 1);
            float top = largest[i];
            UNROLL for (int j = 0; j < 4; j++) {
                u32 key = k0 + 4 * tx + j;
                s[i][j] = key < head.tokens ? with_terms(p, head, keys, query, key, at, tables, m, p.scale * s[i][j]) : -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            top = row_max(top);
            float factor = expf(largest[i] - top);
            largest[i] = top;
            sum[i] *= factor;
            UNROLL for (int j = 0; j < 4; j++) {
                s[i][j] = expf(s[i][j] - top);
                sum[i] += s[i][j];
            }
            UNROLL for (int j = 0; j < D / 16; j++) out[i][j] *= factor;
        }
        put_scores(m, s);
        apply<D>(p, head, v, k0, chunk, 1.0f, m, out);
    }
    float factor[4];
    UNROLL for (int i = 0; i < 4; i++) {
        float all = row_sum(sum[i]);
        factor[i] = 1.0f / all;
        u32 t = q0 + 4 * ty + i;
        if (tx == 0 && chunk == 0 && t < head.tokens) lse[head.stat + t * p.g] = largest[i] + logf(all);
    }
    put_rows<D>(p, head, y, q0, chunk, factor, out);
}

KERNEL(256, 2) global_attention_fwd_f32(GlobalAttentionParams p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<32>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(256) global_attention_fwd_d64_f32(GlobalAttentionParams p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<64>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(256) global_attention_fwd_d128_f32(GlobalAttentionParams p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<128>(p, q, k, v, tables, y, lse, shared);
}
