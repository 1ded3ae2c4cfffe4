// Gradients of the 2D convolution in f16 and bf16, NHWC, as implicit matrix products on tensor cores; tile, pipeline and who owns what
// are in conv2d_mma.cuh, the order of blocks is that of conv2d_mma.cu.
//
//   dx[h, w, c] = sum over taps (r, s) and o of dy[p, q, o] w[o, r, s, c],  h = p stride + r - pad, w likewise     (16-bit)
//   dw[o, r, s, c] = sum over pixels of dy[pixel, o] x[pixel under (r, s), c]                                         (f32)
//
// Input gradient: a phase of the stride along z (see Phase). Rows are its pixels, along the sum over (tap, o); columns are input
// channels, side by side in the weight, so their fragments come from transposed loads. A phase that no tap hits writes zeros.
//
// Weight gradient: rows are (tap, c), columns o, both side by side, the sum runs over the pixels of a part (along z): so that the long side
// of a tall tile lies along kh kw c, which has hundreds where o may have 64. A row's 8 threads of a fragment are neighbours in dw, which
// fills a sector of 32 bytes. conv2d_sum_f32 adds the parts up. A pack keeps its tap; its pixel is counted up in (q, p, image) without
// division.
//
// Flop: 2 per product, padded up to whole tiles. Bytes: dx: dy once for every 128 (or 64) input channels, w once for every 128 (64) pixels of
// a phase; dw: x once for every 128 (64) output channels, dy once for every 128 (64) rows of (tap, c), both mostly out of L2; each part writes
// dw once. Registers of the large tiles: 230 to 252; a step of theirs is 234 (dx) and 243 (dw) instructions a warp, of which 64 are
// products, where forward has 178: on H100 issue is nearly as tight as the tensor cores. Not timed: no GPU. Limits: as conv2d_mma.cu, rows
// of dy too.

#include "conv2d_mma.cuh"

// ------------------------------------------------------------------------------------------------ input gradient

// Pixels of a phase, along the sum.
template <int BM, bool VEC> struct Sources {
    static constexpr int PASSES = Tile<BM, true>::PASSES;
    Share<BM, true, VEC> share;
    Conv2dParams p;
    u32 taps_r, taps_s;
    const Real *dy;
    Walk at, step;
    // Of each pixel: the index of what its first tap takes, and the taps inside (VEC), else row and column of the first; each further
    // tap lies a pixel before.
    u32 origin[PASSES], row[PASSES], column[PASSES];
    Taps taps[PASSES];

    DEVICE Sources(const Conv2dParams &p, const Phase &f, const Real *dy, u32 first) : p(p), taps_r(f.taps_r), taps_s(f.taps_s), dy(dy) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            u32 pixel = first + share.row + i * Tile<BM, true>::ROWS, image = pixel / (f.rows * f.cols);
            // The division is exact. A pixel past the last has a row beyond any image.
            u32 top = pixel / f.cols % f.rows + (f.row + p.pad_h - f.r) / p.stride_h;
            row[i] = image < p.n ? top : 0x80000000u;
            column[i] = pixel % f.cols + (f.col + p.pad_w - f.s) / p.stride_w;
            origin[i] = ((image * p.p + row[i]) * p.q + column[i]) * p.o;
            if constexpr (VEC) {
                taps[i].template add<false>(row[i], taps_r, p.p, 0);
                taps[i].template add<false>(column[i], taps_s, p.q, 16);
            }
        }
        if (taps_s > 0) {
            at.to(share.pack * 8, p.o, taps_s);
            step.to(STEP, p.o, taps_s);
        }
    }
    DEVICE u32 offset(const Walk &at) const { return at.c - (at.r * p.q + at.s) * p.o; }
    DEVICE bool inside(int i, const Walk &at) const { return at.r < taps_r && row[i] - at.r < p.p && column[i] - at.s < p.q; }
    DEVICE void fetch(uint4 *tile) {
        if constexpr (VEC) {
            u32 tap = Taps::of(at), from = offset(at);
            UNROLL for (int i = 0; i < PASSES; i++) share.move(i, tile, dy, origin[i] + from, taps[i].has(tap));
        } else if (p.o % 8 == 0) {
            UNROLL for (int i = 0; i < PASSES; i++) share.move(i, tile, dy, origin[i] + offset(at), inside(i, at));
        } else {
            Walk each = at;
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int i = 0; i < PASSES; i++) share.gather(i, j, dy, origin[i] + offset(each), inside(i, each));
                each.on(1, p.o, taps_s);
            }
        }
        at.on(step, p.o, taps_s);
    }
};

