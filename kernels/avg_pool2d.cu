// Average pooling; the rules are in src/ops/avg_pool2d.rs. A thread owns neighbouring elements of 16 bytes of the output (forward) or of
// the input's gradient (backward, which asks every window that covers the element: no atomics); where the channels are a multiple of
// their number, or of 4, they belong to one pixel and move together. Sums are in f32. Bytes: x about once out of the cache, y once.
// Memory-bound.

#include "common.cuh"
#include "pool2d.cuh"

struct AvgPool2dParams { u32 n, h, w, c, oh, ow, kh, kw, sh, sw, ph, pw, include_pad; };

// One over the number of places that count in a window.
DEVICE float share(AvgPool2dParams p, Range rows, Range columns) {
    return 1.0f / float(p.include_pad ? p.kh * p.kw : (rows.end - rows.first) * (columns.end - columns.first));
}

template <int N> DEVICE void mean(AvgPool2dParams p, u32 e, const Real *x, Real *y) {
    u32 c = e % p.c, column = e / p.c % p.ow, row = e / (p.c * p.ow) % p.oh, n = e / (p.c * p.ow * p.oh);
    u32 top = row * p.sh, left = column * p.sw;
    Range rows = inside(top, p.ph, p.kh, p.h), columns = inside(left, p.pw, p.kw, p.w);
    Pack<N> sum = {};
    for (u32 i = rows.first; i < rows.end; i++) {
        for (u32 j = columns.first; j < columns.end; j++) {
            Pack<N> v = load<N>(x + ((n * p.h + top + i - p.ph) * p.w + left + j - p.pw) * p.c + c);
            UNROLL for (int k = 0; k < N; k++) sum.v[k] += v.v[k];
        }
    }
    float factor = share(p, rows, columns);
    UNROLL for (int k = 0; k < N; k++) sum.v[k] *= factor;
    store(y + e, sum);
}

KERNEL(256) OF(avg_pool2d_fwd)(AvgPool2dParams p, const Real *x, Real *y) {
    for_own(p.n * p.oh * p.ow * p.c, p.c, [=](auto width, u32 e) { mean<width.n>(p, e, x, y); });
}

template <int N> DEVICE void gather(AvgPool2dParams p, u32 i, const Real *dy, Real *dx) {
    u32 c = i % p.c, right = i / p.c % p.w + p.pw, bottom = i / (p.c * p.w) % p.h + p.ph, n = i / (p.c * p.w * p.h);
    Range down = covering(bottom, p.sh, p.kh, p.oh), across = covering(right, p.sw, p.kw, p.ow);
    Pack<N> sum = {};
    for (u32 row = down.first; row < down.end; row++) {
        Range rows = inside(row * p.sh, p.ph, p.kh, p.h);
        for (u32 col = across.first; col < across.end; col++) {
            float factor = share(p, rows, inside(col * p.sw, p.pw, p.kw, p.w));
            Pack<N> d = load<N>(dy + ((n * p.oh + row) * p.ow + col) * p.c + c);
            UNROLL for (int k = 0; k < N; k++) sum.v[k] += d.v[k] * factor;
        }
    }
    store(dx + i, sum);
}

KERNEL(256, 5) OF(avg_pool2d_bwd)(AvgPool2dParams p, const Real *dy, Real *dx) {
    for_own(p.n * p.h * p.w * p.c, p.c, [=](auto width, u32 i) { gather<width.n>(p, i, dy, dx); });
}
