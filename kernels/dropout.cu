// Dropout; the mask is made from counters, see src/ops/dropout.rs. A thread owns four elements: one call of Philox gives four
// words. Bytes: x and y once.

#include "common.cuh"

struct DropoutParams { u32 len, threshold; float scale; u32 seed_low, seed_high, step, op; };

KERNEL(256) dropout_fwd_f32(DropoutParams p, const float *x, float *y) {
    u32 block = flat_id(), first = 4 * block;
    if (first >= p.len) return;
    uint4 w = philox4x32_10(make_uint2(p.seed_low, p.seed_high), make_uint4(block, 0, p.step, p.op));
    u32 words[4] = {w.x, w.y, w.z, w.w};
    if (first + 4 <= p.len) {
        Pack<4> v = load<4>(x + first);
        UNROLL for (int k = 0; k < 4; k++) v.v[k] = words[k] >= p.threshold ? v.v[k] * p.scale : 0.0f;
        store(y + first, v);
    } else {
        UNROLL for (u32 k = 0; k < 4; k++) {
            if (first + k < p.len) y[first + k] = words[k] >= p.threshold ? x[first + k] * p.scale : 0.0f;
        }
    }
}
