// Tiles of 64 x 64 scores of one head, and what global attention does with them. A block has 256 threads; thread (tx, ty) of 16 x 16
// owns rows 4 ty .. 4 ty + 3 and columns 4 tx .. 4 tx + 3 of a tile in registers.
//
// Tensors are [N, T, G, d] with d a multiple of 4 and T = h w tokens; a row is the d numbers of a token in a head.

#define TILE 64
// Numbers of a row that a product takes at a time, and the row of a transposed tile in shared memory.
#define SLICE 32
#define LINE 68

#include "global_attention.cuh"

// ------------------------------------------------------------------------------------------------ shared memory
// Two slices of rows, or 32 rows of what a tile multiplies; then the tile of scores, stored by columns; then position terms of
// the queries: [rows][64], [columns][64]; then the same once more for the backward's sums. src/ops/global_attention/cuda.rs
// counts the same bytes.

struct Memory {
    float *left, *right, *scores, *row_terms, *column_terms, *row_sums, *column_sums;

    DEVICE Memory(const Params &p, float *shared) {
        left = shared;
        right = left + SLICE * LINE;
        scores = right + SLICE * LINE;
        row_terms = scores + TILE * LINE;
        // Rows of the map that 64 tokens can touch, columns that they can have.
        u32 rows = p.has_rel_h ? least(p.h, (TILE - 1) / p.w + 2) : 0, columns = p.has_rel_w ? least(p.w, TILE) : 0;
        column_terms = row_terms + rows * TILE;
        row_sums = column_terms + columns * TILE;
        column_sums = row_sums + rows * TILE;
    }
};

// The keys `first` .. `first` + 63 on the map: which rows they touch, and where a key's terms stand.
struct Keys {
    u32 first, row, rows, columns;
    bool wide;

    DEVICE Keys(const Params &p, u32 first) : first(first) {
        row = first / p.w;
        rows = (least(first + TILE, p.h * p.w) - 1) / p.w - row + 1;
        wide = p.w > TILE;
        columns = wide ? TILE : p.w;
    }
    // The line of a key's row terms, and of its column terms. In maps wider than a tile each key has a column of its own.
    DEVICE u32 row_line(const Params &p, u32 key) const { return key / p.w - row; }
    DEVICE u32 column_line(const Params &p, u32 key) const { return wide ? key - first : key % p.w; }
    // The map's column that column terms in line `c` belong to.
    DEVICE u32 column_of(const Params &p, u32 c) const { return wide ? (first + c) % p.w : c; }
};

// q . rel_h for the rows that the keys touch. Threads meet before and after.
DEVICE void fill_row_terms(const Params &p, const Head &head, const Keys &keys, u32 q0, const float *q,
    const float *tables, Memory m) {
    if (!p.has_rel_h) return;
    __syncthreads();
    for (u32 i = threadIdx.x; i < keys.rows * TILE; i += 256) {
        u32 query = least(q0 + i % TILE, head.tokens - 1), a = keys.row + i / TILE + p.h - 1 - query / p.w;
        m.row_terms[i] = dot_rows(q + head.base + query * head.stride, rel_h_row(p, tables, head.g, a), p.d);
    }
    __syncthreads();
}

// q . rel_w for the keys' columns. Threads meet before and after.
DEVICE void fill_column_terms(const Params &p, const Head &head, const Keys &keys, u32 q0, const float *q,
    const float *tables, Memory m) {
    if (!p.has_rel_w) return;
    __syncthreads();
    for (u32 i = threadIdx.x; i < keys.columns * TILE; i += 256) {
        u32 query = least(q0 + i % TILE, head.tokens - 1), b = keys.column_of(p, i / TILE) + p.w - 1 - query % p.w;
        m.column_terms[i] = dot_rows(q + head.base + query * head.stride, rel_w_row(p, tables, head.g, b), p.d);
    }
    __syncthreads();
}

