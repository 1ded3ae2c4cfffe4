// Blocks of rows of one tensor, see src/ops/split_rows.rs. A thread owns neighbouring elements of the output, 16 bytes, which come
// from one block where its length is a multiple of their number. Bytes: each tensor once. Memory-bound.

#include "common.cuh"

struct SplitRowsParams { u32 block, number, given; };

template <int N> DEVICE void copy(const Real *from, Real *to) { store(to, load<N>(from)); }

// Where a block starts decides the access, as its length does.
KERNEL(256) OF(split_rows_fwd)(SplitRowsParams p, const Real *w, Real *block) {
    const Real *from = w + p.number * p.block;
    for_own(p.block, p.block, [=](auto width, u32 i) { copy<width.n>(from + i, block + i); });
}

struct Parts { const Real *d[7]; };

template <int N> DEVICE void join(SplitRowsParams p, u32 i, Parts parts, Real *dw) {
    u32 part = i / p.block;
    // Chosen one by one: pointers that are indexed would lie in memory.
    const Real *d = parts.d[0];
    UNROLL for (u32 k = 1; k < 7; k++) d = part == k ? parts.d[k] : d;
    Pack<N> v = {};
    if (p.given >> part & 1) v = load<N>(d + i % p.block);
    store(dw + i, v);
}

KERNEL(256) OF(split_rows_bwd)(
    SplitRowsParams p, const Real *d0, const Real *d1, const Real *d2, const Real *d3, const Real *d4, const Real *d5,
    const Real *d6, Real *dw) {
    Parts parts = {{d0, d1, d2, d3, d4, d5, d6}};
    for_own(p.number * p.block, p.block, [=](auto width, u32 i) { join<width.n>(p, i, parts, dw); });
}
