// Depthwise convolution, NHWC: every channel has a kernel of its own.
//   y[n,p,q,c] = bias[c] + sum over r, s of x[n, p * stride + r - pad, q * stride + s - pad, c] * w[c,r,s]
//
// The kernels that networks use, 3x3 and 5x5 at steps 1 and 2, have code of their own:
//
// **Forward.** A thread owns N channels (one access of 16 bytes where they are a multiple of 4, or of 8 of a 16-bit type; four numbers under
// 5x5, whose sums and taps would fill its registers) of four neighbouring outputs of a row: for each row of the kernel a loaded pixel of x
// feeds all of the outputs that it meets. The taps of the block's channels lie in shared memory, turned so that neighbouring threads read
// neighbouring 16 bytes; a block keeps them for all of its tiles. Threads stand in rows of at most 32 along the channels; the rows take tiles
// one below the other, so that the kernel's rows find in L1 what the row above has read. Input gradient at step 1: the same over dy with
// the taps turned round.
// **Input gradient at step 2.** The same walk, where a pixel of dy feeds every second of four neighbours of dx for every tap, and a
// row of dx meets every second row of the kernel: no product with a zero is made. A tile begins where column + pad is even.
// **Weight gradient.** A thread owns N channels of one row of the kernel and walks down its part of the pixels in tiles of four
// outputs, dy under the tile and its sums in registers. A fixed tree of one level in shared memory adds the rows of threads; a block writes
// the sums of its part of the pixels, and sum_rows adds the parts in order. No atomics: the same bits on every run.
//
// Bytes at step 1: forward x, y once, input gradient dy, dx once, weight gradient x, dy once and the parts (at most 528 of the weight, in
// f32, and fewer the more channels); all are memory-bound where L1 holds the rows between: per 16 bytes of output 4.5 accesses of 16 bytes for
// 3x3, 10 for 5x5. Shared memory: taps 4.6 to 12.9 KiB, sums of the weight gradient 12 to 24 KiB. Limits: none but those of tensors;
// other kernel sizes and steps take the kernels without a size in their name, a pixel a thread.
//
// Not measured: no GPU was at hand. By count and by the compiler's registers: eight numbers a thread under 5x5 in half precision want 106 to
// 138 registers, one or two blocks a multiprocessor, and spill in the weight gradient; with four, the compiler left alone aims at four
// blocks and spills up to 16 bytes, asked for three up to 40, so two are asked for. Tiles of eight outputs save a quarter of the accesses of x and waste an eighth on maps of 7 and
// 14 columns.

#include "common.cuh"
#include "conv2d.cuh"

// Outputs of a tile.
constexpr int T = 4;

// The most numbers of an access under a kernel of K x K.
template <int K> constexpr int MOST = K == 5 ? 4 : WIDE<Real>;

// f(Width<N>) for the widest access for so many channels.
template <int K, class F> DEVICE void with_numbers(u32 channels, F f) {
    with_width(channels, [=](auto width) { f(Width<(width.n > MOST<K> ? MOST<K> : width.n)>{}); });
}

// ------------------------------------------------------------------------------------------------ who owns what

// Threads stand in rows of `lanes` along the channels, N channels each; as `Lanes` in src/ops/depthwise.rs. `first` is the block's first
// channel, `row` counts the rows, of which the block has `rows` (for each of `layers`, where a row has several jobs).
struct Stand {
    u32 lanes, lane, row, rows, layer, first, channel;
    bool inside;
};

template <int N> DEVICE Stand stand(u32 channels, u32 most, u32 layers) {
    u32 packs = channels / N, chunks = (packs + most - 1) / most;
    Stand at;
    at.lanes = (packs + chunks - 1) / chunks;
    at.lane = threadIdx.x % at.lanes;
    at.layer = threadIdx.x / at.lanes % layers;
    at.row = threadIdx.x / (at.lanes * layers);
    at.rows = blockDim.x / (at.lanes * layers);
    at.first = blockIdx.x * at.lanes * N;
    at.channel = at.first + at.lane * N;
    at.inside = at.channel < channels && at.row < at.rows;
    return at;
}

