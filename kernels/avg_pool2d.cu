// Average pooling; the rules are in src/ops/avg_pool2d.rs. A thread owns neighbouring elements of 16 bytes of the output (forward) or of
// the input's gradient (backward, which asks every window that covers the element: no atomics); where the channels are a multiple of
// their number, or of 4, they belong to one pixel and move together. Sums are in f32. Bytes: x about once out of the cache, y once.
// Memory-bound.

#include "common.cuh"

struct AvgPool2dParams { u32 n, h, w, c, oh, ow, kh, kw, sh, sw, ph, pw, include_pad; };

// The first place of a window at `start - pad` that lies inside an axis of `size`, and one past the last.
struct Inside { u32 first, end; };
DEVICE Inside inside(u32 start, u32 pad, u32 kernel, u32 size) { return {pad - least(start, pad), least(kernel, size + pad - start)}; }

// One over the number of places that count in a window.
DEVICE float share(AvgPool2dParams p, Inside rows, Inside columns) {
    return 1.0f / float(p.include_pad ? p.kh * p.kw : (rows.end - rows.first) * (columns.end - columns.first));
}

template <int N> DEVICE void mean(AvgPool2dParams p, u32 e, const Real *x, Real *y) {
    u32 c = e % p.c, column = e / p.c % p.ow, row = e / (p.c * p.ow) % p.oh, n = e / (p.c * p.ow * p.oh);
    u32 top = row * p.sh, left = column * p.sw;
    Inside rows = inside(top, p.ph, p.kh, p.h), columns = inside(left, p.pw, p.kw, p.w);
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
    // The first window that reaches this far, and one past the last that starts before it.
    u32 row_first = (bottom + 1 - least(bottom + 1, p.kh) + p.sh - 1) / p.sh, row_end = least(bottom / p.sh + 1, p.oh);
    u32 col_first = (right + 1 - least(right + 1, p.kw) + p.sw - 1) / p.sw, col_end = least(right / p.sw + 1, p.ow);
    Pack<N> sum = {};
    for (u32 row = row_first; row < row_end; row++) {
        Inside rows = inside(row * p.sh, p.ph, p.kh, p.h);
        for (u32 col = col_first; col < col_end; col++) {
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
