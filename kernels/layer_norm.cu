// Layer norm along rows: x [rows, channels]; formulas in src/ops/layer_norm.rs. stats [rows, 2]: mean, 1 / std.
//
// A warp owns a row, eight rows a block; a lane takes N neighbouring channels at a time, 16 bytes where the channels are a multiple
// of them. The row is read again for each pass, out of the cache. Weight and bias gradients: column sums (columns.cuh). Rows are
// stored as the launch says; weight, bias, stats and sums are f32. Bytes: forward x, y; backward x, dy, dx, and x, dy again for
// the sums. Memory-bound.

#include "common.cuh"
#include "columns.cuh"

struct LayerNormParams { u32 rows, channels, rows_per_block, blocks; float eps; };

// The row of this warp, and the first channel of this lane.
DEVICE u32 row_of_warp() { return blockIdx.x * 8 + threadIdx.x / 32; }

template <int N> DEVICE void fwd(
    LayerNormParams p, u32 row, const Real *x, const float *weight, const float *bias, Real *y, float *stats) {
    u32 first = threadIdx.x % 32 * N;
    x += row * p.channels;
    y += row * p.channels;
    float sum = 0.0f;
    for (u32 c = first; c < p.channels; c += 32 * N) {
        Pack<N> v = load<N>(x + c);
        UNROLL for (int k = 0; k < N; k++) sum += v.v[k];
    }
    float mean = warp_sum(sum) / float(p.channels), squares = 0.0f;
    for (u32 c = first; c < p.channels; c += 32 * N) {
        Pack<N> v = load<N>(x + c);
        UNROLL for (int k = 0; k < N; k++) squares += (v.v[k] - mean) * (v.v[k] - mean);
    }
    float inv_std = 1.0f / sqrtf(warp_sum(squares) / float(p.channels) + p.eps);
    for (u32 c = first; c < p.channels; c += 32 * N) {
        Pack<N> v = load<N>(x + c), w = load<N>(weight + c), b = load<N>(bias + c);
        UNROLL for (int k = 0; k < N; k++) v.v[k] = (v.v[k] - mean) * inv_std * w.v[k] + b.v[k];
        store(y + c, v);
    }
    if (first == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = inv_std;
    }
}

KERNEL(256) OF(layer_norm_fwd)(
    LayerNormParams p, const Real *x, const float *weight, const float *bias, Real *y, float *stats) {
    u32 row = row_of_warp();
    if (row >= p.rows) return;
    with_width(p.channels, [=](auto width) { fwd<width.n>(p, row, x, weight, bias, y, stats); });
}

template <int N> DEVICE void bwd(
    LayerNormParams p, u32 row, const Real *x, const Real *dy, const float *weight, const float *stats, Real *dx) {
    u32 first = threadIdx.x % 32 * N, at = row * p.channels;
    float mean = stats[2 * row], inv_std = stats[2 * row + 1], sum = 0.0f, sum_x = 0.0f;
    for (u32 c = first; c < p.channels; c += 32 * N) {
        Pack<N> v = load<N>(x + at + c), d = load<N>(dy + at + c), w = load<N>(weight + c);
        UNROLL for (int k = 0; k < N; k++) {
            float g = d.v[k] * w.v[k];
            sum += g;
            sum_x += g * ((v.v[k] - mean) * inv_std);
        }
    }
    float g_mean = warp_sum(sum) / float(p.channels), gx_mean = warp_sum(sum_x) / float(p.channels);
    for (u32 c = first; c < p.channels; c += 32 * N) {
        Pack<N> v = load<N>(x + at + c), d = load<N>(dy + at + c), w = load<N>(weight + c);
        UNROLL for (int k = 0; k < N; k++) {
            float xhat = (v.v[k] - mean) * inv_std;
            d.v[k] = inv_std * (d.v[k] * w.v[k] - g_mean - xhat * gx_mean);
        }
        store(dx + at + c, d);
    }
}

KERNEL(256) OF(layer_norm_bwd)(
    LayerNormParams p, const Real *x, const Real *dy, const float *weight, const float *stats, Real *dx) {
    u32 row = row_of_warp();
    if (row >= p.rows) return;
    with_width(p.channels, [=](auto width) { bwd<width.n>(p, row, x, dy, weight, stats, dx); });
}

template <int N> DEVICE void bwd_sums(
    LayerNormParams p, const Real *x, const Real *dy, const float *stats, float *part, float *shares) {
    Columns at = columns<N>(p.channels, blockIdx.x);
    u32 first = blockIdx.y * p.rows_per_block, end = least(first + p.rows_per_block, p.rows);
    // Sums of dy, then sums of dy * xhat.
    float sums[2 * N] = {};
    if (at.inside) {
        for (u32 r = first + at.row; r < end; r += at.step) {
            u32 i = r * p.channels + at.channel;
            Pack<N> v = load<N>(x + i), d = load<N>(dy + i);
            float mean = stats[2 * r], inv_std = stats[2 * r + 1];
            UNROLL for (int k = 0; k < N; k++) {
                sums[k] += d.v[k];
                sums[N + k] += d.v[k] * ((v.v[k] - mean) * inv_std);
            }
        }
    }
    add_rows<2 * N>(sums, shares, at);
    if (at.inside && at.row == 0) {
        Pack<N> sum, sum_x;
        UNROLL for (int k = 0; k < N; k++) {
            sum.v[k] = sums[k];
            sum_x.v[k] = sums[N + k];
        }
        float *out = part + blockIdx.y * 2 * p.channels + at.channel;
        store(out, sum);
        store(out + p.channels, sum_x);
    }
}

// part [blocks, 2, channels]
KERNEL(256) OF(layer_norm_bwd_sums)(
    LayerNormParams p, const Real *x, const Real *dy, const float *stats, float *part) {
    SMEM(float, shares, 2 * WIDE<Real> * 256);
    with_width(p.channels, [=](auto width) { bwd_sums<width.n>(p, x, dy, stats, part, shares); });
}

KERNEL(64) layer_norm_bwd_finish_f32(LayerNormParams p, const float *part, float *dweight, float *dbias) {
    u32 c = flat_id();
    if (c >= p.channels) return;
    float sum = 0.0f, sum_x = 0.0f;
    for (u32 b = 0; b < p.blocks; b++) {
        const float *at = part + b * 2 * p.channels + c;
        sum += at[0];
        sum_x += at[p.channels];
    }
    dweight[c] = sum_x;
    dbias[c] = sum;
}
