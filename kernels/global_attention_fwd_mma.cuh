// Global attention forward of a block of four warps on tensor cores: what global_attention_mma.cu and attention_block_mma.cu share.

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

// The output of 64 M queries of a head, from q0 on, and their log-sum-exp. `shared` must be free.
template <int D, int M> DEVICE void forward(const Params &p, const Head &head, u32 q0, const Real *q, const Real *k, const Real *v,
    const float *tables, Real *y, float *lse, unsigned char *shared) {
    constexpr u32 STAGE = 2 * TILE * D;
    u32 at = threadIdx.x / 32 * 16 * M;
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
