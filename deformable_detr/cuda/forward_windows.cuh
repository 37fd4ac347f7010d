// What the forwards over windows have in common: forward_windows.cu is for half types,
// forward_windows_float.cu for float.
#pragma once

#include "deformable_detr/cuda/not_finite.cuh"
#include "deformable_detr/cuda/window_copies.cuh"

namespace ms_deform_attn::cuda {

// What the kernels of float have, and their launch.
WindowBlocks float_window_blocks(int32_t levels);
void forward_windows_float(const Params& p, const WindowLayout& layout, void* stream);

// Does anew those of the listed rows that are not finite.
template <typename scalar_t, bool kFused>
__device__ __noinline__ void store_rows_not_finite(const Params& p, int64_t batch, int32_t head,
                                                   uint32_t list_at, uint32_t list_end) {
  constexpr Source kSource = kFused ? Source::fused : Source::plain;
  const int lane = threadIdx.x % 32;
  TeamRow row;
  row.batch = batch;
  row.head = head;
  row.points = p.points;
  for (uint32_t at = list_at + threadIdx.x / 32 * 4; at < list_end; at += blockDim.x / 8) {
    row.query = load_shared_word(at);
    row.index = (row.batch * p.queries + row.query) * p.heads + row.head;
    const float stored =
        to_acc(__ldcg(static_cast<const scalar_t*>(p.output) + row.index * 32 + lane));
    if (__all_sync(kAllLanes, fabsf(stored) < INFINITY)) continue;
    Softmax<float> softmax{};
    if constexpr (kFused) softmax = find_softmax<scalar_t, 32>(p, row.index);
    store_not_finite<scalar_t, kSource, 1, true>(
        p, static_cast<const LevelEntry<scalar_t, kSource>*>(nullptr), row, lane, true, softmax);
  }
}

}  // namespace ms_deform_attn::cuda
