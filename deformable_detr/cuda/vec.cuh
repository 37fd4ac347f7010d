// Vectors of channels: how rows are loaded, stored and added to global memory.
#pragma once

#include "deformable_detr/dispatch.h"

namespace ms_deform_attn::cuda {

// Conversion to and from the type that sums are kept in.
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(bfloat16_t x) { return __bfloat162float(x); }

template <typename scalar_t>
__device__ __forceinline__ scalar_t from_acc(acc_t<scalar_t> x) {
  return static_cast<scalar_t>(x);
}
template <>
__device__ __forceinline__ half_t from_acc<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat16_t from_acc<bfloat16_t>(float x) {
  return __float2bfloat16_rn(x);
}

// N adjacent channels of a row, moved by one instruction of at most 16 bytes.
template <typename scalar_t, int N>
struct alignas(sizeof(scalar_t) * N) Vec {
  static_assert(sizeof(scalar_t) * N <= 16 && (N & (N - 1)) == 0);
  scalar_t data[N];

  static __device__ __forceinline__ Vec load(const scalar_t* row) {
    return *reinterpret_cast<const Vec*>(row);
  }
  __device__ __forceinline__ void store(scalar_t* row) const { *reinterpret_cast<Vec*>(row) = *this; }
};

// row[i] += x[i], atomically.
template <int N>
__device__ __forceinline__ void atomic_add(double* row, const double (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) atomicAdd(row + i, x[i]);
}

template <int N>
__device__ __forceinline__ void atomic_add(float* row, const float (&x)[N]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (N == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(row), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) atomicAdd(row + i, x[i]);
}

}  // namespace ms_deform_attn::cuda
