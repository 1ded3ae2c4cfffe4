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

enum class Warp { Sync, Shuffle, Ballot };

void *shared(const char *site, size_t bytes);
void *dynamic_shared();
void barrier(Site site);
// Meets the lanes of `mask` and returns what lane `from` brought (Shuffle), or which lanes brought a number that is not 0 (Ballot).
uint64_t meet(Warp what, Site site, unsigned mask, uint64_t value, unsigned from);
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
