// The fused attention block in f16 and bf16 on tensor cores; formulas and who calls what in src/ops/attention_block.rs. T = h w is at most
// 64 in fwd.
//
// fwd: a block of four warps owns a head of `images` images, whose places fill the 64 rows of a tile. It makes q, k and v of them side by
// side, up to 192 columns in registers, so that x streams through shared memory once (heads of up to 64 numbers; wider ones take two
// turns); rounds and writes them to memory, where backward wants them; and attends image by image with the code of
// global_attention_mma.cu, which reads them back out of the cache. proj, dgrad, wgrad: a tile of 64 x 64 of y, dx or dW each, by the
// product of conv2d_mma.cuh; a residual is added to the sums in f32, before they are rounded. Nothing is added by two blocks and every sum
// runs in a fixed order.
//
// Flop of fwd: 6 T C d a head and image in tiles of 64 rows (7 x 7: 49 of them are used), and 4 T^2 d of the attention. Bytes: x once for
// each head, a head's weights once for each block of it, both mostly out of L2; q, k and v written once and read once. A step of 32 of
// the widest product is 64 mma a warp for 16 ldmatrix of 512 B. Shared memory: three stages of 8 to 16 KiB, or what the attention wants.
// Not timed: no GPU. Limits: heads of up to 128 numbers, channels on all sides in multiples of 8.

#include "conv2d_mma.cuh"
#include "global_attention_fwd_mma.cuh"

struct AttentionBlockParams {
    // Of the attention; its d is the width of a head in q, k and v, a multiple of 8.
    GlobalAttentionParams attention;
    // Channels of x, of a head in the weights, of y; the rest as in src/ops/attention_block.rs.
    u32 c, width, o, residual, save, images, parts, weight;
};

constexpr int RING = 3;

DEVICE u32 rows_of(const AttentionBlockParams &p) { return p.attention.n * p.attention.h * p.attention.w; }
DEVICE u32 padded_depth(const AttentionBlockParams &p) { return p.attention.g * p.attention.d; }

// Weights of q, k and v.
struct Projections {
    const Real *q, *k, *v;
    DEVICE const Real *of(u32 which) const { return which == 0 ? q : which == 1 ? k : v; }
};

// Where row `row` of a weight, counted in padded heads, starts; NOWHERE where it is padding.
DEVICE u32 weight_row(const AttentionBlockParams &p, u32 row) {
    u32 c = row % p.attention.d;
    return c < p.width ? (row / p.attention.d * p.width + c) * p.c : NOWHERE;
}

// ------------------------------------------------------------------------------------------------ operands

// Rows of a matrix [rows, length], along the sum.
template <int P> struct Along {
    Share<P, true, true> share;
    const Real *x;
    u32 first, rows, length, k;

    DEVICE Along(const Real *x, u32 first, u32 rows, u32 length)
        : x(x), first(first + share.row), rows(rows), length(length), k(share.pack * 8) {}
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < Tile<P, true>::PASSES; i++) {
            u32 row = first + i * Tile<P, true>::ROWS;
            share.move(i, tile, x, row * length + k, row < rows && k < length);
        }
        k += STEP;
    }
};

// The rows of the weights that make numbers first .. of (q, k, v) of a head, along the sum.
template <int P> struct HeadRows {
    static constexpr int PASSES = Tile<P, true>::PASSES;
    Share<P, true, true> share;
    // Of each row, one that is not there standing for none.
    const Real *row[PASSES];
    const Real *some;
    u32 length, k;

    DEVICE HeadRows(const AttentionBlockParams &p, const Projections &w, u32 g, u32 first) : some(w.q), length(p.c), k(share.pack * 8) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            u32 d = p.attention.d, column = first + share.row + i * Tile<P, true>::ROWS, start = weight_row(p, g * d + column % d);
            row[i] = column < 3 * d && start != NOWHERE ? w.of(column / d) + start : nullptr;
        }
    }
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < PASSES; i++) {
            bool inside = row[i] && k < length;
            share.move(i, tile, inside ? row[i] : some, inside ? k : 0, inside);
        }
        k += STEP;
    }
};

// Rows of dq, dk and dv, along one sum over all three.
template <int P> struct Gradients {
    Share<P, true, true> share;
    const Real *x;
    u32 first, rows, depth, part, k;

    DEVICE Gradients(const AttentionBlockParams &p, const Real *x, u32 first)
        : x(x), first(first + share.row), rows(rows_of(p)), depth(padded_depth(p)), part(p.attention.part), k(share.pack * 8) {}
    DEVICE void fetch(uint4 *tile) {
        u32 from = k / depth * part + k % depth;
        UNROLL for (int i = 0; i < Tile<P, true>::PASSES; i++) {
            u32 row = first + i * Tile<P, true>::ROWS;
            share.move(i, tile, x, from + row * depth, row < rows && k < 3 * depth);
        }
        k += STEP;
    }
};

