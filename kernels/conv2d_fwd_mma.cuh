// The forward product on tensor cores and its operands, of which conv2d_mma.cu tells: what it and conv2d_ends_mma.cu share.

#include "conv2d_mma.cuh"

// Output pixels, along the sum.
template <int BM, bool VEC> struct Windows {
    static constexpr int PASSES = Tile<BM, true>::PASSES;
    Share<BM, true, VEC> share;
    Conv2dParams p;
    const Real *x;
    Walk at, step;
    // Of each pixel: the index of its first tap, and the taps inside (VEC), else the row and column of the first.
    u32 origin[PASSES], row[PASSES], column[PASSES];
    Taps taps[PASSES];

    DEVICE Windows(const Conv2dParams &p, const Real *x, u32 first) : p(p), x(x) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            u32 pixel = first + share.row + i * Tile<BM, true>::ROWS, image = pixel / (p.p * p.q);
            // What lies above or left of the image wraps to something large; so does a pixel past the last.
            row[i] = pixel < p.n * p.p * p.q ? pixel / p.q % p.p * p.stride_h - p.pad_h : 0x80000000u;
            column[i] = pixel % p.q * p.stride_w - p.pad_w;
            origin[i] = ((image * p.h + row[i]) * p.w + column[i]) * p.c;
            if constexpr (VEC) {
                taps[i].template add<true>(row[i], p.kh, p.h, 0);
                taps[i].template add<true>(column[i], p.kw, p.w, 16);
            }
        }
        at.to(share.pack * 8, p.c, p.kw);
        step.to(STEP, p.c, p.kw);
    }
    DEVICE u32 offset(const Walk &at) const { return (at.r * p.w + at.s) * p.c + at.c; }
    DEVICE bool inside(int i, const Walk &at) const { return at.r < p.kh && row[i] + at.r < p.h && column[i] + at.s < p.w; }
    DEVICE void fetch(uint4 *tile) {
        if constexpr (VEC) {
            u32 tap = Taps::of(at), from = offset(at);
            UNROLL for (int i = 0; i < PASSES; i++) share.move(i, tile, x, origin[i] + from, taps[i].has(tap));
        } else if (p.c % 8 == 0) {
            UNROLL for (int i = 0; i < PASSES; i++) share.move(i, tile, x, origin[i] + offset(at), inside(i, at));
        } else {
            Walk each = at;
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int i = 0; i < PASSES; i++) share.gather(i, j, x, origin[i] + offset(each), inside(i, each));
                each.on(1, p.c, p.kw);
            }
        }
        at.on(step, p.c, p.kw);
    }
};

// Output channels, along the sum: rows of the weight.
template <int BN, bool VEC> struct Filters {
    static constexpr int PASSES = Tile<BN, true>::PASSES;
    Share<BN, true, VEC> share;
    const Real *w;
    u32 o, channels, k, end;

    DEVICE Filters(const Conv2dParams &p, const Real *w, u32 first)
        : w(w), o(first + share.row), channels(p.o), k(share.pack * 8), end(p.kh * p.kw * p.c) {}
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            u32 row = o + i * Tile<BN, true>::ROWS;
            if (VEC || end % 8 == 0) {
                share.move(i, tile, w, row * end + k, row < channels && k < end);
            } else if constexpr (!VEC) {
                UNROLL for (int j = 0; j < 8; j++) share.gather(i, j, w, row * end + k + j, row < channels && k + j < end);
            }
        }
        k += STEP;
    }
};

// How a forward product ends.
struct Bias {
    const float *bias;
    u32 columns;

    struct Pair {
        float first, second;
        DEVICE float low(float sum) const { return sum + first; }
        DEVICE float high(float sum) const { return sum + second; }
    };
    DEVICE Pair of(u32 column) const {
        return Pair{bias && column < columns ? bias[column] : 0.0f, bias && column + 1 < columns ? bias[column + 1] : 0.0f};
    }
};

// Rows of y.
template <int BN> struct Pixels {
    u32 pixel, end, columns;
    DEVICE Pixels(const Conv2dParams &p, u32 first) : pixel(first + threadIdx.x / Tile<BN, false>::PACKS), end(p.n * p.p * p.q), columns(p.o) {}
    DEVICE u32 index() const { return pixel < end ? pixel * columns : NOWHERE; }
    DEVICE void on() { pixel += Tile<BN, false>::ROWS; }
};

// Where the block's tile begins.
template <int BM> DEVICE u32 first_row(u32 tiles) { return blockIdx.x / tiles * BM; }
template <int BN> DEVICE u32 first_column(u32 tiles) { return blockIdx.x % tiles * BN; }
template <int BN> DEVICE u32 column_tiles(const Conv2dParams &p) { return (p.o + BN - 1) / BN; }

template <int BM, int BN, int STAGES, bool VEC>
DEVICE void multiply_tile(const Conv2dParams &p, const Real *x, const Real *w, Sums<BM, BN> &sums, uint4 *shared) {
    u32 tiles = column_tiles<BN>(p);
    Windows<BM, VEC> left(p, x, first_row<BM>(tiles));
    Filters<BN, VEC> right(p, w, first_column<BN>(tiles));
    product<BM, BN, STAGES, true, true>(sums, left, right, p.kh * p.kw * p.c, shared);
}
