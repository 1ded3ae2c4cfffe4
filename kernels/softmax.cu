// Softmax along rows: x [rows, columns], y = e^(x - max) / sum; backward dx = y (dy - sum(y dy)).
//
// A warp owns a row, eight rows a block; the row is read again for each pass, out of the cache. Bytes: forward x, y; backward y,
// dy, dx. Memory-bound.

#include "common.cuh"

struct SoftmaxParams { u32 rows, columns; };

KERNEL(256) softmax_fwd_f32(SoftmaxParams p, const float *x, float *y) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    x += row * p.columns;
    y += row * p.columns;
    float top = x[0];
    for (u32 k = lane; k < p.columns; k += 32) top = fmaxf(top, x[k]);
    top = warp_max(top);
    float sum = 0.0f;
    for (u32 k = lane; k < p.columns; k += 32) sum += expf(x[k] - top);
    float scale = 1.0f / warp_sum(sum);
    for (u32 k = lane; k < p.columns; k += 32) y[k] = expf(x[k] - top) * scale;
}

KERNEL(256) softmax_bwd_f32(SoftmaxParams p, const float *y, const float *dy, float *dx) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, first = row * p.columns;
    if (row >= p.rows) return;
    float sum = 0.0f;
    for (u32 k = lane; k < p.columns; k += 32) sum += y[first + k] * dy[first + k];
    sum = warp_sum(sum);
    for (u32 k = lane; k < p.columns; k += 32) dx[first + k] = y[first + k] * (dy[first + k] - sum);
}
