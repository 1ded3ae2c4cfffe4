// Local attention of a feature map, on CUDA cores: every place attends to the kh x kw window around it.
//
//   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   offset (a, b) = key - query,   y = softmax(logit) v
//
// q, k, v, y are [N, H, W, G, d] with rows of a multiple of 16 bytes (the op pads other widths); kh and kw are odd. A key outside the map leaves
// the softmax, or (zero_border) stays with k = v = 0.
//
// Who owns what: a group of L neighbouring lanes owns R neighbouring queries of a row of the map, in one head; a lane holds M
// accesses of 16 bytes of each row. The group walks over the rows of the window and over the kw + R - 1 columns that its queries
// see, so that a key is loaded once for R queries, out of the cache. Products are joined by shuffles in the group; softmax is online,
// and the sums are rescaled only where a new maximum comes. The products with rel_w are made once and wait in shared memory.
// Heads of up to 16, 32, 64 and 512 numbers have L, M, R = 4, 1, 4; 4, 2, 4; 4, 4, 2; 32, 4, 1 in f32 and 2, 1, 4; 4, 1, 4; 4, 2, 2;
// 32, 2, 1 in f16 and bf16; wider ones are refused. Sums are in f32, and so are the tables. In f16 and bf16 windows of more than
// 5 x 5 are for local_attention_mma.cu, where it takes the width.
//
// Flop: 4 kh kw d a query and head. Bytes: each tensor once, if kh rows of k and v of the block's heads stay in the cache. Extra
// memory: one log-sum-exp a query and head. Shared memory: 4 R kw bytes a group, at most 13 KiB.

#include "common.cuh"
#include "local_attention.cuh"

template <int L, int M, int R> DEVICE void forward(
    const Params &p, const Real *q, const Real *k, const Real *v, const float *tables, Real *y, float *lse, float *shared) {
    Group<L, M, R> at(p);
    float *terms = shared + threadIdx.x / L * R * p.kw;
    Piece<M> query[R], out[R];
    float largest[R], sum[R];
    UNROLL for (int r = 0; r < R; r++) {
        query[r] = at.piece(p, q, at.y, at.x + r);
        out[r] = Piece<M>();
        largest[r] = -INFINITY;
        sum[r] = 0.0f;
    }
    at.column_terms(p, query, tables, terms);
    for (u32 a = 0; a < p.kh; a++) {
        float row_term[R];
        at.row_terms(p, query, tables, a, row_term);
        u32 row = at.y + a - p.kh / 2;
        for (u32 j = 0; j < p.kw + R - 1; j++) {
            u32 column = at.x + j - p.kw / 2;
            Piece<M> key = at.piece(p, k, row, column), value = at.piece(p, v, row, column);
            UNROLL for (int r = 0; r < R; r++) {
                float s = at.sum(dot(query[r], key));
                u32 b = j - r;
                if (b >= p.kw || !(p.zero_border || at.in_map(p, row, column))) continue;
                s = p.scale * s + row_term[r] + (p.has_rel_w ? terms[r * p.kw + b] : 0.0f) + bias_of(p, tables, at.head.g, a, b);
                if (s > largest[r]) {
                    float factor = expf(largest[r] - s);
                    largest[r] = s;
                    sum[r] *= factor;
                    scale(out[r], factor);
                }
                s = expf(s - largest[r]);
                sum[r] += s;
                add(out[r], s, value);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        scale(out[r], 1.0f / sum[r]);
        at.put(p, y, r, out[r]);
        if (at.owns(p, r) && at.lane == 0) lse[at.stat(p, r)] = largest[r] + logf(sum[r]);
    }
}

KERNEL(128) OF(local_attention_fwd)(LocalAttentionParams p, const Real *q, const Real *k, const Real *v,
    const float *tables, Real *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<16 / WIDTH, 1, 4>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(128) OF(local_attention_fwd_d32)(LocalAttentionParams p, const Real *q, const Real *k, const Real *v,
    const float *tables, Real *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<4, 8 / WIDTH, 4>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(128) OF(local_attention_fwd_d64)(LocalAttentionParams p, const Real *q, const Real *k, const Real *v,
    const float *tables, Real *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<4, 16 / WIDTH, 2>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(128) OF(local_attention_fwd_wide)(LocalAttentionParams p, const Real *q, const Real *k, const Real *v,
    const float *tables, Real *y, float *lse) {
    DYN_SMEM(float, shared);
    forward<32, 16 / WIDTH, 1>(p, q, k, v, tables, y, lse, shared);
}
