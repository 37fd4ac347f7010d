// Strategy::gather: the gradient of value, each pixel summed by one team and written once.
//
// A block owns a slice of a level (backward_slices.cuh) for a (batch, head). It finds the points
// that touch the slice, weighs their corners, sorts them by cell, and then each team adds up the
// points of the four cells around a pixel and stores the sum (backward_gather_block.cuh). So the
// sums have a fixed order, grad_value needs neither clearing nor atomics, and in a half type no
// float copy. The price is that each block looks through all points of its level (or through those
// of the chunks of queries that reach its slice, see backward_reach.cuh). So it is for
// deterministic gradients, for float64, and for few queries on large maps.
//
// Here are the kernel, the choice of the slices' sizes, and the launch.
#include "deformable_detr/cuda/backward_gather_block.cuh"
#include "deformable_detr/cuda/backward_kernels.h"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

constexpr int kGatherBlocks = 3;  // that share a multiprocessor, if their shared memory allows

// Sums the levels that overlap others. No model has such levels, but metadata on a GPU cannot be
// refused. The first level that has a pixel sums the points of all levels that have it: each team
// tests each of those points for each of its pixels, without sorting. Not inlined, called at the
// kernel's end and without a pointer to what the kernel keeps in registers; otherwise the kernel is
// 1.04 to 1.7 times slower (H100, 2026-11-28).
template <typename Block>
__device__ __noinline__ void sum_overlapping(const BackwardParams& p, const Slicing& slicing,
                                             const void* softmaxes, int64_t first_batch) {
  using acc = typename Block::acc;
  extern __shared__ __align__(32) char memory[];
  const typename Block::Memory shared(memory, slicing, p.levels);
  const Block block(p, slicing, shared, softmaxes, first_batch);
  const int32_t first_pixel = blockIdx.y * Block::kTeams + Block::team();
  const int32_t step = gridDim.y * Block::kTeams;
  for (int64_t i = first_pixel; i < p.spatial_size; i += step) {
    const int32_t pixel = static_cast<int32_t>(i);
    int32_t first = 0;
    while (first < p.levels && !shared.levels[first].has_pixel(pixel)) ++first;
    if (first == p.levels || !shared.slices[first].overlaps) continue;
    typename Block::Sum sum = {};
    for (int32_t l = first; l < p.levels; ++l) {
      const auto& level = shared.levels[l];
      for (int32_t query = 0; query < p.queries && level.has_pixel(pixel); ++query) {
        const int64_t query_index = block.batch * p.queries + query;
        const int64_t row = query_index * p.heads + block.head;
        Softmax<acc> softmax;
        if constexpr (Block::kFused) softmax = block.softmaxes[row];
        typename Block::Point point;
        point.seek(p, row, query_index, shared.slices[l].first_point);
        for (int32_t k = 0; k < points_of_level(p, l); ++k) {
          point.read(p);
          const Corners<acc> corners = find_corners(p, point, l, level);
          const PerCorner<acc> weights = weigh_corners(corners, find_weight(p, point, softmax));
          for (int j = 0; j < 4; ++j) {
            if (corners.pixel[j] == pixel) block.add_row(query, weights.corner[j], sum);
          }
          point.skip(p, 1);
        }
      }
    }
    block.store(pixel, sum);
  }
}

