// Rows of attention's tensors: other widths, and rowsum(dy * y) beside the log-sum-exp. A thread owns an element (pad), eight
// lanes a row (delta, whose rows are a multiple of 16 bytes). Bytes: each tensor once. Memory-bound.

#include "common.cuh"

struct RowParams { u32 rows, from, to; };

// Rows of one width as rows of another: cut, or filled with zeros.
KERNEL(256) OF(attention_rows_pad)(RowParams p, const Real *x, Real *padded) {
    u32 i = flat_id();
    if (i >= p.rows * p.to) return;
    u32 c = i % p.to;
    padded[i] = c < p.from ? x[i / p.to * p.from + c] : rounded<Real>(0.0f);
}

// stats = (lse, y.dy) of each row.
KERNEL(256) OF(attention_rows_delta)(RowParams p, const Real *y, const Real *dy, const float *lse, float *stats) {
    constexpr int N = WIDE<Real>;
    u32 row = flat_id() / 8, lane = threadIdx.x % 8;
    bool inside = row < p.rows;
    float sum = 0.0f;
    if (inside) {
        for (u32 c = N * lane; c < p.from; c += 8 * N) {
            Pack<N> a = load<N>(y + row * p.from + c), b = load<N>(dy + row * p.from + c);
            UNROLL for (int k = 0; k < N; k++) sum += a.v[k] * b.v[k];
        }
    }
    // Also lanes without a row take part.
    for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (inside && lane == 0) {
        stats[2 * row] = lse[row];
        stats[2 * row + 1] = sum;
    }
}
