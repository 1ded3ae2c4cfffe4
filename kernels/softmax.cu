// Softmax along rows: x [rows, columns], y = e^(x - max) / sum; backward dx = y (dy - sum(y dy)).
//
// A warp owns a row, eight rows a block; a lane takes N neighbouring columns at a time, 16 bytes where the columns are a multiple of
// them. The row is read again for each pass, out of the cache. Powers and sums are f32 whatever the storage. Bytes: forward x, y;
// backward y, dy, dx. Memory-bound.

#include "common.cuh"

struct SoftmaxParams { u32 rows, columns; };

template <int N> DEVICE void fwd(SoftmaxParams p, u32 row, const Real *x, Real *y) {
    u32 first = threadIdx.x % 32 * N;
    x += row * p.columns;
    y += row * p.columns;
    float top = to_float(x[0]);
    for (u32 c = first; c < p.columns; c += 32 * N) {
        Pack<N> v = load<N>(x + c);
        UNROLL for (int k = 0; k < N; k++) top = fmaxf(top, v.v[k]);
    }
    top = warp_max(top);
    float sum = 0.0f;
    for (u32 c = first; c < p.columns; c += 32 * N) {
        Pack<N> v = load<N>(x + c);
        UNROLL for (int k = 0; k < N; k++) sum += expf(v.v[k] - top);
    }
    float scale = 1.0f / warp_sum(sum);
    for (u32 c = first; c < p.columns; c += 32 * N) {
        Pack<N> v = load<N>(x + c);
        UNROLL for (int k = 0; k < N; k++) v.v[k] = expf(v.v[k] - top) * scale;
        store(y + c, v);
    }
}

KERNEL(256) OF(softmax_fwd)(SoftmaxParams p, const Real *x, Real *y) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    with_width(p.columns, [=](auto width) { fwd<width.n>(p, row, x, y); });
}

template <int N> DEVICE void bwd(SoftmaxParams p, u32 row, const Real *y, const Real *dy, Real *dx) {
    u32 first = row * p.columns + threadIdx.x % 32 * N, end = (row + 1) * p.columns;
    float sum = 0.0f;
    for (u32 i = first; i < end; i += 32 * N) {
        Pack<N> v = load<N>(y + i), d = load<N>(dy + i);
        UNROLL for (int k = 0; k < N; k++) sum += v.v[k] * d.v[k];
    }
    sum = warp_sum(sum);
    for (u32 i = first; i < end; i += 32 * N) {
        Pack<N> v = load<N>(y + i), d = load<N>(dy + i);
        UNROLL for (int k = 0; k < N; k++) v.v[k] *= d.v[k] - sum;
        store(dx + i, v);
    }
}

KERNEL(256) OF(softmax_bwd)(SoftmaxParams p, const Real *y, const Real *dy, Real *dx) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    with_width(p.columns, [=](auto width) { bwd<width.n>(p, row, y, dy, dx); });
}
