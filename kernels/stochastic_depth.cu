// Stochastic depth fused with the residual sum, see src/ops/stochastic_depth.rs. A thread owns neighbouring elements of 16 bytes; those
// of one image share a random word, and move together where the image is a multiple of their number. Bytes: forward branch, shortcut
// and y once (the branch not where it is dropped); backward dy and dbranch once. Memory-bound.

#include "common.cuh"

struct StochasticDepthParams { u32 len, sample, threshold; float scale; u32 seed_low, seed_high, step, op; };

// Whether an image keeps its branch.
DEVICE bool keeps(StochasticDepthParams p, u32 image) {
    uint4 w = philox4x32_10(make_uint2(p.seed_low, p.seed_high), make_uint4(image / 4, 0, p.step, p.op));
    u32 k = image % 4, word = k == 0 ? w.x : k == 1 ? w.y : k == 2 ? w.z : w.w;
    return word >= p.threshold;
}

template <int N> DEVICE void fwd(StochasticDepthParams p, u32 i, const Real *branch, const Real *shortcut, Real *y) {
    Pack<N> v = load<N>(shortcut + i);
    if (keeps(p, i / p.sample)) {
        Pack<N> b = load<N>(branch + i);
        UNROLL for (int k = 0; k < N; k++) v.v[k] += b.v[k] * p.scale;
    }
    store(y + i, v);
}

KERNEL(256) OF(stochastic_depth_fwd)(StochasticDepthParams p, const Real *branch, const Real *shortcut, Real *y) {
    for_own(p.len, p.sample, [=](auto width, u32 i) { fwd<width.n>(p, i, branch, shortcut, y); });
}

template <int N> DEVICE void bwd(StochasticDepthParams p, u32 i, const Real *dy, Real *dbranch) {
    Pack<N> v = {};
    if (keeps(p, i / p.sample)) {
        v = load<N>(dy + i);
        UNROLL for (int k = 0; k < N; k++) v.v[k] *= p.scale;
    }
    store(dbranch + i, v);
}

KERNEL(256) OF(stochastic_depth_bwd)(StochasticDepthParams p, const Real *dy, Real *dbranch) {
    for_own(p.len, p.sample, [=](auto width, u32 i) { bwd<width.n>(p, i, dy, dbranch); });
}
