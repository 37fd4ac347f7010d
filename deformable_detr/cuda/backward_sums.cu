// The sums of grad_value, for the strategies that add to them (direct, patches, scatter): cleared
// before, and converted after.
//
// Sums are floats. Of a half value they lie in scratch, as sums in a half type would be 2 to 20
// times less exact. PyTorch's own fill and conversion would do, too, but not let the kernels
// overlap: the points of a small problem are worked out while its sums are cleared, and what it
// takes to start a kernel is hidden behind the one before.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"

namespace ms_deform_attn::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kClearBlocks = 4;    // of a multiprocessor: leaves half of it to points_kernel
constexpr int kConvertBlocks = 8;  // the whole of it, as nothing else runs
constexpr int kConverted = 8;      // elements of a half type that a thread writes at once

__global__ void __launch_bounds__(kSumThreads) clear_kernel(float* sums, int64_t count) {
  let_next_kernel_start();
  const int64_t thread = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kSumThreads;
  float4* vectors = reinterpret_cast<float4*>(sums);
  for (int64_t i = thread; i < count / 4; i += threads) vectors[i] = make_float4(0, 0, 0, 0);
  if (thread < count % 4) sums[count / 4 * 4 + thread] = 0;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads)
    convert_kernel(const float* sums, scalar_t* grad_value, int64_t count) {
  using Sums = Vec<float, 4>;
  using Vector = Vec<scalar_t, kConverted>;
  const int64_t thread = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kSumThreads;
  wait_for_previous_kernel();
  for (int64_t i = thread; i < count / kConverted; i += threads) {
    float x[kConverted];
    // Not Vec's load, as these have just been written by another kernel, which may still have run
    // when this one started.
    reinterpret_cast<float4*>(x)[0] = reinterpret_cast<const float4*>(sums)[2 * i];
    reinterpret_cast<float4*>(x)[1] = reinterpret_cast<const float4*>(sums)[2 * i + 1];
    Vector::pack(x).store(grad_value + i * kConverted);
  }
  const int64_t rest = count / kConverted * kConverted + thread;
  if (rest < count) grad_value[rest] = static_cast<scalar_t>(sums[rest]);
}

int64_t count_values(const Params& p) { return p.batch * p.spatial_size * p.heads * p.channels; }

// Blocks for `count` vectors, of which at most `most` share a multiprocessor.
Grid make_grid(int64_t count, int most, bool overlaps_previous) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div<int64_t>(count, kSumThreads));
  const int64_t at_once = int64_t(DeviceLimits().multiprocessors) * most;
  return {std::min(blocks, at_once), 1, kSumThreads, 0, overlaps_previous};
}

}  // namespace

void plan_sums(const BackwardParams& params, BackwardPlan& plan) {
  if (is_half(params.value_dtype)) {
    plan.scratch.sums = plan.scratch.reserve(count_values(params) * sizeof(float));
  }
  plan.overlaps_sums = plan.strategy == Strategy::direct && DeviceLimits().overlaps_kernels;
}

void launch_clear(const BackwardParams& params, void* sums, void* stream) {
  const int64_t count = count_values(params);
  launch_blocks(clear_kernel, make_grid(count / 4, kClearBlocks, false), 1, stream,
                static_cast<float*>(sums), count);
}

void launch_convert(const BackwardParams& params, const BackwardPlan& plan, const void* sums,
                    void* stream) {
  const int64_t count = count_values(params);
  const Grid grid = make_grid(count / kConverted, kConvertBlocks, plan.overlaps_sums);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (sizeof(scalar_t) == 2) {
      launch_blocks(convert_kernel<scalar_t>, grid, 1, stream, static_cast<const float*>(sums),
                    static_cast<scalar_t*>(params.grad_value), count);
    }
  });
}

}  // namespace ms_deform_attn::cuda
