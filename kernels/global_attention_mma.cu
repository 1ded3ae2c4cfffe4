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

#include "global_attention_fwd_mma.cuh"

// A block's share of a launch.
template <int D, int M> DEVICE void start(const Params &p, const Real *q, const Real *k, const Real *v, const float *tables, Real *y,
    float *lse, unsigned char *shared) {
    u32 tiles = (p.h * p.w + TILE * M - 1) / (TILE * M);
    Head head(p, blockIdx.x / tiles / p.g, blockIdx.x / tiles % p.g);
    forward<D, M>(p, head, blockIdx.x % tiles * TILE * M, q, k, v, tables, y, lse, shared);
}

#define ARGUMENTS GlobalAttentionParams p, const Real *q, const Real *k, const Real *v, const float *tables, Real *y, float *lse

KERNEL(128) OF(global_attention_fwd)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    start<16, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d32)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    start<32, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d64)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    start<64, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d128)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    start<128, 1>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d32_m2)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    start<32, 2>(p, q, k, v, tables, y, lse, shared);
}
KERNEL(128) OF(global_attention_fwd_d64_m2)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    start<64, 2>(p, q, k, v, tables, y, lse, shared);
}
