// A moving average, in place; formula in src/ops/ema_step.rs. A thread owns four elements. Bytes: three accesses an element.
// Memory-bound.

#include "common.cuh"

struct EmaParams { u32 len; float rest; };

template <int N> DEVICE void ema(EmaParams p, const float *value, float *average) {
    Pack<N> x = load<N>(value), a = load<N>(average);
    UNROLL for (int k = 0; k < N; k++) a.v[k] += p.rest * (x.v[k] - a.v[k]);
    store(average, a);
}

KERNEL(256) ema_step_f32(EmaParams p, const float *value, float *average) {
    u32 i = 4 * flat_id();
    if (i + 4 <= p.len) {
        ema<4>(p, value + i, average + i);
    } else {
        for (; i < p.len; i++) ema<1>(p, value + i, average + i);
    }
}
