// Gradients of global attention's row and column tables on tensor cores; the formulas stand in global_attention_bwd_mma.cu.
//
//   drel_h[a] = sum over queries i of R[i, a] q_i,   R[i, a] = sum of dS over the keys of i at row offset a;   drel_w[b] likewise
//
// Who owns what: a block owns a piece of the tiles of 64 queries of one head, over all images. For each it makes dS again tile by
// tile of keys, sums it up for each map row and column of the keys, and multiplies the sums, transposed, with the queries; what
// comes out it adds to its own lines of `partial`, whose numbers belong to one lane each. A second kernel
// (global_attention_tables.cu) sums over the pieces. No atomics.
//
// Flop: 4 T^2 d a head, and 2 (2h + 2w) T d. Extra memory: partial [pieces, G, (2h-1) + (2w-1), d]. Limits: heads of up to 128
// numbers; with a bias table, whose gradient needs the sum for each pair of offsets, global_attention_tables.cu has all of it to do.
// Not timed: no GPU.

#include "global_attention_bwd_mma.cuh"

// partial lines of one axis += sums, transposed, times the rows of the tile's queries. `coordinates` are the queries'.
template <int D> DEVICE void add_axis(const Params &p, const Axis &axis, bool rows, u32 q0, const u32 *coordinates, const float *sums,
    const Real *tile, float *partial) {
    Range range(p, axis, rows, q0, TILE);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 o = range.low / 16 * 16; o <= range.high; o += 16) {
        // Sixteen offsets always belong to the same warp.
        if (o / 16 % 4 != warp) continue;
        float out[D / 8][4] = {};
        UNROLL for (int k = 0; k < 4; k++) {
            u32 a[4];
            UNROLL for (int i = 0; i < 4; i++) {
                u32 offset = o + lane_row() + i % 2 * 8, query = k * 16 + i / 2 * 8 + lane_column();
                float x[2];
                UNROLL for (int j = 0; j < 2; j++) {
                    u32 line = line_at(axis, coordinates[query + j], offset);
                    x[j] = line < axis.lines ? sums[line * LINE + query + j] : 0.0f;
                }
                a[i] = pair_of<Real>(x[0], x[1]);
            }
            UNROLL for (int n = 0; n < D / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, tile + place<D>(k * 16 + lane % 16, n + lane / 16));
                u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                mma16(out[n], a, left, Real{});
                mma16(out[n + 1], a, right, Real{});
            }
        }
        UNROLL for (int n = 0; n < D / 8; n++) {
            UNROLL for (int i = 0; i < 2; i++) {
                u32 offset = o + lane_row() + 8 * i, c = n * 8 + lane_column();
                if (offset >= 2 * axis.size - 1 || c >= p.d) continue;
                float2 *to = reinterpret_cast<float2 *>(partial + offset * p.d + c);
                *to = make_float2(to->x + out[n][2 * i], to->y + out[n][2 * i + 1]);
            }
        }
    }
}

// Zeros in the lines of one axis, each written by the lane that adds to it.
template <int D> DEVICE void clear_axis(const Params &p, u32 offsets, float *partial) {
    for (u32 o = threadIdx.x / 32 * 16; o < offsets; o += 64) {
        UNROLL for (int n = 0; n < D / 8; n++) {
            UNROLL for (int i = 0; i < 2; i++) {
                u32 offset = o + lane_row() + 8 * i, c = n * 8 + lane_column();
                if (offset < offsets && c < p.d) *reinterpret_cast<float2 *>(partial + offset * p.d + c) = make_float2(0.0f, 0.0f);
            }
        }
    }
}

