// The softmax of fused calls.
#pragma once

#include <limits>

#include "deformable_detr/cuda/points.cuh"

namespace ms_deform_attn::cuda {

// ----------------------------------------------------------------------------------------- softmax

// The softmax over a row's points, as they come: each lane of the team takes one, and then the
// next.
template <typename acc, int kTeam>
struct RunningSoftmax {
  acc largest = std::numeric_limits<acc>::lowest();  // so that exp(-inf - largest) is zero
  acc sum = 0;  // of exp(logit - largest), of this lane's points

  // exp(logit - largest), where -inf is for a lane without a point. A sum of products with what was
  // returned before is to be multiplied by `shrink`. The whole warp takes part.
  __device__ __forceinline__ acc take(acc logit, acc& shrink) {
    acc larger = max(largest, logit);
#pragma unroll
    for (int offset = 1; offset < kTeam; offset *= 2) {
      larger = max(larger, __shfl_xor_sync(0xffffffff, larger, offset));
    }
    shrink = exponential(largest - larger);
    largest = larger;
    const acc taken = exponential(logit - largest);
    sum = sum * shrink + taken;
    return taken;
  }

  // What makes a weight of what take() returned.
  __device__ __forceinline__ acc scale() const {
    acc all = sum;
#pragma unroll
    for (int offset = 1; offset < kTeam; offset *= 2) {
      all += __shfl_xor_sync(0xffffffff, all, offset);
    }
    return 1 / all;
  }
};

// A row's softmax: weight = exp(logit - largest) * scale.
template <typename acc>
struct Softmax {
  acc largest, scale;
  __device__ __forceinline__ acc weight(acc logit) const {
    return exponential(logit - largest) * scale;
  }
};

// Fused, points_kernel leaves that of each row for the kernel after it, in scratch.
template <typename scalar_t>
__device__ __forceinline__ Softmax<acc_t<scalar_t>>* softmaxes(const BackwardParams& p) {
  return static_cast<Softmax<acc_t<scalar_t>>*>(p.scratch);
}
__host__ __device__ inline int64_t softmax_bytes(const BackwardParams& p) {
  if (!p.fused()) return 0;
  const int64_t one =
      p.value_dtype == DType::f64 ? sizeof(Softmax<double>) : sizeof(Softmax<float>);
  return p.batch * p.queries * p.heads * one;
}

// Over a row's points, by its team of kTeam lanes. The whole warp takes part.
template <typename scalar_t, int kTeam>
__device__ __forceinline__ Softmax<acc_t<scalar_t>> find_softmax(const Params& p, int64_t row) {
  using acc = acc_t<scalar_t>;
  const auto logit = [&](int32_t point) {
    return load_operand<scalar_t>(p.attention_logits, row * p.points + point);
  };
  const int lane = threadIdx.x % kTeam;
  acc largest = -INFINITY, sum = 0;
  for (int32_t i = lane; i < p.points; i += kTeam) largest = max(largest, logit(i));
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffff, largest, offset));
  }
  for (int32_t i = lane; i < p.points; i += kTeam) sum += exponential(logit(i) - largest);
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  return {largest, 1 / sum};
}

// The weight of a point that was read.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ acc_t<scalar_t> find_weight(const Params& p,
                                                       const PointReader<scalar_t, kSource>& point,
                                                       const Softmax<acc_t<scalar_t>>& softmax) {
  const acc_t<scalar_t> weight = point.weight(p);
  return kIsFused<kSource> ? softmax.weight(weight) : weight;
}

}  // namespace ms_deform_attn::cuda
