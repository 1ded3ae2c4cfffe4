// Grouped convolution, NHWC, any number of channels and outputs a group, all groups in one launch. With Cg = C / groups and
// Og = O / groups, output o sees the channels of group o / Og:
//   y[n,p,q,o] = bias[o] + sum over r, s, i < Cg of x[n, p * stride + r - pad, q * stride + s - pad, o / Og * Cg + i] * w[o, r, s, i].
//
// A thread owns one output (forward), one number of the input's gradient, or one weight over one part of the pixels; channels are
// innermost, so that neighbours read neighbours. Sums are gathered, in float, in a fixed order. Each number of x is read
// kh * kw * Og times out of the caches: correct for every shape, and no more than that. What networks use is depthwise.cu (one channel and
// output a group) and conv2d.cu (one group).

#include "common.cuh"
#include "conv2d.cuh"

KERNEL(256) OF(grouped_fwd)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    u32 i = flat_id();
    if (i >= p.n * p.p * p.q * p.o) return;
    u32 o = i % p.o, col = i / p.o % p.q, row = i / (p.o * p.q) % p.p, image = i / (p.o * p.q * p.p);
    u32 cg = p.c / p.groups, first = o / (p.o / p.groups) * cg;
    float sum = p.bias ? bias[o] : 0.0f;
    for (u32 r = 0; r < p.kh; r++) {
        // Wraps to a large number above and left of the image.
        u32 h = row * p.stride_h + r - p.pad_h;
        if (h >= p.h) continue;
        for (u32 s = 0; s < p.kw; s++) {
            u32 v = col * p.stride_w + s - p.pad_w;
            if (v >= p.w) continue;
            const Real *from = x + ((image * p.h + h) * p.w + v) * p.c + first, *tap = w + ((o * p.kh + r) * p.kw + s) * cg;
            for (u32 c = 0; c < cg; c++) sum += to_float(from[c]) * to_float(tap[c]);
        }
    }
    y[i] = rounded<Real>(sum);
}

// dx[h,v,c] = sum over the taps with h = row * stride + r - pad (and so in width) and the outputs o of c's group of dy[row,col,o] * w[o,r,s,c].
KERNEL(256) OF(grouped_dgrad)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    u32 i = flat_id();
    if (i >= p.n * p.h * p.w * p.c) return;
    u32 c = i % p.c, right = i / p.c % p.w + p.pad_w, below = i / (p.c * p.w) % p.h + p.pad_h, image = i / (p.c * p.w * p.h);
    u32 cg = p.c / p.groups, og = p.o / p.groups, first = c / cg * og;
    float sum = 0.0f;
    for (u32 r = below % p.stride_h; r < least(p.kh, below + 1); r += p.stride_h) {
        u32 row = (below - r) / p.stride_h;
        if (row >= p.p) continue;
        for (u32 s = right % p.stride_w; s < least(p.kw, right + 1); s += p.stride_w) {
            u32 col = (right - s) / p.stride_w;
            if (col >= p.q) continue;
            const Real *from = dy + ((image * p.p + row) * p.q + col) * p.o + first;
            const Real *tap = w + ((first * p.kh + r) * p.kw + s) * cg + c % cg;
            for (u32 o = 0; o < og; o++) sum += to_float(from[o]) * to_float(tap[o * p.kh * p.kw * cg]);
        }
    }
    dx[i] = rounded<Real>(sum);
}

// dw[part][o,r,s,c] = sum over the part's pixels of dy[pixel,o] * x[under the tap, c].
KERNEL(256) OF(grouped_wgrad)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    u32 i = flat_id(), cg = p.c / p.groups, weights = p.o * p.kh * p.kw * cg;
    if (i >= weights * p.parts) return;
    u32 c = i % cg, s = i / cg % p.kw, r = i / (cg * p.kw) % p.kh, o = i / (cg * p.kw * p.kh) % p.o;
    u32 first = o / (p.o / p.groups) * cg;
    u32 pixels = p.n * p.p * p.q, share = (pixels + p.parts - 1) / p.parts, start = i / weights * share;
    float sum = 0.0f;
    for (u32 pixel = start; pixel < least(start + share, pixels); pixel++) {
        u32 h = pixel / p.q % p.p * p.stride_h + r - p.pad_h, v = pixel % p.q * p.stride_w + s - p.pad_w;
        if (h >= p.h || v >= p.w) continue;
        u32 image = pixel / (p.q * p.p);
        sum += to_float(dy[pixel * p.o + o]) * to_float(x[((image * p.h + h) * p.w + v) * p.c + first + c]);
    }
    dw[i] = sum;
}
