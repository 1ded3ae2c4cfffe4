// Matrix products on tensor cores whose operands are gathered: what conv2d_mma.cu and conv2d_bwd_mma.cu are made of.
//
// A block of four warps owns a BM x BN tile of the product, a warp a quarter of it (two by two) in registers, as float. The sum runs
// in steps of 32. A stage of shared memory holds a step of both operands; STAGES of them form a ring, so that the copies of
// STAGES - 1 steps are under way while one is multiplied, and one barrier a step is enough: it says that the step's copies are seen by
// all, and that all are through with the stage that is filled next.
//
// An operand is stored as rows of packs of 8 numbers (16 bytes): along the sum, where its memory is contiguous in the sum's index (a
// row is a place, 4 packs), else side by side (a row is an index of the sum, its packs are places). The pack's index is xored with
// the row's, so that the 8 rows an ldmatrix reads lie in 8 different groups of 4 banks.
//
// Where the innermost counts of both operands are multiples of 8, packs are moved by cp.async (VEC). Elsewhere a thread gathers them
// number by number in registers while the step before is multiplied, and stores them to the same place: the tensor cores see no
// difference.

#include "tensor_cores.cuh"
#include "conv2d.cuh"

constexpr u32 THREADS = 128;
constexpr u32 STEP = 32;
// The index of a row of the output that there is not.
constexpr u32 NOWHERE = 0xffffffffu;

// Packs of shared memory that a product needs.
#define PRODUCT_PACKS(bm, bn, stages) (((bm) + (bn)) * 4 * (stages))

// An operand of P places in a stage.
template <int P, bool ALONG> struct Tile {
    static constexpr u32 PACKS = (ALONG ? STEP : P) / 8;
    // A block moves so many rows at once, so often.
    static constexpr u32 ROWS = THREADS / PACKS;
    static constexpr int PASSES = P * STEP / 8 / THREADS;

    DEVICE static u32 at(u32 row, u32 pack) { return row * PACKS + (pack ^ (ALONG ? row / 2 % 4 : row % 8)); }
};

// What a thread moves of an operand: pack `pack` of rows `row` + pass * ROWS.
template <int P, bool ALONG, bool VEC> struct Share {
    typedef Tile<P, ALONG> Layout;
    u32 row = threadIdx.x / Layout::PACKS, pack = threadIdx.x % Layout::PACKS;
    u32 held[VEC ? 1 : Layout::PASSES][4];

    // Every pass lies 128 packs on, in the same place of the swizzle.
    DEVICE uint4 *place(uint4 *tile, int pass) const { return tile + Layout::at(row, pack) + pass * THREADS; }

    // Eight neighbours from `from[index]`, a multiple of 8; zeros where not `inside`.
    DEVICE void move(int pass, uint4 *tile, const Real *from, u32 index, bool inside) {
        if constexpr (VEC) {
            copy_async(place(tile, pass), from + index, inside);
        } else {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (inside) v = *reinterpret_cast<const uint4 *>(from + index);
            held[pass][0] = v.x, held[pass][1] = v.y, held[pass][2] = v.z, held[pass][3] = v.w;
        }
    }
    // Number j of a pack.
    DEVICE void gather(int pass, int j, const Real *from, u32 index, bool inside) {
        u32 bits = 0;
        if (inside) bits = from[index].bits;
        held[pass][j / 2] = j % 2 ? held[pass][j / 2] | bits << 16 : bits;
    }
    // What was not copied on its own.
    DEVICE void put(uint4 *tile) const {
        if constexpr (!VEC) {
            UNROLL for (int i = 0; i < Layout::PASSES; i++) {
                *place(tile, i) = make_uint4(held[i][0], held[i][1], held[i][2], held[i][3]);
            }
        }
    }
};

// The taps of a pixel as bits: bit r says that its row r of taps lies in the image, bit 16 + s its column s. Kernels of up to MOST_TAPS x
// MOST_TAPS: a walk's last step may go three rows past the kernel, whose bits are not set.
constexpr u32 MOST_TAPS = 12;
struct Taps {
    u32 bits = 0;
    // Taps lie a pixel after (`forward`) or before one another, from `first` on (above or left of the image: wrapped to something large).
    template <bool FORWARD> DEVICE void add(u32 first, u32 taps, u32 size, u32 shift) {
        for (u32 i = 0; i < taps; i++) {
            if ((FORWARD ? first + i : first - i) < size) bits |= 1u << (i + shift);
        }
    }
    DEVICE static u32 of(const Walk &at) { return 1u << at.r | 0x10000u << at.s; }
    DEVICE bool has(u32 tap) const { return (bits & tap) == tap; }
};

