// How kernels are launched, and how sizes known at run time become constants of a kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "deformable_detr/cuda/vec.cuh"
#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

constexpr int64_t kMaxBlocksYZ = 65535;  // of a grid
// Dynamic, which every kernel here may have without asking: beside its static shared memory, of
// 48 KB in all.
constexpr int64_t kFreeSharedMemory = 8 * 1024;

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it is not found by whoever asks next
  throw std::runtime_error(cudaGetErrorString(error));
}

// An attribute of the current device.
inline int find_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

struct DeviceLimits {
  int multiprocessors = find_attribute(cudaDevAttrMultiProcessorCount);
  // Shared memory in bytes.
  int block_memory = find_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int multiprocessor_memory = find_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  int major = find_attribute(cudaDevAttrComputeCapabilityMajor);
  bool overlaps_kernels = major >= 9;
  bool has_matrices = major >= 8;  // see matrix.cuh
};

// The blocks of a kernel. As z they have the batches.
struct Grid {
  int64_t blocks_x, blocks_y;
  int threads;
  int64_t shared_memory;           // dynamic, in bytes
  bool overlaps_previous = false;  // see let_next_kernel_start
};

// The most dynamic shared memory that the current device lets a block of this kernel have.
template <typename Kernel>
int64_t shared_memory_limit(Kernel kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel));
  return find_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
         static_cast<int64_t>(attributes.sharedSizeBytes);
}

template <typename Kernel>
bool fits_shared_memory(Kernel kernel, int64_t bytes) {
  return bytes <= kFreeSharedMemory || bytes <= shared_memory_limit(kernel);
}

// Lets a kernel have this much dynamic shared memory. It is allowed all that the device gives,
// whatever this call needs, because the limit is the process's: a smaller one, set by another
// thread between this one's setting and its launch, would make the launch fail.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes) {
  if (bytes <= kFreeSharedMemory) return;
  const int64_t limit = shared_memory_limit(kernel);
  if (bytes > limit) {
    throw std::runtime_error("spatial_shapes needs " + std::to_string(bytes) +
                             " bytes of a block's shared memory for its levels and what goes with "
                             "them, expected at most " +
                             std::to_string(limit) + " on this GPU");
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(limit)));
}

// Launches kernel(arguments...) once.
template <typename... Parameters, typename... Arguments>
void launch_blocks(void (*kernel)(Parameters...), const Grid& grid, int64_t blocks_z, void* stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks_x), static_cast<unsigned>(grid.blocks_y),
                        static_cast<unsigned>(blocks_z));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_memory;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = grid.overlaps_previous ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Launches kernel(p, first_batch, arguments...), as often as the batches take: its blocks serve
// those from first_batch on.
template <typename ParamsType, typename... Arguments>
void launch(void (*kernel)(ParamsType, int64_t, Arguments...), const ParamsType& p,
            const Grid& grid, void* stream, Arguments... arguments) {
  if (grid.blocks_x > INT32_MAX) {
    throw std::runtime_error("the call has " + std::to_string(p.queries) +
                             " queries, more than a grid of " + std::to_string(INT32_MAX) +
                             " blocks serves");
  }
  allow_shared_memory(kernel, grid.shared_memory);
  for (int64_t first_batch = 0; first_batch < p.batch; first_batch += kMaxBlocksYZ) {
    const int64_t batches = std::min(p.batch - first_batch, kMaxBlocksYZ);
    launch_blocks(kernel, grid, batches, stream, p, first_batch, arguments...);
  }
}

// On sm_90 a kernel whose grid overlaps the previous one may start while that still runs
// (programmatic dependent launch). The previous one says from where on; the kernel itself has
// to wait before it ends, so that whatever follows it in the stream also follows both. Worth
// (H100): with sums cleared and converted so, rfdetr_decoder_b8 backward fp16 takes 61.5 instead
// of 64.7 us.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// with_lanes<2, 32>(n, [&](auto lanes) { ... lanes.value ... }): the power of two from 2 to 32
// at or above n (or 32), as a constant.
template <int kMin, int kMax, typename Function>
auto with_lanes(int64_t n, Function&& function) {
  if constexpr (kMin < kMax) {
    if (n > kMin) return with_lanes<kMin * 2, kMax>(n, std::forward<Function>(function));
  }
  return function(std::integral_constant<int, kMin>{});
}

// with_vectors<scalar_t, kMax>(p, [&](auto vec, auto lanes) { ... }): how a team of the
// backward holds channels, as constants: up to 8 lanes with vectors of kMax channels, or 32
// with one each.
template <typename scalar_t, int kMax, typename Function>
auto with_vectors(const Params& p, Function&& function) {
  // float64 is for checking gradients, and its one channel a lane keeps the library small.
  if constexpr (sizeof(scalar_t) < sizeof(double)) {
    if (p.channels % kMax == 0 && Indexing<scalar_t, kMax>::fits(p)) {
      return with_lanes<2, 8>(p.channels / kMax, [&](auto lanes) {
        return function(std::integral_constant<int, kMax>{}, lanes);
      });
    }
  }
  return function(std::integral_constant<int, 1>{}, std::integral_constant<int, 32>{});
}

}  // namespace ms_deform_attn::cuda
