// 2D convolution, NHWC, in f32, as implicit matrix products on CUDA cores: forward y = im2col(x) w^T, input gradient by phases of
// the stride, weight gradient cut into parts of the pixels. All sums are gathered, in a fixed order.
//
// A block of 256 threads owns a B x B tile of the product (B = 64, or 128 where there are tiles enough), a thread a T x T piece
// of it (T = B / 16) in registers. The sum runs in steps of 1024 / B: while one step is multiplied out of shared memory, every
// thread holds its four numbers of each operand for the next; two buffers, so one barrier a step. In the vec4 variants these four
// are one access of 16 bytes; they want channel counts that are multiples of 4. The others take any count: the stem (C = 3) lives
// there, walking over (tap, channel) by counting and not by division.
//
// Flop: 2 per product, padded up to whole tiles. Bytes: an operand's tile is read once for each tile of the other operand's
// side, mostly out of the L2 cache. Shared memory: 17 KiB.

#include "common.cuh"
#include "columns.cuh"
#include "conv2d_tiles.cuh"

// ------------------------------------------------------------------------------------------------ forward

template <int B, bool VEC> DEVICE void forward(const Conv2dParams &p, const float *x, const float *w, const float *bias, float *y, float *shared) {
    float sums[B / 16][B / 16] = {};
    multiply<B, VEC>(p, x, w, sums, shared);
    store_pixels<B>(p, sums, p.bias ? bias : nullptr, y);
}

KERNEL(256) conv2d_fwd_f32(Conv2dParams p, const float *x, const float *w, const float *bias, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    forward<64, false>(p, x, w, bias, y, shared);
}

KERNEL(256) conv2d_fwd_vec4_f32(Conv2dParams p, const float *x, const float *w, const float *bias, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    forward<64, true>(p, x, w, bias, y, shared);
}

KERNEL(256) conv2d_fwd_vec4_large_f32(Conv2dParams p, const float *x, const float *w, const float *bias, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    forward<128, true>(p, x, w, bias, y, shared);
}

// ------------------------------------------------------------------------------------------------ input gradient
// dx[h, w, c] = sum over the taps with h = p * stride + r - pad (and so in width) and over o of dy[p, q, o] * w[o, r, s, c].
// Pixels of dx with equal remainder modulo the stride (a phase) are hit by the same taps: a block takes pixels of one phase.

// Rows are pixels of the phase, the sum runs over its taps and the output channels.
template <int B, bool VEC> struct Sources {
    Share<B, true> share;
    Conv2dParams p;
    const float *dy;
    Walk at;
    int row, col;
    u32 taps_r, taps_s;
    bool inside;

    DEVICE Sources(const Conv2dParams &p, const Phase &f, const float *dy) : p(p), dy(dy), taps_r(f.taps_r), taps_s(f.taps_s) {
        u32 pixel = blockIdx.x * B + share.place;
        inside = pixel < p.n * f.rows * f.cols;
        // Of the phase's first tap; each further one lies a pixel before. The division is exact.
        row = (inside ? int(pixel / f.cols % f.rows) : 0) + int((f.row + p.pad_h - f.r) / p.stride_h);
        col = (inside ? int(pixel % f.cols) : 0) + int((f.col + p.pad_w - f.s) / p.stride_w);
        if (inside) this->dy += pixel / (f.rows * f.cols) * p.p * p.q * p.o;
        if (taps_s > 0) at.to(share.sum, p.o, taps_s);
    }
    template <int N> DEVICE Pack<N> one(const Walk &at) const {
        u32 y = u32(row - int(at.r)), z = u32(col - int(at.s));
        if (inside && at.r < taps_r && y < p.p && z < p.q) return load<N>(dy + (y * p.q + z) * p.o + at.c);
        return Pack<N>{};
    }
    DEVICE Pack<4> next() {
        Pack<4> v;
        if constexpr (VEC) {
            v = one<4>(at);
        } else {
            Walk each = at;
            UNROLL for (int j = 0; j < 4; j++) {
                v.v[j] = one<1>(each).v[0];
                each.on(1, p.o, taps_s);
            }
        }
        at.on(Tile<B>::STEP, p.o, taps_s);
        return v;
    }
};

