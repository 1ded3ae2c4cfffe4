// What every kernel file begins with: the few things that CUDA and the emulated device say differently, and helpers that
// kernels share. No toolkit header is included anywhere, so a driver and NVRTC are all that a user's machine needs.
//
// A kernel is `KERNEL(threads) name(Params p, pointers in the order of the bindings)`, where `threads` is its block size, one
// dimension; `KERNEL(threads, blocks)` wants that many blocks a multiprocessor and so bounds (or frees) registers. No kernel may
// spill registers to memory, unless the line above it is `// Spills.`; scripts/check_cuda sees to it. Memory shared by a block comes from SMEM or DYN_SMEM, never from a bare __shared__: the emulated device
// (kernels/emu/) gives them memory of its own that it poisons and watches. Tensors start at multiples of 16 bytes.

#ifndef ATTN2D_EMULATED
#define KERNEL(...) extern "C" __global__ __launch_bounds__(__VA_ARGS__) void
// n elements of type T at p, n a constant.
#define SMEM(T, p, n) __shared__ __align__(16) T p[n]
// As many as the launch's plan asked for.
#define DYN_SMEM(T, p) extern __shared__ __align__(16) unsigned char attn2d_dynamic[]; T *p = reinterpret_cast<T *>(attn2d_dynamic)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
// NVRTC has none without a header.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#endif

typedef unsigned int u32;

// ------------------------------------------------------------------------------------------------ storage

// A file is compiled once for each type that tensors may be stored in: `Real` is that type, and OF(name) a kernel's name with the
// type behind it. Arithmetic is in float throughout; load and store convert. A kernel whose name ends in _f32 has no other
// version. Files called *_mma.cu are for the 16-bit types alone (tensor cores).
#ifndef ATTN2D_EMULATED
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
#endif

#if defined(STORED_F16)
typedef f16 Real;
#define OF(name) name##_f16
#elif defined(STORED_BF16)
typedef bf16 Real;
#define OF(name) name##_bf16
#else
typedef float Real;
#define OF(name) name##_f32
#endif

#ifndef ATTN2D_EMULATED
DEVICE float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE void round_to(float x, f16 &y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void round_to(float x, bf16 &y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
// Two numbers in a register, the first in the low half.
DEVICE void pack_pair(float low, float high, f16, u32 &pair) { asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)); }
DEVICE void pack_pair(float low, float high, bf16, u32 &pair) { asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)); }
#endif
DEVICE float to_float(float x) { return x; }
DEVICE void round_to(float x, float &y) { y = x; }

// The nearest number that T has, ties to even.
template <class T> DEVICE T rounded(float x) {
    T y;
    round_to(x, y);
    return y;
}
template <class T> DEVICE u32 pair_of(float low, float high) {
    u32 pair;
    pack_pair(low, high, T{}, pair);
    return pair;
}
// The two numbers of a register.
template <class T> DEVICE float low_of(u32 pair) { return to_float(T{static_cast<unsigned short>(pair)}); }
template <class T> DEVICE float high_of(u32 pair) { return to_float(T{static_cast<unsigned short>(pair >> 16)}); }

// ------------------------------------------------------------------------------------------------ memory

// This thread's index in a grid of one dimension.
DEVICE u32 flat_id() { return blockIdx.x * blockDim.x + threadIdx.x; }

DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }

DEVICE float4 load4(const float *p) { return *reinterpret_cast<const float4 *>(p); }
DEVICE void store4(float *p, float4 v) { *reinterpret_cast<float4 *>(p) = v; }

// N numbers side by side, moved by one access: N is 1 or 4, and 2 or 8 of the 16-bit types. Eight floats take two accesses: what
// stands in f32 beside eight numbers of a 16-bit type.
template <int N> struct Pack { float v[N]; };
// How many numbers of a type an access of 16 bytes moves.
template <class T> constexpr int WIDE = 16 / sizeof(T);

template <int N> DEVICE Pack<N> load(const float *p) {
    if constexpr (N == 4) {
        float4 v = load4(p);
        return Pack<N>{{v.x, v.y, v.z, v.w}};
    } else if constexpr (N == 8) {
        float4 v = load4(p), w = load4(p + 4);
        return Pack<N>{{v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w}};
    } else {
        return Pack<N>{{*p}};
    }
}

