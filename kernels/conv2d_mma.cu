// 2D convolution forward in f16 and bf16, NHWC, as an implicit matrix product on tensor cores:
//
//   y[pixel, o] = bias[o] + sum over (r, s, c) of x[pixel under (r, s), c] w[o, (r, s, c)],   sums and bias in f32
//
// Rows are output pixels, columns output channels, both operands lie along the sum; the tile, its pipeline and who owns what are in
// conv2d_mma.cuh. Blocks are counted with the columns innermost, so that the blocks that read the same pixels run together and share
// them in the L2 cache. A thread's packs are of pixels 32 apart, at the same place of the sum, so one walk over (tap, channel) serves
// them all; a pixel costs two registers, its index and which of its taps lie in the image.
//
// What ends a product is one struct (Bias, in conv2d_ends_mma.cu Norm): asked once for a pair of columns, it is given their sums in f32.
//
// Tiles, the largest of which there are enough (src/ops/conv2d/cuda.rs): 128 x 128, 128 x 64 for few output channels, 64 x 64 for
// small problems and for channel counts that are no multiple of 8. Each of four warps owns a quarter:
//
//   tile        warp      registers  shared    blocks an SM          16 along the sum: cycles of shared memory / of tensor cores
//   128 x 128   64 x 64   217-235    48 KiB    2                     32 / 64 on A100, 32 on H100
//   128 x 64    64 x 32   145-154    48 KiB    3 (2 on sm_86, 89)    24 / 32 on A100, 16 on H100
//   64 x 64     32 x 32    95-104    32 KiB    4 (3 on sm_86, 89)    16 / 16 on A100,  8 on H100
//
// A step of 32 is 178, 129 and 102 instructions a warp (sm_80), of which 64, 32 and 16 are products: a scheduler issues one a cycle, a
// product keeps its tensor core busy for 8 cycles on A100 and 4 on H100, so the small tile is bound by issue on H100.
// (An SM reads 128 bytes a cycle of shared memory, its tensor cores make 1024 products a cycle on A100, 2048 on H100 at the most.)
// Flop: 2 per product, padded up to whole tiles. Bytes: x once for every tile of output channels, w once for every tile of pixels; a large
// tile asks L2 for a byte every 32 products, that is for 32 bytes a cycle and SM on A100 and 64 on H100, which is more than L2 gives there.
// Predictions, not timed (no GPU): large tiles come near what mma.sync can do on A100, and are bound by L2 at half to three quarters of
// it on H100; 1 x 1 convolutions of up to 128 channels are bound by device memory on both. To try first with a GPU: copies of x by way of
// L1 (taps that follow one another read nearly the same pixels), and tiles of 256 x 128.
//
// Limits: tensors of less than 2^31 elements; in the vec8 variants rows of x and w at multiples of 16 bytes and kernels of up to 12 x 12.

#include "conv2d_fwd_mma.cuh"

template <int BM, int BN, int STAGES, bool VEC>
DEVICE void forward(const Conv2dParams &p, const Real *x, const Real *w, const float *bias, Real *y, uint4 *shared) {
    u32 tiles = column_tiles<BN>(p);
    Sums<BM, BN> sums;
    multiply_tile<BM, BN, STAGES, VEC>(p, x, w, sums, shared);
    Bias end{p.bias ? bias : nullptr, p.o};
    write<BM, BN>(sums, end, Pixels<BN>(p, first_row<BM>(tiles)), y, first_column<BN>(tiles), p.o, shared);
}

KERNEL(128, 3) OF(conv2d_fwd)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 3));
    forward<64, 64, 3, false>(p, x, w, bias, y, shared);
}

KERNEL(128, 4) OF(conv2d_fwd_vec8)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, 4));
    forward<64, 64, 4, true>(p, x, w, bias, y, shared);
}

KERNEL(128, 3) OF(conv2d_fwd_vec8_tall)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 64, 4));
    forward<128, 64, 4, true>(p, x, w, bias, y, shared);
}

KERNEL(128, 2) OF(conv2d_fwd_vec8_large)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(128, 128, 3));
    forward<128, 128, 3, true>(p, x, w, bias, y, shared);
}