// Input channels, side by side in the weight.
template <int BN, bool VEC> struct Spread {
    static constexpr int PASSES = Tile<BN, false>::PASSES;
    Share<BN, false, VEC> share;
    const Real *w;
    // Over (o, column of taps, row of taps).
    Stride at;
    u32 outputs, taps_s, channels, c, k, end;

    DEVICE Spread(const Conv2dParams &p, const Phase &f, const Real *w, u32 first)
        : w(w), outputs(p.o), taps_s(f.taps_s), channels(p.c), c(first + share.pack * 8), k(share.row), end(f.taps_r * f.taps_s * p.o) {
        u32 step = Tile<BN, false>::ROWS, row = p.kw * p.c;
        if (taps_s > 0) at.start(k, step, p.o, taps_s, p.kh * row, p.stride_w * p.c, p.stride_h * row);
        at.index += f.r * row + f.s * p.c + c;
        if (VEC && c >= channels) end = 0;
    }
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            if (VEC || channels % 8 == 0) {
                share.move(i, tile, w, at.index, k < end && (VEC || c < channels));
            } else if constexpr (!VEC) {
                UNROLL for (int j = 0; j < 8; j++) share.gather(i, j, w, at.index + j, k < end && c + j < channels);
            }
            k += Tile<BN, false>::ROWS;
            at.on(outputs, taps_s);
        }
    }
};

// An input gradient is only rounded.
struct Plain {
    DEVICE Plain of(u32) const { return *this; }
    DEVICE float low(float sum) const { return sum; }
    DEVICE float high(float sum) const { return sum; }
};

// Rows of dx.
template <int BN> struct PhasePixels {
    Conv2dParams p;
    Phase f;
    Walk at, step;
    DEVICE PhasePixels(const Conv2dParams &p, const Phase &f, u32 first) : p(p), f(f) {
        at.to(first + threadIdx.x / Tile<BN, false>::PACKS, f.cols, f.rows);
        step.to(Tile<BN, false>::ROWS, f.cols, f.rows);
    }
    DEVICE u32 index() const {
        u32 row = at.s * p.stride_h + f.row, column = at.c * p.stride_w + f.col;
        return at.r < p.n ? ((at.r * p.h + row) * p.w + column) * p.c : NOWHERE;
    }
    DEVICE void on() { at.on(step, f.cols, f.rows); }
};

template <int BM, int BN, int STAGES, bool VEC> DEVICE void dgrad(const Conv2dParams &p, const Real *dy, const Real *w, Real *dx, uint4 *shared) {
    Phase f(p);
    u32 tiles = (p.c + BN - 1) / BN, row = blockIdx.x / tiles * BM, column = blockIdx.x % tiles * BN;
    if (row >= p.n * f.rows * f.cols) return;
    Sums<BM, BN> sums;
    Sources<BM, VEC> left(p, f, dy, row);
    Spread<BN, VEC> right(p, f, w, column);
    product<BM, BN, STAGES, true, false>(sums, left, right, f.taps_r * f.taps_s * p.o, shared);
    write<BM, BN>(sums, Plain{}, PhasePixels<BN>(p, f, row), dx, column, p.c, shared);
}

KERNEL(128, 3) OF(conv2d_dgrad)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 3));
    dgrad<64, 64, 3, false>(p, dy, w, dx, shared);
}

KERNEL(128, 4) OF(conv2d_dgrad_vec8)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 4));
    dgrad<64, 64, 4, true>(p, dy, w, dx, shared);
}

KERNEL(128, 3) OF(conv2d_dgrad_vec8_tall)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 64, 4));
    dgrad<128, 64, 4, true>(p, dy, w, dx, shared);
}

KERNEL(128, 2) OF(conv2d_dgrad_vec8_large)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 128, 3));
    dgrad<128, 128, 3, true>(p, dy, w, dx, shared);
}

// ------------------------------------------------------------------------------------------------ weight gradient