template <int D> struct Tables {
    Terms<1> terms;
    float *sums;
    u32 *coordinates;
    Real *stages;
    float *row_partial, *column_partial;

    DEVICE Tables(const Params &p, float *partial, unsigned char *shared) : terms(p, shared) {
        sums = terms.end(p);
        coordinates = reinterpret_cast<u32 *>(sums + (row_lines(p) + column_lines(p)) * LINE);
        stages = reinterpret_cast<Real *>(coordinates + 2 * TILE);
        row_partial = partial + blockIdx.x * axis_lines(p) * p.d;
        column_partial = row_partial + p.has_rel_h * table_rows(p) * p.d;
        if (p.has_rel_h) clear_axis<D>(p, table_rows(p), row_partial);
        if (p.has_rel_w) clear_axis<D>(p, table_columns(p), column_partial);
    }
    // Adds what the sums hold; they begin again. `tile` is free.
    DEVICE void flush(const Params &p, const Given &in, const Head &head, u32 q0, u32 k0, Real *tile) {
        __syncthreads();
        fetch<D>(p, head, in.q, q0, tile);
        copy_async_commit();
        copy_async_wait(0);
        __syncthreads();
        if (p.has_rel_h) add_axis<D>(p, row_axis(p, k0), true, q0, coordinates, sums, tile, row_partial);
        if (p.has_rel_w) {
            add_axis<D>(p, column_axis(p, k0), false, q0, coordinates + TILE, sums + row_lines(p) * LINE, tile, column_partial);
        }
        __syncthreads();
        clear_lines(row_lines(p) + column_lines(p), sums + threadIdx.x / 32 * 16);
        __syncwarp();
    }
    // The queries q0 .. q0 + 63 of a head.
    DEVICE void add(const Params &p, const Given &in, const Head &head, u32 q0) {
        constexpr u32 STAGE = 2 * TILE * D;
        u32 at = threadIdx.x / 32 * 16, stage = 0;
        QueryRows<D> rows;
        rows.first = q0 + at;
        rows.row_sums = sums + at;
        rows.load(p, in, head);
        clear_lines(row_lines(p) + column_lines(p), rows.row_sums);
        __syncthreads();
        if (threadIdx.x < TILE) {
            u32 query = least(q0 + threadIdx.x, head.tokens - 1);
            coordinates[threadIdx.x] = query / p.w;
            coordinates[TILE + threadIdx.x] = query % p.w;
        }
        auto copy = [&](u32 k0, u32 stage) {
            fetch<D>(p, head, in.k, k0, stages + stage * STAGE);
            fetch<D>(p, head, in.v, k0, stages + stage * STAGE + TILE * D);
            terms.describe(p, k0, stage);
            copy_async_commit();
        };
        if (STAGES<D> == 2) copy(0, 0);
        for (u32 k0 = 0; k0 < head.tokens; k0 += TILE) {
            if (STAGES<D> == 1) {
                __syncthreads();
                copy(k0, 0);
            }
            copy_async_wait(0);
            __syncthreads();
            if (STAGES<D> == 2 && k0 + TILE < head.tokens) copy(k0 + TILE, stage ^ 1);
            terms.fill(p, head, in.tables, rows.q[0], q0, at, k0, k0 > 0, false);
            __syncwarp();
            Real *k = stages + stage * STAGE;
            const uint2 *keys = terms.keys + stage * TILE;
            for (u32 from = 0; from < TILE && k0 + from < head.tokens; from += COLUMNS) {
                Weights<COLUMNS / 8> ds[1];
                rows.weights(p, in, head, terms, keys, k, k0, from, ds);
                rows.add(p, head, keys, k0, from, ds[0]);
            }
            if (by_tile(p) || k0 + TILE >= head.tokens) flush(p, in, head, q0, k0, k);
            if (STAGES<D> == 2) stage ^= 1;
        }
    }
};

template <int D> DEVICE void bwd_tables(const Params &p, const Given &in, float *partial, unsigned char *shared) {
    Tables<D> tables(p, partial, shared);
    u32 tiles = (p.h * p.w + TILE - 1) / TILE, units = p.n * tiles, each = (units + p.pieces - 1) / p.pieces;
    u32 first = blockIdx.x / p.g * each;
    for (u32 unit = first; unit < least(first + each, units); unit++) {
        tables.add(p, in, Head(p, unit / tiles, blockIdx.x % p.g), unit % tiles * TILE);
    }
}

KERNEL(128, 3) OF(global_attention_bwd_tables_d16)(GlobalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    bwd_tables<16>(p, GIVEN, partial, shared);
}
KERNEL(128, 3) OF(global_attention_bwd_tables_d32)(GlobalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    bwd_tables<32>(p, GIVEN, partial, shared);
}
KERNEL(128, 2) OF(global_attention_bwd_tables_d64)(GlobalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    bwd_tables<64>(p, GIVEN, partial, shared);
}
KERNEL(128) OF(global_attention_bwd_tables_d128)(GlobalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    bwd_tables<128>(p, GIVEN, partial, shared);
}