// Columns first .. of the weights of q, k and v, whose rows are the sum's index.
template <int P> struct WeightColumns {
    Share<P, false, true> share;
    AttentionBlockParams p;
    Projections w;
    u32 column, k;

    DEVICE WeightColumns(const AttentionBlockParams &p, const Projections &w, u32 first)
        : p(p), w(w), column(first + share.pack * 8), k(share.row) {}
    DEVICE void fetch(uint4 *tile) {
        u32 depth = padded_depth(p);
        UNROLL for (int i = 0; i < Tile<P, false>::PASSES; i++) {
            u32 start = weight_row(p, k % depth);
            bool inside = k < 3 * depth && start != NOWHERE && column < p.c;
            share.move(i, tile, w.of(inside ? k / depth : 0), inside ? start + column : 0, inside);
            k += Tile<P, false>::ROWS;
        }
    }
};

// Columns first .. of a matrix [rows, columns], whose rows from `k` on are the sum's index.
template <int P> struct Beside {
    Share<P, false, true> share;
    const Real *x;
    u32 column, columns, k, end;

    DEVICE Beside(const Real *x, u32 first, u32 columns, u32 k, u32 end)
        : x(x), column(first + share.pack * 8), columns(columns), k(k + share.row), end(end) {}
    DEVICE void fetch(uint4 *tile) {
        UNROLL for (int i = 0; i < Tile<P, false>::PASSES; i++) {
            share.move(i, tile, x, k * columns + column, k < end && column < columns);
            k += Tile<P, false>::ROWS;
        }
    }
};

// ------------------------------------------------------------------------------------------------ ends

// f(row, column, first, second) for each pair of neighbours of a tile that this thread has.
template <int BM, int BN, class F> DEVICE void each_pair(Sums<BM, BN> &sums, F f) {
    u32 row = warp_row<BM>() + threadIdx.x % 32 / 4, column = warp_column<BN>() + threadIdx.x % 4 * 2;
    UNROLL for (int i = 0; i < BM / 32; i++) {
        UNROLL for (int j = 0; j < BN / 16; j++) {
            UNROLL for (int h = 0; h < 2; h++) {
                f(row + i * 16 + h * 8, column + j * 8, sums.v[i][j][2 * h], sums.v[i][j][2 * h + 1]);
            }
        }
    }
}

// A sum is only rounded.
struct Rounded {
    DEVICE Rounded of(u32) const { return *this; }
    DEVICE float low(float sum) const { return sum; }
    DEVICE float high(float sum) const { return sum; }
};

// Rows of a matrix with so many columns.
template <int BN> struct MatrixRows {
    u32 row, rows, columns;
    DEVICE MatrixRows(u32 first, u32 rows, u32 columns)
        : row(first + threadIdx.x / Tile<BN, false>::PACKS), rows(rows), columns(columns) {}
    DEVICE u32 index() const { return row < rows ? row * columns : NOWHERE; }
    DEVICE void on() { row += Tile<BN, false>::ROWS; }
};

// Rounds and writes a tile of out [rows, columns], the same place of `more` added first where there is one.
DEVICE void put(Sums<64, 64> &sums, u32 row0, u32 rows, u32 column0, u32 columns, const Real *more, Real *out, uint4 *shared) {
    if (more) {
        each_pair(sums, [&](u32 row, u32 column, float &first, float &second) {
            row += row0, column += column0;
            if (row >= rows || column >= columns) return;
            Pack<2> x = load<2>(more + row * columns + column);
            first += x.v[0], second += x.v[1];
        });
    }
    write<64, 64>(sums, Rounded{}, MatrixRows<64>(row0, rows, columns), out, column0, columns, shared);
}

// ------------------------------------------------------------------------------------------------ forward

