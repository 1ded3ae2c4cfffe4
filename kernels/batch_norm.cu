// Batch norm fused with residual and activation; formulas and the table [4, channels] (mean, 1 / std, weight / std, bias) are
// explained in src/ops/batch_norm.rs. Layout [rows, channels]. Images are stored as the launch says; the table, weight, bias,
// running statistics and their sums are f32 throughout, and nothing is rounded between load and store.
//
// Statistics and sums: a block takes a block of rows and some channels (columns.cuh), or a convolution has
// gathered them (conv2d.cu); a second launch joins the blocks. The rest: a thread owns neighbouring elements of 16 bytes, four in f32, eight of a 16-bit type. Bytes: stats x,
// forward x (+ residual) and y; backward sums x, dy (+ third), backward the same and dx (+ dresidual): half of them in half
// precision, but for the table, which comes from the cache. Memory-bound: twice as fast in half precision is what to expect
// (not timed: no GPU). The backward keeps six numbers of eight channels at hand, 65 to 71 registers: three blocks a multiprocessor, whose
// 768 threads have up to 48 bytes each on their way, 36 KiB.

#include "common.cuh"
#include "columns.cuh"

struct BatchNormParams {
    u32 rows, channels, rows_per_block, blocks;
    u32 act, residual, residual_grad, training;
    float eps, momentum;
};

#define RELU 1
#define SILU 2

// ------------------------------------------------------------------------------------------------ statistics

// Of N channels: a running mean and sum of squared deviations, merged by Chan, Golub and LeVeque's rule: exact also far from zero.
template <int N> struct Moments {
    float seen, mean[N], m2[N];

    DEVICE void merge(float more, const float *means, const float *m2s) {
        float n = seen + more;
        float share = n > 0.0f ? more / n : 0.0f;
        UNROLL for (int k = 0; k < N; k++) {
            float delta = means[k] - mean[k];
            mean[k] += delta * share;
            m2[k] = m2[k] + m2s[k] + delta * delta * (seen * share);
        }
        seen = n;
    }
};

template <int N> DEVICE void stats(BatchNormParams p, const Real *x, float *part, float *shares) {
    Columns at = columns<N>(p.channels, blockIdx.x);
    u32 first = blockIdx.y * p.rows_per_block, end = least(first + p.rows_per_block, p.rows);
    Moments<N> total = {};
    u32 r = at.inside ? first + at.row : end;
    // Four rows in registers at a time: their own mean first, so that a division comes once in four.
    for (; r + 3 * at.step < end; r += 4 * at.step) {
        Pack<N> v[4], mean, m2;
        UNROLL for (int j = 0; j < 4; j++) v[j] = load<N>(x + (r + j * at.step) * p.channels + at.channel);
        UNROLL for (int k = 0; k < N; k++) {
            mean.v[k] = ((v[0].v[k] + v[1].v[k]) + (v[2].v[k] + v[3].v[k])) * 0.25f;
            m2.v[k] = 0.0f;
            UNROLL for (int j = 0; j < 4; j++) m2.v[k] += (v[j].v[k] - mean.v[k]) * (v[j].v[k] - mean.v[k]);
        }
        total.merge(4.0f, mean.v, m2.v);
    }
    const Pack<N> zero = {};
    for (; r < end; r += at.step) total.merge(1.0f, load<N>(x + r * p.channels + at.channel).v, zero.v);
    // The tree over the rows of threads.
    float *mine = shares + threadIdx.x;
    auto show = [&] {
        UNROLL for (int k = 0; k < N; k++) {
            mine[2 * k * 256] = total.mean[k];
            mine[(2 * k + 1) * 256] = total.m2[k];
        }
        mine[2 * N * 256] = total.seen;
    };
    show();
    for (u32 half = at.step / 2; half > 0; half /= 2) {
        __syncthreads();
        if (at.row < half) {
            const float *other = mine + half * at.lanes;
            Pack<N> mean, m2;
            UNROLL for (int k = 0; k < N; k++) {
                mean.v[k] = other[2 * k * 256];
                m2.v[k] = other[(2 * k + 1) * 256];
            }
            total.merge(other[2 * N * 256], mean.v, m2.v);
            show();
        }
    }
    if (at.inside && at.row == 0) {
        Pack<N> mean, m2;
        UNROLL for (int k = 0; k < N; k++) {
            mean.v[k] = total.mean[k];
            m2.v[k] = total.m2[k];
        }
        float *out = part + blockIdx.y * 2 * p.channels + at.channel;
        store(out, mean);
        store(out + p.channels, m2);
    }
}

