// y = value, elementwise. A thread owns four neighbouring elements: one access of 16 bytes, and single ones at a tail.
// Bytes: y once. Memory-bound.

#include "common.cuh"

struct Params { u32 len; float value; };

KERNEL(256) fill_fwd_f32(Params p, float *y) {
    u32 i = 4 * flat_id();
    if (i + 4 <= p.len) {
        store4(y + i, make_float4(p.value, p.value, p.value, p.value));
    } else {
        for (; i < p.len; i++) y[i] = p.value;
    }
}
