// What forward and backward of local attention share: the groups of lanes, and their pieces of rows.

struct LocalAttentionParams {
    u32 n, h, w, g, d, has_rel_h, has_rel_w, has_bias;
    float scale;
    u32 pieces, part, kh, kw, zero_border, by_row;
};
typedef LocalAttentionParams Params;

DEVICE u32 table_rows(const Params &p) { return p.kh; }
DEVICE u32 table_columns(const Params &p) { return p.kw; }

#include "attention_tables.cuh"

// Numbers of an access of 16 bytes.
constexpr int WIDTH = WIDE<Real>;

// A lane's numbers of a row: those of M accesses, side by side with those of the other lanes.
template <int M> struct Piece {
    Pack<WIDTH> v[M];
    DEVICE Piece() {
        UNROLL for (int m = 0; m < M; m++) v[m] = Pack<WIDTH>{};
    }
};

// WIDTH numbers of a row of a tensor, or of a table, which is in f32 always.
template <class T> DEVICE Pack<WIDTH> numbers(const T *from) {
    if constexpr (sizeof(T) == 4 && WIDTH == 8) {
        Pack<4> low = load<4>(from), high = load<4>(from + 4);
        return Pack<WIDTH>{{low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]}};
    } else {
        return load<WIDTH>(from);
    }
}

template <int M> DEVICE float dot(const Piece<M> &a, const Piece<M> &b) {
    float sum = 0.0f;
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int k = 0; k < WIDTH; k++) sum += a.v[m].v[k] * b.v[m].v[k];
    }
    return sum;
}

template <int M> DEVICE void add(Piece<M> &to, float factor, const Piece<M> &x) {
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int k = 0; k < WIDTH; k++) to.v[m].v[k] += factor * x.v[m].v[k];
    }
}

template <int M> DEVICE void scale(Piece<M> &x, float factor) {
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int k = 0; k < WIDTH; k++) x.v[m].v[k] *= factor;
    }
}

// L lanes and the R neighbouring places (queries, or keys for dk and dv) that they own: x .. x + R - 1 of row y. Groups past the
// last one repeat it and write nothing: all lanes of a warp take part in its shuffles.
template <int L, int M, int R> struct Group {
    u32 lane, y, x;
    Head head;
    bool there;

    static DEVICE u32 spans(const Params &p) { return (p.w + R - 1) / R; }
    static DEVICE u32 index(const Params &p) { return least(flat_id() / L, p.n * p.h * spans(p) * p.g - 1); }

    DEVICE Group(const Params &p)
        : lane(threadIdx.x % L), head(p, index(p) / p.g / spans(p) / p.h, index(p) % p.g) {
        u32 i = index(p) / p.g;
        x = i % spans(p) * R;
        y = i / spans(p) % p.h;
        there = flat_id() / L < p.n * p.h * spans(p) * p.g;
    }

    DEVICE bool in_map(const Params &p, u32 row, u32 column) const { return row < p.h && column < p.w; }
    DEVICE bool owns(const Params &p, u32 r) const { return there && x + r < p.w; }
    // Where the statistics of place r stand; of the last column for those past it.
    DEVICE u32 stat(const Params &p, u32 r) const { return head.stat + (y * p.w + least(x + r, p.w - 1)) * p.g; }

    DEVICE float sum(float v) const {
        UNROLL for (int other = L / 2; other > 0; other /= 2) v += __shfl_xor_sync(0xffffffffu, v, other);
        return v;
    }

    // The lane's numbers of a row of a tensor or table.
    template <class T> DEVICE Piece<M> of_row(const Params &p, const T *row) const {
        Piece<M> got;
        UNROLL for (int m = 0; m < M; m++) {
            u32 c = WIDTH * (lane + L * m);
            if (c < p.d) got.v[m] = numbers(row + c);
        }
        return got;
    }
    // The lane's numbers of a place of the map; zeros outside.
    DEVICE Piece<M> piece(const Params &p, const Real *t, u32 row, u32 column) const {
        if (!in_map(p, row, column)) return Piece<M>();
        return of_row(p, t + head.base + (row * p.w + column) * head.stride);
    }
    DEVICE void put(const Params &p, Real *t, u32 r, const Piece<M> &value) const {
        if (!owns(p, r)) return;
        Real *row = t + head.base + (y * p.w + x + r) * head.stride;
        UNROLL for (int m = 0; m < M; m++) {
            u32 c = WIDTH * (lane + L * m);
            if (c < p.d) store(row + c, value.v[m]);
        }
    }

    // q . rel_h[a] of each query.
    DEVICE void row_terms(const Params &p, const Piece<M> (&query)[R], const float *tables, u32 a, float (&terms)[R]) const {
        UNROLL for (int r = 0; r < R; r++) terms[r] = 0.0f;
        if (!p.has_rel_h) return;
        Piece<M> row = of_row(p, rel_h_row(p, tables, head.g, a));
        UNROLL for (int r = 0; r < R; r++) terms[r] = sum(dot(query[r], row));
    }
    // q . rel_w[b] of each query and column of the window, terms [R, kw] in shared memory of the group's own.
    DEVICE void column_terms(const Params &p, const Piece<M> (&query)[R], const float *tables, float *terms) const {
        if (!p.has_rel_w) return;
        for (u32 b = 0; b < p.kw; b++) {
            Piece<M> row = of_row(p, rel_w_row(p, tables, head.g, b));
            UNROLL for (int r = 0; r < R; r++) {
                float term = sum(dot(query[r], row));
                if (lane == 0) terms[r * p.kw + b] = term;
            }
        }
        __syncwarp();
    }
};
