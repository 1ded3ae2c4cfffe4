// Global attention of a feature map, flash style (Dao 2023, "FlashAttention-2"), on tensor cores in f16 and bf16:
//
//   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   offset (a, b) = key - query,   y = softmax(logit) v
//
// Who owns what: a block of four warps owns 64 queries of a head (_m2: 128), a warp 16 (32) of them with all D numbers of their
// output in registers; it walks over the keys 64 at a time. The next tile of k and v is copied (cp.async, two stages) while this one
// is multiplied; there is one barrier a tile. Scores stay in registers: softmax online in powers of two, rows joined by shuffles of
// four lanes, the output rescaled only where a row's maximum has grown; the rounded probabilities are at once the left side of the
// product with v. Sums, softmax and log-sum-exp are f32. A map of 7 x 7 is one tile, so one block an image and head; it asks for
// one stage of shared memory only.
//
// Which version: _m2 reads each tile of k and v from shared memory for twice as many products. With 16 rows a warp an ldmatrix of
// 512 B feeds two mma, which is as long in shared memory (128 B a cycle) as in the tensor cores (1024 FMA a cycle) of an A100 or
// H100 and so bounds both; with 32 rows it is half. It is for maps of more than 128 tokens and heads of up to 64 numbers.
//
// Flop: 4 T^2 d a head, in whole tiles; the position terms add 4 (2h + 2w) T d. Bytes: q, y and tables once, k and v once for each
// tile of queries, mostly out of the L2 cache. Shared memory: 256 D bytes a stage and 272 (528) bytes for each map row and column
// with terms. Limits: heads of up to 128 numbers.
//
// Predicted, not timed (no GPU): of a tile and warp of _m2 with d = 64, a quarter of an A100's multiprocessor has 128 mma of 8 cycles,
// 2048 powers of two at 4 a cycle and about 5 f32 operations a score at 16 a cycle: 1024, 512 and 640 cycles, which overlap only
// between the two blocks that 255 registers leave room for. That is half of the tensor cores' peak at best, less where d is 32;
// maps of one tile are bound by latency.

#include "global_attention_mma.cuh"

// Joins the four lanes of a row.
DEVICE float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
DEVICE float row_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// The softmax of 16 rows so far: maxima and this lane's share of the sums, for rows g and g + 8.
struct Softmax {
    float largest[2], sum[2];

    // Scores (in powers of two) -> unscaled probabilities; what was summed up so far fits them.
    template <int N> DEVICE void step(float (&s)[8][4], float (&out)[N][4]) {
        float top[2] = {largest[0], largest[1]};
        UNROLL for (int j = 0; j < 8; j++) {
            UNROLL for (int i = 0; i < 4; i++) top[i / 2] = fmaxf(top[i / 2], s[j][i]);
        }
        UNROLL for (int i = 0; i < 2; i++) top[i] = row_max(top[i]);
        if (__any_sync(0xffffffffu, top[0] > largest[0] || top[1] > largest[1])) {
            float factor[2];
            UNROLL for (int i = 0; i < 2; i++) {
                factor[i] = exp2_fast(largest[i] - top[i]);
                sum[i] *= factor[i];
                largest[i] = top[i];
            }
            UNROLL for (int n = 0; n < N; n++) {
                UNROLL for (int i = 0; i < 4; i++) out[n][i] *= factor[i / 2];
            }
        }
        UNROLL for (int j = 0; j < 8; j++) {
            UNROLL for (int i = 0; i < 4; i++) {
                s[j][i] = exp2_fast(s[j][i] - largest[i / 2]);
                sum[i / 2] += s[j][i];
            }
        }
    }
};

template <int D, int M> DEVICE void forward(const Params &p, const Real *q, const Real *k, const Real *v, const float *tables,
    Real *y, float *lse, unsigned char *shared) {
    constexpr u32 STAGE = 2 * TILE * D;
    u32 tiles = (p.h * p.w + TILE * M - 1) / (TILE * M), q0 = blockIdx.x % tiles * TILE * M, at = threadIdx.x / 32 * 16 * M;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    Terms<M> terms(p, shared);
    Real *stages = reinterpret_cast<Real *>(terms.end(p));
    fetch<D>(p, head, k, 0, stages);
    fetch<D>(p, head, v, 0, stages + TILE * D);
    terms.describe(p, 0, 0);
    copy_async_commit();

    Rows<D> rows[M];
    Softmax softmax[M];
    float out[M][D / 8][4] = {};
    u32 bias[M][2];
    UNROLL for (int m = 0; m < M; m++) {
        rows[m].load(p, head, q, q0 + at + 16 * m);
        softmax[m] = Softmax{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        UNROLL for (int i = 0; i < 2; i++) {
            bias[m][i] = bias_at(p, head.g, least(q0 + at + 16 * m + lane_row() + 8 * i, head.tokens - 1));
        }
    }
    u32 stage = 0;
    for (u32 k0 = 0; k0 < head.tokens; k0 += TILE, stage ^= 1) {
        // This tile is there, and everybody is done with the last one, whose place the next one takes.
        copy_async_wait(0);
        __syncthreads();
        if (k0 + TILE < head.tokens) {
            Real *next = stages + (stage ^ 1) * STAGE;
            fetch<D>(p, head, k, k0 + TILE, next);
            fetch<D>(p, head, v, k0 + TILE, next + TILE * D);
            terms.describe(p, k0 + TILE, stage ^ 1);
            copy_async_commit();
        }
        UNROLL for (int m = 0; m < M; m++) terms.fill(p, head, tables, rows[m], q0, at + 16 * m, k0, k0 > 0, false);
        __syncwarp();
        const Real *tile = stages + stage * STAGE;
        float s[M][8][4];
        multiply(rows, tile, 0, s);
        UNROLL for (int m = 0; m < M; m++) {
            finish_scores(p, tables, terms, terms.keys + stage * TILE, at + 16 * m, bias[m], s[m]);
            if (k0 + TILE > head.tokens) {
                UNROLL for (int j = 0; j < 8; j++) {
                    UNROLL for (int i = 0; i < 4; i++) {
                        if (k0 + j * 8 + lane_column() + i % 2 >= head.tokens) s[m][j][i] = -INFINITY;
                    }
                }
            }
            softmax[m].step(s[m], out[m]);
        }
        Weights<8> weights[M];
        UNROLL for (int m = 0; m < M; m++) weights[m].round(s[m]);
        apply<D>(weights, tile + TILE * D, 0, out);
        // Before lines of terms are written again.
        __syncwarp();
    }
    UNROLL for (int m = 0; m < M; m++) {
        float factor[2];
        UNROLL for (int i = 0; i < 2; i++) {
            float all = row_sum(softmax[m].sum[i]);
            factor[i] = 1.0f / all;
            u32 t = q0 + at + 16 * m + lane_row() + 8 * i;
            if (lane_column() == 0 && t < head.tokens) lse[head.stat + t * p.g] = softmax[m].largest[i] * LN2 + logf(all);
        }
        put_rows<D>(p, head, y, q0 + at + 16 * m, factor, out[m]);
    }
}

#define ARGUMENTS GlobalAttentionParams p, const Real *q, const Real *k, const Real *v, const float *tables, Real *y, float *lse

KERNEL(128) OF(global_attention_fwd)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    forward<16, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d32)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    forward<32, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d64)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    forward<64, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d128)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    forward<128, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d32_m2)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    forward<32, 2>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d64_m2)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    forward<64, 2>(p, q, k, v, tables, y, lse, shared);
}