// part [blocks, 2, channels]
KERNEL(256) OF(batch_norm_stats)(BatchNormParams p, const Real *x, float *part) {
    SMEM(float, shares, (2 * WIDE<Real> + 1) * 256);
    with_width(p.channels, [=](auto width) { stats<width.n>(p, x, part, shares); });
}

// Joins the blocks: a block takes 8 channels, its threads stand in 32 rows. The mean is the mean of the blocks' as seen from the first of
// them, then the squared deviations are those inside the blocks and of the blocks' means: no division, and a mean far from zero
// costs no accuracy.
KERNEL(256) batch_norm_finish_f32(
    BatchNormParams p, const float *part, const float *weight, const float *bias, float *running_mean, float *running_var,
    float *table) {
    SMEM(float, shares, 512);
    Columns at;
    at.lanes = 8, at.lane = threadIdx.x % 8, at.row = threadIdx.x / 8, at.step = 32;
    at.channel = blockIdx.x * 8 + at.lane;
    at.inside = at.channel < p.channels;
    const float *own = part + least(at.channel, p.channels - 1);
    float rows = float(p.rows), shift = own[0], sum[1] = {}, m2[1] = {};
    auto rows_of = [=](u32 b) { return float(least(p.rows_per_block, p.rows - b * p.rows_per_block)); };
    for (u32 b = at.row; b < p.blocks; b += at.step) sum[0] += rows_of(b) * (own[b * 2 * p.channels] - shift);
    add_rows<1>(sum, shares, at);
    __syncthreads();
    float mean = shift + shares[at.lane] / rows;
    for (u32 b = at.row; b < p.blocks; b += at.step) {
        const float *block = own + b * 2 * p.channels;
        m2[0] += block[p.channels] + rows_of(b) * ((block[0] - mean) * (block[0] - mean));
    }
    add_rows<1>(m2, shares + 256, at);
    if (!at.inside || at.row != 0) return;
    u32 c = at.channel;
    float inv_std = 1.0f / sqrtf(m2[0] / rows + p.eps);
    table[c] = mean;
    table[p.channels + c] = inv_std;
    table[2 * p.channels + c] = weight[c] * inv_std;
    table[3 * p.channels + c] = bias[c];
    running_mean[c] += p.momentum * (mean - running_mean[c]);
    running_var[c] += p.momentum * (m2[0] / (rows - 1.0f) - running_var[c]);
}

KERNEL(64) batch_norm_table_f32(
    BatchNormParams p, const float *weight, const float *bias, const float *mean, const float *var, float *table) {
    u32 c = flat_id();
    if (c >= p.channels) return;
    float inv_std = 1.0f / sqrtf(var[c] + p.eps);
    table[c] = mean[c];
    table[p.channels + c] = inv_std;
    table[2 * p.channels + c] = weight[c] * inv_std;
    table[3 * p.channels + c] = bias[c];
}

// ------------------------------------------------------------------------------------------------ forward

template <int N> DEVICE void forward(
    BatchNormParams p, u32 i, u32 c, const Real *x, const Real *residual, const float *table, Real *y) {
    Pack<N> z = load<N>(x + i), mean = load<N>(table + c), scale = load<N>(table + 2 * p.channels + c),
            shift = load<N>(table + 3 * p.channels + c);
    UNROLL for (int k = 0; k < N; k++) z.v[k] = (z.v[k] - mean.v[k]) * scale.v[k] + shift.v[k];
    if (p.residual) {
        Pack<N> r = load<N>(residual + i);
        UNROLL for (int k = 0; k < N; k++) z.v[k] += r.v[k];
    }
    UNROLL for (int k = 0; k < N; k++) {
        if (p.act == RELU) z.v[k] = z.v[k] < 0.0f ? 0.0f : z.v[k];
        if (p.act == SILU) z.v[k] *= sigmoid(z.v[k]);
    }
    store(y + i, z);
}

KERNEL(256) OF(batch_norm_fwd)(
    BatchNormParams p, const Real *x, const Real *residual, const float *table, Real *y) {
    for_own(p.rows * p.channels, p.channels, [=](auto width, u32 i) {
        forward<width.n>(p, i, i % p.channels, x, residual, table, y);
    });
}

// ------------------------------------------------------------------------------------------------ backward

