// Position tables of attention, packed in one buffer: rel_h [rows, G d], rel_w [columns, G d], bias [G, rows, columns], absent ones
// taking no place. Put after the parameter block, which the file names Params, and its table_rows and table_columns.

// Parts of the packed tables start at multiples of 128 numbers (`ALIGN`).
DEVICE u32 aligned(u32 n) { return (n + 127) / 128 * 128; }
DEVICE u32 rel_w_start(const Params &p) { return aligned(p.has_rel_h * table_rows(p) * p.g * p.d); }
DEVICE u32 bias_start(const Params &p) { return rel_w_start(p) + aligned(p.has_rel_w * table_columns(p) * p.g * p.d); }

// Rows of head g for the row offset a and the column offset b.
DEVICE const float *rel_h_row(const Params &p, const float *tables, u32 g, u32 a) { return tables + (a * p.g + g) * p.d; }
DEVICE const float *rel_w_row(const Params &p, const float *tables, u32 g, u32 b) {
    return tables + rel_w_start(p) + (b * p.g + g) * p.d;
}

// A bias, or 0 where there is none.
DEVICE float bias_of(const Params &p, const float *tables, u32 g, u32 a, u32 b) {
    return p.has_bias ? tables[bias_start(p) + (g * table_rows(p) + a) * table_columns(p) + b] : 0.0f;
}

// d is a multiple of 4; either row may be of a 16-bit type.
template <class A, class B> DEVICE float dot_rows(const A *a, const B *b, u32 d) {
    float sum = 0.0f;
    for (u32 c = 0; c < d; c += 4) {
        Pack<4> x = load<4>(a + c), y = load<4>(b + c);
        sum += x.v[0] * y.v[0] + x.v[1] * y.v[1] + x.v[2] * y.v[2] + x.v[3] * y.v[3];
    }
    return sum;
}

// A head of an image: token t's row starts at base + t * stride, its statistics lie at stat + t * g.
struct Head {
    u32 g, base, stride, stat, tokens;
    DEVICE Head(const Params &p, u32 n, u32 g) : g(g) {
        tokens = p.h * p.w;
        stat = n * tokens * p.g + g;
        base = stat * p.d;
        stride = p.g * p.d;
    }
};

// What a backward pass reads.
struct Given {
    const Real *q, *k, *v;
    const float *tables;
    const Real *dy;
    const float *stats;
};

// Arguments of backward kernels.
#define INPUTS const Real *q, const Real *k, const Real *v, const float *tables, const Real *dy, const float *stats
#define GIVEN Given{q, k, v, tables, dy, stats}

// ------------------------------------------------------------------------------------------------ gradients of the tables

// Numbers that the table pass writes for each offset: dS q where there are rel tables, then dS (and three zeros) for the bias.
DEVICE u32 rel_width(const Params &p) { return p.has_rel_h + p.has_rel_w > 0 ? p.d : 0; }
DEVICE u32 partial_width(const Params &p) { return rel_width(p) + 4 * p.has_bias; }

// dS of a query and a key at offset (a, b). A key that is not `inside` is zeros.
DEVICE float pair_gradient(const Params &p, const Given &in, const Head &head, u32 query, u32 key, bool inside, u32 a, u32 b) {
    const Real *q = in.q + head.base + query * head.stride;
    float s = bias_of(p, in.tables, head.g, a, b), dp = 0.0f;
    if (inside) {
        s += p.scale * dot_rows(q, in.k + head.base + key * head.stride, p.d);
        dp = dot_rows(in.dy + head.base + query * head.stride, in.v + head.base + key * head.stride, p.d);
    }
    if (p.has_rel_h) s += dot_rows(q, rel_h_row(p, in.tables, head.g, a), p.d);
    if (p.has_rel_w) s += dot_rows(q, rel_w_row(p, in.tables, head.g, b), p.d);
    u32 stat = head.stat + query * p.g;
    return expf(s - in.stats[2 * stat]) * (dp - in.stats[2 * stat + 1]);
}

// An element of the packed tables' gradient: rel_h sums over pieces and column offsets, rel_w over pieces and row offsets, bias
// over pieces. A thread owns an element.
DEVICE void sum_tables(const Params &p, const float *partial, float *dtables) {
    u32 rows = table_rows(p), columns = table_columns(p), row = p.g * p.d, i = flat_id();
    u32 second = rel_w_start(p), bias = bias_start(p), width = partial_width(p);
    if (i >= bias + aligned(p.has_bias * p.g * rows * columns)) return;
    // The first sum, how many follow in a piece and how far apart; none for the gaps between the tables.
    u32 first = 0, step = width, count = 0;
    if (i < second) {
        u32 c = i % row, a = i / row;
        first = (c / p.d * rows + a) * columns * width + c % p.d;
        count = a < rows ? columns : 0;
    } else if (i < bias) {
        u32 c = (i - second) % row, b = (i - second) / row;
        first = (c / p.d * rows * columns + b) * width + c % p.d;
        step = width * columns;
        count = b < columns ? rows : 0;
    } else {
        first = (i - bias) * width + width - 4;
        count = i - bias < p.g * rows * columns ? 1 : 0;
    }
    float sum = 0.0f;
    for (u32 piece = 0; piece < p.pieces; piece++) {
        u32 start = first + piece * p.g * rows * columns * width;
        for (u32 j = 0; j < count; j++) sum += partial[start + j * step];
    }
    dtables[i] = sum;
}

// A warp's sums at an offset: each lane brings dS q (32 numbers from `chunk` on) and dS of its pairs.
#define OFFSET_NUMBERS 32
struct OffsetSums {
    float ds_q[OFFSET_NUMBERS];
    float ds;

    DEVICE OffsetSums() : ds(0.0f) {
        UNROLL for (int c = 0; c < OFFSET_NUMBERS; c++) ds_q[c] = 0.0f;
    }
    DEVICE void add(float pair, const Real *q, u32 width) {
        ds += pair;
        UNROLL for (u32 c = 0; c < OFFSET_NUMBERS; c += 4) {
            if (c < width) {
                Pack<4> x = load<4>(q + c);
                UNROLL for (int k = 0; k < 4; k++) ds_q[c + k] += pair * x.v[k];
            }
        }
    }
    // All lanes must call it.
    DEVICE void put(const Params &p, float *out, u32 chunk, u32 width) {
        u32 lane = threadIdx.x % 32;
        UNROLL for (u32 c = 0; c < OFFSET_NUMBERS; c++) {
            float all = warp_sum(ds_q[c]);
            if (lane == 0 && c < width) out[chunk + c] = all;
        }
        float all = warp_sum(ds);
        if (lane == 0 && chunk == 0 && p.has_bias) store(out + rel_width(p), Pack<4>{{all, 0.0f, 0.0f, 0.0f}});
    }
};
