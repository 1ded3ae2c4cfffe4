// Local attention of a feature map in f16 and bf16 on tensor cores, for windows of more than 5 x 5 and heads of 16, 32, 64 or 128
// numbers; the formula stands in local_attention.cu, who owns what in local_attention_mma.cuh.
//
// A warp walks over the halo of its patch, 16 keys at a time: S = q k^T by mma, position terms (made once by mma, waiting in shared
// memory) and masks in registers, P rounded as operand of P v. The softmax is online in powers of two. Its maximum may be up to
// SLACK less than a logit, so that sums are rescaled rarely: P is then at most 2^SLACK, which has the same relative error. Logits,
// sums and log-sum-exp are in f32.
//
// Flop: 4 d of the products for each of 16 ceil((kh + 3) (kw + 3) / 16) keys a query and head (7 x 7: 2.3 times the useful ones).
// Bytes: q, y and lse once; k and v (kh + 7) (kw + 4 across - 1) / (32 across) times out of the cache (7 x 7: 2.4 or 3.1 times).
// Shared memory: bands of at most 36 KiB, 16 rows and 2.5 KiB of position terms a warp, the tables
// twice in 16 bits. Predicted, not timed (no GPU): for 64 images of 56 x 56, 2 heads of 32, 7 x 7, some 100 instructions for 16 keys
// of 16 queries make 20 us of instruction issue on an H100, beside 34 us of memory traffic: bound by memory.

#include "local_attention_mma.cuh"

#define SLACK 8.0f

template <int D> struct Softmax {
    float out[D / 8][4], largest[2], sum[2];

    DEVICE Softmax() {
        UNROLL for (int n = 0; n < D / 8; n++) {
            UNROLL for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
        }
        UNROLL for (int i = 0; i < 2; i++) largest[i] = -INFINITY, sum[i] = 0.0f;
    }

    // Rescales where a logit goes far beyond the maximum; all lanes of a warp must call it.
    DEVICE void make_room(const float (&s)[2][4]) {
        float top[2];
        UNROLL for (int i = 0; i < 2; i++) top[i] = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
        if (!__any_sync(0xffffffffu, top[0] > largest[0] + SLACK || top[1] > largest[1] + SLACK)) return;
        UNROLL for (int i = 0; i < 2; i++) {
            float next = fmaxf(largest[i], row_max(top[i]));
            float factor = next == -INFINITY ? 1.0f : exp2_fast(largest[i] - next);
            largest[i] = next;
            sum[i] *= factor;
            UNROLL for (int n = 0; n < D / 8; n++) out[n][2 * i] *= factor, out[n][2 * i + 1] *= factor;
        }
    }
    // s becomes P.
    DEVICE void exponents(float (&s)[2][4]) {
        UNROLL for (int i = 0; i < 2; i++) {
            // A row that has met no key yet.
            float base = largest[i] == -INFINITY ? 0.0f : largest[i];
            UNROLL for (int j = 0; j < 4; j++) {
                float &x = s[j / 2][2 * i + j % 2];
                x = exp2_fast(x - base);
                sum[i] += x;
            }
        }
    }
};

template <int D> DEVICE void forward(const Params &p, const Real *q, const Real *k, const Real *v, const float *tables, Real *y,
    float *lse, unsigned char *shared) {
    Patch<D> at(p);
    Memory<D> m(p, shared, at.columns, 1, 0);
    at.stage_own(p, q, m.own);
    stage_tables<D>(p, at.head.g, tables, m);
    Left<D> query;
    Softmax<D> softmax;
    Window seen(p, at, !p.zero_border);
    Terms<D> terms(p, at, m);
    auto stage = [&](u32 from, u32 rows) { at.stage_band(p, k, v, from, rows, m.a, m.b); };
    auto begin = [&]() {
        query.take(m.own, at.lane);
        position_terms<D>(p, at, query, m);
    };
    walk(p, at, stage, begin, [&](const Chunk &chunk) {
        float s[2][4] = {};
        multiply<D>(s, query, m.a + chunk.as_rows);
        UNROLL for (int i = 0; i < 4; i++) {
            bool column = seen.column(chunk.column[i]);
            UNROLL for (int r = 0; r < 2; r++) {
                float &x = s[i / 2][2 * r + i % 2];
                if (column && seen.row(r, chunk.row[i])) x = LOG2E * p.scale * x + terms.at(p, r, chunk.row[i], chunk.column[i]);
                else x = -INFINITY;
            }
        }
        softmax.make_room(s);
        softmax.exponents(s);
        u32 probabilities[4];
        as_left(s, probabilities);
        apply<D>(softmax.out, probabilities, m.b + chunk.as_columns);
    });
    if (!at.there) return;
    UNROLL for (int i = 0; i < 2; i++) {
        float sum = row_sum(softmax.sum[i]);
        softmax.sum[i] = 1.0f / sum;
        u32 row = at.g + 8 * i;
        if (at.t == 0 && at.inside(p, row)) lse[at.head.stat + at.place(p, row) * p.g] = LN2 * (softmax.largest[i] + log2f(sum));
    }
    at.put(p, softmax.out, softmax.sum[0], softmax.sum[1], m.own, y);
}

#define FORWARD_INPUTS const Real *q, const Real *k, const Real *v, const float *tables, Real *y, float *lse

KERNEL(256, 2) OF(local_attention_fwd_mma_d16)(LocalAttentionParams p, FORWARD_INPUTS) {
    DYN_SMEM(unsigned char, shared);
    forward<16>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(256, 2) OF(local_attention_fwd_mma_d32)(LocalAttentionParams p, FORWARD_INPUTS) {
    DYN_SMEM(unsigned char, shared);
    forward<32>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(local_attention_fwd_mma_d64)(LocalAttentionParams p, FORWARD_INPUTS) {
    DYN_SMEM(unsigned char, shared);
    forward<64>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(local_attention_fwd_mma_d128)(LocalAttentionParams p, FORWARD_INPUTS) {
    DYN_SMEM(unsigned char, shared);
    forward<128>(p, q, k, v, tables, y, lse, shared);
}
