// How kernels are launched.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/points.cuh"
#include "deformable_detr/cuda/rows.cuh"

namespace ms_deform_attn::cuda {

// ------------------------------------------------------------------------------------------ launch

// Launches a kernel over groups of tiles (x), groups of heads (y) and batches (z; as many launches
// as it takes). Returns null, or the error.
template <typename ParamsType, typename... Arguments>
const char* launch(void (*kernel)(ParamsType, Arguments...), ParamsType p, int64_t blocks_x,
                   int64_t blocks_y, int threads, int64_t shared_memory, bool overlap_previous,
                   void* stream, Arguments... arguments) {
  if (p.levels > kMaxLevels) return "spatial_shapes has too many levels, expected at most 1024";
  if (blocks_x > INT32_MAX) return "sampling_locations has too many queries, expected below 2^31";
  if (blocks_y > kMaxBlocksYZ) return "value has too many heads, expected at most 65535";
  for (; p.first_batch < p.batch; p.first_batch += kMaxBlocksYZ) {
    const int64_t batches = std::min(p.batch - p.first_batch, kMaxBlocksYZ);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y),
                          static_cast<unsigned>(batches));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_memory;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = overlap_previous ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, arguments...);
    if (error != cudaSuccess) {
      cudaGetLastError();  // so that it is not found by whoever asks next
      return cudaGetErrorString(error);
    }
  }
  return nullptr;
}

// The tiles of a layout: how many blocks, where each serves `tiles` of them.
template <typename Layout>
int64_t tile_blocks(const Params& p, int tiles) {
  return ceil_div<int64_t>(ceil_div<int64_t>(p.queries, Layout::kTileQueries), tiles);
}
template <typename Layout>
int64_t head_blocks(const Params& p) {
  return ceil_div(p.heads, Layout::kTileHeads);
}

// with_source<scalar_t>(p, [&](auto source) { ... source.value ... }): how the points are given.
template <typename scalar_t, typename Function>
auto with_source(const Params& p, Function&& function) {
  const auto with = [&](auto same, auto mixed) {
    if constexpr (!std::is_same_v<scalar_t, acc_t<scalar_t>>) {
      const auto is_mixed = [&](const Operand& x) { return x.data && x.dtype != p.value_dtype; };
      if (is_mixed(p.sampling_locations) || is_mixed(p.attention_weights) ||
          is_mixed(p.sampling_offsets) || is_mixed(p.attention_logits) ||
          is_mixed(p.reference_points)) {
        return function(mixed);
      }
    }
    return function(same);
  };
  if (p.fused()) {
    return with(std::integral_constant<Source, Source::fused>{},
                std::integral_constant<Source, Source::fused_mixed>{});
  }
  return with(std::integral_constant<Source, Source::same>{},
              std::integral_constant<Source, Source::mixed>{});
}

// with_lanes<2, 32>(n, [&](auto lanes) { ... lanes.value ... }): the power of two from 2 to 32 at
// or above n (or 32), as a constant.
template <int kMin, int kMax, typename Function>
auto with_lanes(int64_t n, Function&& function) {
  if constexpr (kMin < kMax) {
    if (n > kMin) return with_lanes<kMin * 2, kMax>(n, std::forward<Function>(function));
  }
  return function(std::integral_constant<int, kMin>{});
}

// Dynamic shared memory beyond what a kernel may have without asking.
template <typename Kernel>
const char* allow_shared_memory(Kernel kernel, int64_t bytes, const char* too_much) {
  if (bytes <= 16 * 1024) return nullptr;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    if (bytes + static_cast<int64_t>(attributes.sharedSizeBytes) > limit) return too_much;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// function(vector, lanes): how a row is held, or a part of it: in vectors of up to kMax channels.
template <typename scalar_t, int kMax, typename Function>
const char* with_row(const Params& p, Function&& function) {
  // Rows of double are long enough as they are.
  if constexpr (sizeof(scalar_t) < sizeof(double)) {
    if (p.channels % kMax == 0 && Rows<scalar_t, kMax>::fits(p)) {
      return with_lanes<2, 8>(p.channels / kMax, [&](auto lanes) {
        return function(std::integral_constant<int, kMax>{}, lanes);
      });
    }
  }
  return function(std::integral_constant<int, 1>{}, std::integral_constant<int, 32>{});
}

}  // namespace ms_deform_attn::cuda