// Tiles of rows of n images of rows x columns pixels: one below the other first. Blocks along y have equal spans of them.
struct Tiles {
    u32 rows, across, end, next, step;

    DEVICE Tiles(u32 n, u32 rows, u32 across, Stand at) : rows(rows), across(across) {
        u32 tiles = n * rows * across, each = (tiles + gridDim.y - 1) / gridDim.y;
        end = least((blockIdx.y + 1) * each, tiles);
        next = blockIdx.y * each + at.row;
        step = at.rows;
    }
    // Row, number in the row and image of the next tile, if there is one.
    DEVICE bool take(u32 &row, u32 &tile, u32 &image) {
        if (next >= end) return false;
        row = next % rows;
        tile = next / rows % across;
        image = next / (rows * across);
        next += step;
        return true;
    }
};

// The taps of a block's channels as [tap][channel], turned round for a gradient.
template <int K, int N> struct Taps {
    // Not a multiple of 32, so that the taps of a channel are stored to different banks.
    static constexpr u32 ROW = 32 * N + 4;
    static constexpr u32 FLOATS = K * K * ROW;

    DEVICE static void fetch(Stand at, u32 channels, const Real *w, bool turned, float *shared) {
        for (u32 e = threadIdx.x; e < at.lanes * N * K * K; e += blockDim.x) {
            u32 channel = e / (K * K), tap = e % (K * K);
            if (at.first + channel >= channels) break;
            float v = to_float(w[at.first * K * K + e]);
            shared[(turned ? K * K - 1 - tap : tap) * ROW + channel] = v;
        }
        __syncthreads();
    }
    // The taps of a row of the kernel.
    DEVICE static void row(const float *shared, Stand at, u32 r, Pack<N> (&tap)[K]) {
        UNROLL for (int s = 0; s < K; s++) tap[s] = load<N>(shared + (r * K + s) * ROW + at.lane * N);
    }
};

// N channels of a pixel of a row, zero where the pixel lies outside.
template <int N> DEVICE Pack<N> pixel(const Real *row, int column, u32 width, u32 channels) {
    Pack<N> x = {};
    if (u32(column) < width) x = load<N>(row + u32(column) * channels);
    return x;
}

template <int N> DEVICE void add_product(Pack<N> &sum, const Pack<N> &x, const Pack<N> &y) {
    UNROLL for (int k = 0; k < N; k++) sum.v[k] += x.v[k] * y.v[k];
}

// The pixels of a tile that lie in a row of `width` from column `first` on.
template <int N> DEVICE void put(const Pack<N> (&sum)[T], Real *row, int first, u32 width, u32 channels) {
    UNROLL for (int q = 0; q < T; q++) {
        if (u32(first + q) < width) store(row + u32(first + q) * channels, sum[q]);
    }
}

// ------------------------------------------------------------------------------------------------ forward and input gradient

// A correlation of [n, h, w, c] to [n, p, q, c]; the window of output (0, 0) begins pad_h rows above and pad_w columns left of the image.
struct Map {
    u32 n, h, w, p, q, c;
    int pad_h, pad_w;
};

template <int K, int S, int N> DEVICE void correlate(
    Map m, const Real *from, const Real *w, const float *bias, bool turned, Real *out, float *shared) {
    Stand at = stand<N>(m.c, 32, 1);
    Taps<K, N>::fetch(at, m.c, w, turned, shared);
    if (!at.inside) return;
    Pack<N> start = {};
    if (bias) start = load<N>(bias + at.channel);
    Tiles tiles(m.n, m.p, (m.q + T - 1) / T, at);
    for (u32 p, tile, image; tiles.take(p, tile, image);) {
        int top = int(p * S) - m.pad_h, left = int(tile * T * S) - m.pad_w;
        Pack<N> sum[T];
        UNROLL for (int q = 0; q < T; q++) sum[q] = start;
        ROLLED for (u32 r = 0; r < K; r++) {
            if (u32(top + int(r)) >= m.h) continue;
            const Real *row = from + (image * m.h + u32(top + int(r))) * m.w * m.c + at.channel;
            Pack<N> tap[K];
            Taps<K, N>::row(shared, at, r, tap);
            UNROLL for (int i = 0; i < (T - 1) * S + K; i++) {
                Pack<N> x = pixel<N>(row, left + i, m.w, m.c);
                UNROLL for (int s = 0; s < K; s++) {
                    if ((i - s) % S == 0 && i >= s && (i - s) / S < T) add_product(sum[(i - s) / S], x, tap[s]);
                }
            }
        }
        put<N>(sum, out + (image * m.p + p) * m.q * m.c + at.channel, int(tile * T), m.q, m.c);
    }
}

