// Squeeze and excitation; formulas in src/ops/squeeze_excite.rs. x [images, pixels, channels], part [images, blocks, channels], mean,
// gate, u and dmean [images, channels], hidden [images, 2, squeezed] (z, then silu(z)), v [images, squeezed]; images are stored as the
// launch says, and so are w1 and w2 in theirs; all else is f32.
//
// Sums: a block owns some pixels of an image and some channels (columns.cuh). The two layers: a block owns an image, with a warp for a
// row of w1 and a thread for a row of w2; it reads again what it wrote to memory before a barrier, which comes out of the first cache.
// Products: a thread owns neighbouring elements of 16 bytes. Bytes: forward x twice, y; backward x, dy twice, dx. Memory-bound.

#include "common.cuh"
#include "columns.cuh"

struct SqueezeExciteParams { u32 images, pixels, channels, squeezed, pixels_per_block, blocks; };

// ------------------------------------------------------------------------------------------------ sums

// The sums of f(i), N neighbouring elements from the i-th on, over the pixels of a block.
template <int N, class F> DEVICE void sums(SqueezeExciteParams p, float *part, float *shares, F f) {
    u32 number = blockIdx.x % (p.images * p.blocks);
    Columns at = columns<N>(p.channels, blockIdx.x / (p.images * p.blocks));
    u32 image = number / p.blocks, first = number % p.blocks * p.pixels_per_block;
    u32 end = least(first + p.pixels_per_block, p.pixels);
    float total[N] = {};
    if (at.inside) {
        for (u32 r = first + at.row; r < end; r += at.step) {
            Pack<N> v = f((image * p.pixels + r) * p.channels + at.channel);
            UNROLL for (int k = 0; k < N; k++) total[k] += v.v[k];
        }
    }
    add_rows<N>(total, shares, at);
    if (at.inside && at.row == 0) {
        Pack<N> out;
        UNROLL for (int k = 0; k < N; k++) out.v[k] = total[k];
        store(part + number * p.channels + at.channel, out);
    }
}

KERNEL(256) OF(squeeze_excite_sums)(SqueezeExciteParams p, const Real *x, float *part) {
    SMEM(float, shares, WIDE<Real> * 256);
    with_width(p.channels, [=](auto width) {
        sums<width.n>(p, part, shares, [=](u32 i) { return load<decltype(width)::n>(x + i); });
    });
}

template <int N> DEVICE Pack<N> product(const Real *x, const Real *dy) {
    Pack<N> v = load<N>(x), d = load<N>(dy);
    UNROLL for (int k = 0; k < N; k++) v.v[k] *= d.v[k];
    return v;
}

KERNEL(256) OF(squeeze_excite_bwd_sums)(SqueezeExciteParams p, const Real *x, const Real *dy, float *part) {
    SMEM(float, shares, WIDE<Real> * 256);
    with_width(p.channels, [=](auto width) {
        sums<width.n>(p, part, shares, [=](u32 i) { return product<decltype(width)::n>(x + i, dy + i); });
    });
}

// ------------------------------------------------------------------------------------------------ the two layers

// The sum of an image's blocks.
DEVICE float total(SqueezeExciteParams p, const float *part, u32 image, u32 c) {
    float sum = 0.0f;
    for (u32 b = 0; b < p.blocks; b++) sum += part[(image * p.blocks + b) * p.channels + c];
    return sum;
}

// A lane's share of the product of a row of w with x, both of so many columns.
template <int N> DEVICE float row_share(u32 columns, const Real *w, const float *x) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 32 * N; c < columns; c += 32 * N) {
        Pack<N> a = load<N>(w + c), b = load<N>(x + c);
        UNROLL for (int k = 0; k < N; k++) sum += a.v[k] * b.v[k];
    }
    return sum;
}

KERNEL(256) OF(squeeze_excite_gate)(
    SqueezeExciteParams p, const float *part, const Real *w1, const float *b1, const Real *w2, const float *b2, float *mean,
    float *hidden, float *gate) {
    u32 image = blockIdx.x;
    mean += image * p.channels;
    gate += image * p.channels;
    float *z = hidden + 2 * image * p.squeezed, *act = z + p.squeezed;
    for (u32 c = threadIdx.x; c < p.channels; c += 256) mean[c] = total(p, part, image, c) / float(p.pixels);
    __syncthreads();
    for (u32 s = threadIdx.x / 32; s < p.squeezed; s += 8) {
        const Real *row = w1 + s * p.channels;
        float sum = 0.0f;
        with_width(p.channels, [&](auto width) { sum = row_share<width.n>(p.channels, row, mean); });
        sum = warp_sum(sum) + b1[s];
        if (threadIdx.x % 32 == 0) {
            z[s] = sum;
            act[s] = sum * sigmoid(sum);
        }
    }
    __syncthreads();
    for (u32 c = threadIdx.x; c < p.channels; c += 256) {
        float sum = b2[c];
        for (u32 s = 0; s < p.squeezed; s++) sum += to_float(w2[c * p.squeezed + s]) * act[s];
        gate[c] = sigmoid(sum);
    }
}