// (tap, input channel), side by side; a row is a pixel of the part.
template <int BM, bool VEC> struct Under {
    static constexpr int PASSES = Tile<BM, false>::PASSES;
    Share<BM, false, VEC> share;
    Conv2dParams p;
    const Real *x;
    u32 pixel, end;
    // The pack's first tap and channel (past the kernel's last row: no column), the pixel as (column, row, image) with the index of its
    // first tap.
    Walk tap;
    Stride at;
    // Of the pack's first tap: its place under pixel 0 (wraps in the border), its index from the pixel's.
    u32 top, left, from;

    DEVICE Under(const Conv2dParams &p, const Real *x, u32 first, u32 begin, u32 end) : p(p), x(x), pixel(begin + share.row), end(end) {
        tap.to(first + share.pack * 8, p.c, p.kw);
        u32 step = Tile<BM, false>::ROWS, row = p.w * p.c;
        at.start(pixel, step, p.q, p.p, p.stride_w * p.c, p.stride_h * row, p.h * row);
        at.index -= p.pad_h * row + p.pad_w * p.c;
        top = tap.r - p.pad_h, left = tap.s - p.pad_w;
        from = (tap.r * p.w + tap.s) * p.c + tap.c;
        if (VEC && tap.r >= p.kh) this->end = 0;
    }
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            u32 y = at.s * p.stride_h, z = at.c * p.stride_w;
            if (VEC || p.c % 8 == 0) {
                bool column = VEC || tap.r < p.kh;
                share.move(i, tile, x, at.index + from, pixel < end && column && y + top < p.h && z + left < p.w);
            } else if constexpr (!VEC) {
                Walk each = tap;
                UNROLL for (int j = 0; j < 8; j++) {
                    bool inside = pixel < end && each.r < p.kh && y + each.r - p.pad_h < p.h && z + each.s - p.pad_w < p.w;
                    share.gather(i, j, x, at.index + (each.r * p.w + each.s) * p.c + each.c, inside);
                    each.on(1, p.c, p.kw);
                }
            }
            pixel += Tile<BM, false>::ROWS;
            at.on(p.q, p.p);
        }
    }
};

// Output channels, side by side in dy.
template <int BN, bool VEC> struct Upstream {
    static constexpr int PASSES = Tile<BN, false>::PASSES;
    Share<BN, false, VEC> share;
    const Real *dy;
    // The pack's first channel; the index of the pack, and of the first pixel past the part.
    u32 channels, o, at, end;

    DEVICE Upstream(const Conv2dParams &p, const Real *dy, u32 first, u32 begin, u32 end)
        : dy(dy), channels(p.o), o(first + share.pack * 8), at((begin + share.row) * p.o + o), end(o < p.o ? end * p.o : 0) {}
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            if (VEC || channels % 8 == 0) {
                share.move(i, tile, dy, at, at < end);
            } else if constexpr (!VEC) {
                UNROLL for (int j = 0; j < 8; j++) share.gather(i, j, dy, at + j, at < end && o + j < channels);
            }
            at += Tile<BN, false>::ROWS * channels;
        }
    }
};

template <int BM, int BN, int STAGES, bool VEC>
DEVICE void wgrad(const Conv2dParams &p, const Real *x, const Real *dy, float *dw, uint4 *shared) {
    u32 tiles = (p.o + BN - 1) / BN, row = blockIdx.x / tiles * BM, column = blockIdx.x % tiles * BN;
    u32 pixels = p.n * p.p * p.q, part = (pixels + p.parts - 1) / p.parts;
    u32 begin = least(blockIdx.z * part, pixels), end = least(begin + part, pixels);
    Sums<BM, BN> sums;
    Under<BM, VEC> left(p, x, row, begin, end);
    Upstream<BN, VEC> right(p, dy, column, begin, end);
    product<BM, BN, STAGES, false, false>(sums, left, right, end - begin, shared);
    u32 numbers = p.kh * p.kw * p.c, lane = threadIdx.x % 32;
    row += warp_row<BM>() + lane / 4;
    column += warp_column<BN>() + lane % 4 * 2;
    dw += blockIdx.z * p.o * numbers;
    UNROLL for (int j = 0; j < BN / 16; j++) {
        UNROLL for (int e = 0; e < 4; e++) {
            u32 o = column + j * 8 + e % 2;
            UNROLL for (int i = 0; i < BM / 32; i++) {
                u32 k = row + i * 16 + e / 2 * 8;
                if (o < p.o && k < numbers) dw[o * numbers + k] = sums.v[i][j][e];
            }
        }
    }
}

KERNEL(128, 3) OF(conv2d_wgrad)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 3));
    wgrad<64, 64, 3, false>(p, x, dy, dw, shared);
}

KERNEL(128, 4) OF(conv2d_wgrad_vec8)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 4));
    wgrad<64, 64, 4, true>(p, x, dy, dw, shared);
}

KERNEL(128, 3) OF(conv2d_wgrad_vec8_tall)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 64, 4));
    wgrad<128, 64, 4, true>(p, x, dy, dw, shared);
}

KERNEL(128, 2) OF(conv2d_wgrad_vec8_large)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 128, 3));
    wgrad<128, 128, 3, true>(p, x, dy, dw, shared);
}
