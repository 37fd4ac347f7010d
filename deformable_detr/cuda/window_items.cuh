// A kernel over windows whose blocks stay: there are as many as run at once, and each serves some
// items, a region of one (batch, head) each, in these phases:
//
//     prepare    windows are placed where sampled points are, and the queries listed; by the last
//                warp, while the others sum up the item before
//     fill       value is copied to the windows
//     sum        each warp but the last takes some of the listed queries at a time; it is the
//                kernel's own
//     repair     rows that are not finite are done anew by plain arithmetic
#pragma once

#include "deformable_detr/cuda/forward_windows.cuh"

namespace ms_deform_attn::cuda {

struct WindowItem {
  int64_t batch;
  int32_t head, region;

  // Of items that differ first in their heads, whose pixels are adjacent in memory.
  __device__ __forceinline__ WindowItem(const Params& p, int32_t regions, int32_t index) {
    const int32_t of_heads = index / p.heads;
    head = index - of_heads * p.heads;
    batch = of_heads / regions;
    region = of_heads - static_cast<int32_t>(batch) * regions;
  }
};

// What the warps of a block share.
template <int kLevels>
struct WindowBlock {
  Cut<kLevels> cut;
  Region<kLevels> regions[2];  // of an item and the next
  volatile bool not_finite;    // an element of a row that was stored
};

// Places an item's windows and lists its queries, by `workers` warps of which this is one. The
// region's queries were found before; of a level with few columns it may have none.
template <typename scalar_t, bool kFused, int kLevels>
__device__ __noinline__ void prepare_item(const Params& p, const Cut<kLevels>& cut,
                                          Region<kLevels>& region, const WindowItem item,
                                          uint32_t list, int worker, int workers) {
  if (region.count == 0) return;
#pragma unroll 1
  for (int l = worker; l < kLevels; l += workers) {
    place_window<scalar_t, kFused>(p, cut, region, l, item.batch, item.head);
  }
#pragma unroll 1
  for (int32_t i = worker * 32 + threadIdx.x % 32; i < region.count; i += workers * 32) {
    store_shared(list + i * 4, static_cast<uint32_t>(query_of_region(cut, region, i).query));
  }
}

// Serves a block's items, or none, if the call is left. sum(item, region, value, list_at, list_end,
// is_to_sum_up) sums up the listed queries; value is that of the item's head. Before it reads
// windows, each warp asks is_to_sum_up(), which is false for the last one.
template <typename scalar_t, bool kFused, int kLevels, typename Sum>
__device__ __forceinline__ void serve_items(const Params& p, const WindowLayout& layout,
                                            int most_missed, char* memory,
                                            WindowBlock<kLevels>& block, Sum&& sum) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t memory_at = shared_address(memory);
  const Cut<kLevels>& cut = block.cut;
  const auto list_of = [&](int turn) {
    return memory_at + layout.list + turn % 2 * (layout.list_queries * 4);
  };
  const auto find = [&](const WindowItem& item, int turn) {
    find_region(cut, cut.across, cut.down, item.region, block.regions[turn % 2]);
  };

  // The first item is prepared by all warps, while choose_kernel runs.
  int32_t index = blockIdx.x;
  if (warp == 0) {
    cut_image(p, layout, block.cut);
    __syncwarp();
    if (cut.across > 0) find(WindowItem(p, cut.across * cut.down, index), 0);
    if (threadIdx.x == 0) block.not_finite = false;
  }
  __syncthreads();
  const int32_t regions = cut.across * cut.down;
  const int32_t items = regions * static_cast<int32_t>(p.batch) * p.heads;
  if (index < items) {
    prepare_item<scalar_t, kFused>(p, cut, block.regions[0], WindowItem(p, regions, index),
                                   list_of(0), warp, warps);
    for (int32_t i = threadIdx.x; i < cut.zero_pieces; i += blockDim.x) {
      store_shared(memory_at + cut.zeros + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
  wait_for_previous_kernel();
  if (left_by_windows(p, most_missed)) return;
  // Only here: what is left is served faster where these blocks' shared memory is L1 again.
  let_next_kernel_start();
  __syncthreads();

  for (int turn = 0; index < items; ++turn, index += gridDim.x) {
    const WindowItem item(p, regions, index);
    const Region<kLevels>& region = block.regions[turn % 2];
    const uint32_t list_at = list_of(turn), list_end = list_at + region.count * 4;
    const scalar_t* const value = static_cast<const scalar_t*>(p.value) +
                                  (item.batch * p.spatial_size * p.heads + item.head) * 32;
    // All warps meet here, and the last one prepares.
    const auto is_to_sum_up = [&] {
      wait_for_copies();
      __syncthreads();
      if (warp < warps - 1) return true;
      if (index + gridDim.x < items) {
        const WindowItem next(p, regions, index + gridDim.x);
        Region<kLevels>& next_region = block.regions[(turn + 1) % 2];
        find(next, turn + 1);
        __syncwarp();
        prepare_item<scalar_t, kFused>(p, cut, next_region, next, list_of(turn + 1), 0, 1);
      }
      return false;
    };
    if (list_at < list_end) {
      fill_windows(p, cut, region, memory_at, value);
      sum(item, region, value, list_at, list_end, is_to_sum_up);
    } else {
      is_to_sum_up();
    }
    __syncthreads();
    if (block.not_finite) {
      store_rows_not_finite<scalar_t, kFused>(p, item.batch, item.head, list_at, list_end);
      __syncthreads();
      if (threadIdx.x == 0) block.not_finite = false;
    }
  }
}

}  // namespace ms_deform_attn::cuda
