// The softmax over a row's points, which fused calls take of the logits inside the kernels.
//
// The forward takes it in one pass, while it adds up samples (RunningSoftmax). The backward needs
// final weights from the start, so points_kernel takes it in a pass of its own (find_softmax), and
// leaves it in scratch for the kernels that sum grad_value.
#pragma once

#include <limits>

#include "deformable_detr/cuda/points.cuh"

namespace ms_deform_attn::cuda {

// exp(x) of x <= 0, to a few units in the last place of 1.
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// Reductions over the kTeam lanes of each team. The whole warp takes part.
template <int kTeam, typename acc>
__device__ __forceinline__ acc team_max(acc x) {
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) {
    x = max(x, __shfl_xor_sync(0xffffffff, x, offset));
  }
  return x;
}
template <int kTeam, typename acc>
__device__ __forceinline__ acc team_sum(acc x) {
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

// The softmax of points that come one by one to each lane of a team.
template <typename acc, int kTeam>
struct RunningSoftmax {
  acc largest = std::numeric_limits<acc>::lowest();  // so that exp(-inf - largest) is zero
  acc sum = 0;  // of exp(logit - largest), over this lane's points

  // Returns exp(logit - largest); a lane without a point passes -inf. The largest logit may have
  // grown: the caller multiplies what it added up so far by `rescale`. The whole warp takes part.
  __device__ __forceinline__ acc take(acc logit, acc& rescale) {
    const acc larger = team_max<kTeam>(max(largest, logit));
    rescale = exponential(largest - larger);
    largest = larger;
    const acc taken = exponential(logit - largest);
    sum = sum * rescale + taken;
    return taken;
  }

  // The factor that makes an attention weight of what take() returned.
  __device__ __forceinline__ acc scale() const { return 1 / team_sum<kTeam>(sum); }
};

// The softmax of a row: weight = exp(logit - largest) * scale.
template <typename acc>
struct Softmax {
  acc largest, scale;

  __device__ __forceinline__ acc weight(acc logit) const {
    return exponential(logit - largest) * scale;
  }
};

// Of the row with this index, by its team. The whole warp takes part.
template <typename scalar_t, int kTeam>
__device__ __forceinline__ Softmax<acc_t<scalar_t>> find_softmax(const Params& p, int64_t row) {
  using acc = acc_t<scalar_t>;
  const auto logit = [&](int32_t point) {
    return load_element<scalar_t>(p.attention_logits, row * p.points + point);
  };
  const int lane = threadIdx.x % kTeam;
  acc largest = -INFINITY, sum = 0;
  for (int32_t i = lane; i < p.points; i += kTeam) largest = max(largest, logit(i));
  largest = team_max<kTeam>(largest);
  for (int32_t i = lane; i < p.points; i += kTeam) sum += exponential(logit(i) - largest);
  return {largest, 1 / team_sum<kTeam>(sum)};
}

// The attention weight of a point that was read.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ acc_t<scalar_t> find_weight(const Params& p,
                                                       const PointReader<scalar_t, kSource>& point,
                                                       const Softmax<acc_t<scalar_t>>& softmax) {
  const acc_t<scalar_t> weight = point.weight(p);
  return kIsFused<kSource> ? softmax.weight(weight) : weight;
}

}  // namespace ms_deform_attn::cuda
