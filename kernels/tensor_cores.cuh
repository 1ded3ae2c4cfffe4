// Tensor cores and asynchronous copies: the few instructions that kernels of the 16-bit types are made of. Each has a second body in
// kernels/emu/emu.h; kernels/tensor_cores_mma.cu tries each alone, so that `attn2d verify` compares both bodies where there is a GPU.
//
// Fragments of mma16, for lane l, g = l / 4 and t = l % 4 (PTX ISA, mma.m16n8k16); a register holds two neighbours along k:
//   a [16 x 16]: a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8)
//   b [16 x 8]:  b[0] (2t, g), b[1] (2t + 8, g)             that is, row g of b transposed
//   c [16 x 8]:  c[0] (g, 2t), c[1] (g, 2t + 1), c[2] (g + 8, 2t), c[3] (g + 8, 2t + 1)
// c, rounded and packed in pairs, is a fragment a of the next product: c of columns 0..8 gives a[0], a[1], of 8..16 a[2], a[3].

// Two headers of one file may include it.
#ifndef TENSOR_CORES_CUH
#define TENSOR_CORES_CUH

#include "common.cuh"

#ifndef ATTN2D_EMULATED

// c += a b, in float; all lanes of a warp must call it. The last argument only names the type.
DEVICE void mma16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x to about two units in the last place; tiny results are 0, as is that of -infinity.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where shared memory lies in its own address space.
DEVICE u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Two or four matrices of 8 x 8 from shared memory: lane 8 j + i names row i of matrix j, 16 bytes at a multiple of 16 (of two
// matrices, lanes from 16 on name any valid row). out[j] gets numbers (g, 2t) and (g, 2t + 1) of matrix j, transposed (2t, g) and
// (2t + 1, g). All lanes of a warp must call it.
DEVICE void load_matrices(u32 (&out)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices(u32 (&out)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
        : "=r"(out[0]), "=r"(out[1]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&out)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&out)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : "=r"(out[0]), "=r"(out[1]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from global to shared memory, both at multiples of 16, without a register between; zeros where not `inside` (`from` is
// then not read and may lie anywhere). Seen by this thread after a wait for its group, by others after a barrier.
DEVICE void copy_async(void *to, const void *from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
// Closes a group of copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups but the last `but_last`, a constant.
#define copy_async_wait(but_last) asm volatile("cp.async.wait_group %0;" :: "n"(but_last) : "memory")

#endif

#endif
