// Scans over the threads of a warp or a block.
#pragma once

#include <cstdint>

namespace ms_deform_attn::cuda {

// Returns the sum of x over the warp's lanes up to this one.
template <typename Integer>
__device__ __forceinline__ Integer inclusive_warp_scan(Integer x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Integer other = __shfl_up_sync(0xffffffff, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// Returns the sum of x over the block's threads before this one; `total` becomes the sum over all.
// The block has to meet (__syncthreads) between two calls.
template <int kWarps>
__device__ __forceinline__ int32_t exclusive_scan(int32_t x, int32_t& total) {
  __shared__ int32_t warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t sum = inclusive_warp_scan(x);
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  total = 0;
  int32_t before = sum - x;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += total;
    total += warp_sums[w];
  }
  return before;
}

}  // namespace ms_deform_attn::cuda
