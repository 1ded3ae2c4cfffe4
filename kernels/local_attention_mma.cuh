// Local attention on tensor cores, what forward and backward share: patches, their keys in shared memory, position terms.
//
// A warp owns a patch of 4 x 4 places in a head: the 16 rows of mma16. What its places see is a halo of (kh + 3) x (kw + 3) places,
// walked in order, 16 at a time; ldmatrix takes each row by its address, so no row of the halo needs padding, and of the products
// kh kw / (16 ceil((kh + 3) (kw + 3) / 16)) are useful: 44 % for 7 x 7, 56 % for 9 x 9, 66 % for 13 x 13. The rest is masked.
//
// A block owns patches 2 down and `across` (2 or 4) side by side, whose halos overlap: the rows of both tensors that are walked over
// come in bands, copied asynchronously to shared memory once for all of its warps, with zeros outside the map. Rows stand D + 8
// numbers apart, so that eight neighbouring ones lie in different banks.
//
// A number in the halo of a patch takes part in the products of all its 16 places, though masked: one that is not finite there
// makes NaN of up to three places more than it should.

#include "tensor_cores.cuh"
#include "local_attention.cuh"

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// The most bytes of a band, see band_rows.
#define BAND_BYTES 36864
// Numbers from the position terms of a place to those of the next, and of an offset to the next: no multiple of 32.
#define TERMS 36
#define TURNED 20

DEVICE u32 patches_across() { return blockDim.x / 64; }
// Rows of the tables, those of rel_h first, filled up to tiles of 16.
DEVICE u32 term_rows(const Params &p) { return p.has_rel_h + p.has_rel_w > 0 ? (p.kh + p.kw + 15) / 16 * 16 : 0; }

// Where a warp stands. Halos are counted from their upper left place.
template <int D> struct Patch {
    static constexpr u32 ROW = D + 8;
    static constexpr u32 PIECES = D / 8;
    // Lane; its row and its pair of columns in a fragment.
    u32 lane, g, t;
    // First place of the block, and of the patch in the block; columns of the block's halo and of the patch's.
    u32 block_y, block_x, down, right, columns, wide;
    // j * magic / 2^20 = j / wide for all places of a halo.
    u32 magic;
    Head head;
    // First place of the patch, and whether it is on the map.
    u32 y, x;
    bool there;

    static DEVICE u32 tiles(u32 side, u32 tile) { return (side + tile - 1) / tile; }

    // The block's patches: those of a tile of 8 x 4 across places, counted over all images, in a head.
    DEVICE Patch(const Params &p, u32 tile, u32 of_head)
        : lane(threadIdx.x % 32), g(lane / 4), t(lane % 4),
          head(p, tile / tiles(p.w, 4 * patches_across()) / tiles(p.h, 8), of_head) {
        u32 across = patches_across(), warp = threadIdx.x / 32;
        block_x = tile % tiles(p.w, 4 * across) * 4 * across;
        block_y = tile / tiles(p.w, 4 * across) % tiles(p.h, 8) * 8;
        down = warp / across * 4;
        right = warp % across * 4;
        columns = p.kw + 4 * across - 1;
        wide = p.kw + 3;
        magic = (1u << 20) / wide + 1;
        y = block_y + down;
        x = block_x + right;
        there = y < p.h && x < p.w;
    }
    // A block for each tile and head, heads next to each other: they share sectors and pages.
    DEVICE Patch(const Params &p) : Patch(p, blockIdx.x / p.g, blockIdx.x % p.g) {}

    // Row i of the patch.
    DEVICE bool inside(const Params &p, u32 i) const { return y + i / 4 < p.h && x + i % 4 < p.w; }
    DEVICE u32 place(const Params &p, u32 i) const { return (y + i / 4) * p.w + x + i % 4; }
    // Row and column of place j in a halo, counted from the row that j = 0 stands for.
    DEVICE u32 row_of(u32 j) const { return j * magic >> 20; }

    // The rows of the patch, [16, ROW], copied by its warp; zeros outside the map.
    DEVICE void stage_own(const Params &p, const Real *from, Real *to) const {
        for (u32 i = lane; i < 16 * PIECES; i += 32) {
            u32 row = i / PIECES, piece = i % PIECES * 8;
            bool in = inside(p, row);
            copy_async(to + row * ROW + piece, from + head.base + (in ? place(p, row) * head.stride + piece : 0), in);
        }
    }
    // The same rows back: two accumulators' halves at a time, then whole accesses. `own` is free again after it.
    DEVICE void put(const Params &p, const float (&sums)[D / 8][4], float upper, float lower, Real *own, Real *to) const {
        UNROLL for (int n = 0; n < D / 8; n++) {
            u32 *pair = reinterpret_cast<u32 *>(own + g * ROW + 8 * n + 2 * t);
            pair[0] = pair_of<Real>(sums[n][0] * upper, sums[n][1] * upper);
            pair[8 * ROW / 2] = pair_of<Real>(sums[n][2] * lower, sums[n][3] * lower);
        }
        __syncwarp();
        for (u32 i = lane; i < 16 * PIECES; i += 32) {
            u32 row = i / PIECES, piece = i % PIECES * 8;
            if (!inside(p, row)) continue;
            Real *target = to + head.base + place(p, row) * head.stride + piece;
            *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(own + row * ROW + piece);
        }
        __syncwarp();
    }

    // Rows `from` to `from + rows` of the block's halo in two tensors, copied by the block; zeros outside the map.
    DEVICE void stage_band(const Params &p, const Real *a, const Real *b, u32 from, u32 rows, Real *to_a, Real *to_b) const {
        for (u32 i = threadIdx.x; i < rows * columns * PIECES; i += blockDim.x) {
            u32 at = i / PIECES, piece = i % PIECES * 8, row = at / columns, source = head.base;
            // Wraps to something large above and left of the map.
            u32 place_y = block_y + from + row - p.kh / 2, place_x = block_x + at - row * columns - p.kw / 2;
            bool in = place_y < p.h && place_x < p.w;
            if (in) source += (place_y * p.w + place_x) * head.stride + piece;
            copy_async(to_a + at * ROW + piece, a + source, in);
            copy_async(to_b + at * ROW + piece, b + source, in);
        }
    }
};

