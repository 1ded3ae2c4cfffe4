// Max pooling; the rules are in src/ops/max_pool2d.rs. places[e] is i * kw + j of the element that output e took: one byte
// each, four to a word, or one word each where p.wide is set.
//
// A thread owns four neighbouring elements of the output (forward) or of the input's gradient (backward, which asks every window
// that covers the element: no atomics); where the channels are a multiple of 4 they belong to one pixel and move together.
// Bytes: x about once out of the cache, y and places once. Memory-bound.

#include "common.cuh"

struct MaxPool2dParams { u32 n, h, w, c, oh, ow, kh, kw, sh, sw, ph, pw, wide; };

// The places that outputs e .. e + N of one pixel take; also writes y.
template <int N> DEVICE void largest(MaxPool2dParams p, u32 e, const float *x, float *y, u32 (&place)[N]) {
    u32 c = e % p.c, q = e / p.c % p.ow, row = e / (p.c * p.ow) % p.oh, n = e / (p.c * p.ow * p.oh);
    u32 top = row * p.sh, left = q * p.sw;
    u32 i_first = p.ph - least(top, p.ph), j_first = p.pw - least(left, p.pw);
    u32 i_end = least(p.kh, p.h + p.ph - top), j_end = least(p.kw, p.w + p.pw - left);
    Pack<N> best = load<N>(x + ((n * p.h + top + i_first - p.ph) * p.w + left + j_first - p.pw) * p.c + c);
    UNROLL for (int k = 0; k < N; k++) place[k] = i_first * p.kw + j_first;
    for (u32 i = i_first; i < i_end; i++) {
        for (u32 j = j_first; j < j_end; j++) {
            Pack<N> v = load<N>(x + ((n * p.h + top + i - p.ph) * p.w + left + j - p.pw) * p.c + c);
            UNROLL for (int k = 0; k < N; k++) {
                if (v.v[k] > best.v[k] || v.v[k] != v.v[k]) {
                    best.v[k] = v.v[k];
                    place[k] = i * p.kw + j;
                }
            }
        }
    }
    store(y + e, best);
}

KERNEL(256) max_pool2d_fwd_f32(MaxPool2dParams p, const float *x, float *y, u32 *places) {
    u32 word = flat_id(), first = 4 * word, len = p.n * p.oh * p.ow * p.c;
    if (first >= len) return;
    u32 place[4] = {};
    if (p.c % 4 == 0) {
        largest<4>(p, first, x, y, place);
    } else {
        for (u32 k = 0; k < least(4, len - first); k++) {
            u32 one[1];
            largest<1>(p, first + k, x, y, one);
            place[k] = one[0];
        }
    }
    if (!p.wide) {
        places[word] = place[0] | place[1] << 8 | place[2] << 16 | place[3] << 24;
    } else {
        for (u32 k = 0; k < least(4, len - first); k++) places[first + k] = place[k];
    }
}

// The gradients of input elements i .. i + N of one pixel.
template <int N> DEVICE void gather(MaxPool2dParams p, u32 i, const float *dy, const u32 *places, float *dx) {
    u32 c = i % p.c, right = i / p.c % p.w + p.pw, bottom = i / (p.c * p.w) % p.h + p.ph, n = i / (p.c * p.w * p.h);
    // The first window that reaches this far, and one past the last that starts before it.
    u32 row_first = (bottom + 1 - least(bottom + 1, p.kh) + p.sh - 1) / p.sh, row_end = least(bottom / p.sh + 1, p.oh);
    u32 col_first = (right + 1 - least(right + 1, p.kw) + p.sw - 1) / p.sw, col_end = least(right / p.sw + 1, p.ow);
    Pack<N> sum;
    UNROLL for (int k = 0; k < N; k++) sum.v[k] = 0.0f;
    for (u32 row = row_first; row < row_end; row++) {
        for (u32 col = col_first; col < col_end; col++) {
            u32 e = ((n * p.oh + row) * p.ow + col) * p.c + c;
            u32 place = (bottom - row * p.sh) * p.kw + right - col * p.sw;
            Pack<N> d = load<N>(dy + e);
            UNROLL for (u32 k = 0; k < N; k++) {
                u32 taken = p.wide ? places[e + k] : places[(e + k) / 4] >> (8 * ((e + k) % 4)) & 255;
                if (taken == place) sum.v[k] += d.v[k];
            }
        }
    }
    store(dx + i, sum);
}

KERNEL(256) max_pool2d_bwd_f32(MaxPool2dParams p, const float *dy, const u32 *places, float *dx) {
    u32 i = 4 * flat_id(), len = p.n * p.h * p.w * p.c;
    if (p.c % 4 == 0) {
        if (i < len) gather<4>(p, i, dy, places, dx);
    } else {
        for (u32 end = least(i + 4, len); i < end; i++) gather<1>(p, i, dy, places, dx);
    }
}