// The logit of a query and a key of the tile from their scaled product. `at` is the query's place in its tile.
DEVICE float with_terms(const Params &p, const Head &head, const Keys &keys, u32 query, u32 key, u32 at,
    const float *tables, const Memory &m, float s) {
    if (p.has_rel_h) s += m.row_terms[keys.row_line(p, key) * TILE + at];
    if (p.has_rel_w) s += m.column_terms[keys.column_line(p, key) * TILE + at];
    if (p.has_bias) {
        s += bias_of(p, tables, head.g, key / p.w + p.h - 1 - query / p.w, key % p.w + p.w - 1 - query % p.w);
    }
    return s;
}

// ------------------------------------------------------------------------------------------------ products

// Puts numbers c0 .. c0 + 31 of the rows of tokens t0 .. t0 + 63 into a slice, transposed; zero past the last token and number.
DEVICE void fill_slice(const Params &p, const Head &head, const float *x, u32 t0, u32 c0, float *slice) {
    UNROLL for (u32 i = threadIdx.x; i < TILE * SLICE / 4; i += 256) {
        u32 row = i % TILE, c = i / TILE * 4;
        Pack<4> v = {};
        if (t0 + row < head.tokens && c0 + c < p.d) v = load<4>(x + head.base + (t0 + row) * head.stride + c0 + c);
        UNROLL for (int j = 0; j < 4; j++) slice[(c + j) * LINE + row] = v.v[j];
    }
}

// s[i][j] = row of x at token x0 + 4 ty + i times row of y at token y0 + 4 tx + j. Threads meet inside.
DEVICE void multiply(const Params &p, const Head &head, const float *x, u32 x0, const float *y, u32 y0, Memory m,
    float (&s)[4][4]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    UNROLL for (int i = 0; i < 4; i++) {
        UNROLL for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
    }
    for (u32 c0 = 0; c0 < p.d; c0 += SLICE) {
        __syncthreads();
        fill_slice(p, head, x, x0, c0, m.left);
        fill_slice(p, head, y, y0, c0, m.right);
        __syncthreads();
        u32 width = least(SLICE, p.d - c0);
        for (u32 c = 0; c < width; c += 4) {
            UNROLL for (u32 k = c; k < c + 4; k++) {
                Pack<4> a = load<4>(m.left + k * LINE + 4 * ty), b = load<4>(m.right + k * LINE + 4 * tx);
                UNROLL for (int i = 0; i < 4; i++) {
                    UNROLL for (int j = 0; j < 4; j++) s[i][j] += a.v[i] * b.v[j];
                }
            }
        }
    }
}

// Puts a tile where `apply` reads it, by columns. Threads meet before.
DEVICE void put_scores(Memory m, const float (&s)[4][4]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    __syncthreads();
    UNROLL for (int j = 0; j < 4; j++) {
        store(m.scores + (4 * tx + j) * LINE + 4 * ty, Pack<4>{{s[0][j], s[1][j], s[2][j], s[3][j]}});
    }
}

// A row of D numbers of output is spread over the 16 threads tx: which of them is a thread's j-th.
template <int D> DEVICE u32 column_of(int j) {
    u32 tx = threadIdx.x % 16;
    return D == 32 ? 2 * tx + j : j / 4 * 64 + 4 * tx + j % 4;
}

// out[i][..] += factor * sum over the tile's columns of scores[4 ty + i][column] * (numbers chunk .. chunk + D of the row of x at
// token t0 + column). Threads meet inside, the first time before anything is read.
template <int D> DEVICE void apply(const Params &p, const Head &head, const float *x, u32 t0, u32 chunk, float factor,
    Memory m, float (&out)[4][D / 16]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (u32 half = 0; half < TILE; half += 32) {
        __syncthreads();
        UNROLL for (u32 i = threadIdx.x; i < 32 * D / 4; i += 256) {
            u32 row = i / (D / 4), c = i % (D / 4) * 4, t = t0 + half + row;
            Pack<4> v = {};
            if (t < head.tokens && chunk + c < p.d) v = load<4>(x + head.base + t * head.stride + chunk + c);
            UNROLL for (int j = 0; j < 4; j++) v.v[j] *= factor;
            store(m.left + row * D + c, v);
        }
        __syncthreads();
        for (u32 row = 0; row < 32; row++) {
            Pack<4> a = load<4>(m.scores + (half + row) * LINE + 4 * ty);
            float b[D / 16];
            const float *line = m.left + row * D;
            if constexpr (D == 32) {
                b[0] = line[2 * tx];
                b[1] = line[2 * tx + 1];
            } else {
                UNROLL for (int j = 0; j < D / 16; j += 4) {
                    Pack<4> v = load<4>(line + j * 16 + 4 * tx);
                    UNROLL for (int k = 0; k < 4; k++) b[j + k] = v.v[k];
                }
            }
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int j = 0; j < D / 16; j++) out[i][j] += a.v[i] * b[j];
            }
        }
    }
}