// A walk of equal steps over (c, s, r) with the index it stands at, which no step multiplies for.
struct Stride {
    u32 c = 0, s = 0, index = 0, by_c = 0, by_s = 0, by_index = 0, next_s = 0, next_r = 0;
    // From `k` on by `step`; c, s and r count `channels`, `columns` and on, and are each_c, each_s and each_r apart in memory.
    DEVICE void start(u32 k, u32 step, u32 channels, u32 columns, u32 each_c, u32 each_s, u32 each_r) {
        Walk at, by;
        at.to(k, channels, columns);
        by.to(step, channels, columns);
        c = at.c, s = at.s, by_c = by.c, by_s = by.s;
        index = at.c * each_c + at.s * each_s + at.r * each_r;
        by_index = by.c * each_c + by.s * each_s + by.r * each_r;
        next_s = each_s - channels * each_c;
        next_r = each_r - columns * each_s;
    }
    DEVICE void on(u32 channels, u32 columns) {
        c += by_c, s += by_s, index += by_index;
        if (c >= channels) c -= channels, s++, index += next_s;
        if (s >= columns) s -= columns, index += next_r;
    }
};

// ------------------------------------------------------------------------------------------------ the product

// Where a warp's quarter of the tile begins.
template <int BM> DEVICE u32 warp_row() { return threadIdx.x / 64 * (BM / 2); }
template <int BN> DEVICE u32 warp_column() { return threadIdx.x / 32 % 2 * (BN / 2); }

// Fragment i of mma16's a: 16 rows from `first` + 16 i on, and j of two b's: as many columns, at numbers k to k + 16 of the step. What is
// constant is added behind the swizzle, which it does not change, so that it needs no register.
template <int P, bool ALONG> DEVICE void left_fragment(u32 (&a)[4], const uint4 *tile, u32 first, int i, u32 k) {
    typedef Tile<P, ALONG> Layout;
    u32 lane = threadIdx.x % 32;
    if constexpr (ALONG) load_matrices(a, tile + Layout::at(first + lane % 16, k / 8 + lane / 16) + i * 16 * Layout::PACKS);
    else load_matrices_transposed(a, tile + Layout::at(lane % 8 + lane / 16 * 8, first / 8 + i * 2 + lane / 8 % 2) + k * Layout::PACKS);
}
template <int P, bool ALONG> DEVICE void right_fragments(u32 (&b)[4], const uint4 *tile, u32 first, int j, u32 k) {
    typedef Tile<P, ALONG> Layout;
    u32 lane = threadIdx.x % 32;
    if constexpr (ALONG) {
        load_matrices(b, tile + Layout::at(first + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2) + j * 16 * Layout::PACKS);
    } else {
        load_matrices_transposed(b, tile + Layout::at(lane % 16, first / 8 + j * 2 + lane / 16) + k * Layout::PACKS);
    }
}

// A thread's sums: of fragment (i, j) of 16 x 8, in mma16's order.
template <int BM, int BN> struct Sums {
    float v[BM / 32][BN / 16][4] = {};
};

template <int BM, int BN, bool LEFT, bool RIGHT> DEVICE void multiply(Sums<BM, BN> &sums, const uint4 *left, const uint4 *right) {
    u32 row = warp_row<BM>(), column = warp_column<BN>();
    UNROLL for (u32 k = 0; k < STEP; k += 16) {
        u32 a[BM / 32][4], b[BN / 32][4];
        UNROLL for (int i = 0; i < BM / 32; i++) left_fragment<BM, LEFT>(a[i], left, row, i, k);
        UNROLL for (int j = 0; j < BN / 32; j++) right_fragments<BN, RIGHT>(b[j], right, column, j, k);
        UNROLL for (int i = 0; i < BM / 32; i++) {
            UNROLL for (int j = 0; j < BN / 16; j++) {
                u32 pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                mma16(sums.v[i][j], a[i], pair, Real{});
            }
        }
    }
}