template <int K, int S> DEVICE void forward(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y, float *shared) {
    Map m = {p.n, p.h, p.w, p.p, p.q, p.c, int(p.pad_h), int(p.pad_w)};
    with_numbers<K>(p.c, [=](auto width) { correlate<K, S, width.n>(m, x, w, p.bias ? bias : nullptr, false, y, shared); });
}

template <int K> DEVICE void dgrad(Conv2dParams p, const Real *dy, const Real *w, Real *dx, float *shared) {
    Map m = {p.n, p.p, p.q, p.h, p.w, p.c, K - 1 - int(p.pad_h), K - 1 - int(p.pad_w)};
    with_numbers<K>(p.c, [=](auto width) { correlate<K, 1, width.n>(m, dy, w, nullptr, true, dx, shared); });
}

// The input gradient at step 2: column 2 i - s of a tile, counted from where column + pad is even, meets pixel i of dy under tap s,
// taps turned round.
template <int K, int N> DEVICE void spread(Conv2dParams p, const Real *dy, const Real *w, Real *dx, float *shared) {
    Stand at = stand<N>(p.c, 32, 1);
    Taps<K, N>::fetch(at, p.c, w, true, shared);
    if (!at.inside) return;
    u32 odd = p.pad_w % 2;
    Tiles tiles(p.n, p.h, (p.w + odd + T - 1) / T, at);
    for (u32 h, tile, image; tiles.take(h, tile, image);) {
        u32 below = h + p.pad_h;
        int first = int(tile * T) - int(odd), left = (first + int(p.pad_w)) / 2 - (K - 1) / 2;
        Pack<N> sum[T] = {};
        ROLLED for (u32 r = below % 2; r < least(K, below + 1); r += 2) {
            u32 from = (below - r) / 2;
            if (from >= p.p) continue;
            const Real *row = dy + (image * p.p + from) * p.q * p.c + at.channel;
            Pack<N> tap[K];
            Taps<K, N>::row(shared, at, K - 1 - r, tap);
            UNROLL for (int i = 0; i < (T + K) / 2; i++) {
                Pack<N> x = pixel<N>(row, left + i, p.q, p.c);
                UNROLL for (int s = 0; s < K; s++) {
                    if (2 * i >= s && 2 * i - s < T) add_product(sum[2 * i - s], x, tap[s]);
                }
            }
        }
        put<N>(sum, dx + (image * p.h + h) * p.w * p.c + at.channel, first, p.w, p.c);
    }
}

template <int K> DEVICE void dgrad_s2(Conv2dParams p, const Real *dy, const Real *w, Real *dx, float *shared) {
    with_numbers<K>(p.c, [=](auto width) { spread<K, width.n>(p, dy, w, dx, shared); });
}

#define TAPS(k) SMEM(float, shared, (k) * (k) * (32 * MOST<k> + 4))

KERNEL(256) OF(depthwise_fwd_k3)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    TAPS(3);
    forward<3, 1>(p, x, w, bias, y, shared);
}
KERNEL(256) OF(depthwise_fwd_k3_s2)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    TAPS(3);
    forward<3, 2>(p, x, w, bias, y, shared);
}
KERNEL(256, 2) OF(depthwise_fwd_k5)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    TAPS(5);
    forward<5, 1>(p, x, w, bias, y, shared);
}
KERNEL(256, 2) OF(depthwise_fwd_k5_s2)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    TAPS(5);
    forward<5, 2>(p, x, w, bias, y, shared);
}