template <int N, class T> DEVICE Pack<N> load(const T *p) {
    Pack<N> x;
    if constexpr (N == 1) {
        x.v[0] = to_float(*p);
    } else {
        u32 pairs[N / 2];
        if constexpr (N == 8) {
            uint4 v = *reinterpret_cast<const uint4 *>(p);
            pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
        } else if constexpr (N == 4) {
            uint2 v = *reinterpret_cast<const uint2 *>(p);
            pairs[0] = v.x, pairs[1] = v.y;
        } else {
            pairs[0] = *reinterpret_cast<const u32 *>(p);
        }
        UNROLL for (int i = 0; i < N / 2; i++) x.v[2 * i] = low_of<T>(pairs[i]), x.v[2 * i + 1] = high_of<T>(pairs[i]);
    }
    return x;
}

template <int N, class T> DEVICE void store(T *p, Pack<N> x) {
    if constexpr (N == 1) {
        *p = rounded<T>(x.v[0]);
    } else {
        u32 pairs[N / 2];
        UNROLL for (int i = 0; i < N / 2; i++) pairs[i] = pair_of<T>(x.v[2 * i], x.v[2 * i + 1]);
        if constexpr (N == 8) *reinterpret_cast<uint4 *>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        else if constexpr (N == 4) *reinterpret_cast<uint2 *>(p) = make_uint2(pairs[0], pairs[1]);
        else *reinterpret_cast<u32 *>(p) = pairs[0];
    }
}

DEVICE void store(float *p, Pack<1> x) { *p = x.v[0]; }
DEVICE void store(float *p, Pack<4> x) { store4(p, make_float4(x.v[0], x.v[1], x.v[2], x.v[3])); }
DEVICE void store(float *p, Pack<8> x) {
    store4(p, make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));
    store4(p + 4, make_float4(x.v[4], x.v[5], x.v[6], x.v[7]));
}

// N as an argument.
template <int N> struct Width { static constexpr int n = N; };

// The widest access that leaves no pack of a row of so many channels half outside: f(Width<N>) for N = 8 (16-bit types), 4 or 1.
template <class F> DEVICE void with_width(u32 channels, F f) {
    if constexpr (WIDE<Real> == 8) {
        if (channels % 8 == 0) return f(Width<8>{});
    }
    if (channels % 4 == 0) f(Width<4>{});
    else f(Width<1>{});
}

// This thread's share of len elements in rows of so many channels, 16 bytes of Real: f(Width<N>, i) for packs i .. i + N of one row.
template <class F> DEVICE void for_own(u32 len, u32 channels, F f) {
    with_width(channels, [=](auto width) {
        u32 i = WIDE<Real> * flat_id(), end = least(i + WIDE<Real>, len);
        for (; i < end; i += width.n) f(width, i);
    });
}

// ------------------------------------------------------------------------------------------------ functions

// Written so that no power overflows.
DEVICE float sigmoid(float x) {
    float e = expf(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// ------------------------------------------------------------------------------------------------ sums

// The sum over a warp, for all of its lanes; all must call it. A butterfly: every lane adds the same numbers in the same order.
DEVICE float warp_sum(float v) {
    for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

DEVICE float warp_max(float v) {
    for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

// The sum over a block of whole warps, for all of its threads; all must call it. `shares` has a float for each warp and is free
// again after the next barrier.
DEVICE float block_sum(float v, float *shares) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 i = 0; i < blockDim.x / 32; i++) sum += shares[i];
    return sum;
}

// ------------------------------------------------------------------------------------------------ random numbers

// Philox 4x32-10 (Salmon et al. 2011): the same words as src/tensor/philox.rs.
DEVICE uint4 philox4x32_10(uint2 key, uint4 c) {
    UNROLL for (int round = 0; round < 10; round++) {
        if (round > 0) {
            key.x += 0x9E3779B9u;
            key.y += 0xBB67AE85u;
        }
        u32 ah = __umulhi(0xD2511F53u, c.x), al = 0xD2511F53u * c.x;
        u32 bh = __umulhi(0xCD9E8D57u, c.z), bl = 0xCD9E8D57u * c.z;
        c = make_uint4(bh ^ c.y ^ key.x, bl, ah ^ c.w ^ key.y, al);
    }
    return c;
}