// Columns are input channels, side by side in the weight.
template <int B, bool VEC> struct Spread {
    Share<B, false> share;
    Conv2dParams p;
    Phase f;
    const float *w;
    Walk at;
    u32 c;

    DEVICE Spread(const Conv2dParams &p, const Phase &f, const float *w) : p(p), f(f), w(w) {
        c = blockIdx.y * B + share.place;
        if (f.taps_s > 0) at.to(share.sum, p.o, f.taps_s);
    }
    DEVICE Pack<4> next() {
        Pack<4> v = {};
        u32 tap = (f.r + at.r * p.stride_h) * p.kw + f.s + at.s * p.stride_w;
        const float *row = w + (at.c * p.kh * p.kw + tap) * p.c;
        if (at.r < f.taps_r) {
            if constexpr (VEC) {
                if (c < p.c) v = load<4>(row + c);
            } else {
                UNROLL for (int j = 0; j < 4; j++) {
                    if (c + j < p.c) v.v[j] = row[c + j];
                }
            }
        }
        at.on(Tile<B>::STEP, p.o, f.taps_s);
        return v;
    }
};

template <int B, bool VEC> DEVICE void dgrad(const Conv2dParams &p, const float *dy, const float *w, float *dx, float *shared) {
    Phase f(p);
    u32 pixels = p.n * f.rows * f.cols;
    if (blockIdx.x * B >= pixels) return;
    float sums[B / 16][B / 16] = {};
    Sources<B, VEC> left(p, f, dy);
    Spread<B, VEC> right(p, f, w);
    product<B>(sums, left, right, f.taps_r * f.taps_s * p.o, shared);
    UNROLL for (int i = 0; i < B / 16; i++) {
        u32 pixel = blockIdx.x * B + place_of(threadIdx.x / 16, i);
        if (pixel >= pixels) continue;
        u32 row = pixel / f.cols % f.rows * p.stride_h + f.row, col = pixel % f.cols * p.stride_w + f.col;
        u32 at = (pixel / (f.rows * f.cols) * p.h + row) * p.w + col;
        store_row<B>(sums[i], dx + at * p.c, blockIdx.y * B, p.c, nullptr);
    }
}

KERNEL(256) conv2d_dgrad_f32(Conv2dParams p, const float *dy, const float *w, float *dx) {
    SMEM(float, shared, PRODUCT_FLOATS);
    dgrad<64, false>(p, dy, w, dx, shared);
}

KERNEL(256) conv2d_dgrad_vec4_f32(Conv2dParams p, const float *dy, const float *w, float *dx) {
    SMEM(float, shared, PRODUCT_FLOATS);
    dgrad<64, true>(p, dy, w, dx, shared);
}

KERNEL(256) conv2d_dgrad_vec4_large_f32(Conv2dParams p, const float *dy, const float *w, float *dx) {
    SMEM(float, shared, PRODUCT_FLOATS);
    dgrad<128, true>(p, dy, w, dx, shared);
}

// ------------------------------------------------------------------------------------------------ weight gradient
// dw[o, r, s, c] = sum over pixels of dy[pixel, o] * x[pixel under (r, s), c]. The pixels are cut into `parts`, one along z, so
// that small weights occupy a large GPU too; conv2d_sum_f32 adds the parts up.

// Rows are output channels, side by side in dy; the sum runs over the pixels of a part.
template <int B, bool VEC> struct Upstream {
    Share<B, false> share;
    const float *dy;
    u32 pixel, end, o, channels;

    DEVICE Upstream(const Conv2dParams &p, u32 first, u32 end, const float *dy)
        : dy(dy), pixel(first + share.sum), end(end), o(blockIdx.x * B + share.place), channels(p.o) {}
    DEVICE Pack<4> next() {
        Pack<4> v = {};
        const float *row = dy + pixel * channels;
        if (pixel < end) {
            if constexpr (VEC) {
                if (o < channels) v = load<4>(row + o);
            } else {
                UNROLL for (int j = 0; j < 4; j++) {
                    if (o + j < channels) v.v[j] = row[o + j];
                }
            }
        }
        pixel += Tile<B>::STEP;
        return v;
    }
};

// Columns are (tap, input channel).
template <int B, bool VEC> struct Under {
    static constexpr int N = VEC ? 4 : 1;
    Share<B, false> share;
    Conv2dParams p;
    const float *x;
    u32 pixel, end;
    // Of each number that the thread loads: its channel and its tap; rows past the kernel's mark what is no column.
    Walk taps[4 / N];

    DEVICE Under(const Conv2dParams &p, u32 first, u32 end, const float *x) : p(p), x(x), pixel(first + share.sum), end(end) {
        taps[0].to(blockIdx.y * B + share.place, p.c, p.kw);
        UNROLL for (int j = 1; j < 4 / N; j++) {
            taps[j] = taps[j - 1];
            taps[j].on(1, p.c, p.kw);
        }
    }
    DEVICE Pack<4> next() {
        Pack<4> v = {};
        if (pixel < end) {
            u32 q = pixel % p.q, rest = pixel / p.q;
            u32 top = rest % p.p * p.stride_h, left = q * p.stride_w;
            const float *image = x + rest / p.p * p.h * p.w * p.c;
            UNROLL for (int j = 0; j < 4 / N; j++) {
                // Wraps to something large in the border above and to the left.
                u32 y = top + taps[j].r - p.pad_h, z = left + taps[j].s - p.pad_w;
                if (taps[j].r < p.kh && y < p.h && z < p.w) {
                    Pack<N> got = load<N>(image + (y * p.w + z) * p.c + taps[j].c);
                    UNROLL for (int k = 0; k < N; k++) v.v[j * N + k] = got.v[k];
                }
            }
        }
        pixel += Tile<B>::STEP;
        return v;
    }
};

