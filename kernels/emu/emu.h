// The CUDA of kernels/*.cu for the host: what a kernel text says, answered by the emulator of emu.cpp. build.rs puts it before
// each text, which it puts in a namespace without name. A kernel is then a plain C++ function that a fibre runs as one CUDA thread.
//
// Not modelled: speed, registers, banks, memory ordering between warps (everything is sequentially consistent).

#pragma once
#define ATTN2D_EMULATED 1

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define KERNEL(...) void
#define DEVICE inline
#define UNROLL
#define ROLLED
#define __restrict__
#define SMEM(T, p, n) static char attn2d_site_##p; T *p = static_cast<T *>(emu::shared(&attn2d_site_##p, sizeof(T) * (n)))
#define DYN_SMEM(T, p) T *p = static_cast<T *>(emu::dynamic_shared())

struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {

// What the running fibre may ask about itself.
struct Place { dim3 thread, block, block_size, grid; };
extern __thread Place *here;

// A place in a kernel's text.
struct Site { const char *file; int line; };

enum class Warp { Sync, Shuffle, Ballot, Together };

void *shared(const char *site, size_t bytes);
void *dynamic_shared();
void barrier(Site site);
// Meets the lanes of `mask` and returns what lane `from` brought (Shuffle), or which lanes brought a number that is not 0 (Ballot).
uint64_t meet(Warp what, Site site, unsigned mask, uint64_t value, unsigned from);
// Meets all lanes of the warp; `work` is then called once with what each of them brought.
void together(Site site, void (*work)(void **lanes), void *mine);
// A copy of 16 bytes (or zeros, without `from`) that is seen when its group has been waited for.
void copy_later(Site site, void *to, const void *from);
void close_copies();
void finish_copies(unsigned but_last);
// Stops the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const char *format, ...);

// A kernel as the table of build.rs lists it.
struct Kernel {
    const char *name;
    void (*call)(void **arguments);
    unsigned arguments, param_bytes, max_threads;
};

template <class... A, size_t... I>
void unpack(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A *>(arguments[I])...);
}
template <class... A> void apply(void (*kernel)(A...), void **arguments) {
    unpack(kernel, arguments, std::index_sequence_for<A...>());
}
template <class P, class... A> constexpr unsigned param_bytes(void (*)(P, A...)) { return sizeof(P); }
template <class... A> constexpr unsigned count(void (*)(A...)) { return sizeof...(A); }

template <class T> T shuffle(Site site, unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet(Warp::Shuffle, site, mask, bits, from);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

static inline unsigned lane() { return here->thread.x % 32; }

} // namespace emu

#define EMU_EXPORT(name, threads) \
    extern "C" const emu::Kernel attn2d_emu_##name = { \
        #name, [](void **a) { emu::apply(&name, a); }, emu::count(&name), emu::param_bytes(&name), threads};

#define EMU_SITE (emu::Site{__FILE__, __LINE__})
#define threadIdx (emu::here->thread)
#define blockIdx (emu::here->block)
#define blockDim (emu::here->block_size)
#define gridDim (emu::here->grid)
#define __syncthreads() emu::barrier(EMU_SITE)
#define __syncwarp(...) (void)emu::meet(emu::Warp::Sync, EMU_SITE, emu::full_mask(__VA_ARGS__), 0, 0)
#define __shfl_sync(mask, v, from) emu::shuffle(EMU_SITE, mask, v, (from) % 32)
#define __shfl_xor_sync(mask, v, other) emu::shuffle(EMU_SITE, mask, v, emu::lane() ^ (other))
#define __shfl_down_sync(mask, v, by) emu::shuffle(EMU_SITE, mask, v, emu::lane() + (by) < 32 ? emu::lane() + (by) : emu::lane())
#define __shfl_up_sync(mask, v, by) emu::shuffle(EMU_SITE, mask, v, emu::lane() >= (by) ? emu::lane() - (by) : emu::lane())
#define __ballot_sync(mask, v) static_cast<unsigned>(emu::meet(emu::Warp::Ballot, EMU_SITE, mask, (v) ? 1 : 0, 0))
#define __any_sync(mask, v) (__ballot_sync(mask, v) != 0)
#define __all_sync(mask, v) (__ballot_sync(mask, v) == (mask))

namespace emu {
static inline unsigned full_mask(unsigned mask = 0xffffffffu) { return mask; }
} // namespace emu

static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }

// Threads run one at a time, so a plain read and write is one step.
template <class T> static inline T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <class T> static inline T atomicMax(T *p, T v) { T old = *p; *p = v > old ? v : old; return old; }
template <class T> static inline T atomicMin(T *p, T v) { T old = *p; *p = v < old ? v : old; return old; }
template <class T> static inline T atomicExch(T *p, T v) { T old = *p; *p = v; return old; }
template <class T> static inline T atomicCAS(T *p, T was, T v) { T old = *p; if (old == was) *p = v; return old; }

