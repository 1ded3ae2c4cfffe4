// Tiles of 64 tokens of a head on tensor cores, and the position terms beside them. A block has four warps; a warp owns M times 16
// rows of a tile of scores, as fragments of mma16 in registers (tensor_cores.cuh): lane 4 g + t has rows g and g + 8 and, of every
// 8 columns, 2 t and 2 t + 1. Scores that are rounded and packed are at once the left side of the next product.
//
// Tensors are [N, T, G, d] of a 16-bit type with d a multiple of 8 and T = h w tokens. D is d rounded up to 16, 32, 64 or 128; what
// lies past d is zeros.

#include "tensor_cores.cuh"
#include "global_attention.cuh"

#define TILE 64
#define THREADS 128
// Sides of the map up to which all row (and column) terms of a tile of queries are kept; larger maps have them made again for
// each tile of keys.
#define WHOLE 56
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

DEVICE u32 lane_row() { return threadIdx.x % 32 / 4; }
DEVICE u32 lane_column() { return threadIdx.x % 4 * 2; }

// ------------------------------------------------------------------------------------------------ tiles

// Where 8 numbers of a row of a tile [64][D] stand. Chunks of 16 bytes are shuffled so that the 8 rows of a matrix lie in
// different banks.
template <int D> DEVICE u32 place(u32 row, u32 chunk) {
    constexpr u32 PERIOD = D < 64 ? D / 8 : 8, ROWS = 8 / PERIOD;
    return row * D + (chunk ^ row / ROWS % PERIOD) * 8;
}

// Copies of the rows of tokens t0 .. t0 + 63 into a tile; zeros past the last token and number.
template <int D> DEVICE void fetch(const Params &p, const Head &head, const Real *x, u32 t0, Real *tile) {
    UNROLL for (u32 i = threadIdx.x; i < TILE * D / 8; i += THREADS) {
        u32 row = i / (D / 8), chunk = i % (D / 8), t = t0 + row;
        bool inside = t < head.tokens && chunk * 8 < p.d;
        copy_async(tile + place<D>(row, chunk), inside ? x + head.base + t * head.stride + chunk * 8 : x, inside);
    }
}

template <int N> DEVICE void clear(float (&s)[N][4]) {
    UNROLL for (int n = 0; n < N; n++) {
        UNROLL for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
    }
}

// 16 rows as left sides of the products over d.
template <int D> struct Rows {
    u32 a[D / 16][4];

    // Tokens first .. first + 15 from global memory.
    DEVICE void load(const Params &p, const Head &head, const Real *x, u32 first) {
        UNROLL for (int k = 0; k < D / 16; k++) {
            UNROLL for (int i = 0; i < 4; i++) {
                u32 t = first + lane_row() + i % 2 * 8, c = k * 16 + i / 2 * 8 + lane_column();
                bool inside = t < head.tokens && c < p.d;
                a[k][i] = inside ? *reinterpret_cast<const u32 *>(x + head.base + t * head.stride + c) : 0;
            }
        }
    }
    // Rows first .. first + 15 of a tile.
    DEVICE void load(const Real *tile, u32 first) {
        u32 lane = threadIdx.x % 32;
        UNROLL for (int k = 0; k < D / 16; k++) load_matrices(a[k], tile + place<D>(first + lane % 16, 2 * k + lane / 16));
    }
};

