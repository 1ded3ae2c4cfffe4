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

// A block's share of a launch.
template <int D> DEVICE void start(const Params &p, const float *q, const float *k, const float *v, const float *tables, float *y,
    float *lse, float *shared) {
    u32 tiles = (p.h * p.w + TILE - 1) / TILE;
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    forward<D>(p, head, blockIdx.x % tiles * TILE, blockIdx.y * D, q, k, v, tables, y, lse, shared);
}

KERNEL(256, 2) global_attention_fwd_f32(GlobalAttentionParams p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse) {
    DYN_SMEM(float, shared);
    start<32>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(256) global_attention_fwd_d64_f32(GlobalAttentionParams p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse) {
    DYN_SMEM(float, shared);
    start<64>(p, q, k, v, tables, y, lse, shared);
}

KERNEL(256) global_attention_fwd_d128_f32(GlobalAttentionParams p, const float *q, const float *k, const float *v,
    const float *tables, float *y, float *lse) {
    DYN_SMEM(float, shared);
    start<128>(p, q, k, v, tables, y, lse, shared);
}