KERNEL(256) OF(squeeze_excite_bwd_gate)(
    SqueezeExciteParams p, const float *part, const Real *w1, const Real *w2, const float *hidden, const float *gate, float *u,
    float *v, float *dmean) {
    SMEM(float, shares, 256);
    u32 image = blockIdx.x;
    u += image * p.channels;
    v += image * p.squeezed;
    for (u32 c = threadIdx.x; c < p.channels; c += 256) {
        float g = gate[image * p.channels + c];
        u[c] = total(p, part, image, c) * g * (1.0f - g);
    }
    // Columns of w2 side by side, its rows over the rows of threads.
    for (u32 chunk = 0, s = 0; s < p.squeezed; chunk++) {
        Columns at = columns<1>(p.squeezed, chunk);
        __syncthreads();
        float sum[1] = {};
        if (at.inside) {
            for (u32 c = at.row; c < p.channels; c += at.step) sum[0] += u[c] * to_float(w2[c * p.squeezed + at.channel]);
        }
        add_rows<1>(sum, shares, at);
        if (at.inside && at.row == 0) {
            float z = hidden[2 * image * p.squeezed + at.channel], g = sigmoid(z);
            v[at.channel] = sum[0] * g * (1.0f + z * (1.0f - g));
        }
        s += at.lanes;
    }
    __syncthreads();
    for (u32 c = threadIdx.x; c < p.channels; c += 256) {
        float sum = 0.0f;
        for (u32 s = 0; s < p.squeezed; s++) sum += v[s] * to_float(w1[s * p.channels + c]);
        dmean[image * p.channels + c] = sum / float(p.pixels);
    }
}

// A thread an element of dw1, then of dw2; the first of a row has the bias too. Images in order.
KERNEL(256) squeeze_excite_bwd_weights_f32(
    SqueezeExciteParams p, const float *u, const float *v, const float *mean, const float *hidden, float *dw1, float *db1, float *dw2,
    float *db2) {
    u32 i = flat_id(), len = p.channels * p.squeezed;
    if (i >= 2 * len) return;
    float sum = 0.0f, bias = 0.0f;
    if (i < len) {
        u32 s = i / p.channels, c = i % p.channels;
        for (u32 n = 0; n < p.images; n++) {
            float d = v[n * p.squeezed + s];
            bias += d;
            sum += d * mean[n * p.channels + c];
        }
        dw1[i] = sum;
        if (c == 0) db1[s] = bias;
    } else {
        u32 c = (i - len) / p.squeezed, s = (i - len) % p.squeezed;
        for (u32 n = 0; n < p.images; n++) {
            float d = u[n * p.channels + c];
            bias += d;
            sum += d * hidden[(2 * n + 1) * p.squeezed + s];
        }
        dw2[i - len] = sum;
        if (s == 0) db2[c] = bias;
    }
}

// ------------------------------------------------------------------------------------------------ the image

template <int N> DEVICE void scale(SqueezeExciteParams p, u32 i, const Real *x, const float *gate, Real *y) {
    u32 at = i / (p.pixels * p.channels) * p.channels + i % p.channels;
    Pack<N> v = load<N>(x + i), g = load<N>(gate + at);
    UNROLL for (int k = 0; k < N; k++) v.v[k] *= g.v[k];
    store(y + i, v);
}

KERNEL(256) OF(squeeze_excite_fwd)(SqueezeExciteParams p, const Real *x, const float *gate, Real *y) {
    for_own(p.images * p.pixels * p.channels, p.channels, [=](auto width, u32 i) { scale<width.n>(p, i, x, gate, y); });
}

template <int N> DEVICE void bwd(SqueezeExciteParams p, u32 i, const Real *dy, const float *gate, const float *dmean, Real *dx) {
    u32 at = i / (p.pixels * p.channels) * p.channels + i % p.channels;
    Pack<N> v = load<N>(dy + i), g = load<N>(gate + at), m = load<N>(dmean + at);
    UNROLL for (int k = 0; k < N; k++) v.v[k] = v.v[k] * g.v[k] + m.v[k];
    store(dx + i, v);
}

KERNEL(256) OF(squeeze_excite_bwd)(
    SqueezeExciteParams p, const Real *dy, const float *gate, const float *dmean, Real *dx) {
    for_own(p.images * p.pixels * p.channels, p.channels,
            [=](auto width, u32 i) { bwd<width.n>(p, i, dy, gate, dmean, dx); });
}
