// The dtypes of multi-scale deformable attention.
//
// A scalar_t is how a tensor is stored, acc_t<scalar_t> how it is computed with: coordinates,
// weights and sums are fp32 for the half types. To add a dtype, add it to each function here, to
// value_dtype() in inputs.cpp (which PyTorch dtypes are taken), to the conversions in cpu/vector.h
// and cuda/vec.cuh (how vectors of it become acc_t), and to tests/cases.py. Where is_half() is
// asked for a threshold or a copy of the sums, see whether the new dtype belongs there.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#endif

namespace ms_deform_attn {

#if defined(__CUDACC__)
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
#else
using half_t = torch::headeronly::Half;
using bfloat16_t = torch::headeronly::BFloat16;
#endif

enum class DType : int8_t { f64, f32, f16, bf16 };

template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
constexpr DType kDType = std::is_same_v<scalar_t, double>   ? DType::f64
                         : std::is_same_v<scalar_t, float>  ? DType::f32
                         : std::is_same_v<scalar_t, half_t> ? DType::f16
                                                            : DType::bf16;

inline bool is_half(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

// dispatch(dtype, [&](auto zero) { using scalar_t = decltype(zero); ... });
template <typename Function>
void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f64: return function(double{});
    case DType::f32: return function(float{});
    case DType::f16: return function(half_t{});
    case DType::bf16: return function(bfloat16_t{});
  }
}

}  // namespace ms_deform_attn