// g = dy * act'(z) and xhat of N elements. With a residual, third is y (ReLU) or the residual (SiLU).
template <int N> DEVICE void before_act(
    BatchNormParams p, u32 i, u32 c, const Real *x, const Real *dy, const Real *third, const float *table, Pack<N> &g,
    Pack<N> &xhat) {
    Pack<N> image = load<N>(x + i), mean = load<N>(table + c), inv_std = load<N>(table + p.channels + c);
    g = load<N>(dy + i);
    UNROLL for (int k = 0; k < N; k++) xhat.v[k] = (image.v[k] - mean.v[k]) * inv_std.v[k];
    if (p.act == 0) return;
    Pack<N> other;
    if (p.residual) other = load<N>(third + i);
    if (p.act == RELU && p.residual) {
        UNROLL for (int k = 0; k < N; k++) g.v[k] = other.v[k] > 0.0f ? g.v[k] : 0.0f;
        return;
    }
    Pack<N> scale = load<N>(table + 2 * p.channels + c), shift = load<N>(table + 3 * p.channels + c);
    UNROLL for (int k = 0; k < N; k++) {
        float z = (image.v[k] - mean.v[k]) * scale.v[k] + shift.v[k];
        if (p.act == RELU) {
            g.v[k] = z > 0.0f ? g.v[k] : 0.0f;
        } else {
            if (p.residual) z += other.v[k];
            float s = sigmoid(z);
            g.v[k] *= s * (1.0f + z * (1.0f - s));
        }
    }
}

template <int N> DEVICE void bwd_sums(
    BatchNormParams p, const Real *x, const Real *dy, const Real *third, const float *table, float *part, float *shares) {
    Columns at = columns<N>(p.channels, blockIdx.x);
    u32 first = blockIdx.y * p.rows_per_block, end = least(first + p.rows_per_block, p.rows);
    // Sums of g, then sums of g * xhat.
    float sums[2 * N] = {};
    if (at.inside) {
        for (u32 r = first + at.row; r < end; r += at.step) {
            Pack<N> g, xhat;
            before_act<N>(p, r * p.channels + at.channel, at.channel, x, dy, third, table, g, xhat);
            UNROLL for (int k = 0; k < N; k++) {
                sums[k] += g.v[k];
                sums[N + k] += g.v[k] * xhat.v[k];
            }
        }
    }
    add_rows<2 * N>(sums, shares, at);
    if (at.inside && at.row == 0) {
        Pack<N> sum, sum_x;
        UNROLL for (int k = 0; k < N; k++) {
            sum.v[k] = sums[k];
            sum_x.v[k] = sums[N + k];
        }
        float *out = part + blockIdx.y * 2 * p.channels + at.channel;
        store(out, sum);
        store(out + p.channels, sum_x);
    }
}

// part [blocks, 2, channels]
KERNEL(256) OF(batch_norm_bwd_sums)(
    BatchNormParams p, const Real *x, const Real *dy, const Real *third, const float *table, float *part) {
    SMEM(float, shares, 2 * WIDE<Real> * 256);
    with_width(p.channels, [=](auto width) { bwd_sums<width.n>(p, x, dy, third, table, part, shares); });
}

KERNEL(64) batch_norm_bwd_finish_f32(BatchNormParams p, const float *part, float *dweight, float *dbias) {
    u32 c = flat_id();
    if (c >= p.channels) return;
    float sum = 0.0f, sum_x = 0.0f;
    for (u32 b = 0; b < p.blocks; b++) {
        const float *at = part + b * 2 * p.channels + c;
        sum += at[0];
        sum_x += at[p.channels];
    }
    dweight[c] = sum_x;
    dbias[c] = sum;
}

template <int N> DEVICE void backward(
    BatchNormParams p, u32 i, const Real *x, const Real *dy, const Real *third, const float *table, const float *dweight,
    const float *dbias, Real *dx, Real *dresidual) {
    u32 c = i % p.channels;
    Pack<N> g, xhat, out, scale = load<N>(table + 2 * p.channels + c);
    before_act<N>(p, i, c, x, dy, third, table, g, xhat);
    out = g;
    if (p.training) {
        Pack<N> dw = load<N>(dweight + c), db = load<N>(dbias + c);
        float share = 1.0f / float(p.rows);
        UNROLL for (int k = 0; k < N; k++) out.v[k] -= (db.v[k] + xhat.v[k] * dw.v[k]) * share;
    }
    UNROLL for (int k = 0; k < N; k++) out.v[k] *= scale.v[k];
    store(dx + i, out);
    if (p.residual_grad) store(dresidual + i, g);
}

KERNEL(256, 3) OF(batch_norm_bwd)(
    BatchNormParams p, const Real *x, const Real *dy, const Real *third, const float *table, const float *dweight,
    const float *dbias, Real *dx, Real *dresidual) {
    for_own(p.rows * p.channels, p.channels, [=](auto width, u32 i) {
        backward<width.n>(p, i, x, dy, third, table, dweight, dbias, dx, dresidual);
    });
}