// Rows of a band: all that a block sees if they fit in BAND_BYTES, else 8, 4 or (wide heads and windows) 2.
template <int D> DEVICE u32 band_rows(const Params &p) {
    u32 row = (p.kw + 4 * patches_across() - 1) * Patch<D>::ROW * 2 * sizeof(Real);
    return (p.kh + 7) * row <= BAND_BYTES ? p.kh + 7 : 8 * row <= BAND_BYTES ? 8 : 4 * row <= BAND_BYTES ? 4 : 2;
}

// The block's shared memory in its order. src/ops/local_attention/cuda.rs counts the same bytes.
template <int D> struct Memory {
    static constexpr u32 ROW = Patch<D>::ROW;
    // The two bands; the tables' rows rounded, and what rounding left.
    Real *a, *b, *high, *low;
    // The warp's own patch, of one or two tensors, and its position terms [16, TERMS] or [32, TURNED].
    Real *own, *other;
    float *terms, *bias;
    // Log-sum-exp and rowsum(dy * y) of each place of a band.
    float2 *stats;

    // `tensors` of the warp's own, `statistics` 1 where the band has some.
    DEVICE Memory(const Params &p, unsigned char *shared, u32 columns, u32 tensors, u32 statistics) {
        u32 warps = blockDim.x / 32, warp = threadIdx.x / 32, band = band_rows<D>(p) * columns;
        a = reinterpret_cast<Real *>(shared);
        b = a + band * ROW;
        high = b + band * ROW;
        low = high + term_rows(p) * ROW;
        own = low + term_rows(p) * ROW + warp * tensors * 16 * ROW;
        other = own + 16 * ROW;
        float *numbers = reinterpret_cast<float *>(low + term_rows(p) * ROW + warps * tensors * 16 * ROW);
        stats = reinterpret_cast<float2 *>(numbers);
        numbers += statistics * 2 * band;
        terms = numbers + (term_rows(p) > 0 ? warp * 32 * TURNED : 0);
        bias = numbers + (term_rows(p) > 0 ? warps * 32 * TURNED : 0);
    }
};

