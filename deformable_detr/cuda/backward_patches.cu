// Strategy::patches: the gradient of value for problems whose queries are the pixels, in half
// types, on tensor cores.
//
// A patch is 8 x 2 pixels, and the 7 cells (squares between four pixels) among them. A block takes
// the queries of all levels in a region of the image, as those sample about the same part of each
// level, and sorts their points of one level by patch. A warp then takes some of the sorted points,
// 16 at a time: the gradient of the patch's pixels is the product of the points' shares (corner
// weight * attention weight), pixels x points, and their rows of grad_output, points x channels.
// Patches are sorted column after column, so that what a patch's southern row got is the next one's
// northern row, and a pixel is added to memory about once for all the block's points near it.
//
// Points that meet too few others are added to memory one by one, so that this is no slower where
// points lie anywhere. Sums are in any order.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/patch_points.cuh"
#include "deformable_detr/cuda/patch_product.cuh"
#include "deformable_detr/cuda/query_regions.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

template <typename scalar_t, Source kSource>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    patches_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch, int32_t regions,
                   const Softmax<float>* softmaxes) {
#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  using Product = cuda::Product<scalar_t>;
  extern __shared__ __align__(128) char memory[];
  PatchMemory& shared = *reinterpret_cast<PatchMemory*>(memory);
  LevelEntry* const levels = reinterpret_cast<LevelEntry*>(memory + sizeof(PatchMemory));
  QueryPart* const parts = reinterpret_cast<QueryPart*>(levels + p.levels);

  LevelLoader<LevelEntry> level_loader;
  level_loader.load(p);
  level_loader.store(p, levels);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t channel_blocks = ceil_div(p.channels, kPatchChannels);
  const int32_t head_and_channels = blockIdx.x / regions;
  const int32_t region = blockIdx.x - head_and_channels * regions;
  const int32_t head = head_and_channels / channel_blocks;
  const int32_t channel = head_and_channels % channel_blocks * kPatchChannels;
  const int64_t batch = first_batch + blockIdx.z;
  const int32_t pitch = p.heads * p.channels;
  float* const grad_value = opaque(static_cast<float*>(p.grad_value) +
                                   batch * p.spatial_size * pitch + head * p.channels + channel);
  const uint32_t rows_at = shared_address(shared.grad_output);
  if (warp == 0) {
    const int32_t across = choose_across(p, levels, regions, kQueries);
    const int32_t down = regions / across;
    int32_t count = 0;
    if (region < across * down) count = find_parts(p, levels, across, down, region, parts);
    if (lane == 0) {
      shared.count = count;
      shared.first_query = 0;
    }
  }
  for (int i = threadIdx.x; i < 2 * kBins / 4; i += kPatchThreads) {
    reinterpret_cast<int4*>(shared.bins)[i] = make_int4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kPoints + kStep; i += kPatchThreads) shared.rows[i] = 0;
  __syncthreads();

  if (threadIdx.x == 0) shared.stage.bins = 0;
  while (true) {  // once, where the region's queries fit
    const int32_t n_queries = min(kQueries, shared.count - shared.first_query);
    if (n_queries <= 0) break;
    for (int i = threadIdx.x; i < kQueries; i += kPatchThreads) {
      shared.queries[i] = i < n_queries ? query_of_parts(p, parts, shared.first_query + i) : 0;
      shared.finite[i] = true;
    }
    if (threadIdx.x == 0) {
      shared.any_not_finite = false;
      shared.stage = {0, 0, 0, shared.stage.bins};
    }
    __syncthreads();
    {
      using Piece = Vec<scalar_t, kPieceChannels>;
      constexpr int kThreadRows = kPatchThreads / kPieces, kOwnPieces = kQueries / kThreadRows;
      const int piece = threadIdx.x % kPieces, own_row = threadIdx.x / kPieces;
      const scalar_t* const grad_output = static_cast<const scalar_t*>(p.grad_output) +
                                          batch * p.queries * pitch + head * p.channels + channel +
                                          piece * kPieceChannels;
      const bool has_piece = channel + piece * kPieceChannels < p.channels;
      Piece pieces[kOwnPieces];
#pragma unroll
      for (int i = 0; i < kOwnPieces; ++i) {
        const int row = own_row + i * kThreadRows;
        if (has_piece && row < n_queries) {
          pieces[i] = Piece::load(grad_output + int64_t(shared.queries[row]) * pitch);
        }
      }
#pragma unroll
      for (int i = 0; i < kOwnPieces; ++i) {
        const int row = own_row + i * kThreadRows;
        float of[kPieceChannels], finite = 0;
        pieces[i].unpack(of);
#pragma unroll
        for (int c = 0; c < kPieceChannels; ++c) finite += of[c] * 0;
        if (finite != 0) {  // NaN
          shared.finite[row] = false;
          shared.any_not_finite = true;
          pieces[i] = Piece{};
        }
        Product::store_piece(rows_at + row * Product::kPitch, piece, pieces[i].bits);
      }
    }

    // A thread's points: of every kThreadQueries-th query.
    const int own_query = threadIdx.x / kStagePoints, own_point = threadIdx.x % kStagePoints;
    while (true) {
      // Kept in shared memory, as there are no registers left.
      const PointStage stage = shared.stage;
      if (stage.level == p.levels) break;
      const LevelEntry level = levels[stage.level];
      const int32_t level_points = points_of_level(p, stage.level);
      const int32_t bin_rows = level.height + 2;  // one free, so that columns do not meet
      const int64_t all_bins = int64_t(ceil_div(level.width + 1, kCells)) * bin_rows;
      const bool shares_bins = all_bins > kBins;
      const int32_t n_bins = shares_bins ? kBins : static_cast<int32_t>(all_bins);
      int32_t* const bins = shared.bins[stage.bins];
      if (shares_bins) {
        __syncthreads();
        for (int i = threadIdx.x; i < kBins; i += kPatchThreads) shared.owners[i] = -1;
        __syncthreads();
      }
      // Each thread works out some points, and counts those of each bin.
      const bool has_points = stage.first + own_point < level_points;
      const int32_t point = stage.first_point + min(stage.first + own_point, level_points - 1);
      PointReader<scalar_t, kSource> readers[kOwnPoints];
      Softmax<float> softmax[kOwnPoints];
      readers[0].seek(p, batch * p.queries * p.heads + head, batch * p.queries, point);
#pragma unroll
      for (int i = kOwnPoints - 1; i >= 0; --i) {
        const int32_t query = shared.queries[own_query + i * kThreadQueries];
        readers[i] = readers[0];
        readers[i].skip_few_bytes(p, query);
        readers[i].read(p);
        if constexpr (kIsFused<kSource>) {
          softmax[i] = softmaxes[(batch * p.queries + query) * p.heads + head];
        }
      }
      float xs[kOwnPoints], norths[kOwnPoints], souths[kOwnPoints];
      int32_t place[kOwnPoints];  // the patch; of what is sorted the bin, and the rank in it
      // A bit for each point: those that are sorted, those that are not, and those whose weight
      // would not do for the product.
      unsigned sorted = 0, unsorted = 0, irregular = 0;
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        const float weight = find_weight(p, readers[i], softmax[i]);
        const CellPoint cell = find_cell<scalar_t, kSource>(p, readers[i], stage.level, level);
        const uint32_t column = cell.column + 1;
        const uint32_t patch_column = __umulhi(column, 0x24924925);  // column / kCells
        place[i] = patch_column * bin_rows + (cell.row + 1);
        if (cell.touches && has_points && own_query + i * kThreadQueries < n_queries) {
          (fabsf(weight) <= Product::kLargest ? sorted : irregular) |= 1u << i;
        }
        xs[i] =
            (static_cast<float>(static_cast<int32_t>(column - patch_column * kCells)) - kMiddle) +
            cell.right;
        const float scaled = weight * Product::kScale;
        souths[i] = scaled * cell.down;
        norths[i] = scaled - souths[i];
      }
      if (shares_bins) {
        // The first patch has the bin.
#pragma unroll
        for (int i = 0; i < kOwnPoints; ++i) {
          if (!(sorted >> i & 1)) continue;
          const int32_t bin = static_cast<uint32_t>(place[i]) % kBins;
          const int32_t owner = atomicCAS(shared.owners + bin, -1, place[i]);
          const bool owns = owner == -1 || owner == place[i];
          place[i] = owns ? bin : place[i];
          unsorted |= owns ? 0 : 1u << i;
        }
        sorted &= ~unsorted;
      }
      int32_t rank[kOwnPoints] = {};
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        if (sorted >> i & 1) rank[i] = atomicAdd(bins + place[i], 1);
      }
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        place[i] = sorted >> i & 1 ? place[i] << 16 | rank[i] : place[i];
      }
      __syncthreads();

      // A counting sort.
      const int32_t first_bin = threadIdx.x * kThreadBins;
      int32_t counts[kThreadBins], points_and_patches = 0;
      if (first_bin < n_bins) {
#pragma unroll
        for (int i = 0; i < kThreadBins; i += 4) {
          reinterpret_cast<int4&>(counts[i]) = *reinterpret_cast<const int4*>(bins + first_bin + i);
        }
#pragma unroll
        for (int i = 0; i < kThreadBins; ++i) {
          points_and_patches += counts[i] + (counts[i] > 0 ? 1 << 16 : 0);
        }
      }
      int32_t totals;
      const int32_t before = exclusive_scan<kPatchWarps>(points_and_patches, totals);
      const int32_t n_points = totals & 0xffff, n_patches = totals >> 16;
      if (points_and_patches > 0) {
        int32_t start = before & 0xffff, patch = before >> 16;
#pragma unroll
        for (int i = 0; i < kThreadBins; ++i) {
          const int32_t count = counts[i];
          counts[i] = start;
          if (count > 0) shared.patches[patch++] = (first_bin + i) << 16 | start;
          start += count;
        }
#pragma unroll
        for (int i = 0; i < kThreadBins; i += 4) {
          *reinterpret_cast<int4*>(bins + first_bin + i) = reinterpret_cast<const int4&>(counts[i]);
        }
      }
      if (threadIdx.x == 0) {
        shared.patches[n_patches] = shared.patches[n_patches + 1] = n_points;
        const bool level_ends = stage.first + kStagePoints >= level_points;
        shared.stage = {stage.level + level_ends, level_ends ? 0 : stage.first + kStagePoints,
                        stage.first_point + (level_ends ? level_points : 0), 1 - stage.bins};
      }
      __syncthreads();
      const bool sparse = n_points < n_patches * kMinPoints;
