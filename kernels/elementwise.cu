// Elementwise ops: y = f(a) or y = f(a, b). A thread owns four neighbouring elements (eight of a 16-bit type): one access of
// 16 bytes for each tensor, and single ones at a tail. Bytes: each tensor once. Memory-bound.
//
// In a backward, a is what was saved and b is dy.

#include "common.cuh"

struct Params { u32 len; };
struct AddBiasParams { u32 len, channels; };

constexpr int N = WIDE<Real>;

template <class F> DEVICE void map(u32 len, const Real *a, Real *y, F f) {
    u32 i = N * flat_id();
    if (i + N <= len) {
        Pack<N> v = load<N>(a + i);
        UNROLL for (int k = 0; k < N; k++) v.v[k] = f(v.v[k]);
        store(y + i, v);
    } else {
        for (; i < len; i++) y[i] = rounded<Real>(f(to_float(a[i])));
    }
}

template <class F> DEVICE void zip(u32 len, const Real *a, const Real *b, Real *y, F f) {
    u32 i = N * flat_id();
    if (i + N <= len) {
        Pack<N> v = load<N>(a + i), w = load<N>(b + i);
        UNROLL for (int k = 0; k < N; k++) v.v[k] = f(v.v[k], w.v[k]);
        store(y + i, v);
    } else {
        for (; i < len; i++) y[i] = rounded<Real>(f(to_float(a[i]), to_float(b[i])));
    }
}

// The standard normal distribution function, by its upper tail at |x|: `normal_tail` of src/cpu/vmath.rs.
DEVICE float normal_cdf(float x) {
    float z = fminf(fabsf(x), 14.0f);
    float t = 1.0f / (0.28f * z + 1.0f);
    float s = 0.021008056f;
    s = s * t - 0.074773245f;
    s = s * t + 0.052199695f;
    s = s * t + 0.040743675f;
    s = s * t + 0.039661884f;
    s = s * t + 0.0978088f;
    s = s * t + 0.09947921f;
    s = s * t + 0.11219643f;
    s = s * t + 0.11167551f;
    float tail = s * t * expf(-0.5f * z * z);
    // fminf loses a NaN.
    return x != x ? x : x > 0.0f ? 1.0f - tail : tail;
}

KERNEL(256) OF(add_fwd)(Params p, const Real *a, const Real *b, Real *y) {
    zip(p.len, a, b, y, [](float a, float b) { return a + b; });
}

KERNEL(256) OF(mul_fwd)(Params p, const Real *a, const Real *b, Real *y) {
    zip(p.len, a, b, y, [](float a, float b) { return a * b; });
}

KERNEL(256) OF(add_bias_fwd)(AddBiasParams p, const Real *x, const float *bias, Real *y) {
    u32 i = N * flat_id();
    if (i >= p.len) return;
    u32 c = i % p.channels;
    if (i + N <= p.len && p.channels % N == 0) {
        Pack<N> v = load<N>(x + i);
        UNROLL for (int k = 0; k < N; k++) v.v[k] += bias[c + k];
        store(y + i, v);
        return;
    }
    for (u32 end = least(i + N, p.len); i < end; i++) {
        y[i] = rounded<Real>(to_float(x[i]) + bias[c]);
        c = c + 1 == p.channels ? 0 : c + 1;
    }
}

KERNEL(256) OF(relu_fwd)(Params p, const Real *x, Real *y) {
    map(p.len, x, y, [](float x) { return x < 0.0f ? 0.0f : x; });
}

KERNEL(256) OF(relu_bwd)(Params p, const Real *y, const Real *dy, Real *dx) {
    zip(p.len, y, dy, dx, [](float y, float dy) { return y > 0.0f ? dy : 0.0f; });
}

KERNEL(256) OF(sigmoid_fwd)(Params p, const Real *x, Real *y) {
    map(p.len, x, y, [](float x) { return sigmoid(x); });
}

KERNEL(256) OF(sigmoid_bwd)(Params p, const Real *y, const Real *dy, Real *dx) {
    zip(p.len, y, dy, dx, [](float y, float dy) { return dy * y * (1.0f - y); });
}

KERNEL(256) OF(silu_fwd)(Params p, const Real *x, Real *y) {
    map(p.len, x, y, [](float x) { return x * sigmoid(x); });
}

KERNEL(256) OF(silu_bwd)(Params p, const Real *x, const Real *dy, Real *dx) {
    zip(p.len, x, dy, dx, [](float x, float dy) {
        float s = sigmoid(x);
        return dy * s * (1.0f + x * (1.0f - s));
    });
}

KERNEL(256) OF(gelu_fwd)(Params p, const Real *x, Real *y) {
    map(p.len, x, y, [](float x) { return x * normal_cdf(x); });
}

KERNEL(256) OF(gelu_bwd)(Params p, const Real *x, const Real *dy, Real *dx) {
    zip(p.len, x, dy, dx, [](float x, float dy) {
        float z = fminf(fabsf(x), 14.0f);
        float density = 0.3989422804f * expf(-0.5f * z * z);
        return dy * (normal_cdf(x) + x * density);
    });
}
