// Between f32 and a 16-bit type, to the nearest, ties to even. A thread owns four neighbouring elements: accesses of 16 and 8 bytes,
// and single ones at a tail. Bytes: each tensor once. Memory-bound.

#include "common.cuh"

struct Params { u32 len; };

KERNEL(256) OF(cast_to)(Params p, const float *x, Real *y) {
    u32 i = 4 * flat_id();
    if (i + 4 <= p.len) store(y + i, load<4>(x + i));
    else for (; i < p.len; i++) y[i] = rounded<Real>(x[i]);
}

KERNEL(256) OF(cast_from)(Params p, const Real *x, float *y) {
    u32 i = 4 * flat_id();
    if (i + 4 <= p.len) store(y + i, load<4>(x + i));
    else for (; i < p.len; i++) y[i] = to_float(x[i]);
}