#pragma unroll
      for (int i = 0; i < kOwnPoints; ++i) {
        if (!(sorted >> i & 1)) continue;
        const int32_t bin = place[i] >> 16;
        if (sparse) {
          place[i] = shares_bins ? shared.owners[bin] : bin;
          continue;
        }
        const int32_t to = bins[bin] + (place[i] & 0xffff);
        shared.x[to] = xs[i];
        shared.north[to] = norths[i];
        shared.south[to] = souths[i];
        shared.rows[to] = static_cast<uint16_t>((own_query + i * kThreadQueries) * Product::kPitch);
      }
      if (sparse) unsorted |= sorted;
      if (threadIdx.x < kStep) {
        shared.x[n_points + threadIdx.x] = 0;
        shared.north[n_points + threadIdx.x] = shared.south[n_points + threadIdx.x] = 0;
      }
      // A warp's part of the sorted points costs as much as the others'.
      const auto part = [&](int of_warp) {
        return find_part(shared.patches, n_points, n_patches, of_warp);
      };
      const int2 first_part = part(warp), next_part = part(warp + 1);
      __syncthreads();
      float per_row = __fdividef(1, bin_rows);
#if defined(__CUDA_ARCH__)
      asm volatile("" : "+f"(per_row));  // so that it is not worked out at each use