// s[m] = rows[m] times the transposed rows `from` .. from + 8 J - 1 of a tile.
template <int J, int D, int M> DEVICE void multiply(const Rows<D> (&rows)[M], const Real *tile, u32 from, float (&s)[M][J][4]) {
    u32 lane = threadIdx.x % 32;
    UNROLL for (int m = 0; m < M; m++) clear(s[m]);
    UNROLL for (int k = 0; k < D / 16; k++) {
        UNROLL for (int j = 0; j < J; j += 2) {
            // Two columns of 8 x 8 matrices: 8 rows of the tile, and the 8 after them.
            u32 b[4];
            load_matrices(b, tile + place<D>(from + j * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
            UNROLL for (int m = 0; m < M; m++) {
                mma16(s[m][j], rows[m].a[k], left, Real{});
                mma16(s[m][j + 1], rows[m].a[k], right, Real{});
            }
        }
    }
}

// 16 x 8 J scores, rounded, as left sides of the products over the columns.
template <int J> struct Weights {
    u32 a[J / 2][4];

    DEVICE void round(const float (&s)[J][4]) {
        UNROLL for (int k = 0; k < J / 2; k++) {
            UNROLL for (int i = 0; i < 4; i++) {
                const float(&from)[4] = s[2 * k + i / 2];
                a[k][i] = pair_of<Real>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
            }
        }
    }
};

// out[m] += weights[m] times the rows from `from` on of a tile: 16 M x D.
template <int D, int M, int J> DEVICE void apply(
    const Weights<J> (&weights)[M], const Real *tile, u32 from, float (&out)[M][D / 8][4]) {
    u32 lane = threadIdx.x % 32;
    UNROLL for (int k = 0; k < J / 2; k++) {
        UNROLL for (int n = 0; n < D / 8; n += 2) {
            u32 b[4];
            load_matrices_transposed(b, tile + place<D>(from + k * 16 + lane % 16, n + lane / 16));
            u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
            UNROLL for (int m = 0; m < M; m++) {
                mma16(out[m][n], weights[m].a[k], left, Real{});
                mma16(out[m][n + 1], weights[m].a[k], right, Real{});
            }
        }
    }
}

// Writes 16 rows of D numbers to tokens first .. first + 15, row g + 8 i times factor[i].
template <int D> DEVICE void put_rows(
    const Params &p, const Head &head, Real *y, u32 first, const float (&factor)[2], const float (&out)[D / 8][4]) {
    UNROLL for (int i = 0; i < 2; i++) {
        u32 t = first + lane_row() + 8 * i;
        if (t >= head.tokens) continue;
        Real *row = y + head.base + t * head.stride;
        UNROLL for (int n = 0; n < D / 8; n++) {
            u32 c = n * 8 + lane_column();
            if (c < p.d) store(row + c, Pack<2>{{out[n][2 * i] * factor[i], out[n][2 * i + 1] * factor[i]}});
        }
    }
}

// ------------------------------------------------------------------------------------------------ position terms
// q.rel_h for each map row and q.rel_w for each map column of the keys, times log2(e), in shared memory: a line for each row (or
// column), a number for each of the tile's queries. They are products of the queries with the tables' rows, made by mma16 for eight
// offsets at a time; each lands in the line where its offset takes its query. The tables are f32: both halves of
// x = high + low go through the tensor cores, so that no more is lost than in f32 storage's own rounding of q.

// One axis of the map in lines: `lines` of them, from coordinate `first` on (columns go on at 0 after the last); coordinates
// `low` .. `high` occur among the keys.
struct Axis {
    u32 size, first, lines, low, high;

    // The line of a coordinate; at least `lines` where it has none.
    DEVICE u32 line(u32 coordinate) const { return coordinate < first ? coordinate + size - first : coordinate - first; }
};

// Whether terms are made again for each tile of keys, that of the rows and that of the columns.
DEVICE bool by_tile(const Params &p) { return (p.has_rel_h && p.h > WHOLE) || (p.has_rel_w && p.w > WHOLE); }
// Lines in memory.
DEVICE u32 row_lines(const Params &p) { return !p.has_rel_h ? 0 : by_tile(p) ? least(p.h, (TILE - 1) / p.w + 2) : p.h; }
DEVICE u32 column_lines(const Params &p) { return !p.has_rel_w ? 0 : p.w > WHOLE ? TILE : p.w; }

// Axes of the keys k0 .. k0 + 63.
DEVICE Axis row_axis(const Params &p, u32 k0) {
    u32 low = k0 / p.w, high = (least(k0 + TILE, p.h * p.w) - 1) / p.w;
    return by_tile(p) ? Axis{p.h, low, high - low + 1, low, high} : Axis{p.h, 0, p.h, 0, p.h - 1};
}
DEVICE Axis column_axis(const Params &p, u32 k0) {
    u32 last = least(k0 + TILE, p.h * p.w) - 1;
    if (p.w <= WHOLE) return Axis{p.w, 0, p.w, 0, p.w - 1};
    bool one_row = k0 / p.w == last / p.w;
    return Axis{p.w, k0 % p.w, TILE, one_row ? k0 % p.w : 0, one_row ? last % p.w : p.w - 1};
}

// The offsets `low` .. `high` (rows of the table) that `count` queries from `first` on have to the keys.
struct Range {
    u32 low, high;

    DEVICE Range(const Params &p, const Axis &axis, bool rows, u32 first, u32 count) {
        u32 most = p.h * p.w - 1, from = least(first, most), to = least(first + count - 1, most);
        u32 least_query = rows ? from / p.w : from / p.w == to / p.w ? from % p.w : 0;
        u32 most_query = rows ? to / p.w : from / p.w == to / p.w ? to % p.w : p.w - 1;
        low = axis.low + axis.size - 1 - most_query;
        high = axis.high + axis.size - 1 - least_query;
    }
};

// The line where the key stands that a query has at an offset; at least `lines` where there is none.
DEVICE u32 line_at(const Axis &axis, u32 query, u32 offset) {
    u32 key = offset + query + 1 - axis.size;
    return key < axis.size ? axis.line(key) : axis.lines;
}

// Those of 16 queries, and the coordinates of rows g and g + 8.
struct Offsets : Range {
    u32 query[2];

    DEVICE Offsets(const Params &p, const Axis &axis, bool rows, u32 first) : Range(p, axis, rows, first, 16) {
        UNROLL for (int i = 0; i < 2; i++) {
            u32 token = least(first + lane_row() + 8 * i, p.h * p.w - 1);
            query[i] = rows ? token / p.w : token % p.w;
        }
    }
    DEVICE u32 line(const Axis &axis, int i, u32 offset) const { return line_at(axis, query[i], offset); }
};

// Lines of LINE numbers.
template <int LINE, int D> DEVICE void fill_axis(const Params &p, const Axis &axis, bool rows, const float *table, const Rows<D> &q,
    u32 first, float *lines) {
    Offsets offsets(p, axis, rows, first);
    for (u32 o = offsets.low; o <= offsets.high; o += 8) {
        const float *row = table + least(o + lane_row(), offsets.high) * p.g * p.d;
        float s[4] = {};
        UNROLL for (int k = 0; k < D / 16; k++) {
            u32 high[2], low[2];
            UNROLL for (int i = 0; i < 2; i++) {
                u32 c = k * 16 + i * 8 + lane_column();
                float2 x = c < p.d ? *reinterpret_cast<const float2 *>(row + c) : make_float2(0.0f, 0.0f);
                high[i] = pair_of<Real>(x.x, x.y);
                low[i] = pair_of<Real>(x.x - low_of<Real>(high[i]), x.y - high_of<Real>(high[i]));
            }
            mma16(s, q.a[k], high, Real{});
            mma16(s, q.a[k], low, Real{});
        }
        UNROLL for (int i = 0; i < 4; i++) {
            u32 offset = o + lane_column() + i % 2, line = offsets.line(axis, i / 2, offset);
            if (offset <= offsets.high && line < axis.lines) lines[line * LINE + lane_row() + i / 2 * 8] = s[i] * LOG2E;
        }
    }
}

// The terms of 64 M queries in shared memory, and where the keys of two tiles find theirs.
template <int M> struct Terms {
    static constexpr int LINE = TILE * M + 4;
    float *rows, *columns;
    // For each key where its row's line starts, in the upper half where its column's, then its place in the bias table.
    uint2 *keys;

    DEVICE Terms(const Params &p, void *memory) {
        keys = static_cast<uint2 *>(memory);
        rows = reinterpret_cast<float *>(keys + 2 * TILE);
        columns = rows + row_lines(p) * LINE;
    }
    DEVICE float *end(const Params &p) { return columns + column_lines(p) * LINE; }

    // Where the keys of the tile from k0 on find their terms. Seen after a barrier.
    DEVICE void describe(const Params &p, u32 k0, u32 stage) {
        if (threadIdx.x >= TILE) return;
        u32 key = least(k0 + threadIdx.x, p.h * p.w - 1), y = key / p.w, x = key % p.w;
        u32 row = row_axis(p, k0).line(y), column = column_axis(p, k0).line(x);
        keys[stage * TILE + threadIdx.x] = make_uint2(row * LINE | column * LINE << 16, y * table_columns(p) + x);
    }
    // Terms of the 16 queries from q0 + `at` on, whose rows are q, with the keys from k0 on; `again` where the tile is not the
    // queries' first, `alone` where it is their only one. A warp calls it for its own.
    template <int D> DEVICE void fill(const Params &p, const Head &head, const float *tables, const Rows<D> &q, u32 q0, u32 at,
        u32 k0, bool again, bool alone) {
        if (p.has_rel_h && (!again || by_tile(p))) {
            Axis axis = row_axis(p, k0);
            if (alone) axis.low = k0 / p.w, axis.high = (least(k0 + TILE, head.tokens) - 1) / p.w;
            fill_axis<LINE>(p, axis, true, rel_h_row(p, tables, head.g, 0), q, q0 + at, rows + at);
        }
        if (p.has_rel_w && (!again || p.w > WHOLE)) {
            fill_axis<LINE>(p, column_axis(p, k0), false, rel_w_row(p, tables, head.g, 0), q, q0 + at, columns + at);
        }
    }
    // What is added to the score of the query `at` of the tile and a key, whose description is `key`. `bias` is where the query
    // counts its keys' biases from.
    DEVICE float of(const Params &p, const float *tables, uint2 key, u32 at, u32 bias) const {
        float x = p.has_rel_h ? rows[(key.x & 0xffff) + at] : 0.0f;
        if (p.has_rel_w) x += columns[(key.x >> 16) + at];
        if (p.has_bias) x += tables[bias + key.y] * LOG2E;
        return x;
    }
};

// Where in the tables the biases of a head and query are counted from: key (0, 0).
DEVICE u32 bias_at(const Params &p, u32 g, u32 query) {
    return bias_start(p) + (g * table_rows(p) + p.h - 1 - query / p.w) * table_columns(p) + p.w - 1 - query % p.w;
}

DEVICE bool has_terms(const Params &p) { return p.has_rel_h + p.has_rel_w + p.has_bias > 0; }

// s = (scale s + terms) log2(e) for 16 queries (rows) from q0 + `at` on and the keys that `keys` describes.
template <int M, int J> DEVICE void finish_scores(const Params &p, const float *tables, const Terms<M> &terms, const uint2 *keys, u32 at,
    const u32 (&bias)[2], float (&s)[J][4]) {
    float factor = p.scale * LOG2E;
    UNROLL for (int j = 0; j < J; j++) {
        UNROLL for (int i = 0; i < 4; i++) s[j][i] *= factor;
        if (has_terms(p)) {
            uint4 both = *reinterpret_cast<const uint4 *>(keys + j * 8 + lane_column());
            uint2 key[2] = {make_uint2(both.x, both.y), make_uint2(both.z, both.w)};
            UNROLL for (int i = 0; i < 4; i++) {
                s[j][i] += terms.of(p, tables, key[i % 2], at + lane_row() + i / 2 * 8, bias[i / 2]);
            }
        }
    }
}
