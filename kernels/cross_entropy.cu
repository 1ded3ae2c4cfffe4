// Softmax cross-entropy; formulas in src/ops/cross_entropy.rs. rows [N, 3]: loss, weight, log-sum-exp of each row.
//
// Logits and their gradient are stored as the launch says; rows, weights and the loss are f32, and so is all arithmetic.
//
// Forward: a warp owns a row, a lane 16 bytes of it at a time where rows are a multiple of them; then one block sums the rows in a
// fixed order. Backward: a thread owns neighbouring logits of 16 bytes. Bytes: the logits three times out of the cache, rows once;
// backward logits and dlogits.

#include "common.cuh"

struct CrossEntropyParams { u32 rows, classes, weighted; float smoothing, nan; };

DEVICE float weight_of(CrossEntropyParams p, const float *weight, u32 k) { return p.weighted ? weight[k] : 1.0f; }

template <int N> DEVICE void row_loss(
    CrossEntropyParams p, u32 n, const Real *logits, const u32 *labels, const float *class_weight, float *rows) {
    u32 first = threadIdx.x % 32 * N;
    logits += n * p.classes;
    float top = to_float(logits[0]);
    for (u32 c = first; c < p.classes; c += 32 * N) {
        Pack<N> v = load<N>(logits + c);
        UNROLL for (int k = 0; k < N; k++) top = fmaxf(top, v.v[k]);
    }
    top = warp_max(top);
    float sum = 0.0f;
    for (u32 c = first; c < p.classes; c += 32 * N) {
        Pack<N> v = load<N>(logits + c);
        UNROLL for (int k = 0; k < N; k++) sum += expf(v.v[k] - top);
    }
    float lse = top + logf(warp_sum(sum)), spread = 0.0f;
    if (p.smoothing > 0.0f) {
        for (u32 c = first; c < p.classes; c += 32 * N) {
            Pack<N> v = load<N>(logits + c);
            UNROLL for (int k = 0; k < N; k++) spread += weight_of(p, class_weight, c + k) * (lse - v.v[k]);
        }
        spread = warp_sum(spread);
    }
    if (first != 0) return;
    u32 label = labels[n];
    float loss = p.nan, own = 1.0f;
    if (label < p.classes) {
        own = weight_of(p, class_weight, label);
        loss = (1.0f - p.smoothing) * own * (lse - to_float(logits[label])) + p.smoothing / float(p.classes) * spread;
    }
    rows[3 * n] = loss;
    rows[3 * n + 1] = own;
    rows[3 * n + 2] = lse;
}

KERNEL(256) OF(cross_entropy_fwd)(
    CrossEntropyParams p, const Real *logits, const u32 *labels, const float *class_weight, float *rows) {
    u32 n = blockIdx.x * 8 + threadIdx.x / 32;
    if (n >= p.rows) return;
    with_width(p.classes, [=](auto width) { row_loss<width.n>(p, n, logits, labels, class_weight, rows); });
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

// The gradients of logits i .. i + N of one row.
template <int N> DEVICE void slope(
    CrossEntropyParams p, u32 i, const Real *logits, const u32 *labels, const float *class_weight, const float *rows,
    const float *totals, const float *dloss, Real *dlogits) {
    u32 n = i / p.classes, c = i % p.classes, label = labels[n];
    float own = rows[3 * n + 1] * (1.0f - p.smoothing), share = p.smoothing / float(p.classes), lse = rows[3 * n + 2];
    float scale = dloss[0] / totals[0], all = own + share * totals[1];
    Pack<N> v = load<N>(logits + i);
    UNROLL for (int k = 0; k < N; k++) {
        float target = (c + k == label ? own : 0.0f) + share * weight_of(p, class_weight, c + k);
        v.v[k] = scale * (expf(v.v[k] - lse) * all - target);
    }
    store(dlogits + i, v);
}

KERNEL(256) OF(cross_entropy_bwd)(
    CrossEntropyParams p, const Real *logits, const u32 *labels, const float *class_weight, const float *rows,
    const float *totals, const float *dloss, Real *dlogits) {
    for_own(p.rows * p.classes, p.classes, [=](auto width, u32 i) {
        slope<width.n>(p, i, logits, labels, class_weight, rows, totals, dloss, dlogits);
    });
}