#endif
      if (__any_sync(kAllLanes, unsorted != 0)) {
#pragma unroll
        for (int i = 0; i < kOwnPoints; ++i) {
          const unsigned lanes = __ballot_sync(kAllLanes, unsorted >> i & 1);
          const int2 patch = find_patch(place[i], per_row, bin_rows);
          const float from_column = xs[i] + kMiddle;
          const int32_t cell = static_cast<int32_t>(from_column);
          const CellPoint point{patch.x + cell, patch.y, from_column - cell, 0, true};
          const uint32_t rows = rows_at + (warp * 8 + i * kThreadQueries) * Product::kPitch;
#pragma unroll 1
          for (unsigned left = lanes; left != 0; left &= left - 1) {
            const int from = __ffs(left) - 1;
            const auto of = [&](auto x) { return __shfl_sync(kAllLanes, x, from); };
            add_sorted_point<Product>(
                p, of(point.column), of(point.row), of(point.right), of(norths[i]), of(souths[i]),
                rows + from / kStagePoints * Product::kPitch, level, grad_value, channel, pitch);
          }
        }
      }
      if (__any_sync(kAllLanes, irregular != 0)) {
        add_alone<scalar_t, kSource>(p, irregular, batch, head, channel, stage.level,
                                     levels[stage.level], point, shared.queries + own_query,
                                     softmaxes);
      }
      if (first_bin < n_bins) {
#pragma unroll
        for (int i = 0; i < kThreadBins; i += 4) {
          *reinterpret_cast<int4*>(bins + first_bin + i) = make_int4(0, 0, 0, 0);
        }
      }
      if (n_points == 0 || sparse) continue;

      // Each warp takes its part of the sorted points.
      int32_t index = first_part.x;  // of the patch
      const int32_t begin = first_part.y, end = next_part.y;
      if (begin == end) continue;
      const int g = lane / 4, t = lane % 4;
      const float own_column = g - kMiddle;
      const int32_t width = level.width, height = level.height;
      const int32_t channels_left = p.channels - channel - t * 4;
      float* const of_level = grad_value + int64_t(level.start) * pitch;
      const int64_t row_step = int64_t(width) * pitch;
      Product product;
      int32_t current = -1, column = 0, row = 0;  // of the patch that the sums are of
      int pending = 0;                            // its rows that have sums
      float* to = of_level;                       // the lane's pixel in the northern row
      bool has_column = false;                    // whether it has one
      uint32_t patch = shared.patches[index], next = shared.patches[index + 1];
      for (;; ++index) {
        const uint32_t after = shared.patches[min(index + 2, n_patches)];
        const int32_t start = max(static_cast<int32_t>(patch & 0xffff), begin);
        const bool ended = start >= end;
        int32_t key = -1;
        if (!ended) key = shares_bins ? shared.owners[patch >> 16] : patch >> 16;
        // What the patch before has got is added to memory, unless the next one's row gets more.
#pragma unroll 1
        for (; pending > 0 && current != key; --pending, ++current, ++row) {
          float sum[2][4];
          product.take(sum);
          const bool inside = has_column && is_inside(row, height);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t any = __float_as_uint(sum[i][0]) | __float_as_uint(sum[i][1]) |
                                 __float_as_uint(sum[i][2]) | __float_as_uint(sum[i][3]);
            atomic_add_if(to + i * 16, sum[i], inside && any != 0 && channels_left > i * 16);
          }
          to += row_step;
        }
        if (ended) break;
        if (pending == 0) {
          current = key;
          const int2 first = find_patch(key, per_row, bin_rows);
          column = first.x;
          row = first.y;
          has_column = is_inside(column + g, width);
          to = of_level + int64_t(row * width + column + g) * pitch + t * 4;
        }
        const int32_t stop = min(static_cast<int32_t>(next & 0xffff), end);
        const uint32_t count = stop - start;
        if (count <= kFewPoints) {
#pragma unroll 1
          for (int32_t i = start; i < stop; ++i) {
            const float from_column = shared.x[i] + kMiddle;
            const int32_t cell = static_cast<int32_t>(from_column);
            add_sorted_point<Product>(p, column + cell, row, from_column - cell, shared.north[i],
                                      shared.south[i], rows_at + shared.rows[i], level, grad_value,
                                      channel, pitch);
          }
        } else {
#pragma unroll 1
          for (int32_t i = start & ~3; i < stop; i += kStep) {
            const int32_t at = i + t * 4;
            const float4 x = *reinterpret_cast<const float4*>(shared.x + at);
            const float4 north = *reinterpret_cast<const float4*>(shared.north + at);
            const float4 south = *reinterpret_cast<const float4*>(shared.south + at);
            const float xs[4] = {x.x, x.y, x.z, x.w};
            const float norths[4] = {north.x, north.y, north.z, north.w};
            const float souths[4] = {south.x, south.y, south.z, south.w};
            float of_north[4], of_south[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const bool counts = static_cast<uint32_t>(at + k - start) < count;
              const float share = __saturatef(1 - fabsf((counts ? xs[k] : 1000.f) - own_column));
              of_north[k] = share * norths[k];
              of_south[k] = share * souths[k];
            }
            product.add(of_north, of_south, rows_at, shared.rows + i);
          }
          pending = 2;
        }
        patch = next;
        next = after;
      }
    }

    if (shared.any_not_finite) {
      add_not_finite<scalar_t, kSource>(p, levels, batch, head, channel, shared.queries,
                                        shared.finite, n_queries, softmaxes);
    }
    if (shared.count <= shared.first_query + kQueries) break;
    __syncthreads();
    if (threadIdx.x == 0) shared.first_query += kQueries;
    __syncthreads();
  }