template <typename scalar_t, Source kSource, int kVec, int kLanes>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    gather_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch,
                  const __grid_constant__ Slicing slicing, const void* softmaxes,
                  const Reach* reaches) {
  using Block = GatherBlock<scalar_t, kSource, kVec, kLanes>;
  using acc = typename Block::acc;
  constexpr int kTeams = Block::kTeams;
  extern __shared__ __align__(32) char memory[];
  __shared__ SliceCursor cursor;
  const typename Block::Memory shared(memory, slicing, p.levels);
  LevelLoader<typename Block::LevelEntry> level_loader;
  level_loader.load(p);
  level_loader.store(p, shared.levels);
  const bool filled = levels_fill_value(p, shared.levels);
  for (int32_t l = threadIdx.x; l < p.levels; l += kGatherThreads) {
    shared.slices[l] = cut_level(p, slicing, shared.levels, l, !filled);
  }

  const Block block(p, slicing, shared, softmaxes, first_batch);
  const int team = Block::team();

  if (!filled && blockIdx.y == 0) block.zero_uncovered();

  int64_t slice_index = blockIdx.y;
  __syncthreads();
  if (threadIdx.x == 0) cursor.seek(p, shared.levels, shared.slices, slice_index);
  __syncthreads();
  while (cursor.level < p.levels) {
    // Copied, as the cursor may move on before all threads are done with this slice.
    const typename Block::Slice slice = block.slice_at(cursor);
    typename Block::Search search = block.start_search(slice, reaches);
    const int32_t pixels = slice.pixels.pixels();
    // Where pixels are few, `replicas` teams share one. With one each, deterministic backwards take
    // up to 53% longer (seed_b1_q300 fp16), and hub_b8_q900 fp16 10% (H100, 2026-11-28).
    const int replicas = max(1, min(kTeams / pixels, 32));
    bool more, halved, at_once;
    for (bool first_round = true;; first_round = false) {
      const int count = block.find(slice, search);
      more = __syncthreads_or(search.more(slicing));
      halved = first_round && more && pixels > slicing.sum_pixels;
      if (threadIdx.x == 0 && first_round) {
        if (halved) {
          cursor.halve();
        } else if (!cursor.advance()) {
          slice_index += gridDim.y;
          cursor.seek(p, shared.levels, shared.slices, slice_index);
        }
      }
      if (halved) break;
      block.weigh(slice, count);
      __syncthreads();
      block.sort(slice, count);
      __syncthreads();

      // Each team adds up its pixels. Where that is all, it stores them at once.
      at_once = first_round && !more && replicas == 1;
      if (at_once) {
        const int32_t touched = block.order_pixels(slice);
        __syncthreads();
        for (int32_t i = team; i < pixels; i += kTeams) {
          const int32_t pixel = block.pixel_order()[i];
          typename Block::Sum sum = {};
          if (i < touched) block.add(slice, pixel, 0, 1, sum);
          block.store(Block::index_in_value(slice, pixel), sum);
        }
      } else {
        for (int32_t i = team; i < pixels * replicas; i += kTeams) {
          const int32_t replica = replicas == 1 ? 0 : i / pixels, pixel = i - replica * pixels;
          typename Block::Sum sum = {};
          block.add(slice, pixel, replica, replicas, sum);
          acc* kept = block.kept_sum(i);
#pragma unroll
          for (int c = 0; c < kVec; ++c) kept[c] = first_round ? sum[c] : kept[c] + sum[c];
        }
      }
      __syncthreads();
      if (!more) break;
    }

    if (!halved && !at_once) {
      for (int32_t pixel = team; pixel < pixels; pixel += kTeams) {
        typename Block::Sum sum = {};
        for (int replica = 0; replica < replicas; ++replica) {
          const acc* kept = block.kept_sum(replica * pixels + pixel);
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[c] += kept[c];
        }
        block.store(Block::index_in_value(slice, pixel), sum);
      }
    }
    __syncthreads();
  }
  if (!filled) sum_overlapping<Block>(p, slicing, softmaxes, first_batch);
  wait_for_previous_kernel();
}

// ------------------------------------------------------------------------------ slices and kernel

constexpr int kMinCandidates = 128;
constexpr int kMinSlicePixels = 128;  // before min_slices cuts, or the plan shrinks
constexpr int kSumPixels = 64;
constexpr int kStaticBytes = 2048;  // of shared memory that a block has besides, at most
// With a table of reaches:
constexpr int kReachMinSlices = 16;
constexpr int kSumBytes = 32 * 1024;

// The kernel for a problem, and what is to be known of it.
struct GatherLaunch {
  void (*kernel)(BackwardParams, int64_t, Slicing, const void*, const Reach*);
  int64_t slice_blocks;                               // of a batch, on each slice
  int pixel_bytes;                                    // of a pixel's sums in a block
  int64_t (*shared_memory)(const Slicing&, int32_t);  // bytes, for so many levels
};

GatherLaunch choose_kernel(const BackwardParams& p) {
  GatherLaunch result;
  with_types(p, [&](auto zero, auto source) {
    using scalar_t = decltype(zero);
    with_vectors<scalar_t, 16 / sizeof(scalar_t)>(p, [&](auto vec, auto lanes) {
      using Block = GatherBlock<scalar_t, source.value, vec.value, lanes.value>;
      result = {gather_kernel<scalar_t, source.value, vec.value, lanes.value>,
                Block::slice_blocks(p), Block::kTeamChannels * sizeof(typename Block::acc),
                Block::Memory::bytes};
    });
  });
  return result;
}

