// Elementwise ops: y = f(a) or y = f(a, b). A thread owns four neighbouring elements: one access of 16 bytes for each tensor,
// and single ones at a tail. Bytes: each tensor once. Memory-bound.
//
// In a backward, a is what was saved and b is dy.

#include "common.cuh"

struct Params { u32 len; };
struct AddBiasParams { u32 len, channels; };

template <class F> DEVICE void map(u32 len, const float *a, float *y, F f) {
    u32 i = 4 * flat_id();
    if (i + 4 <= len) {
        Pack<4> v = load<4>(a + i);
        UNROLL for (int k = 0; k < 4; k++) v.v[k] = f(v.v[k]);
        store(y + i, v);
    } else {
        for (; i < len; i++) y[i] = f(a[i]);
    }
}

template <class F> DEVICE void zip(u32 len, const float *a, const float *b, float *y, F f) {
    u32 i = 4 * flat_id();
    if (i + 4 <= len) {
        Pack<4> v = load<4>(a + i), w = load<4>(b + i);
        UNROLL for (int k = 0; k < 4; k++) v.v[k] = f(v.v[k], w.v[k]);
        store(y + i, v);
    } else {
        for (; i < len; i++) y[i] = f(a[i], b[i]);
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

KERNEL(256) add_fwd_f32(Params p, const float *a, const float *b, float *y) {
    zip(p.len, a, b, y, [](float a, float b) { return a + b; });
}

KERNEL(256) mul_fwd_f32(Params p, const float *a, const float *b, float *y) {
    zip(p.len, a, b, y, [](float a, float b) { return a * b; });
}

KERNEL(256) add_bias_fwd_f32(AddBiasParams p, const float *x, const float *bias, float *y) {
    u32 i = 4 * flat_id();
    if (i >= p.len) return;
    u32 c = i % p.channels;
    if (i + 4 <= p.len && p.channels % 4 == 0) {
        Pack<4> v = load<4>(x + i), b = load<4>(bias + c);
        UNROLL for (int k = 0; k < 4; k++) v.v[k] += b.v[k];
        store(y + i, v);
        return;
    }
    for (u32 end = least(i + 4, p.len); i < end; i++) {
        y[i] = x[i] + bias[c];
        c = c + 1 == p.channels ? 0 : c + 1;
    }
}

KERNEL(256) relu_fwd_f32(Params p, const float *x, float *y) {
    map(p.len, x, y, [](float x) { return x < 0.0f ? 0.0f : x; });
}

KERNEL(256) relu_bwd_f32(Params p, const float *y, const float *dy, float *dx) {
    zip(p.len, y, dy, dx, [](float y, float dy) { return y > 0.0f ? dy : 0.0f; });
}

KERNEL(256) sigmoid_fwd_f32(Params p, const float *x, float *y) {
    map(p.len, x, y, [](float x) { return sigmoid(x); });
}

KERNEL(256) sigmoid_bwd_f32(Params p, const float *y, const float *dy, float *dx) {
    zip(p.len, y, dy, dx, [](float y, float dy) { return dy * y * (1.0f - y); });
}

KERNEL(256) silu_fwd_f32(Params p, const float *x, float *y) {
    map(p.len, x, y, [](float x) { return x * sigmoid(x); });
}

KERNEL(256) silu_bwd_f32(Params p, const float *x, const float *dy, float *dx) {
    zip(p.len, x, dy, dx, [](float x, float dy) {
        float s = sigmoid(x);
        return dy * s * (1.0f + x * (1.0f - s));
    });
}

KERNEL(256) gelu_fwd_f32(Params p, const float *x, float *y) {
    map(p.len, x, y, [](float x) { return x * normal_cdf(x); });
}

KERNEL(256) gelu_bwd_f32(Params p, const float *x, const float *dy, float *dx) {
    zip(p.len, x, dy, dx, [](float x, float dy) {
        float z = fminf(fabsf(x), 14.0f);
        float density = 0.3989422804f * expf(-0.5f * z * z);
        return dy * (normal_cdf(x) + x * density);
    });
}