// Writes what `apply` made to the rows of tokens t0 + 4 ty + i, each times its factor.
template <int D> DEVICE void put_rows(const Params &p, const Head &head, float *y, u32 t0, u32 chunk,
    const float (&factor)[4], const float (&out)[4][D / 16]) {
    u32 ty = threadIdx.x / 16;
    UNROLL for (int i = 0; i < 4; i++) {
        u32 t = t0 + 4 * ty + i;
        if (t >= head.tokens) continue;
        float *row = y + head.base + t * head.stride;
        if constexpr (D == 32) {
            UNROLL for (int j = 0; j < 2; j++) {
                u32 c = chunk + column_of<D>(j);
                if (c < p.d) row[c] = out[i][j] * factor[i];
            }
        } else {
            UNROLL for (int j = 0; j < D / 16; j += 4) {
                u32 c = chunk + column_of<D>(j);
                Pack<4> v;
                UNROLL for (int k = 0; k < 4; k++) v.v[k] = out[i][j + k] * factor[i];
                if (c < p.d) store(row + c, v);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ forward

// Joins the sixteen threads of a row.
DEVICE float row_max(float v) {
    for (int lane = 8; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}
DEVICE float row_sum(float v) {
    for (int lane = 8; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

// Numbers chunk .. chunk + D - 1 of the output of 64 queries of a head, from q0 on, and (with the first) their log-sum-exp.
template <int D> DEVICE void forward(const Params &p, const Head &head, u32 q0, u32 chunk, const float *q, const float *k,
    const float *v, const float *tables, float *y, float *lse, float *shared) {
    Memory m(p, shared);
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float out[4][D / 16] = {}, largest[4], sum[4] = {};
    UNROLL for (int i = 0; i < 4; i++) largest[i] = -INFINITY;
    for (u32 k0 = 0; k0 < head.tokens; k0 += TILE) {
        Keys keys(p, k0);
        if (k0 == 0 || keys.wide) fill_column_terms(p, head, keys, q0, q, tables, m);
        fill_row_terms(p, head, keys, q0, q, tables, m);
        float s[4][4];
        multiply(p, head, q, q0, k, k0, m, s);
        UNROLL for (int i = 0; i < 4; i++) {
            u32 at = 4 * ty + i, query = least(q0 + at, head.tokens - 1);
            float top = largest[i];
            UNROLL for (int j = 0; j < 4; j++) {
                u32 key = k0 + 4 * tx + j;
                s[i][j] = key < head.tokens ? with_terms(p, head, keys, query, key, at, tables, m, p.scale * s[i][j]) : -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            top = row_max(top);
            float factor = expf(largest[i] - top);
            largest[i] = top;
            sum[i] *= factor;
            UNROLL for (int j = 0; j < 4; j++) {
                s[i][j] = expf(s[i][j] - top);
                sum[i] += s[i][j];
            }
            UNROLL for (int j = 0; j < D / 16; j++) out[i][j] *= factor;
        }
        put_scores(m, s);
        apply<D>(p, head, v, k0, chunk, 1.0f, m, out);
    }
    float factor[4];
    UNROLL for (int i = 0; i < 4; i++) {
        float all = row_sum(sum[i]);
        factor[i] = 1.0f / all;
        u32 t = q0 + 4 * ty + i;
        if (tx == 0 && chunk == 0 && t < head.tokens) lse[head.stat + t * p.g] = largest[i] + logf(all);
    }
    put_rows<D>(p, head, y, q0, chunk, factor, out);
}
