// 2D convolutions forward in f32 that end in more than a bias: with the statistics that a batch norm needs of y, or with a whole norm,
// residual and activation. The product is conv2d.cu's, tile for tile.
//
// Statistics: a pass over y less, for 2 numbers a channel of each 64 pixels (1/32 of y) and, in a block's end, four
// exchanges of a tile's rows through shared memory. Norm: no pass but this one; the residual is read once.
// Predictions, not timed (no GPU): the end is hidden behind other blocks' products.

#include "common.cuh"
#include "conv2d_tiles.cuh"

// ------------------------------------------------------------------------------------------------ statistics

// Adds each column over the rows of threads, for all of them: a pair of rows in a warp, then the warps in order. `shares` has 8 B floats.
template <int B> DEVICE void over_rows(float (&v)[B / 16], float *shares) {
    u32 tx = threadIdx.x % 16;
    float *mine = shares + threadIdx.x / 32 * B;
    UNROLL for (int j = 0; j < B / 16; j++) v[j] += __shfl_xor_sync(0xffffffffu, v[j], 16);
    UNROLL for (int j = 0; j < B / 16; j += 4) {
        if (threadIdx.x % 32 < 16) store(mine + place_of(tx, j), Pack<4>{{v[j], v[j + 1], v[j + 2], v[j + 3]}});
    }
    __syncthreads();
    UNROLL for (int j = 0; j < B / 16; j += 4) {
        Pack<4> total = load<4>(shares + place_of(tx, j));
        UNROLL for (int warp = 1; warp < 8; warp++) {
            Pack<4> more = load<4>(shares + warp * B + place_of(tx, j));
            UNROLL for (int k = 0; k < 4; k++) total.v[k] += more.v[k];
        }
        UNROLL for (int k = 0; k < 4; k++) v[j + k] = total.v[k];
    }
}

// Mean and sum of squared deviations from it of each column, over each 64 rows of the tile: part [blocks of 64 pixels, 2, o]. Both are
// taken of the sums in registers, one after the other, so a mean far from zero costs no accuracy. Pixels past the last do not count.
template <int B> DEVICE void statistics(const Conv2dParams &p, const float (&sums)[B / 16][B / 16], float *part, float *shared) {
    constexpr int T = B / 16;
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, pixels = p.n * p.p * p.q;
    UNROLL for (int part_of = 0; part_of < B / 64; part_of++) {
        u32 first = blockIdx.x * B + part_of * 64;
        if (first >= pixels) continue;
        u32 rows = least(64, pixels - first), mine = rows > ty * 4 ? rows - ty * 4 : 0;
        float *shares = shared + part_of * 16 * B;
        float mean[T] = {}, m2[T] = {};
        UNROLL for (int i = 0; i < 4; i++) {
            UNROLL for (int j = 0; j < T; j++) mean[j] += u32(i) < mine ? sums[part_of * 4 + i][j] : 0.0f;
        }
        over_rows<B>(mean, shares);
        UNROLL for (int j = 0; j < T; j++) mean[j] /= float(rows);
        UNROLL for (int i = 0; i < 4; i++) {
            UNROLL for (int j = 0; j < T; j++) {
                float d = u32(i) < mine ? sums[part_of * 4 + i][j] - mean[j] : 0.0f;
                m2[j] += d * d;
            }
        }
        over_rows<B>(m2, shares + 8 * B);
        if (ty != 0) continue;
        float *out = part + first / 64 * 2 * p.o;
        UNROLL for (int j = 0; j < T; j++) {
            u32 column = blockIdx.y * B + place_of(tx, j);
            if (column < p.o) out[column] = mean[j], out[p.o + column] = m2[j];
        }
    }
}

template <int B, bool VEC> DEVICE void with_statistics(const Conv2dParams &p, const float *x, const float *w, float *part, float *y, float *shared) {
    float sums[B / 16][B / 16] = {};
    multiply<B, VEC>(p, x, w, sums, shared);
    store_pixels<B>(p, sums, nullptr, y);
    statistics<B>(p, sums, part, shared);
}

KERNEL(256) conv2d_stats_f32(Conv2dParams p, const float *x, const float *w, float *part, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    with_statistics<64, false>(p, x, w, part, y, shared);
}

KERNEL(256) conv2d_stats_vec4_f32(Conv2dParams p, const float *x, const float *w, float *part, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    with_statistics<64, true>(p, x, w, part, y, shared);
}

KERNEL(256) conv2d_stats_vec4_large_f32(Conv2dParams p, const float *x, const float *w, float *part, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    with_statistics<128, true>(p, x, w, part, y, shared);
}

// ------------------------------------------------------------------------------------------------ norm
// y = act((sum - mean) * scale + shift + residual), mean, scale and shift by a norm's table [4, o] (src/ops/batch_norm.rs).

// Four columns from `column` on of a row of so many; zeros past its end.
DEVICE Pack<4> four(const float *row, u32 column, u32 columns) {
    Pack<4> v = {};
    if (columns % 4 == 0) {
        if (column < columns) v = load<4>(row + column);
    } else {
        UNROLL for (int k = 0; k < 4; k++) {
            if (column + k < columns) v.v[k] = row[column + k];
        }
    }
    return v;
}

template <int B, bool VEC>
DEVICE void with_norm(const Conv2dParams &p, const float *x, const float *w, const float *table, const float *residual, float *y, float *shared) {
    float sums[B / 16][B / 16] = {};
    multiply<B, VEC>(p, x, w, sums, shared);
    UNROLL for (int j = 0; j < B / 16; j += 4) {
        u32 column = blockIdx.y * B + place_of(threadIdx.x % 16, j);
        Pack<4> mean = four(table, column, p.o), scale = four(table + 2 * p.o, column, p.o), shift = four(table + 3 * p.o, column, p.o);
        UNROLL for (int i = 0; i < B / 16; i++) {
            u32 pixel = blockIdx.x * B + place_of(threadIdx.x / 16, i);
            Pack<4> more = {};
            if (p.residual && pixel < p.n * p.p * p.q) more = four(residual + pixel * p.o, column, p.o);
            UNROLL for (int k = 0; k < 4; k++) {
                float z = (sums[i][j + k] - mean.v[k]) * scale.v[k] + shift.v[k];
                sums[i][j + k] = activated(p, z + more.v[k]);
            }
        }
    }
    store_pixels<B>(p, sums, nullptr, y);
}

KERNEL(256) conv2d_norm_f32(Conv2dParams p, const float *x, const float *w, const float *table, const float *residual, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    with_norm<64, false>(p, x, w, table, residual, y, shared);
}

KERNEL(256) conv2d_norm_vec4_f32(Conv2dParams p, const float *x, const float *w, const float *table, const float *residual, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    with_norm<64, true>(p, x, w, table, residual, y, shared);
}

KERNEL(256) conv2d_norm_vec4_large_f32(Conv2dParams p, const float *x, const float *w, const float *table, const float *residual, float *y) {
    SMEM(float, shared, PRODUCT_FLOATS);
    with_norm<128, true>(p, x, w, table, residual, y, shared);
}
