// Fused optimiser steps, in place, over flat buffers; formulas in src/ops/optim_step.rs. A thread owns four parameters. Bytes: SGD
// five accesses a parameter, AdamW seven, one more with a mask. Memory-bound. Where there is a control, its second number multiplies each
// gradient, and 0 ends the kernel.

#include "common.cuh"

struct SgdParams { u32 len, masked, controlled, nesterov; float lr, momentum, weight_decay; };
struct AdamWParams {
    u32 len, masked, controlled;
    float lr, step_size, beta2, rest1, rest2, inv_root, eps, weight_decay;
};

template <int N> DEVICE Pack<N> decays(u32 masked, float decay, const float *mask, u32 i) {
    Pack<N> d;
    if (masked) d = load<N>(mask + i);
    UNROLL for (int k = 0; k < N; k++) d.v[k] = masked ? decay * d.v[k] : decay;
    return d;
}

template <int N> DEVICE void sgd(
    SgdParams p, u32 i, float factor, const float *grad, const float *mask, float *param, float *momentum) {
    Pack<N> g = load<N>(grad + i), x = load<N>(param + i), m = load<N>(momentum + i);
    Pack<N> decay = decays<N>(p.masked, p.weight_decay, mask, i);
    UNROLL for (int k = 0; k < N; k++) {
        float slope = factor * g.v[k] + decay.v[k] * x.v[k];
        m.v[k] = p.momentum * m.v[k] + slope;
        x.v[k] -= p.lr * (p.nesterov ? slope + p.momentum * m.v[k] : m.v[k]);
    }
    store(momentum + i, m);
    store(param + i, x);
}

KERNEL(256) sgd_step_f32(
    SgdParams p, const float *grad, const float *mask, const float *control, float *param, float *momentum) {
    u32 i = 4 * flat_id();
    float factor = p.controlled ? control[1] : 1.0f;
    if (factor == 0.0f) return;
    if (i + 4 <= p.len) {
        sgd<4>(p, i, factor, grad, mask, param, momentum);
    } else {
        for (; i < p.len; i++) sgd<1>(p, i, factor, grad, mask, param, momentum);
    }
}

template <int N> DEVICE void adamw(
    AdamWParams p, u32 i, float factor, const float *grad, const float *mask, float *param, float *mean, float *square) {
    Pack<N> g = load<N>(grad + i), x = load<N>(param + i), m = load<N>(mean + i), v = load<N>(square + i);
    Pack<N> decay = decays<N>(p.masked, p.weight_decay, mask, i);
    UNROLL for (int k = 0; k < N; k++) {
        float slope = factor * g.v[k];
        m.v[k] += p.rest1 * (slope - m.v[k]);
        v.v[k] = p.beta2 * v.v[k] + p.rest2 * slope * slope;
        x.v[k] -= p.lr * decay.v[k] * x.v[k];
        x.v[k] -= p.step_size * m.v[k] / (sqrtf(v.v[k]) * p.inv_root + p.eps);
    }
    store(mean + i, m);
    store(square + i, v);
    store(param + i, x);
}

KERNEL(256) adamw_step_f32(
    AdamWParams p, const float *grad, const float *mask, const float *control, float *param, float *mean, float *square) {
    u32 i = 4 * flat_id();
    float factor = p.controlled ? control[1] : 1.0f;
    if (factor == 0.0f) return;
    if (i + 4 <= p.len) {
        adamw<4>(p, i, factor, grad, mask, param, mean, square);
    } else {
        for (; i < p.len; i++) adamw<1>(p, i, factor, grad, mask, param, mean, square);
    }
}