template <int B, bool VEC> DEVICE void wgrad(const Conv2dParams &p, const float *x, const float *dy, float *dw, float *shared) {
    u32 pixels = p.n * p.p * p.q, part = (pixels + p.parts - 1) / p.parts;
    u32 first = least(blockIdx.z * part, pixels), end = least(first + part, pixels);
    float sums[B / 16][B / 16] = {};
    Upstream<B, VEC> left(p, first, end, dy);
    Under<B, VEC> right(p, first, end, x);
    product<B>(sums, left, right, end - first, shared);
    u32 columns = p.kh * p.kw * p.c;
    UNROLL for (int i = 0; i < B / 16; i++) {
        u32 o = blockIdx.x * B + place_of(threadIdx.x / 16, i);
        if (o < p.o) store_row<B>(sums[i], dw + (blockIdx.z * p.o + o) * columns, blockIdx.y * B, columns, nullptr);
    }
}

KERNEL(256) conv2d_wgrad_f32(Conv2dParams p, const float *x, const float *dy, float *dw) {
    SMEM(float, shared, PRODUCT_FLOATS);
    wgrad<64, false>(p, x, dy, dw, shared);
}

KERNEL(256) conv2d_wgrad_vec4_f32(Conv2dParams p, const float *x, const float *dy, float *dw) {
    SMEM(float, shared, PRODUCT_FLOATS);
    wgrad<64, true>(p, x, dy, dw, shared);
}

KERNEL(256) conv2d_wgrad_vec4_large_f32(Conv2dParams p, const float *x, const float *dy, float *dw) {
    SMEM(float, shared, PRODUCT_FLOATS);
    wgrad<128, true>(p, x, dy, dw, shared);
}

// ------------------------------------------------------------------------------------------------ bias gradient and parts

// db[o] = sum over the pixels of a part of dy[pixel, o]: column sums, a part along y.
template <int N> DEVICE void dbias(const Conv2dParams &p, const float *dy, float *db, float *shares) {
    Columns at = columns<N>(p.o, blockIdx.x);
    u32 pixels = p.n * p.p * p.q, part = (pixels + p.parts - 1) / p.parts;
    u32 first = least(blockIdx.y * part, pixels), end = least(first + part, pixels);
    float total[N] = {};
    if (at.inside) {
        for (u32 r = first + at.row; r < end; r += at.step) {
            Pack<N> v = load<N>(dy + r * p.o + at.channel);
            UNROLL for (int k = 0; k < N; k++) total[k] += v.v[k];
        }
    }
    add_rows<N>(total, shares, at);
    if (at.inside && at.row == 0) {
        Pack<N> out;
        UNROLL for (int k = 0; k < N; k++) out.v[k] = total[k];
        store(db + blockIdx.y * p.o + at.channel, out);
    }
}

KERNEL(256) conv2d_dbias_f32(Conv2dParams p, const float *dy, float *db) {
    SMEM(float, shares, 4 * 256);
    if (p.o % 4 == 0) dbias<4>(p, dy, db, shares);
    else dbias<1>(p, dy, db, shares);
}

struct SumParams { u32 len, parts; };

// out[i] = sum over parts of sums[part][i]; a thread owns four elements.
template <int N> DEVICE void sum_parts(SumParams p, u32 i, const float *sums, float *out) {
    Pack<N> total = {};
    for (u32 part = 0; part < p.parts; part++) {
        Pack<N> v = load<N>(sums + part * p.len + i);
        UNROLL for (int k = 0; k < N; k++) total.v[k] += v.v[k];
    }
    store(out + i, total);
}

KERNEL(256) conv2d_sum_f32(SumParams p, const float *sums, float *out) {
    u32 i = 4 * flat_id();
    if (p.len % 4 == 0) {
        if (i < p.len) sum_parts<4>(p, i, sums, out);
    } else {
        for (u32 end = least(i + 4, p.len); i < end; i++) sum_parts<1>(p, i, sums, out);
    }
}
