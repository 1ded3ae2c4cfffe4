// The products of f32 convolutions on CUDA cores, tile by tile, and the forward's operands: what conv2d.cu and conv2d_ends.cu share. What a
// block and a thread own is said in conv2d.cu; common.cuh comes before this.

#include "conv2d.cuh"

// ------------------------------------------------------------------------------------------------ the product

template <int B> struct Tile {
    static constexpr int T = B / 16;
    static constexpr int STEP = 1024 / B;
    static constexpr int ROW = B + 4;
    static constexpr int FLOATS = STEP * ROW;
};

// Floats of shared memory: two operands, two buffers.
#define PRODUCT_FLOATS 4352

// Where a thread's four numbers of an operand lie in its tile. Along the sum (`sum` to `sum` + 3 of place `place`), where the
// operand is contiguous in the sum's index; else side by side (places `place` to `place` + 3 at `sum`).
template <int B, bool ALONG> struct Share {
    u32 place, sum;
    DEVICE Share() {
        constexpr u32 packs = ALONG ? Tile<B>::STEP / 4 : B / 4;
        place = ALONG ? threadIdx.x / packs : threadIdx.x % packs * 4;
        sum = ALONG ? threadIdx.x % packs * 4 : threadIdx.x / packs;
    }
    DEVICE void put(float *tile, Pack<4> v) const {
        float *at = tile + sum * Tile<B>::ROW + place;
        if (ALONG) {
            UNROLL for (int j = 0; j < 4; j++) at[j * Tile<B>::ROW] = v.v[j];
        } else {
            store(at, v);
        }
    }
};

// sums += left right over the sum's index from 0 to `end`. left and right are operands: `next()` gives the thread's four numbers
// of the next step (zero past the end), `share` says where they lie.
template <int B, class L, class R> DEVICE void product(float (&sums)[B / 16][B / 16], L &left, R &right, u32 end, float *shared) {
    constexpr int T = Tile<B>::T, STEP = Tile<B>::STEP, ROW = Tile<B>::ROW, FLOATS = Tile<B>::FLOATS;
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    if (end == 0) return;
    float *now = shared, *then = shared + 2 * FLOATS;
    left.share.put(now, left.next());
    right.share.put(now + FLOATS, right.next());
    __syncthreads();
    for (u32 k = 0; k < end; k += STEP) {
        bool more = k + STEP < end;
        Pack<4> l, r;
        if (more) {
            l = left.next();
            r = right.next();
        }
        UNROLL for (int s = 0; s < STEP; s++) {
            float a[T], b[T];
            UNROLL for (int i = 0; i < T; i += 4) {
                Pack<4> va = load<4>(now + s * ROW + i * 16 + ty * 4), vb = load<4>(now + FLOATS + s * ROW + i * 16 + tx * 4);
                UNROLL for (int j = 0; j < 4; j++) {
                    a[i + j] = va.v[j];
                    b[i + j] = vb.v[j];
                }
            }
            UNROLL for (int i = 0; i < T; i++) {
                UNROLL for (int j = 0; j < T; j++) sums[i][j] += a[i] * b[j];
            }
        }
        if (more) {
            left.share.put(then, l);
            right.share.put(then + FLOATS, r);
        }
        __syncthreads();
        float *swap = now;
        now = then;
        then = swap;
    }
}

// The row or column of the tile that the thread's i-th sum belongs to; `t` is the thread's place along that side.
DEVICE u32 place_of(u32 t, int i) { return i / 4 * 64 + t * 4 + i % 4; }

// Writes the sums of row `i` to out[first + column] for the columns below `columns`.
template <int B> DEVICE void store_row(const float (&sums)[B / 16], float *out, u32 first, u32 columns, const float *bias) {
    u32 tx = threadIdx.x % 16;
    UNROLL for (int j = 0; j < B / 16; j += 4) {
        u32 at = first + place_of(tx, j);
        Pack<4> v;
        UNROLL for (int k = 0; k < 4; k++) v.v[k] = sums[j + k] + (bias && at + k < columns ? bias[at + k] : 0.0f);
        if (columns % 4 == 0) {
            if (at < columns) store(out + at, v);
        } else {
            UNROLL for (int k = 0; k < 4; k++) {
                if (at + k < columns) out[at + k] = v.v[k];
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ forward

// Rows are output pixels, the sum runs over taps and input channels.
template <int B, bool VEC> struct Windows {
    Share<B, true> share;
    Conv2dParams p;
    const float *x;
    Walk at;
    int row, col;
    bool inside;

    DEVICE Windows(const Conv2dParams &p, const float *x) : p(p), x(x) {
        u32 pixel = blockIdx.x * B + share.place;
        inside = pixel < p.n * p.p * p.q;
        row = int(pixel / p.q % p.p * p.stride_h) - int(p.pad_h);
        col = int(pixel % p.q * p.stride_w) - int(p.pad_w);
        if (inside) this->x += pixel / (p.p * p.q) * p.h * p.w * p.c;
        at.to(share.sum, p.c, p.kw);
    }
    template <int N> DEVICE Pack<N> one(const Walk &at) const {
        u32 y = u32(row + int(at.r)), z = u32(col + int(at.s));
        // What lies above or left of the image has wrapped to something large.
        if (inside && at.r < p.kh && y < p.h && z < p.w) return load<N>(x + (y * p.w + z) * p.c + at.c);
        return Pack<N>{};
    }
    DEVICE Pack<4> next() {
        Pack<4> v;
        if constexpr (VEC) {
            v = one<4>(at);
        } else {
            Walk each = at;
            UNROLL for (int j = 0; j < 4; j++) {
                v.v[j] = one<1>(each).v[0];
                each.on(1, p.c, p.kw);
            }
        }
        at.on(Tile<B>::STEP, p.c, p.kw);
        return v;
    }
};

// Columns are output channels: rows of the weight, contiguous along the sum.
template <int B, bool VEC> struct Filters {
    Share<B, true> share;
    const float *w;
    u32 k, end;

    DEVICE Filters(const Conv2dParams &p, const float *w) : w(w), k(share.sum), end(p.kh * p.kw * p.c) {
        u32 o = blockIdx.y * B + share.place;
        if (o < p.o) this->w += o * end;
        else end = 0;
    }
    DEVICE Pack<4> next() {
        Pack<4> v = {};
        if constexpr (VEC) {
            if (k < end) v = load<4>(w + k);
        } else {
            UNROLL for (int j = 0; j < 4; j++) {
                if (k + j < end) v.v[j] = w[k + j];
            }
        }
        k += Tile<B>::STEP;
        return v;
    }
};

template <int B, bool VEC>
DEVICE void multiply(const Conv2dParams &p, const float *x, const float *w, float (&sums)[B / 16][B / 16], float *shared) {
    Windows<B, VEC> left(p, x);
    Filters<B, VEC> right(p, w);
    product<B>(sums, left, right, p.kh * p.kw * p.c, shared);
}

template <int B> DEVICE void store_pixels(const Conv2dParams &p, const float (&sums)[B / 16][B / 16], const float *bias, float *y) {
    UNROLL for (int i = 0; i < B / 16; i++) {
        u32 pixel = blockIdx.x * B + place_of(threadIdx.x / 16, i);
        if (pixel < p.n * p.p * p.q) store_row<B>(sums[i], y + pixel * p.o, blockIdx.y * B, p.o, bias);
    }
}