// sums += left right over the sum's index from 0 to `end`. left and right are operands: `fetch(tile)` moves the thread's share of the
// next step (zeros past the end) and `share` puts what it holds of it. Shared memory is free again after the next barrier.
template <int BM, int BN, int STAGES, bool LEFT, bool RIGHT, class L, class R>
DEVICE void product(Sums<BM, BN> &sums, L &left, R &right, u32 end, uint4 *shared) {
    constexpr u32 HALF = BM * STEP / 8, STAGE = (BM + BN) * STEP / 8;
    u32 steps = (end + STEP - 1) / STEP, now = 0, then = STAGES - 1;
    UNROLL for (u32 s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            uint4 *next = shared + s * STAGE;
            left.fetch(next);
            right.fetch(next + HALF);
            left.share.put(next);
            right.share.put(next + HALF);
        }
        copy_async_commit();
    }
    for (u32 k = 0; k < steps; k++) {
        copy_async_wait(STAGES - 2);
        __syncthreads();
        bool more = k + STAGES - 1 < steps;
        uint4 *next = shared + then * STAGE;
        if (more) {
            left.fetch(next);
            right.fetch(next + HALF);
        }
        // A group a step, if an empty one: so the wait counts steps.
        copy_async_commit();
        multiply<BM, BN, LEFT, RIGHT>(sums, shared + now * STAGE, shared + now * STAGE + HALF);
        if (more) {
            left.share.put(next);
            right.share.put(next + HALF);
        }
        now = now + 1 == STAGES ? 0 : now + 1;
        then = then + 1 == STAGES ? 0 : then + 1;
    }
}

// ------------------------------------------------------------------------------------------------ its end

// Rounds the tile's sums after `finish(sum, column)` and writes them in packs, by way of shared memory: a fragment's rows are 8 numbers
// wide, which would fill half of a sector of 32 bytes an access. `rows` stands at the thread's row of the tile: `index()` is where its
// column 0 lies in `out` (NOWHERE: no such row), `on()` moves it by Tile<BN, false>::ROWS rows. What is written may be changed at last by
// `after(numbers, their index in out)`, of N at a time.
struct Nothing {
    template <int N> DEVICE void operator()(Pack<N> &, u32) const {}
    static constexpr bool CHANGES = false;
};
template <int BM, int BN, class F, class O, class A = Nothing>
DEVICE void write(const Sums<BM, BN> &sums, F finish, O rows, Real *out, u32 first, u32 columns, uint4 *shared, A after = {}) {
    typedef Tile<BN, false> Layout;
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    __syncthreads();
    UNROLL for (int j = 0; j < BN / 16; j++) {
        u32 column = warp_column<BN>() + j * 8;
        auto end = finish.of(first + column + t);
        UNROLL for (int i = 0; i < BM / 32; i++) {
            UNROLL for (int h = 0; h < 2; h++) {
                u32 *at = reinterpret_cast<u32 *>(shared + Layout::at(warp_row<BM>() + g, column / 8) + (i * 16 + h * 8) * Layout::PACKS);
                at[t / 2] = pair_of<Real>(end.low(sums.v[i][j][2 * h]), end.high(sums.v[i][j][2 * h + 1]));
            }
        }
    }
    __syncthreads();
    u32 row = threadIdx.x / Layout::PACKS, pack = threadIdx.x % Layout::PACKS, column = first + pack * 8;
    for (; row < BM; row += Layout::ROWS, rows.on()) {
        u32 index = rows.index();
        if (index == NOWHERE) continue;
        const uint4 *from = shared + Layout::at(row, pack);
        if (columns % 8 == 0) {
            if (column >= columns) continue;
            if constexpr (A::CHANGES) {
                Pack<8> v = load<8>(reinterpret_cast<const Real *>(from));
                after(v, index + column);
                store(out + index + column, v);
            } else {
                *reinterpret_cast<uint4 *>(out + index + column) = *from;
            }
        } else {
            UNROLL for (u32 k = 0; k < 8; k++) {
                if (column + k >= columns) continue;
                Pack<1> v = load<1>(reinterpret_cast<const Real *>(from) + k);
                after(v, index + column + k);
                store(out + index + column + k, v);
            }
        }
    }
}
