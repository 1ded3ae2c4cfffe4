// Kernels with one fault each, for the tests of the emulated device (src/backend/cuda_emu.rs). They are compiled for nothing else.

#include "../tensor_cores.cuh"

struct FaultParams { u32 len; };

KERNEL(64) fault_none_f32(FaultParams p, const float *x, float *y) {
    DYN_SMEM(float, tile);
    u32 i = flat_id();
    tile[threadIdx.x] = i < p.len ? x[i] : 0.0f;
    __syncthreads();
    float sum = block_sum(tile[63 - threadIdx.x], tile);
    if (i < p.len) y[i] = x[i] + 0.0f * sum;
}

// Reads one element past its input.
KERNEL(64) fault_read_past_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i < p.len) y[i] = x[i + 64];
}

// Writes just past its output.
KERNEL(64) fault_write_past_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i <= p.len) y[i] = x[i % p.len];
}

// Writes before its output.
KERNEL(64) fault_write_before_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i < p.len) y[i] = x[i];
    if (i == 7) y[-1] = 1.0f;
}

// Writes to what it is said to read.
KERNEL(64) fault_write_input_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i < p.len) y[i] = x[i];
    if (i == 5) const_cast<float *>(x)[5] = 1.0f;
}

// Two halves of a block wait at different barriers.
KERNEL(64) fault_divergent_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    if (i < p.len) y[i] = x[i];
}

// A thread leaves while the others wait for it.
KERNEL(64) fault_early_return_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i >= p.len) return;
    __syncthreads();
    y[i] = x[i];
}

// Uses shared memory that nobody wrote.
KERNEL(64) fault_unwritten_f32(FaultParams p, const float *x, float *y) {
    DYN_SMEM(float, tile);
    u32 i = flat_id();
    if (threadIdx.x != 9) tile[threadIdx.x] = 1.0f;
    __syncthreads();
    if (i < p.len) y[i] = x[i] + fmaxf(tile[threadIdx.x], 1.0f);
}

// Reads a neighbour's number without a barrier.
KERNEL(64) fault_race_f32(FaultParams p, const float *x, float *y) {
    DYN_SMEM(float, tile);
    u32 i = flat_id();
    tile[threadIdx.x] = i < p.len ? x[i] : 0.0f;
    if (i < p.len) y[i] = tile[(threadIdx.x + 1) % 64];
}

// Blocks that add to one number.
KERNEL(64) fault_blocks_race_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i < p.len) y[i] = x[i];
    if (threadIdx.x == 0) y[0] = float(blockIdx.x);
}

// Half of a warp shuffles with all of it.
KERNEL(64) fault_shuffle_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    float v = 0.0f;
    if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    if (i < p.len) y[i] = x[i] + v;
}

// Writes past a shared array.
KERNEL(64) fault_shared_f32(FaultParams p, const float *x, float *y) {
    SMEM(float, tile, 63);
    u32 i = flat_id();
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    if (i < p.len) y[i] = x[i] + tile[0];
}

// Touches more dynamic shared memory than the launch gives.
KERNEL(64) fault_dynamic_f32(FaultParams p, const float *x, float *y) {
    DYN_SMEM(float, tile);
    u32 i = flat_id();
    tile[threadIdx.x + 64] = 1.0f;
    if (i < p.len) y[i] = x[i];
}

KERNEL(64) fault_division_u32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id();
    if (i < p.len) y[i] = x[i] + float(i / (p.len - 100));
}

// Uses what an asynchronous copy brings before it has waited for it.
KERNEL(64) fault_unwaited_f32(FaultParams p, const float *x, float *y) {
    SMEM(float, tile, 64 * 4);
    u32 i = flat_id();
    copy_async(tile + 4 * threadIdx.x, x + 4 * (threadIdx.x % 16), true);
    copy_async_commit();
    if (i < p.len) y[i] = x[i] + fmaxf(tile[4 * threadIdx.x], 1.0f);
}

// Copies to an address that is no multiple of 16.
KERNEL(64) fault_misaligned_f32(FaultParams p, const float *x, float *y) {
    SMEM(float, tile, 64 * 4 + 1);
    u32 i = flat_id();
    copy_async(tile + 4 * threadIdx.x + 1, x, true);
    copy_async_commit();
    copy_async_wait(0);
    if (i < p.len) y[i] = x[i] + 0.0f * tile[4];
}

// A lane that does not take part in its warp's product.
KERNEL(64) fault_lane_missing_f32(FaultParams p, const float *x, float *y) {
    u32 i = flat_id(), a[4] = {}, b[2] = {};
    float c[4] = {};
    if (threadIdx.x != 40) mma16(c, a, b, f16{});
    if (i < p.len) y[i] = x[i] + c[0];
}