// The tables' rows of the head as a sum of two numbers of 16 bits each, and the biases; by the block.
template <int D> DEVICE void stage_tables(const Params &p, u32 g, const float *tables, const Memory<D> &m) {
    for (u32 i = threadIdx.x; i < term_rows(p) * D / 4; i += blockDim.x) {
        u32 row = i / (D / 4), c = i % (D / 4) * 4;
        Pack<4> x{}, rest;
        if (row < p.kh) {
            if (p.has_rel_h) x = load<4>(rel_h_row(p, tables, g, row) + c);
        } else if (row < p.kh + p.kw) {
            if (p.has_rel_w) x = load<4>(rel_w_row(p, tables, g, row - p.kh) + c);
        }
        UNROLL for (int k = 0; k < 4; k++) rest.v[k] = x.v[k] - to_float(rounded<Real>(x.v[k]));
        store(m.high + row * Memory<D>::ROW + c, x);
        store(m.low + row * Memory<D>::ROW + c, rest);
    }
    for (u32 i = threadIdx.x; p.has_bias && i < p.kh * p.kw; i += blockDim.x) {
        m.bias[i] = LOG2E * tables[bias_start(p) + g * p.kh * p.kw + i];
    }
}

// ------------------------------------------------------------------------------------------------ fragments

// Where a lane points in rows of shared memory. A tile of 16 rows as a: rows are places, columns channels.
template <int D> DEVICE u32 left_start(u32 lane) { return lane % 16 * Patch<D>::ROW + lane / 16 * 8; }

// 16 rows as fragments a of all steps along d: kept in registers, or for wide heads read again at each use.
template <int D> struct Left {
    static constexpr bool KEPT = D <= 64;
    u32 kept[KEPT ? D / 16 : 1][4];
    const Real *rows;

    // Rows must have come, and stay.
    DEVICE void take(const Real *from, u32 lane) {
        rows = from + left_start<D>(lane);
        if constexpr (KEPT) {
            UNROLL for (int step = 0; step < D / 16; step++) load_matrices(kept[step], rows + 16 * step);
        }
    }
    DEVICE void get(int step, u32 (&a)[4]) const {
        if constexpr (KEPT) {
            UNROLL for (int i = 0; i < 4; i++) a[i] = kept[step][i];
        } else {
            load_matrices(a, rows + 16 * step);
        }
    }
};

// s [16, 16] += left . rows: `rows` points at row lane / 16 * 8 + lane % 8 of the 16, and at channel lane / 8 % 2 * 8.
template <int D> DEVICE void multiply(float (&s)[2][4], const Left<D> &left, const Real *rows) {
    UNROLL for (int step = 0; step < D / 16; step++) {
        u32 a[4], both[4];
        left.get(step, a);
        load_matrices(both, rows + 16 * step);
        u32 first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        mma16(s[0], a, first, Real{});
        mma16(s[1], a, second, Real{});
    }
}

// sums [16, D] += a [16, 16] rows: `rows` points at row lane % 16 of the 16, and at channel lane / 16 * 8.
template <int D> DEVICE void apply(float (&sums)[D / 8][4], const u32 (&a)[4], const Real *rows) {
    UNROLL for (int n = 0; n < D / 16; n++) {
        u32 both[4];
        load_matrices_transposed(both, rows + 16 * n);
        u32 first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        mma16(sums[2 * n], a, first, Real{});
        mma16(sums[2 * n + 1], a, second, Real{});
    }
}

// An accumulator of 16 columns as a fragment a.
DEVICE void as_left(const float (&s)[2][4], u32 (&a)[4]) {
    UNROLL for (int i = 0; i < 4; i++) a[i] = pair_of<Real>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
}

// Over the four lanes of a row.
DEVICE float row_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
DEVICE float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// ------------------------------------------------------------------------------------------------ what a place sees

// 16 places of a patch's halo from place j on, of a band: which rows of the band a lane points at, and the places of its scores
// s[i / 2][i % 2] and s[i / 2][i % 2 + 2], in the patch's halo.
struct Chunk {
    u32 as_rows, as_columns;
    u32 row[4], column[4];
    // The same places in the band; the last place for those past it.
    u32 place[4];

    // `first`: row of the halo that place 0 of the walk stands for; `start`: where it lies in the band. Places past the last
    // have rows past the halo, and so are in no window; they are read as the last.
    template <int D> DEVICE Chunk(const Patch<D> &at, u32 j, u32 places, u32 first, u32 start) {
        u32 r = least(j + at.lane / 16 * 8 + at.lane % 8, places - 1), c = least(j + at.lane % 16, places - 1);
        u32 skip = at.columns - at.wide;
        as_rows = (start + r + at.row_of(r) * skip) * Patch<D>::ROW + at.lane / 8 % 2 * 8;
        as_columns = (start + c + at.row_of(c) * skip) * Patch<D>::ROW + at.lane / 16 * 8;
        UNROLL for (int i = 0; i < 4; i++) {
            u32 k = j + i / 2 * 8 + 2 * at.t + i % 2, y = at.row_of(k);
            row[i] = k < places ? first + y : 1u << 16;
            column[i] = k - y * at.wide;
            k = least(k, places - 1);
            place[i] = start + k + at.row_of(k) * skip;
        }
    }
};

