// Dropout; the mask is made from counters, see src/ops/dropout.rs. A thread owns neighbouring elements of 16 bytes; one call of
// Philox gives the words of four. Bytes: x and y once.

#include "common.cuh"

struct DropoutParams { u32 len, threshold; float scale; u32 seed_low, seed_high, step, op; };

constexpr int N = WIDE<Real>;

KERNEL(256) OF(dropout_fwd)(DropoutParams p, const Real *x, Real *y) {
    u32 first = N * flat_id();
    if (first >= p.len) return;
    float factor[N];
    UNROLL for (int j = 0; j < N; j += 4) {
        uint4 w = philox4x32_10(make_uint2(p.seed_low, p.seed_high), make_uint4((first + j) / 4, 0, p.step, p.op));
        u32 words[4] = {w.x, w.y, w.z, w.w};
        UNROLL for (int k = 0; k < 4; k++) factor[j + k] = words[k] >= p.threshold ? p.scale : 0.0f;
    }
    if (first + N <= p.len) {
        Pack<N> v = load<N>(x + first);
        UNROLL for (int k = 0; k < N; k++) v.v[k] = factor[k] != 0.0f ? v.v[k] * factor[k] : 0.0f;
        store(y + first, v);
    } else {
        UNROLL for (u32 k = 0; k < N; k++) {
            if (first + k < p.len) y[first + k] = rounded<Real>(factor[k] != 0.0f ? to_float(x[first + k]) * factor[k] : 0.0f);
        }
    }
}
