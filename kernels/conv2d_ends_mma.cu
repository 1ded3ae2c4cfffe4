// 2D convolutions forward in f16 and bf16 that end in more than a bias: with the statistics that a batch norm needs of y, or with a whole
// norm, residual and activation. The product is conv2d_mma.cu's, tile for tile.
//
// Statistics are taken in a warp's registers, without a barrier: some 600 instructions a warp of a large tile, beside 178 for each 32 of
// its sum; y (32 KiB a large tile) is not read again for them. A part is 2 numbers a channel of 64 pixels (32 of a small tile).
// Predictions, not timed (no GPU): of a 1 x 1 convolution of 64 channels, which is bound by memory, a third of the traffic of convolution
// and statistics goes (x, y, y again); from 3 x 3 convolutions of 128 channels on it is below a tenth of the time either way.

#include "conv2d_fwd_mma.cuh"

// ------------------------------------------------------------------------------------------------ statistics

// What is stored of a sum.
DEVICE float stored(float sum) { return to_float(rounded<Real>(sum)); }

// The sum over the eight rows of a fragment, for all of its lanes.
DEVICE float over_rows(float v) {
    UNROLL for (int lane = 4; lane < 32; lane *= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

// Mean and sum of squared deviations from it of each column over a warp's BM / 2 rows: part [blocks of BM / 2 pixels, 2, o]. Both are taken
// of the rounded sums in registers, one after the other, so a mean far from zero costs no more than its rounding has. Pixels past
// the last do not count.
template <int BM, int BN> DEVICE void statistics(const Conv2dParams &p, const Sums<BM, BN> &sums, float *part) {
    u32 tiles = column_tiles<BN>(p), first = first_row<BM>(tiles) + warp_row<BM>(), pixels = p.n * p.p * p.q;
    if (first >= pixels) return;
    u32 rows = least(BM / 2, pixels - first), g = threadIdx.x % 32 / 4;
    float share = 1.0f / float(rows);
    float *out = part + first / (BM / 2) * 2 * p.o;
    UNROLL for (int j = 0; j < BN / 16; j++) {
        u32 column = first_column<BN>(tiles) + warp_column<BN>() + j * 8 + threadIdx.x % 4 * 2;
        UNROLL for (int k = 0; k < 2; k++) {
            float mean = 0.0f, m2 = 0.0f;
            UNROLL for (int i = 0; i < BM / 16; i++) {
                if (i * 8 + g < rows) mean += stored(sums.v[i / 2][j][i % 2 * 2 + k]);
            }
            mean = over_rows(mean) * share;
            UNROLL for (int i = 0; i < BM / 16; i++) {
                float d = i * 8 + g < rows ? stored(sums.v[i / 2][j][i % 2 * 2 + k]) - mean : 0.0f;
                m2 += d * d;
            }
            m2 = over_rows(m2);
            if (g == 0 && column + k < p.o) out[column + k] = mean, out[p.o + column + k] = m2;
        }
    }
}

template <int BM, int BN, int STAGES, bool VEC>
DEVICE void with_statistics(const Conv2dParams &p, const Real *x, const Real *w, float *part, Real *y, uint4 *shared) {
    u32 tiles = column_tiles<BN>(p);
    Sums<BM, BN> sums;
    multiply_tile<BM, BN, STAGES, VEC>(p, x, w, sums, shared);
    statistics<BM, BN>(p, sums, part);
    write<BM, BN>(sums, Bias{nullptr, p.o}, Pixels<BN>(p, first_row<BM>(tiles)), y, first_column<BN>(tiles), p.o, shared);
}

KERNEL(128, 3) OF(conv2d_stats)(Conv2dParams p, const Real *x, const Real *w, float *part, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 3));
    with_statistics<64, 64, 3, false>(p, x, w, part, y, shared);
}

KERNEL(128, 4) OF(conv2d_stats_vec8)(Conv2dParams p, const Real *x, const Real *w, float *part, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 4));
    with_statistics<64, 64, 4, true>(p, x, w, part, y, shared);
}

KERNEL(128, 3) OF(conv2d_stats_vec8_tall)(Conv2dParams p, const Real *x, const Real *w, float *part, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 64, 4));
    with_statistics<128, 64, 4, true>(p, x, w, part, y, shared);
}

KERNEL(128, 2) OF(conv2d_stats_vec8_large)(Conv2dParams p, const Real *x, const Real *w, float *part, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 128, 3));
    with_statistics<128, 128, 3, true>(p, x, w, part, y, shared);
}

// ------------------------------------------------------------------------------------------------ norm

// y = act((sum - mean) * scale + shift + residual), by a norm's table [4, o] (src/ops/batch_norm.rs). The residual is added, and the sum
// activated, on the way from shared memory, where rows are whole: what lies there is rounded once, as a conv2d's output is.
struct Norm {
    Conv2dParams p;
    const float *table;
    const Real *residual;
    static constexpr bool CHANGES = true;

    struct Line {
        float mean, scale, shift;
    };
    struct Pair {
        Conv2dParams p;
        Line first, second;
        DEVICE float end(float sum, const Line &at) const {
            float z = (sum - at.mean) * at.scale + at.shift;
            return p.residual ? z : activated(p, z);
        }
        DEVICE float low(float sum) const { return end(sum, first); }
        DEVICE float high(float sum) const { return end(sum, second); }
    };
    DEVICE Line line(u32 column) const {
        if (column >= p.o) return Line{};
        return Line{table[column], table[2 * p.o + column], table[3 * p.o + column]};
    }
    DEVICE Pair of(u32 column) const { return Pair{p, line(column), line(column + 1)}; }

    template <int N> DEVICE void operator()(Pack<N> &z, u32 index) const {
        if (!p.residual) return;
        Pack<N> more = load<N>(residual + index);
        UNROLL for (int k = 0; k < N; k++) z.v[k] = activated(p, z.v[k] + more.v[k]);
    }
};

template <int BM, int BN, int STAGES, bool VEC>
DEVICE void with_norm(const Conv2dParams &p, const Real *x, const Real *w, const float *table, const Real *residual, Real *y, uint4 *shared) {
    u32 tiles = column_tiles<BN>(p);
    Sums<BM, BN> sums;
    multiply_tile<BM, BN, STAGES, VEC>(p, x, w, sums, shared);
    Norm end{p, table, residual};
    write<BM, BN>(sums, end, Pixels<BN>(p, first_row<BM>(tiles)), y, first_column<BN>(tiles), p.o, shared, end);
}

KERNEL(128, 3) OF(conv2d_norm)(Conv2dParams p, const Real *x, const Real *w, const float *table, const Real *residual, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 3));
    with_norm<64, 64, 3, false>(p, x, w, table, residual, y, shared);
}

KERNEL(128, 4) OF(conv2d_norm_vec8)(Conv2dParams p, const Real *x, const Real *w, const float *table, const Real *residual, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 4));
    with_norm<64, 64, 4, true>(p, x, w, table, residual, y, shared);
}

KERNEL(128, 3) OF(conv2d_norm_vec8_tall)(Conv2dParams p, const Real *x, const Real *w, const float *table, const Real *residual, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 64, 4));
    with_norm<128, 64, 4, true>(p, x, w, table, residual, y, shared);
}

KERNEL(128, 2) OF(conv2d_norm_vec8_large)(Conv2dParams p, const Real *x, const Real *w, const float *table, const Real *residual, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 128, 3));
    with_norm<128, 128, 3, true>(p, x, w, table, residual, y, shared);
}
