// The mean over an image's pixels: x [images, pixels, channels] -> y [images, channels].
//
// Forward: a block owns an image and some channels, as columns.cuh says. Backward: a thread owns neighbouring elements of 16
// bytes. Sums are in f32. Bytes: each tensor once. Memory-bound.

#include "common.cuh"
#include "columns.cuh"

struct GlobalAvgPoolParams { u32 images, pixels, channels; };

template <int N> DEVICE void mean(GlobalAvgPoolParams p, const Real *x, Real *y, float *shares) {
    u32 image = blockIdx.x % p.images;
    Columns at = columns<N>(p.channels, blockIdx.x / p.images);
    float total[N] = {};
    if (at.inside) {
        for (u32 r = at.row; r < p.pixels; r += at.step) {
            Pack<N> v = load<N>(x + (image * p.pixels + r) * p.channels + at.channel);
            UNROLL for (int k = 0; k < N; k++) total[k] += v.v[k];
        }
    }
    add_rows<N>(total, shares, at);
    if (at.inside && at.row == 0) {
        Pack<N> out;
        UNROLL for (int k = 0; k < N; k++) out.v[k] = total[k] / float(p.pixels);
        store(y + image * p.channels + at.channel, out);
    }
}

KERNEL(256) OF(global_avg_pool_fwd)(GlobalAvgPoolParams p, const Real *x, Real *y) {
    SMEM(float, shares, WIDE<Real> * 256);
    with_width(p.channels, [=](auto width) { mean<width.n>(p, x, y, shares); });
}

template <int N> DEVICE void spread(GlobalAvgPoolParams p, u32 i, const Real *dy, Real *dx) {
    u32 image = i / (p.pixels * p.channels);
    Pack<N> v = load<N>(dy + image * p.channels + i % p.channels);
    UNROLL for (int k = 0; k < N; k++) v.v[k] /= float(p.pixels);
    store(dx + i, v);
}

KERNEL(256) OF(global_avg_pool_bwd)(GlobalAvgPoolParams p, const Real *dy, Real *dx) {
    for_own(p.images * p.pixels * p.channels, p.channels, [=](auto width, u32 i) { spread<width.n>(p, i, dy, dx); });
}