// Heads of up to D numbers, BN columns of (q, k, v) at a time.
template <int D, int BN> DEVICE void block_forward(const AttentionBlockParams &p, const Real *x, const Projections &weights,
    const float *tables, Real *qkv, Real *attended, float *lse, unsigned char *shared) {
    const GlobalAttentionParams &at = p.attention;
    u32 g = blockIdx.x % at.g, image = blockIdx.x / at.g * p.images, end = least(image + p.images, at.n), tokens = at.h * at.w;
    u32 row0 = image * tokens, rows = end * tokens;
    for (u32 first = 0; first < 3 * at.d; first += BN) {
        Sums<64, BN> sums;
        Along<64> left(x, row0, rows, p.c);
        HeadRows<BN> right(p, weights, g, first);
        product<64, BN, RING, true, true>(sums, left, right, p.c, reinterpret_cast<uint4 *>(shared));
        // A pair belongs to one of q, k and v: d is a multiple of 8.
        each_pair(sums, [&](u32 row, u32 column, float low, float high) {
            row += row0, column += first;
            if (row >= rows || column >= 3 * at.d) return;
            Real *to = qkv + column / at.d * at.part + (row * at.g + g) * at.d + column % at.d;
            store(to, Pack<2>{{low, high}});
        });
        __syncthreads();
    }
    // What the block has written is there for all of it.
    for (; image < end; image++) {
        forward<D, 1>(at, Head(at, image, g), 0, qkv, qkv + at.part, qkv + 2 * at.part, tables, attended, lse, shared);
        __syncthreads();
    }
}

#define ARGUMENTS AttentionBlockParams p, const Real *x, const Real *wq, const Real *wk, const Real *wv, const float *tables, \
    Real *qkv, Real *attended, float *lse

KERNEL(128) OF(attention_block_fwd)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    block_forward<16, 64>(p, x, Projections{wq, wk, wv}, tables, qkv, attended, lse, shared);
}
KERNEL(128) OF(attention_block_fwd_d32)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    block_forward<32, 96>(p, x, Projections{wq, wk, wv}, tables, qkv, attended, lse, shared);
}
// Left to itself the compiler keeps to 168 registers and spills one.
KERNEL(128, 2) OF(attention_block_fwd_d64)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    block_forward<64, 192>(p, x, Projections{wq, wk, wv}, tables, qkv, attended, lse, shared);
}
KERNEL(128) OF(attention_block_fwd_d128)(ARGUMENTS) {
    DYN_SMEM(unsigned char, shared);
    block_forward<128, 192>(p, x, Projections{wq, wk, wv}, tables, qkv, attended, lse, shared);
}

// ------------------------------------------------------------------------------------------------ products

KERNEL(128, 4) OF(attention_block_proj)(AttentionBlockParams p, const Real *attended, const Real *wo, const Real *x, Real *y) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, RING));
    u32 tiles = (p.o + 63) / 64, row0 = blockIdx.x / tiles * 64, column0 = blockIdx.x % tiles * 64, depth = p.attention.g * p.width;
    Sums<64, 64> sums;
    Along<64> left(attended, row0, rows_of(p), depth), right(wo, column0, p.o, depth);
    product<64, 64, RING, true, true>(sums, left, right, depth, shared);
    put(sums, row0, rows_of(p), column0, p.o, p.residual ? x : nullptr, y, shared);
}

// One sum over the numbers of dq, dk and dv.
KERNEL(128, 4) OF(attention_block_dgrad)(AttentionBlockParams p, const Real *grads, const Real *wq, const Real *wk, const Real *wv,
    const Real *dy, Real *dx) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, RING));
    u32 tiles = (p.c + 63) / 64, row0 = blockIdx.x / tiles * 64, column0 = blockIdx.x % tiles * 64;
    Sums<64, 64> sums;
    Gradients<64> left(p, grads, row0);
    WeightColumns<64> right(p, Projections{wq, wk, wv}, column0);
    product<64, 64, RING, true, false>(sums, left, right, 3 * padded_depth(p), shared);
    put(sums, row0, rows_of(p), column0, p.c, p.residual ? dy : nullptr, dx, shared);
}

// dw [parts][3][depth, c], f32: along y which of q, k and v, along z the part of the rows.
KERNEL(128, 4) OF(attention_block_wgrad)(AttentionBlockParams p, const Real *x, const Real *grads, float *dw) {
    SMEM(uint4, shared, PRODUCT_PACKS(64, 64, RING));
    u32 tiles = (p.c + 63) / 64, row0 = blockIdx.x / tiles * 64, column0 = blockIdx.x % tiles * 64;
    u32 depth = padded_depth(p), rows = rows_of(p), length = (rows + p.parts - 1) / p.parts;
    u32 first = least(blockIdx.z * length, rows), end = least(first + length, rows);
    Sums<64, 64> sums;
    Beside<64> left(grads + blockIdx.y * p.attention.part, row0, depth, first, end), right(x, column0, p.c, first, end);
    product<64, 64, RING, false, false>(sums, left, right, end - first, shared);
    dw += (blockIdx.z * 3 + blockIdx.y) * p.weight;
    each_pair(sums, [&](u32 row, u32 column, float low, float high) {
        row += row0, column += column0;
        u32 start = row < depth && column < p.c ? weight_row(p, row) : NOWHERE;
        if (start != NOWHERE) *reinterpret_cast<float2 *>(dw + start + column) = make_float2(low, high);
    });
}