KERNEL(256) OF(depthwise_dgrad_k3)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    TAPS(3);
    dgrad<3>(p, dy, w, dx, shared);
}
KERNEL(256) OF(depthwise_dgrad_k3_s2)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    TAPS(3);
    dgrad_s2<3>(p, dy, w, dx, shared);
}
KERNEL(256, 2) OF(depthwise_dgrad_k5)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    TAPS(5);
    dgrad<5>(p, dy, w, dx, shared);
}
KERNEL(256, 2) OF(depthwise_dgrad_k5_s2)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    TAPS(5);
    dgrad_s2<5>(p, dy, w, dx, shared);
}

// Any kernel and step: a thread owns 16 bytes of one output. The taps of a channel lie together, so that they are read number by number.
template <int N> DEVICE Pack<N> tap_of(const Real *w, u32 channel, u32 tap, u32 taps) {
    Pack<N> v;
    UNROLL for (int k = 0; k < N; k++) v.v[k] = to_float(w[(channel + k) * taps + tap]);
    return v;
}

template <int N> DEVICE void output(Conv2dParams p, u32 i, const Real *x, const Real *w, const float *bias, Real *y) {
    u32 c = i % p.c, col = i / p.c % p.q, row = i / (p.c * p.q) % p.p, image = i / (p.c * p.q * p.p);
    Pack<N> sum = {};
    if (p.bias) sum = load<N>(bias + c);
    for (u32 r = 0; r < p.kh; r++) {
        // Wraps to a large number above and left of the image.
        u32 h = row * p.stride_h + r - p.pad_h;
        if (h >= p.h) continue;
        for (u32 s = 0; s < p.kw; s++) {
            u32 v = col * p.stride_w + s - p.pad_w;
            if (v < p.w) add_product(sum, load<N>(x + ((image * p.h + h) * p.w + v) * p.c + c), tap_of<N>(w, c, r * p.kw + s, p.kh * p.kw));
        }
    }
    store(y + i, sum);
}

KERNEL(256) OF(depthwise_fwd)(Conv2dParams p, const Real *x, const Real *w, const float *bias, Real *y) {
    for_own(p.n * p.p * p.q * p.c, p.c, [=](auto width, u32 i) { output<width.n>(p, i, x, w, bias, y); });
}

template <int N> DEVICE void input(Conv2dParams p, u32 i, const Real *dy, const Real *w, Real *dx) {
    u32 c = i % p.c, right = i / p.c % p.w + p.pad_w, below = i / (p.c * p.w) % p.h + p.pad_h, image = i / (p.c * p.w * p.h);
    Pack<N> sum = {};
    for (u32 r = below % p.stride_h; r < least(p.kh, below + 1); r += p.stride_h) {
        u32 row = (below - r) / p.stride_h;
        if (row >= p.p) continue;
        for (u32 s = right % p.stride_w; s < least(p.kw, right + 1); s += p.stride_w) {
            u32 col = (right - s) / p.stride_w;
            if (col < p.q) add_product(sum, load<N>(dy + ((image * p.p + row) * p.q + col) * p.c + c), tap_of<N>(w, c, r * p.kw + s, p.kh * p.kw));
        }
    }
    store(dx + i, sum);
}

KERNEL(256) OF(depthwise_dgrad)(Conv2dParams p, const Real *dy, const Real *w, Real *dx) {
    for_own(p.n * p.h * p.w * p.c, p.c, [=](auto width, u32 i) { input<width.n>(p, i, dy, w, dx); });
}

// ------------------------------------------------------------------------------------------------ weight gradient

