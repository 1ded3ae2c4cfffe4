// The fused attention block in f32; formulas and who calls what in src/ops/attention_block.rs. T = h w is at most 64 in fwd.
//
// Every product is made of tiles of 64 x 64: a block of 256 threads owns one, thread (tx, ty) rows 4 ty .. + 3 and columns 4 tx .. + 3 of
// it in registers. Slices of 32 along the sum lie in shared memory, transposed, as in attention_tiles.cuh; an operand is told by a
// function that gives four neighbours, along the sum or beside it.
//
// fwd: a block owns a head of `images` images, whose places fill the 64 rows of a tile. It makes q, k and v, 64 numbers at a time,
// writes them to memory (backward wants them there) and attends image by image with the code of global_attention.cu, which reads
// them back out of the cache. proj, dgrad, wgrad: a tile of y, dx or dW each; the residual is added where the tile is written. Nothing
// is added by two blocks and every sum runs in a fixed order.
//
// Flop of fwd: 6 T C d a head and image, in tiles of 64 rows (7 x 7: 49 of them are used), and 4 T^2 d of the attention. Bytes: x once for
// each head, a head's weights once for each block of it, both mostly out of L2; q, k, v written and read back. Launches: 2 forward where
// there were 5 or 6. Shared memory: that of global_attention.cu, at most 51 KiB. Not timed: no GPU.

#include "common.cuh"
#include "attention_tiles.cuh"

struct AttentionBlockParams {
    // Of the attention; its d is the width of a head in q, k and v, a multiple of 4.
    GlobalAttentionParams attention;
    // Channels of x, of a head in the weights, of y; the rest as in src/ops/attention_block.rs.
    u32 c, width, o, residual, save, images, parts, weight;
};

DEVICE u32 rows_of(const AttentionBlockParams &p) { return p.attention.n * p.attention.h * p.attention.w; }
DEVICE u32 padded_depth(const AttentionBlockParams &p) { return p.attention.g * p.attention.d; }

// Weights of q, k and v.
struct Weights {
    const float *q, *k, *v;
    DEVICE const float *of(u32 which) const { return which == 0 ? q : which == 1 ? k : v; }
};

// Where row `row` of a weight, counted in padded heads, starts; NONE where it is padding.
constexpr u32 NONE = 0xffffffffu;
DEVICE u32 weight_row(const AttentionBlockParams &p, u32 row) {
    u32 c = row % p.attention.d;
    return c < p.width ? (row / p.attention.d * p.width + c) * p.c : NONE;
}

// Four numbers of a row of `length` from place `at` on, zeros past its end. Rows whose length is a multiple of 4 lie at multiples of 16
// bytes.
DEVICE Pack<4> four(const float *row, u32 at, u32 length) {
    Pack<4> v = {};
    if (length % 4 == 0) {
        if (at < length) v = load<4>(row + at);
    } else {
        UNROLL for (u32 j = 0; j < 4; j++) {
            if (at + j < length) v.v[j] = row[at + j];
        }
    }
    return v;
}

// Puts an operand's slice: `of(place, k)` gives numbers k .. k + 3 of a place (along the sum) ...
template <class F> DEVICE void fill_along(F of, u32 k0, float *slice) {
    UNROLL for (u32 i = threadIdx.x; i < TILE * SLICE / 4; i += 256) {
        u32 place = i % TILE, k = i / TILE * 4;
        Pack<4> v = of(place, k0 + k);
        UNROLL for (int j = 0; j < 4; j++) slice[(k + j) * LINE + place] = v.v[j];
    }
}
// ... or number k of places `place` .. + 3.
template <class F> DEVICE void fill_beside(F of, u32 k0, float *slice) {
    UNROLL for (u32 i = threadIdx.x; i < TILE * SLICE / 4; i += 256) {
        u32 place = i % (TILE / 4) * 4, k = i / (TILE / 4);
        store(slice + k * LINE + place, of(place, k0 + k));
    }
}

// s = the product over numbers k0 .. end - 1, past which operands are zeros. Threads meet inside.
template <class L, class R> DEVICE void product(u32 k0, u32 end, L fill_left, R fill_right, float *shared, float (&s)[4][4]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float *left = shared, *right = shared + SLICE * LINE;
    UNROLL for (int i = 0; i < 4; i++) {
        UNROLL for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
    }
    for (; k0 < end; k0 += SLICE) {
        __syncthreads();
        fill_left(k0, left);
        fill_right(k0, right);
        __syncthreads();
        UNROLL for (u32 k = 0; k < SLICE; k++) {
            Pack<4> a = load<4>(left + k * LINE + 4 * ty), b = load<4>(right + k * LINE + 4 * tx);
            UNROLL for (int i = 0; i < 4; i++) {
                UNROLL for (int j = 0; j < 4; j++) s[i][j] += a.v[i] * b.v[j];
            }
        }
    }
}