// ------------------------------------------------------------------------------------------------ half precision

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

static inline float to_float(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, rest = x.bits & 1023;
    if (exponent == 0) {
        float value = float(rest) * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t shifted = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
    return __uint_as_float(sign | shifted | rest << 13);
}
static inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

// To the nearest, ties to even; NaN becomes the one that the hardware makes.
static inline void round_to(float x, f16 &y) {
    uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffffu;
    uint32_t bits;
    if (u > 0x7f800000u) bits = 0x7fff, sign = 0;
    else if (u >= 0x477ff000u) bits = 0x7c00;
    else if (u < 0x38800000u) bits = uint32_t(nearbyintf(__uint_as_float(u) * 0x1p24f));
    else bits = (u + 0xfff + (u >> 13 & 1) - 0x38000000u) >> 13;
    y.bits = uint16_t(sign | bits);
}
static inline void round_to(float x, bf16 &y) {
    uint32_t u = __float_as_uint(x);
    y.bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
template <class T> static inline void pack_pair(float low, float high, T, uint32_t &pair) {
    T l, h;
    round_to(low, l);
    round_to(high, h);
    pair = l.bits | uint32_t(h.bits) << 16;
}

// ------------------------------------------------------------------------------------------------ tensor cores
// The bodies of what tensor_cores.cuh declares. Products are exact in float, sums run over k in order.

namespace emu {

template <class T> struct Fragments { float *c; const uint32_t *a, *b; };

template <class T> void multiply(void **lanes) {
    auto of = [&](unsigned lane) { return static_cast<Fragments<T> *>(lanes[lane]); };
    auto half = [](uint32_t pair, unsigned k) { return to_float(T{uint16_t(k % 2 ? pair >> 16 : pair)}); };
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned row = lane / 4, k = lane % 4 * 2;
        for (unsigned i = 0; i < 8; i++) a[row + i / 2 % 2 * 8][k + i / 4 * 8 + i % 2] = half(of(lane)->a[i / 2], i);
        for (unsigned i = 0; i < 4; i++) b[k + i / 2 * 8 + i % 2][row] = half(of(lane)->b[i / 2], i);
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = of(lane)->c[i];
            for (unsigned k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            of(lane)->c[i] = sum;
        }
    }
}

template <class T> void mma(Site site, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    Fragments<T> mine = {c, a, b};
    together(site, multiply<T>, &mine);
}

struct Rows { uint32_t *out; const void *row; };

// Lane 8 j + i brings row i of matrix j (8 numbers); it gets two numbers of each matrix.
template <unsigned N, bool TRANSPOSED> void spread(void **lanes) {
    auto of = [&](unsigned lane) { return static_cast<Rows *>(lanes[lane]); };
    auto number = [&](unsigned matrix, unsigned row, unsigned column) -> uint32_t {
        return static_cast<const uint16_t *>(of(8 * matrix + row)->row)[column];
    };
    uint32_t out[32][N];
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned j = 0; j < N; j++) {
            unsigned x = lane / 4, y = lane % 4 * 2;
            out[lane][j] = TRANSPOSED ? number(j, y, x) | number(j, y + 1, x) << 16 : number(j, x, y) | number(j, x, y + 1) << 16;
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) memcpy(of(lane)->out, out[lane], sizeof out[lane]);
}

template <bool TRANSPOSED, size_t N> void load_matrices(Site site, uint32_t (&out)[N], const void *row) {
    static_assert(N == 2 || N == 4, "two or four matrices");
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("brings a row that does not start at a multiple of 16 bytes to %s:%d", site.file, site.line);
    Rows mine = {out, row};
    together(site, spread<N, TRANSPOSED>, &mine);
}

} // namespace emu

static inline float exp2_fast(float x) {
    float y = exp2f(x);
    return fabsf(y) < 1.17549435e-38f ? 0.0f : y;
}

#define mma16(c, a, b, type) emu::mma(EMU_SITE, c, a, b, type)
#define load_matrices(out, row) emu::load_matrices<false>(EMU_SITE, out, row)
#define load_matrices_transposed(out, row) emu::load_matrices<true>(EMU_SITE, out, row)
#define copy_async(to, from, inside) emu::copy_later(EMU_SITE, to, (inside) ? static_cast<const void *>(from) : nullptr)
#define copy_async_commit() emu::close_copies()
#define copy_async_wait(but_last) emu::finish_copies(but_last)
