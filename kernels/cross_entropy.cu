// Softmax cross-entropy; formulas in src/ops/cross_entropy.rs. rows [N, 3]: loss, weight, log-sum-exp of each row.
//
// Forward: a warp owns a row, then one block sums the rows in a fixed order. Backward: a thread owns a logit. Bytes: the logits
// three times out of the cache, rows once; backward logits and dlogits.

#include "common.cuh"

struct CrossEntropyParams { u32 rows, classes, weighted; float smoothing, nan; };

DEVICE float weight_of(CrossEntropyParams p, const float *weight, u32 k) { return p.weighted ? weight[k] : 1.0f; }

KERNEL(256) cross_entropy_fwd_f32(
    CrossEntropyParams p, const float *logits, const u32 *labels, const float *class_weight, float *rows) {
    u32 n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= p.rows) return;
    logits += n * p.classes;
    float top = logits[0];
    for (u32 k = lane; k < p.classes; k += 32) top = fmaxf(top, logits[k]);
    top = warp_max(top);
    float sum = 0.0f;
    for (u32 k = lane; k < p.classes; k += 32) sum += expf(logits[k] - top);
    float lse = top + logf(warp_sum(sum)), spread = 0.0f;
    if (p.smoothing > 0.0f) {
        for (u32 k = lane; k < p.classes; k += 32) spread += weight_of(p, class_weight, k) * (lse - logits[k]);
        spread = warp_sum(spread);
    }
    if (lane != 0) return;
    u32 label = labels[n];
    float loss = p.nan, own = 1.0f;
    if (label < p.classes) {
        own = weight_of(p, class_weight, label);
        loss = (1.0f - p.smoothing) * own * (lse - logits[label]) + p.smoothing / float(p.classes) * spread;
    }
    rows[3 * n] = loss;
    rows[3 * n + 1] = own;
    rows[3 * n + 2] = lse;
}

// One block.
KERNEL(256) cross_entropy_finish_f32(
    CrossEntropyParams p, const float *rows, const float *class_weight, float *loss, float *totals) {
    SMEM(float, shares, 8);
    float sum = 0.0f, own = 0.0f, all = 0.0f;
    for (u32 n = threadIdx.x; n < p.rows; n += 256) {
        sum += rows[3 * n];
        own += rows[3 * n + 1];
    }
    for (u32 k = threadIdx.x; k < p.classes; k += 256) all += weight_of(p, class_weight, k);
    sum = block_sum(sum, shares);
    own = block_sum(own, shares);
    all = block_sum(all, shares);
    if (threadIdx.x == 0) {
        loss[0] = sum / own;
        totals[0] = own;
        totals[1] = all;
    }
}

KERNEL(256) cross_entropy_bwd_f32(
    CrossEntropyParams p, const float *logits, const u32 *labels, const float *class_weight, const float *rows,
    const float *totals, const float *dloss, float *dlogits) {
    u32 i = flat_id();
    if (i >= p.rows * p.classes) return;
    u32 n = i / p.classes, k = i % p.classes;
    float own = rows[3 * n + 1] * (1.0f - p.smoothing), share = p.smoothing / float(p.classes);
    float target = (k == labels[n] ? own : 0.0f) + share * weight_of(p, class_weight, k);
    float softmax = expf(logits[i] - rows[3 * n + 2]);
    dlogits[i] = dloss[0] / totals[0] * (softmax * (own + share * totals[1]) - target);
}
