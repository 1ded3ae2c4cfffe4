// Each instruction of tensor_cores.cuh alone, so that the hardware and the emulated device can be compared:
//
//   product = a b,   a [16, 16], b [16, 8] (row-major);   shifted = a, its rows moved down by one, the first of zeros;   powers = 2^b
//
// One warp. a is fetched by copy_async in two groups of which the first is used before the second is there, b with transposed loads;
// the product comes from mma16, `shifted` from copies of rows of which one is not inside.

#include "tensor_cores.cuh"

struct Params { u32 unused; };

KERNEL(32) OF(tensor_cores)(Params, const Real *a, const Real *b, float *product, Real *shifted,
    float *powers) {
    SMEM(Real, left, 16 * 16);
    SMEM(Real, right, 16 * 8);
    SMEM(Real, moved, 16 * 16);
    u32 lane = threadIdx.x, row = lane / 2, part = lane % 2 * 8;
    copy_async(left + row * 16 + part, a + row * 16 + part, true);
    if (lane < 16) copy_async(right + lane * 8, b + lane * 8, true);
    copy_async_commit();
    copy_async(moved + row * 16 + part, a + (row == 0 ? 0 : row - 1) * 16 + part, row > 0);
    copy_async_commit();
    copy_async_wait(1);
    __syncwarp();
    u32 fragment[4], column[2], pair[2];
    // Matrices in the order of a's registers: rows 0..8 and 8..16 of columns 0..8, then of 8..16.
    load_matrices(fragment, left + lane % 16 * 16 + lane / 16 * 8);
    load_matrices_transposed(column, right + lane % 16 * 8);
    float sums[4] = {};
    mma16(sums, fragment, column, Real{});
    UNROLL for (int i = 0; i < 4; i++) product[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
    UNROLL for (int i = 0; i < 4; i++) powers[4 * lane + i] = exp2_fast(to_float(right[4 * lane + i]));
    copy_async_wait(0);
    __syncwarp();
    // The same matrices again, two at a time and not transposed.
    UNROLL for (int half = 0; half < 2; half++) {
        load_matrices(pair, moved + lane % 16 * 16 + half * 8);
        UNROLL for (int i = 0; i < 2; i++) {
            Real *to = shifted + (lane / 4 + i * 8) * 16 + half * 8 + lane % 4 * 2;
            to[0] = rounded<Real>(low_of<Real>(pair[i]));
            to[1] = rounded<Real>(high_of<Real>(pair[i]));
        }
    }
}