// Which places of the halo belong to the windows of a lane's two rows of the patch: g, and g + 8, two places further down.
struct Window {
    u32 left, width, top[2], height[2];

    // `in_map`: only places on the map.
    template <int D> DEVICE Window(const Params &p, const Patch<D> &at, bool in_map) {
        span(at.g % 4, p.kw, at.x, p.w, in_map, left, width);
        span(at.g / 4, p.kh, at.y, p.h, in_map, top[0], height[0]);
        span(at.g / 4 + 2, p.kh, at.y, p.h, in_map, top[1], height[1]);
    }
    static DEVICE void span(u32 at, u32 k, u32 origin, u32 side, bool in_map, u32 &first, u32 &length) {
        u32 last = at + k;
        first = at;
        if (in_map) {
            if (origin + first < k / 2) first = k / 2 - origin;
            last = least(last, side + k / 2 - origin);
        }
        length = last > first ? last - first : 0;
    }
    DEVICE bool column(u32 x) const { return x - left < width; }
    DEVICE bool row(int which, u32 y) const { return y - top[which] < height[which]; }
};

// The logit's position term, in powers of two, of a place of the halo for row g or g + 8 of the patch.
template <int D> struct Terms {
    const float *row[2], *column[2], *bias[2];

    DEVICE Terms(const Params &p, const Patch<D> &at, const Memory<D> &m) {
        UNROLL for (int i = 0; i < 2; i++) {
            u32 y = at.g / 4 + 2 * i, x = at.g % 4;
            row[i] = m.terms + (at.g + 8 * i) * TERMS - y;
            column[i] = m.terms + (at.g + 8 * i) * TERMS + p.kh - x;
            bias[i] = m.bias - y * p.kw - x;
        }
    }
    DEVICE float at(const Params &p, int which, u32 y, u32 x) const {
        float term = 0.0f;
        if (p.has_rel_h + p.has_rel_w > 0) term = row[which][y] + column[which][x];
        if (p.has_bias) term += bias[which][y * p.kw + x];
        return term;
    }
};

// q . rel_h[a] and q . rel_w[b] of the patch, [16, TERMS], by its warp. The tables' two parts make up for their rounding.
template <int D> DEVICE void position_terms(const Params &p, const Patch<D> &at, const Left<D> &query, const Memory<D> &m) {
    u32 start = (at.lane / 16 * 8 + at.lane % 8) * Patch<D>::ROW + at.lane / 8 % 2 * 8;
    for (u32 row = 0; row < term_rows(p); row += 16) {
        float s[2][4] = {};
        multiply<D>(s, query, m.low + row * Patch<D>::ROW + start);
        multiply<D>(s, query, m.high + row * Patch<D>::ROW + start);
        UNROLL for (int i = 0; i < 8; i++) {
            m.terms[(at.g + i % 4 / 2 * 8) * TERMS + row + i / 4 * 8 + 2 * at.t + i % 2] = LOG2E * s[i / 4][i % 4];
        }
    }
    __syncwarp();
}

// Walks over what the block's patches see, band by band: `stage(from, rows)` starts the copies of a band, `begin()` is called once what
// was copied before it is there, then `each(chunk)` for all places of the warp's halo. All threads of a block must call it.
template <int D, class Stage, class Begin, class Each>
DEVICE void walk(const Params &p, const Patch<D> &at, Stage stage, Begin begin, Each each) {
    u32 all = p.kh + 7, rows = band_rows<D>(p);
    copy_async_commit();
    for (u32 from = 0; from < all; from += rows) {
        u32 end = least(from + rows, all);
        if (from > 0) __syncthreads();
        stage(from, end - from);
        copy_async_commit();
        if (from == 0) {
            copy_async_wait(1);
            __syncthreads();
            begin();
        }
        copy_async_wait(0);
        __syncthreads();
        // The rows of the band that this patch sees.
        u32 first = from > at.down ? from : at.down, last = least(end, at.down + p.kh + 3);
        if (!at.there || first >= last) continue;
        u32 places = (last - first) * at.wide, start = (first - from) * at.columns + at.right;
        for (u32 j = 0; j < places; j += 16) each(Chunk(at, j, places, first - at.down, start));
    }
}