// Writes a tile of out [rows, columns], with the same place of `more` added where there is one.
DEVICE void put(const float (&s)[4][4], u32 row0, u32 rows, u32 column0, u32 columns, const float *more, float *out) {
    u32 column = column0 + threadIdx.x % 16 * 4;
    UNROLL for (int i = 0; i < 4; i++) {
        u32 row = row0 + threadIdx.x / 16 * 4 + i;
        if (row >= rows || column >= columns) continue;
        u32 at = row * columns + column;
        Pack<4> v = {{s[i][0], s[i][1], s[i][2], s[i][3]}};
        if (more) {
            Pack<4> add = four(more + row * columns, column, columns);
            UNROLL for (int j = 0; j < 4; j++) v.v[j] += add.v[j];
        }
        if (columns % 4 == 0) {
            store(out + at, v);
        } else {
            UNROLL for (u32 j = 0; j < 4; j++) {
                if (column + j < columns) out[at + j] = v.v[j];
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ forward

// Numbers first .. first + 63 of (q, k, v) of head g for rows row0 .. row0 + count - 1.
DEVICE void project(const AttentionBlockParams &p, const float *x, const Weights &weights, u32 g, u32 row0, u32 count, u32 first,
    float *qkv, float *shared) {
    u32 d = p.attention.d;
    float s[4][4];
    auto left = [&](u32 k0, float *slice) {
        fill_along([&](u32 place, u32 k) { return place < count ? four(x + (row0 + place) * p.c, k, p.c) : Pack<4>{}; }, k0, slice);
    };
    auto right = [&](u32 k0, float *slice) {
        fill_along([&](u32 place, u32 k) {
            u32 column = first + place, row = weight_row(p, g * d + column % d);
            bool inside = column < 3 * d && row != NONE;
            return inside ? four(weights.of(column / d) + row, k, p.c) : Pack<4>{};
        }, k0, slice);
    };
    product(0, p.c, left, right, shared, s);
    // Four neighbours belong to one of q, k and v: d is a multiple of 4.
    u32 column = first + threadIdx.x % 16 * 4;
    if (column >= 3 * d) return;
    float *out = qkv + column / d * p.attention.part + g * d + column % d;
    UNROLL for (int i = 0; i < 4; i++) {
        u32 row = threadIdx.x / 16 * 4 + i;
        if (row < count) store(out + (row0 + row) * padded_depth(p), Pack<4>{{s[i][0], s[i][1], s[i][2], s[i][3]}});
    }
}

template <int D> DEVICE void block_forward(const AttentionBlockParams &p, const float *x, const Weights &weights, const float *tables,
    float *qkv, float *attended, float *lse, float *shared) {
    const GlobalAttentionParams &at = p.attention;
    u32 g = blockIdx.x % at.g, image = blockIdx.x / at.g * p.images, end = least(image + p.images, at.n), tokens = at.h * at.w;
    for (u32 first = 0; first < 3 * at.d; first += TILE) {
        project(p, x, weights, g, image * tokens, (end - image) * tokens, first, qkv, shared);
    }
    // What the block has written is there for all of it.
    __syncthreads();
    for (; image < end; image++) {
        Head head(at, image, g);
        for (u32 chunk = 0; chunk < at.d; chunk += D) {
            forward<D>(at, head, 0, chunk, qkv, qkv + at.part, qkv + 2 * at.part, tables, attended, lse, shared);
        }
    }
}

#define ARGUMENTS AttentionBlockParams p, const float *x, const float *wq, const float *wk, const float *wv, const float *tables, \
    float *qkv, float *attended, float *lse

KERNEL(256, 2) attention_block_fwd_f32(ARGUMENTS) {
    DYN_SMEM(float, shared);
    block_forward<32>(p, x, Weights{wq, wk, wv}, tables, qkv, attended, lse, shared);
}

KERNEL(256, 2) attention_block_fwd_d64_f32(ARGUMENTS) {
    DYN_SMEM(float, shared);
    block_forward<64>(p, x, Weights{wq, wk, wv}, tables, qkv, attended, lse, shared);
}

// ------------------------------------------------------------------------------------------------ products

KERNEL(256, 2) attention_block_proj_f32(AttentionBlockParams p, const float *attended, const float *wo, const float *x, float *y) {
    SMEM(float, shared, 2 * SLICE * LINE);
    u32 tiles = (p.o + TILE - 1) / TILE, row0 = blockIdx.x / tiles * TILE, column0 = blockIdx.x % tiles * TILE;
    u32 depth = p.attention.g * p.width, rows = rows_of(p);
    float s[4][4];
    auto left = [&](u32 k0, float *slice) {
        fill_along([&](u32 place, u32 k) {
            return row0 + place < rows ? four(attended + (row0 + place) * depth, k, depth) : Pack<4>{};
        }, k0, slice);
    };
    auto right = [&](u32 k0, float *slice) {
        fill_along([&](u32 place, u32 k) {
            return column0 + place < p.o ? four(wo + (column0 + place) * depth, k, depth) : Pack<4>{};
        }, k0, slice);
    };
    product(0, depth, left, right, shared, s);
    put(s, row0, rows, column0, p.o, p.residual ? x : nullptr, y);
}

// One sum over the numbers of dq, dk and dv.
KERNEL(256, 2) attention_block_dgrad_f32(AttentionBlockParams p, const float *grads, const float *wq, const float *wk, const float *wv,
    const float *dy, float *dx) {
    SMEM(float, shared, 2 * SLICE * LINE);
    u32 tiles = (p.c + TILE - 1) / TILE, row0 = blockIdx.x / tiles * TILE, column0 = blockIdx.x % tiles * TILE;
    u32 depth = padded_depth(p), rows = rows_of(p);
    Weights weights{wq, wk, wv};
    float s[4][4];
    auto left = [&](u32 k0, float *slice) {
        // Four neighbours belong to one of the three: depth is a multiple of 4.
        fill_along([&](u32 place, u32 k) {
            bool inside = row0 + place < rows && k < 3 * depth;
            return inside ? load<4>(grads + k / depth * p.attention.part + (row0 + place) * depth + k % depth) : Pack<4>{};
        }, k0, slice);
    };
    auto right = [&](u32 k0, float *slice) {
        fill_beside([&](u32 place, u32 k) {
            u32 row = weight_row(p, k % depth);
            bool inside = k < 3 * depth && row != NONE;
            return inside ? four(weights.of(k / depth) + row, column0 + place, p.c) : Pack<4>{};
        }, k0, slice);
    };
    product(0, 3 * depth, left, right, shared, s);
    put(s, row0, rows, column0, p.c, p.residual ? dy : nullptr, dx);
}

// dw [parts][3][depth, c]: along y which of q, k and v, along z the part of the rows.
KERNEL(256, 2) attention_block_wgrad_f32(AttentionBlockParams p, const float *x, const float *grads, float *dw) {
    SMEM(float, shared, 2 * SLICE * LINE);
    u32 tiles = (p.c + TILE - 1) / TILE, row0 = blockIdx.x / tiles * TILE, column0 = blockIdx.x % tiles * TILE;
    u32 depth = padded_depth(p), rows = rows_of(p), length = (rows + p.parts - 1) / p.parts;
    u32 first = blockIdx.z * length, end = least(first + length, rows);
    float s[4][4];
    auto left = [&](u32 k0, float *slice) {
        fill_beside([&](u32 place, u32 k) {
            return k < end ? four(grads + blockIdx.y * p.attention.part + k * depth, row0 + place, depth) : Pack<4>{};
        }, k0, slice);
    };
    auto right = [&](u32 k0, float *slice) {
        fill_beside([&](u32 place, u32 k) { return k < end ? four(x + k * p.c, column0 + place, p.c) : Pack<4>{}; }, k0, slice);
    };
    product(first, end, left, right, shared, s);
    dw += (blockIdx.z * 3 + blockIdx.y) * p.weight;
    UNROLL for (int i = 0; i < 4; i++) {
        u32 row = row0 + threadIdx.x / 16 * 4 + i, start = row < depth ? weight_row(p, row) : NONE;
        UNROLL for (u32 j = 0; j < 4; j++) {
            u32 column = column0 + threadIdx.x % 16 * 4 + j;
            if (start != NONE && column < p.c) dw[start + column] = s[i][j];
        }
    }
}
