// y = value, elementwise. A thread owns four neighbouring elements (eight of a 16-bit type): one access of 16 bytes, and single ones at a tail.
// Bytes: y once. Memory-bound.

#include "common.cuh"

struct Params { u32 len; float value; };

KERNEL(256) OF(fill_fwd)(Params p, Real *y) {
    constexpr int N = WIDE<Real>;
    u32 i = N * flat_id();
    if (i + N <= p.len) {
        Pack<N> v;
        UNROLL for (int k = 0; k < N; k++) v.v[k] = p.value;
        store(y + i, v);
    } else {
        for (; i < p.len; i++) y[i] = rounded<Real>(p.value);
    }
}