// dw[part][c,r,s] = sum over the part's pixels of dy[pixel,c] * x[under the tap, c]; blockIdx.y is the part.
template <int K, int S, int N> DEVICE void weigh(Conv2dParams p, const Real *x, const Real *dy, float *dw, float *shared) {
    Stand at = stand<N>(p.c, 16, K);
    Pack<N> sum[K] = {};
    Tiles tiles(p.n, p.p, (p.q + T - 1) / T, at);
    if (!at.inside) tiles.end = 0;
    for (u32 row, tile, image; tiles.take(row, tile, image);) {
        u32 h = row * S + at.layer - p.pad_h;
        if (h >= p.h) continue;
        int first = int(tile * T), left = first * S - int(p.pad_w);
        const Real *up = dy + (image * p.p + row) * p.q * p.c + at.channel, *under = x + (image * p.h + h) * p.w * p.c + at.channel;
        Pack<N> d[T];
        UNROLL for (int q = 0; q < T; q++) d[q] = pixel<N>(up, first + q, p.q, p.c);
        UNROLL for (int i = 0; i < (T - 1) * S + K; i++) {
            Pack<N> v = pixel<N>(under, left + i, p.w, p.c);
            UNROLL for (int s = 0; s < K; s++) {
                if ((i - s) % S == 0 && i >= s && (i - s) / S < T) add_product(sum[s], v, d[(i - s) / S]);
            }
        }
    }
    // [row of threads][tap][channel]
    u32 width = at.lanes * N;
    if (at.row < at.rows) {
        UNROLL for (int s = 0; s < K; s++) {
            UNROLL for (int k = 0; k < N; k++) shared[((at.row * K + at.layer) * K + s) * width + at.lane * N + k] = sum[s].v[k];
        }
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < width * K * K; e += blockDim.x) {
        u32 channel = e / (K * K), tap = e % (K * K);
        if (at.first + channel >= p.c) break;
        float total = 0.0f;
        for (u32 row = 0; row < at.rows; row++) total += shared[(row * K * K + tap) * width + channel];
        dw[(blockIdx.y * p.c + at.first) * K * K + e] = total;
    }
}

template <int K, int S> DEVICE void wgrad(Conv2dParams p, const Real *x, const Real *dy, float *dw, float *shared) {
    with_numbers<K>(p.c, [=](auto width) { weigh<K, S, width.n>(p, x, dy, dw, shared); });
}

#define SUMS(k) SMEM(float, shared, 256 * (k) * MOST<k>)

KERNEL(256) OF(depthwise_wgrad_k3)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SUMS(3);
    wgrad<3, 1>(p, x, dy, dw, shared);
}
KERNEL(256) OF(depthwise_wgrad_k3_s2)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SUMS(3);
    wgrad<3, 2>(p, x, dy, dw, shared);
}
KERNEL(256, 2) OF(depthwise_wgrad_k5)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SUMS(5);
    wgrad<5, 1>(p, x, dy, dw, shared);
}
KERNEL(256, 2) OF(depthwise_wgrad_k5_s2)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    SUMS(5);
    wgrad<5, 2>(p, x, dy, dw, shared);
}

// Any kernel and step: a thread owns one weight over one part of the pixels, neighbours neighbouring channels.
KERNEL(256) OF(depthwise_wgrad)(Conv2dParams p, const Real *x, const Real *dy, float *dw) {
    u32 i = flat_id(), taps = p.kh * p.kw;
    if (i >= p.c * taps * p.parts) return;
    u32 c = i % p.c, tap = i / p.c % taps, part = i / (p.c * taps);
    u32 pixels = p.n * p.p * p.q, share = (pixels + p.parts - 1) / p.parts, start = part * share;
    float sum = 0.0f;
    for (u32 pixel = start; pixel < least(start + share, pixels); pixel++) {
        u32 h = pixel / p.q % p.p * p.stride_h + tap / p.kw - p.pad_h, v = pixel % p.q * p.stride_w + tap % p.kw - p.pad_w;
        if (h >= p.h || v >= p.w) continue;
        u32 image = pixel / (p.q * p.p);
        sum += to_float(dy[pixel * p.c + c]) * to_float(x[((image * p.h + h) * p.w + v) * p.c + c]);
    }
    dw[(part * p.c + c) * taps + tap] = sum;
}
