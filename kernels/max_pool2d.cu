// Max pooling; the rules are in src/ops/max_pool2d.rs. places[e] is i * kw + j of the element that output e took: one byte
// each, four to a word, or one word each where p.wide is set.
//
// A thread owns neighbouring elements of 16 bytes (four in f32, eight of a 16-bit type) of the output (forward) or of the input's
// gradient (backward, which asks every window that covers the element: no atomics, and sums in f32); where the channels are a multiple of
// their number, or of 4, they belong to one pixel and move together. Bytes: x about once out of the cache, y and places once, so
// that a 16-bit y is 3 bytes an element. Memory-bound.

#include "common.cuh"
#include "pool2d.cuh"

struct MaxPool2dParams { u32 n, h, w, c, oh, ow, kh, kw, sh, sw, ph, pw, wide; };

// The places that outputs e .. e + N of one pixel take; also writes y.
template <int N> DEVICE void largest(MaxPool2dParams p, u32 e, const Real *x, Real *y, u32 *place) {
    u32 c = e % p.c, q = e / p.c % p.ow, row = e / (p.c * p.ow) % p.oh, n = e / (p.c * p.ow * p.oh);
    u32 top = row * p.sh, left = q * p.sw;
    Range rows = inside(top, p.ph, p.kh, p.h), columns = inside(left, p.pw, p.kw, p.w);
    Pack<N> best = load<N>(x + ((n * p.h + top + rows.first - p.ph) * p.w + left + columns.first - p.pw) * p.c + c);
    UNROLL for (int k = 0; k < N; k++) place[k] = rows.first * p.kw + columns.first;
    for (u32 i = rows.first; i < rows.end; i++) {
        for (u32 j = columns.first; j < columns.end; j++) {
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

// This thread's outputs, packs of N, and their places, words of four.
template <int N> DEVICE void pool(MaxPool2dParams p, const Real *x, Real *y, u32 *places) {
    constexpr int M = N < 4 ? 4 : N;
    u32 len = p.n * p.oh * p.ow * p.c, e = WIDE<Real> * flat_id(), end = least(e + WIDE<Real>, len);
    for (; e < end; e += M) {
        u32 place[M] = {};
        UNROLL for (int k = 0; k < M; k += N) {
            if (N > 1 || e + k < end) largest<N>(p, e + k, x, y, place + k);
        }
        if (p.wide) {
            for (u32 k = 0; k < least(M, end - e); k++) places[e + k] = place[k];
        } else {
            UNROLL for (int k = 0; k < M; k += 4) {
                places[(e + k) / 4] = place[k] | place[k + 1] << 8 | place[k + 2] << 16 | place[k + 3] << 24;
            }
        }
    }
}

KERNEL(256, 5) OF(max_pool2d_fwd)(MaxPool2dParams p, const Real *x, Real *y, u32 *places) {
    with_width(p.c, [=](auto width) { pool<width.n>(p, x, y, places); });
}

// The places of elements e .. e + N, which fill words where N is more than 1.
template <int N> DEVICE void read_places(MaxPool2dParams p, u32 e, const u32 *places, u32 (&place)[N]) {
    if (p.wide) {
        UNROLL for (int k = 0; k < N; k++) place[k] = places[e + k];
    } else if constexpr (N == 1) {
        place[0] = places[e / 4] >> (8 * (e % 4)) & 255;
    } else {
        UNROLL for (int j = 0; j < N; j += 4) {
            u32 word = places[e / 4 + j / 4];
            UNROLL for (int k = 0; k < 4; k++) place[j + k] = word >> (8 * k) & 255;
        }
    }
}

// The gradients of input elements i .. i + N of one pixel.
template <int N> DEVICE void gather(MaxPool2dParams p, u32 i, const Real *dy, const u32 *places, Real *dx) {
    u32 c = i % p.c, right = i / p.c % p.w + p.pw, bottom = i / (p.c * p.w) % p.h + p.ph, n = i / (p.c * p.w * p.h);
    Range rows = covering(bottom, p.sh, p.kh, p.oh), columns = covering(right, p.sw, p.kw, p.ow);
    Pack<N> sum;
    UNROLL for (int k = 0; k < N; k++) sum.v[k] = 0.0f;
    for (u32 row = rows.first; row < rows.end; row++) {
        for (u32 col = columns.first; col < columns.end; col++) {
            u32 e = ((n * p.oh + row) * p.ow + col) * p.c + c;
            u32 place = (bottom - row * p.sh) * p.kw + right - col * p.sw;
            Pack<N> d = load<N>(dy + e);
            u32 taken[N];
            read_places<N>(p, e, places, taken);
            UNROLL for (int k = 0; k < N; k++) {
                if (taken[k] == place) sum.v[k] += d.v[k];
            }
        }
    }
    store(dx + i, sum);
}

KERNEL(256) OF(max_pool2d_bwd)(MaxPool2dParams p, const Real *dy, const u32 *places, Real *dx) {
    for_own(p.n * p.h * p.w * p.c, p.c, [=](auto width, u32 i) { gather<width.n>(p, i, dy, places, dx); });
}
