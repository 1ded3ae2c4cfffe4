// Norm of a gradient and the factor of a step; formulas in src/ops/clip_grad_norm.rs. A block sums the squares of a piece, a thread
// four elements at a time; one block adds the pieces and writes norm and factor. Bytes: the gradient once. Memory-bound.

#include "common.cuh"

struct PartsParams { u32 len, piece; float inv_scale; };
struct FinishParams { u32 parts; float max_norm, inv_scale; };

template <int N> DEVICE float squares(const float *grad, float scale) {
    Pack<N> g = load<N>(grad);
    float sum = 0.0f;
    UNROLL for (int k = 0; k < N; k++) sum += (g.v[k] * scale) * (g.v[k] * scale);
    return sum;
}

KERNEL(256) clip_grad_norm_parts_f32(PartsParams p, const float *grad, float *parts) {
    SMEM(float, shares, 8);
    u32 first = blockIdx.x * p.piece, end = least(first + p.piece, p.len);
    float sum = 0.0f;
    for (u32 i = first + 4 * threadIdx.x; i < end; i += 4 * 256) {
        if (i + 4 <= end) {
            sum += squares<4>(grad + i, p.inv_scale);
        } else {
            for (u32 j = i; j < end; j++) sum += squares<1>(grad + j, p.inv_scale);
        }
    }
    sum = block_sum(sum, shares);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One block.
KERNEL(256) clip_grad_norm_finish_f32(FinishParams p, const float *parts, float *control) {
    SMEM(float, shares, 8);
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < p.parts; i += 256) sum += parts[i];
    float norm = sqrtf(block_sum(sum, shares));
    if (threadIdx.x != 0) return;
    float clip = p.max_norm > 0.0f ? fminf(p.max_norm / (norm + 1e-6f), 1.0f) : 1.0f;
    control[0] = norm;
    // Neither a NaN nor an infinity is at most the largest number.
    control[1] = norm <= 3.402823466e38f ? p.inv_scale * clip : 0.0f;
}
