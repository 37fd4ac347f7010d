// Vectors of adjacent channels: how they are found, loaded, stored and added to in global memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

// Back, a cast rounds to nearest.
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> to_acc(scalar_t x) {
  return x;
}

// Two adjacent half-type channels at a time: one instruction each, where taking the upper one out
// of its word first would cost another.
__device__ __forceinline__ float2 to_acc_pair(uint32_t word, half_t) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
__device__ __forceinline__ float2 to_acc_pair(uint32_t word, bfloat16_t) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// An unsigned type of `bytes` bytes: what one instruction moves.
template <int bytes>
using Bits = std::conditional_t<bytes <= 4, std::conditional_t<bytes == 2, uint16_t, uint32_t>,
                                std::conditional_t<bytes == 8, uint2, uint4>>;

// N adjacent channels, moved by one instruction of at most 16 bytes.
template <typename scalar_t, int N>
struct Vec {
  using bits_t = Bits<sizeof(scalar_t) * N>;
  static_assert(sizeof(bits_t) == sizeof(scalar_t) * N);
  bits_t bits{};

  // From a tensor that the kernel only reads.
  static __device__ __forceinline__ Vec load(const scalar_t* from) {
    return {__ldg(reinterpret_cast<const bits_t*>(from))};
  }
  // To a tensor that the kernel does not read, so that it need not stay in the caches.
  __device__ __forceinline__ void store(scalar_t* to) const {
    __stcs(reinterpret_cast<bits_t*>(to), bits);
  }

  __device__ __forceinline__ void unpack(acc_t<scalar_t> (&x)[N]) const {
    if constexpr (sizeof(scalar_t) == 2 && N > 1) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float2 pair = to_acc_pair(reinterpret_cast<const uint32_t*>(&bits)[i], scalar_t{});
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = to_acc(reinterpret_cast<const scalar_t*>(&bits)[i]);
    }
  }
  static __device__ __forceinline__ Vec pack(const acc_t<scalar_t> (&x)[N]) {
    Vec packed;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      reinterpret_cast<scalar_t*>(&packed.bits)[i] = static_cast<scalar_t>(x[i]);
    }
    return packed;
  }
  // sum[i] += weight * element i.
  __device__ __forceinline__ void add_to(acc_t<scalar_t> (&sum)[N], acc_t<scalar_t> weight) const {
    acc_t<scalar_t> x[N];
    unpack(x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += weight * x[i];
  }
};

// to[i] += x[i], atomically.
template <int N>
__device__ __forceinline__ void atomic_add(float* to, const float (&x)[N]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (N == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(to + i, x[i]);
  }
}

// A pointer whose origin the compiler does not know. It would otherwise undo an addition that is
// made once before a loop, and make it at each use in the loop instead.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Finds the channels of a pixel in a tensor like value, or of a query in one like output. Vectors
// are counted in 32 bits, so that an address is one multiply-add, where fits() allows it; single
// elements (kVec == 1) are counted in 64 bits.
template <typename scalar_t, int kVec>
struct Indexing {
  static bool fits(const Params& p) {
    const int64_t heads = std::max(p.spatial_size, p.queries) * p.heads;
    return kVec == 1 || heads * p.channels / kVec <= INT32_MAX;
  }
  // Of a pixel or query. Negative for kOutside.
  template <typename ParamsType>
  static __device__ __forceinline__ int32_t offset(const ParamsType& p, int32_t pixel) {
    return kVec == 1 ? pixel : pixel * (p.heads * p.channels / kVec);
  }
  template <typename ParamsType>
  static __device__ __forceinline__ int4 offsets(const ParamsType& p, const int32_t (&pixel)[4]) {
    return make_int4(offset(p, pixel[0]), offset(p, pixel[1]), offset(p, pixel[2]),
                     offset(p, pixel[3]));
  }
  template <typename element_t>
  static __device__ __forceinline__ element_t* at(const Params& p, element_t* origin,
                                                  int32_t offset) {
    if constexpr (kVec == 1) {
      return origin + int64_t(offset) * (p.heads * p.channels);
    } else {
      return origin + int64_t(offset) * kVec;
    }
  }
};

}  // namespace ms_deform_attn::cuda
