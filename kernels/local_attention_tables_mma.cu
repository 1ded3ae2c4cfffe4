// Gradients of local attention's position tables in f16 and bf16 on tensor cores; the formula stands in local_attention_bwd.cu, who
// owns what in local_attention_mma.cuh.
//
// A block owns a head and a piece of the tiles of all images, and walks over them as dq does. dS of a patch is summed by the rows
// and the columns of the halo (`Margins`), moved to the offsets of each query, and its transpose is the left operand of a product
// with the patch's rows of q: d(rel_h, rel_w) of the patch, which stays in registers from tile to tile. For the bias the patch's
// dS waits in shared memory in 16 bits; lanes own offsets and take one number of each of the 16 queries.
//
// partial [pieces, G, kh * kw * width] begins with [kh + kw, d] where there are rel tables, then [kh, kw] where there is a bias,
// then zeros: the room is what the sums by offset of local_attention_bwd.cu take, which reads q, k, v and dy once for each offset.
//
// Flop: 4 d + 64 for each of the padded places a query, then 32 d ceil((kh + kw) / 16) a query. Bytes: as dq reads. Shared memory:
// as dq, and where there is a bias 512 bytes for 16 places of the halo a warp; where that is too much (a bias, heads of 128, wide
// windows) the op takes local_attention_bwd.cu. Not timed: no GPU.

#include "local_attention_bwd_mma.cuh"

// Numbers from dS of a query to the next: all places of a halo in whole chunks, and 8 for the banks.
DEVICE u32 halo_row(const Params &p) { return ((p.kh + 3) * (p.kw + 3) + 15) / 16 * 16 + 8; }

// sums [32, D] of offsets += (dS by the offsets of each query, from the warp's scratch)^T q.
template <int D> DEVICE void add_rows(const Params &p, const Patch<D> &at, const Memory<D> &m, float (&sums)[2][D / 8][4]) {
    UNROLL for (u32 half = 0; half < 2; half++) {
        if (16 * half >= term_rows(p)) continue;
        u32 a[4];
        UNROLL for (int i = 0; i < 4; i++) {
            u32 offset = 16 * half + at.g + i % 2 * 8, query = i / 2 * 8 + 2 * at.t;
            a[i] = pair_of<Real>(Margins::of(p, m.terms, query, offset), Margins::of(p, m.terms, query + 1, offset));
        }
        apply<D>(sums[half], a, m.own + left_start<D>(at.lane));
    }
}

// by_offset [kh kw], in shared memory of the warp's own, += dS of the patch, [16, halo_row].
DEVICE void add_offsets(const Params &p, const Real *halo, float *by_offset) {
    __syncwarp();
    for (u32 i = threadIdx.x % 32; i < p.kh * p.kw; i += 32) {
        const Real *ds = halo + i / p.kw * (p.kw + 3) + i % p.kw;
        float sum = 0.0f;
        UNROLL for (u32 query = 0; query < 16; query++) sum += to_float(ds[query * halo_row(p) + query / 4 * (p.kw + 3) + query % 4]);
        by_offset[i] += sum;
    }
    __syncwarp();
}

// The block's sums, one warp after the other, and zeros for the rest of its part of `partial`.
template <int D> DEVICE void put_sums(
    const Params &p, const float (&sums)[2][D / 8][4], const float *by_offset, float *whole, float *to) {
    u32 lane = threadIdx.x % 32, offsets = p.kh * p.kw, rel = term_rows(p) > 0 ? (p.kh + p.kw) * D : 0;
    for (u32 warp = 0; warp < blockDim.x / 32 && rel > 0; warp++) {
        __syncthreads();
        if (warp != threadIdx.x / 32) continue;
        UNROLL for (int i = 0; i < D; i++) {
            u32 row = i / (D / 2) * 16 + lane / 4 + i % 4 / 2 * 8, c = i % (D / 2) / 4 * 8 + 2 * (lane % 4) + i % 2;
            float &sum = whole[row * D + c];
            float mine = sums[i / (D / 2)][i % (D / 2) / 4][i % 4];
            sum = warp == 0 ? mine : sum + mine;
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < offsets * partial_width(p); i += blockDim.x) {
        float sum = 0.0f;
        if (i < rel) {
            sum = whole[i];
        } else if (p.has_bias && i - rel < offsets) {
            for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += by_offset[warp * offsets + i - rel];
        }
        to[i] = sum;
    }
}

template <int D> DEVICE void table_gradients(const Params &p, const Given &in, float *partial, unsigned char *shared) {
    u32 g = blockIdx.x % p.g, piece = blockIdx.x / p.g, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 all = p.n * Patch<D>::tiles(p.h, 8) * Patch<D>::tiles(p.w, 4 * patches_across());
    u32 each = (all + p.pieces - 1) / p.pieces, end = least((piece + 1) * each, all);
    Memory<D> m(p, shared, p.kw + 4 * patches_across() - 1, 2, 0);
    // Behind the biases: sums by offset of each warp, then dS of each warp's patch.
    float *by_offset = m.bias + p.kh * p.kw;
    Real *halo = reinterpret_cast<Real *>(by_offset + warps * p.kh * p.kw) + warp * 16 * halo_row(p);
    stage_tables<D>(p, g, in.tables, m);
    for (u32 i = threadIdx.x; p.has_bias && i < warps * p.kh * p.kw; i += blockDim.x) by_offset[i] = 0.0f;
    float sums[2][D / 8][4] = {};
    for (u32 tile = piece * each; tile < end; tile++) {
        __syncthreads();
        Patch<D> at(p, tile, g);
        Margins margins;
        score_gradients(p, at, m, in, [&](const u32 (&ds)[4], const Chunk &chunk) {
            if (term_rows(p) > 0) margins.add(ds, chunk, at.g);
            UNROLL for (int i = 0; p.has_bias && i < 4; i++) {
                u32 place = chunk.row[i / 2 * 2] * at.wide + chunk.column[i / 2 * 2], row = at.g + i % 2 * 8;
                if (chunk.row[i / 2 * 2] < p.kh + 3) *reinterpret_cast<u32 *>(halo + row * halo_row(p) + place) = ds[i];
            }
        });
        if (!at.there) continue;
        if (term_rows(p) > 0) {
            margins.put(m.terms, at.g, at.t);
            add_rows<D>(p, at, m, sums);
        }
        if (p.has_bias) add_offsets(p, halo, by_offset + warp * p.kh * p.kw);
    }
    __syncthreads();
    put_sums<D>(p, sums, by_offset, reinterpret_cast<float *>(shared), partial + blockIdx.x * p.kh * p.kw * partial_width(p));
}

KERNEL(128) OF(local_attention_bwd_tables_mma_d16)(LocalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    table_gradients<16>(p, GIVEN, partial, shared);
}
KERNEL(128) OF(local_attention_bwd_tables_mma_d32)(LocalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    table_gradients<32>(p, GIVEN, partial, shared);
}
KERNEL(128) OF(local_attention_bwd_tables_mma_d64)(LocalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    table_gradients<64>(p, GIVEN, partial, shared);
}
KERNEL(128) OF(local_attention_bwd_tables_mma_d128)(LocalAttentionParams p, INPUTS, float *partial) {
    DYN_SMEM(unsigned char, shared);
    table_gradients<128>(p, GIVEN, partial, shared);
}
