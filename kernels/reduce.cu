// Sums over blocks of rows: x [rows, channels] -> sum [blocks, channels], in f32; who owns what is in columns.cuh. Bytes: x once, the
// sums once. Memory-bound.

#include "common.cuh"
#include "columns.cuh"

struct SumRowsParams { u32 rows, channels, rows_per_block, blocks; };

template <int N> DEVICE void sum_rows(SumRowsParams p, const Real *x, float *sum, float *shares) {
    Columns at = columns<N>(p.channels, blockIdx.x);
    u32 first = blockIdx.y * p.rows_per_block, end = least(first + p.rows_per_block, p.rows);
    float total[N] = {};
    if (at.inside) {
        for (u32 r = first + at.row; r < end; r += at.step) {
            Pack<N> v = load<N>(x + r * p.channels + at.channel);
            UNROLL for (int k = 0; k < N; k++) total[k] += v.v[k];
        }
    }
    add_rows<N>(total, shares, at);
    if (at.inside && at.row == 0) {
        Pack<N> out;
        UNROLL for (int k = 0; k < N; k++) out.v[k] = total[k];
        store(sum + blockIdx.y * p.channels + at.channel, out);
    }
}

KERNEL(256) OF(sum_rows_fwd)(SumRowsParams p, const Real *x, float *sum) {
    SMEM(float, shares, 4 * 256);
    if (p.channels % 4 == 0) sum_rows<4>(p, x, sum, shares);
    else sum_rows<1>(p, x, sum, shares);
}
