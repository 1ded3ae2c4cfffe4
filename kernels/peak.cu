// y[i] = i, then `rounds` times y[i] = a y[i] + b: what the multiply-add units do at most. Not an op: `attn2d bench` measures
// its ceiling with it.
//
// A thread owns 16 neighbouring chains in registers: four cycles of latency on four issue slots want 16 warps or chains.
// Bytes: y once, beside thousands of multiply-adds an element.

#include "common.cuh"

struct Params { u32 len, rounds; float a, b; };

KERNEL(256) peak_fma_f32(Params p, float *y) {
    const int CHAINS = 16;
    u32 first = CHAINS * flat_id();
    float v[CHAINS];
    UNROLL for (int k = 0; k < CHAINS; k++) v[k] = float(first + k);
    for (u32 r = 0; r < p.rounds; r++) {
        UNROLL for (int k = 0; k < CHAINS; k++) v[k] = fmaf(p.a, v[k], p.b);
    }
    UNROLL for (int k = 0; k < CHAINS; k++) {
        if (first + k < p.len) y[first + k] = v[k];
    }
}
