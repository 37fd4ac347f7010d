// Where rows of channels are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

// ---------------------------------------------------------------------------------------- pixels

// A pointer that the compiler knows nothing of: it would undo an addition, to do it at each use.
template <typename T>
__device__ __forceinline__ T* settled(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Finds rows of a tensor like value. Vectors are counted in 32 bits, so that an address is
// one multiply-add; fits() tells whether that is enough. Single elements are counted in 64 bits.
template <typename scalar_t, int kVec>
struct Rows {
  static bool fits(const Params& p) {
    const int64_t rows = std::max(p.spatial_size, p.queries) * p.heads;
    return kVec == 1 || rows * p.channels / kVec <= INT32_MAX;
  }
  // Of a pixel, or a query in a tensor like output. Negative for a pixel outside.
  static __device__ __forceinline__ int32_t offset(const Params& p, int32_t pixel) {
    return kVec == 1 ? pixel : pixel * (p.heads * p.channels / kVec);
  }
  static __device__ __forceinline__ int4 offsets(const Params& p, const int32_t (&pixel)[4]) {
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