// reach_chunks: as in Slicing.
Slicing choose_slicing(const BackwardParams& p, const GatherLaunch& chosen, int32_t reach_chunks) {
  const DeviceLimits limits;
  const int64_t points = max_level_points(p);
  Slicing slicing;
  if (reach_chunks > 0) {
    const int pixels = std::min(kSumBytes / chosen.pixel_bytes, kMaxSlicePixels);
    slicing = {pixels, kReachMinSlices, kMaxCandidates, pixels, reach_chunks};
  } else {
    // Enough slices to fill the GPU twice, and all points at a time, if they fit.
    const int64_t blocks_of_slice = p.batch * chosen.slice_blocks;
    const int64_t pixels = p.spatial_size * blocks_of_slice / (2 * limits.multiprocessors);
    const int64_t of_warp = ceil_div<int64_t>(points, kGatherThreads) * 32;
    slicing = {int32_t(std::clamp<int64_t>(pixels, kMinSlicePixels, kMaxSlicePixels)), 1,
               int32_t(std::clamp<int64_t>(of_warp, 32, kMaxCandidates)), kSumPixels, 0};
  }
  const auto shrink = [&](int64_t bytes, int candidates, int pixels) {
    const auto fits = [&] { return chosen.shared_memory(slicing, p.levels) <= bytes; };
    while (slicing.candidates > candidates && !fits()) slicing.candidates -= 32;
    while (slicing.slice_pixels > pixels && !fits()) {
      slicing.slice_pixels /= 2;
      slicing.sum_pixels = std::min(slicing.sum_pixels, slicing.slice_pixels);
    }
  };
  const int shared = std::max(limits.multiprocessor_memory / kGatherBlocks, 48 * 1024);
  shrink(std::min(limits.block_memory, shared) - kStaticBytes, kMinCandidates, kMinCutPixels);
  shrink(limits.block_memory - kStaticBytes, 32, 2);
  const int64_t held = kGatherWarps * slicing.candidates;
  if (reach_chunks == 0 && points > held) {
    slicing.min_slices = int32_t(ceil_div(4 * points, 3 * held));
  }
  return slicing;
}

// About as many slices as all levels have.
int64_t estimate_slices(const Params& p, const Slicing& slicing) {
  return p.spatial_size / slicing.slice_pixels * 5 / 4 + int64_t(p.levels) * slicing.min_slices + 2;
}

}  // namespace

// ----------------------------------------------------------------------------------------- entries

void plan_gather(const BackwardParams& params, BackwardPlan& plan) {
  // Points are counted in 32 bits, a little beyond the last one.
  constexpr int64_t kMostPoints = INT32_MAX - kLookAhead * kGatherThreads;
  const int64_t points = max_level_points(params);
  if (points > kMostPoints) {
    throw std::runtime_error("the call has " + std::to_string(points) +
                             " points in a level, over all queries of a head, expected at most " +
                             std::to_string(kMostPoints) + " where gradients repeat");
  }
  const int32_t chunks = count_reach_chunks(params);
  if (chunks > 0) {
    const int64_t levels = params.batch * params.heads * params.levels;
    plan.scratch.reaches = plan.scratch.reserve(levels * chunks * sizeof(Reach));
  }
  plan.slicing = choose_slicing(params, choose_kernel(params), chunks);
  // In a fused call gather_kernel needs the softmaxes of points_kernel.
  plan.overlaps_points =
      plan.runs_points_kernel && !params.fused() && DeviceLimits().overlaps_kernels;
}

void launch_reach(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  const int32_t chunks = plan.slicing.reach_chunks;
  const int64_t warps = int64_t(chunks) * params.heads * params.levels;
  const Grid grid{ceil_div<int64_t>(warps, kReachThreads / 32), 1, kReachThreads, 0};
  with_types(params, [&](auto zero, auto source) {
    launch(reach_kernel<decltype(zero), source.value>, params, grid, stream, chunks,
           in_scratch<Reach>(params, plan.scratch.reaches));
  });
}

void launch_gather(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  const GatherLaunch chosen = choose_kernel(params);
  const int64_t slices = std::min(estimate_slices(params, plan.slicing), kMaxBlocksYZ);
  const Grid grid{chosen.slice_blocks, slices, kGatherThreads,
                  chosen.shared_memory(plan.slicing, params.levels), plan.overlaps_points};
  launch(chosen.kernel, params, grid, stream, plan.slicing,
         in_scratch<const void>(params, plan.scratch.softmaxes),
         in_scratch<const Reach>(params, plan.scratch.reaches));
}

}  // namespace ms_deform_attn::cuda