#endif
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

// So many regions that a block holds their queries, and that the multiprocessors end at about the
// same time.
int32_t count_regions(const BackwardParams& p) {
  constexpr double kUsual = 0.95 * kQueries;  // as regions differ
  const int64_t slices = p.batch * p.heads * ceil_div(p.channels, kPatchChannels);
  const int64_t at_once = int64_t(DeviceLimits().multiprocessors) * kPatchBlocks;
  const int64_t least = static_cast<int64_t>(p.queries / kUsual) + 1;
  const int64_t turns = ceil_div(least * slices, at_once);
  const int64_t most = ceil_div<int64_t>(p.queries, kQueries / 4);
  return static_cast<int32_t>(std::clamp(turns * at_once / slices, least, std::max(least, most)));
}

template <typename scalar_t, Source kSource>
int64_t patch_bytes(const Params& p) {
  const int64_t of_level = sizeof(LevelEntry<scalar_t, kSource>) + sizeof(QueryPart);
  return sizeof(PatchMemory) + p.levels * of_level + sizeof(QueryPart);
}

bool can_patch(const BackwardParams& p) {
  constexpr int64_t kStatic = 1024 + 1024;  // a block's static memory, and what the system takes
  const int64_t query_bytes = int64_t(p.heads) * p.points * 2 * sizeof(float);
  const bool fits = is_half(p.value_dtype) && p.method == Method::bilinear &&
                    p.channels % kPieceChannels == 0 && count_rows(p) > kFewRows &&
                    p.spatial_size < (1 << 30) && query_bytes <= INT32_MAX;
  if (!fits) return false;
  const DeviceLimits limits;
  const int64_t bytes = patch_bytes<half_t, Source::fused>(p) + kStatic;  // no source needs more
  return limits.has_matrices && bytes <= limits.block_memory &&
         bytes * kPatchBlocks <= limits.multiprocessor_memory;
}

void launch_patches(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  const int32_t regions = count_regions(params);
  const int64_t blocks =
      int64_t(regions) * params.heads * ceil_div(params.channels, kPatchChannels);
  const auto with = [&](auto zero) {
    using scalar_t = decltype(zero);
    with_source<scalar_t>(params, [&](auto source) {
      const Grid grid{blocks, 1, kPatchThreads, patch_bytes<scalar_t, source.value>(params)};
      launch(patches_kernel<scalar_t, source.value>, params, grid, stream, regions,
             in_scratch<const Softmax<float>>(params, plan.scratch.softmaxes));
    });
  };
  params.value_dtype == DType::f16 ? with(half_t{}) : with(bfloat16_t{});
}

}  // namespace ms_deform_attn::cuda
