// Instructions that C++ has no words for: asynchronous copies to shared memory, and the tensor
// cores' matrices of half types. From sm_80 on; the kernels that use them are empty before.
//
// Shared memory is addressed by 32-bit numbers here, as those instructions want it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "deformable_detr/dispatch.h"

namespace ms_deform_attn::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes to shared memory, or writes zeros there if they are not `present`. They pass by
// L1.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool present) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
#endif
}
// Of the calling thread.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes. Lane i has the address of row i % 8 of matrix i / 8, and
// gets of each matrix row i / 4 the elements 2 * (i % 4) and the next. Transposed, it gets of each
// matrix column i / 4 the rows 2 * (i % 4) and the next.
template <bool kTransposed = true>
__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t row) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(row)
                 : "memory");
  }
#endif
}

// c += a * b, of 16 x 16 and 16 x 8 elements of a half type, in the layout of mma.m16n8k16.
template <typename scalar_t>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<scalar_t, half_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Loads from shared memory in active lanes; the others keep what they have. Without a branch, which
// the compiler would make of an if.
__device__ __forceinline__ void load_if(uint2& x, uint32_t from, uint32_t active) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %3, 0; @q ld.shared.v2.u32 {%0,%1}, [%2];}"
               : "+r"(x.x), "+r"(x.y)
               : "r"(from), "r"(active)
               : "memory");
}
__device__ __forceinline__ void load_if(uint32_t& x, uint32_t from, uint32_t active) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q ld.shared.u32 %0, [%1];}"
               : "+r"(x)
               : "r"(from), "r"(active)
               : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_shared_pair(uint32_t from) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ int32_t load_shared_word(uint32_t from) {
  int32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t to, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// A number that is kept in a register. The compiler would otherwise work out again at each use what
// depends on the lane alone. The whole warp takes part.
template <typename T>
__device__ __forceinline__ T pinned(T x) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(pinned(reinterpret_cast<uint64_t>(x)));
  } else {
    return __shfl_sync(0xffffffff, x, threadIdx.x % 32);
  }
}

}  // namespace ms_deform_attn::cuda
