// An encoder's value through windows in shared memory.
//
// Where the queries are the pixels, the image can be cut into regions: the queries of all levels
// in a region sample about the same part of each level. A block serves a region's queries for one
// head. First it copies the parts that its points reach, a window a level, to shared memory,
// whatever lies outside the map as zeros. The few points outside the windows are left to the
// kernel.
//
// Sizes of levels may be known to the GPU alone. The host fixes the shared memory and the most
// regions; each block works out how the image is cut, and how large the windows are. Everything
// here is for kLevels levels of four points, and 32 channels.
#pragma once

#include <algorithm>
#include <cmath>

#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/plan.h"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {

// Serves a call through windows, or leaves it, which only the GPU finds out: see left_by_windows().
void forward_windows(const Params& params, const WindowLayout& layout, void* stream);

constexpr int kWindowThreads = 384;
constexpr int kWindowBlocks = 2;  // that share a multiprocessor
constexpr int kWindowWarps = kWindowThreads / 32;
template <typename scalar_t>
constexpr int kPixelBytes = UsualParams::channels * sizeof(scalar_t);  // a pixel's channels
constexpr unsigned kAllLanes = 0xffffffff;

// ------------------------------------------------------------------------------------------ choice

// A call is left to the kernel that needs no windows, if they would miss so many of its points; at
// that share both take as long. In percent, of the forwards in half types and in float, and of the
// gradients of points.
constexpr int kMostMissed = 4, kMostMissedFloat = 3;
template <bool kFused>
constexpr int kMostMissedBackward = kFused ? 6 : 4;
constexpr int kSampledPoints = 32 * 4;  // of each level of a (batch, head)

// params.windows: the sampled points that windows would miss, of each (batch, head), and then how
// many tiles blocks have fetched of a call that is left.
__host__ __device__ __forceinline__ int64_t count_slices(const Params& p) {
  return p.batch * p.heads;
}
__device__ __forceinline__ int32_t* fetched_tiles(const Params& p) {
  return static_cast<int32_t*>(p.windows) + count_slices(p);
}

// Both kernels ask, and one of them serves. By each warp; the kernel before has to have ended, or
// to have waited for choose_kernel. through_l1: by blocks that waited, of which there are many.
__device__ __forceinline__ bool left_by_windows(const Params& p, int most_missed,
                                                bool through_l1 = false) {
  const int32_t slices = static_cast<int32_t>(count_slices(p));
  float missed = 0;
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32; i < slices; i += 32) {
    const int32_t* const of_slice = static_cast<const int32_t*>(p.windows) + i;
    missed += through_l1 ? *of_slice : __ldcg(of_slice);
  }
  return team_sum<32>(missed) * 100 > float(most_missed * kSampledPoints) * p.levels * slices;
}

// ------------------------------------------------------------------------------------------ layout

// The blocks of a kernel over windows.
struct WindowBlocks {
  int per_multiprocessor;
  int32_t warps_bytes;  // of shared memory, for all warps of a block
  int32_t lists;        // of queries
  // The pixels by which a window should exceed its region, for offsets as they are when training
  // starts.
  float usual_halo;
};

// The layout for a call: regions so small that the usual windows of a pyramid fit, and so many that
// the multiprocessors end at about the same time. No regions: windows do not pay.
inline WindowLayout plan_windows(const Params& p, const WindowBlocks& blocks,
                                 const DeviceLimits& limits) {
  constexpr int64_t kMinRegionQueries = 128, kMaxListed = 4096;
  constexpr double kRegionCost = 60;      // what a region costs beside its queries, as queries
  constexpr int64_t kKept = 1024 + 1024;  // a block's static memory, and what the system takes
  const int64_t slices = count_slices(p);
  const int64_t at_once = int64_t(limits.multiprocessors) * blocks.per_multiprocessor;
  const int64_t memory =
      std::min(limits.multiprocessor_memory / blocks.per_multiprocessor, limits.block_memory) -
      kKept;
  double finest = 0;  // pixels of the finest level, each of the next half as wide
  for (int32_t l = 0; l < p.levels; ++l) finest = 1 + finest / 4;
  finest = p.queries / finest;
  const auto layout_of = [&](int64_t regions) {
    WindowLayout layout{};
    layout.regions = static_cast<int32_t>(regions);
    layout.first_blocks = static_cast<int32_t>(at_once);
    layout.list = blocks.warps_bytes;
    const int64_t queries = ceil_div<int64_t>(p.queries, regions) * 5 / 4 + 128;
    layout.list_queries = static_cast<int32_t>(std::min(queries, kMaxListed) / 4 * 4);
    layout.windows = layout.list + blocks.lists * layout.list_queries * 4;
    layout.pieces = static_cast<int32_t>((memory - layout.windows) / 16);
    layout.bytes = layout.windows + layout.pieces * 16;
    layout.pixel_pieces = is_half(p.value_dtype) ? 4 : 8;
    // So that in half types the pieces of two rows lie in different banks.
    layout.row_gap = is_half(p.value_dtype) ? 1 : 0;
    layout.usual_halo = blocks.usual_halo;
    return layout;
  };
  const auto fits = [&](int64_t regions) {
    const WindowLayout layout = layout_of(regions);
    double side = std::sqrt(finest / regions);
    double pieces = layout.zero_pieces(side + layout.usual_halo);
    for (int32_t l = 0; l < p.levels; ++l, side /= 2) {
      pieces += layout.window_pieces(side + layout.usual_halo, side + layout.usual_halo);
    }
    return pieces <= layout.pieces;
  };
  // Between what does not fit and what does.
  int64_t least = 0, most = p.queries / kMinRegionQueries;
  if (most == 0 || !fits(most)) return {};
  while (most - least > 1) (fits((least + most) / 2) ? most : least) = (least + most) / 2;
  // All blocks take a number of turns, of so many at a time.
  const int64_t first_turns = ceil_div(most * slices, at_once);
  int64_t best = most;
  double least_cost = INFINITY;
  for (int64_t turns = first_turns; turns <= 2 * first_turns; ++turns) {
    const int64_t regions = turns * at_once / slices;
    const double queries = static_cast<double>(p.queries) / regions;
    if (queries < kMinRegionQueries && regions > most) break;
    const double cost = turns * (queries + kRegionCost);
    if (cost < least_cost) {
      least_cost = cost;
      best = regions;
    }
  }
  return layout_of(best);
}

// ---------------------------------------------------------------------------------------- launches

// The layout for a call. No regions: it is not one for windows, or has fewer than so many points
// for each multiprocessor. one_level: whether the kernel takes calls with one. In
// forward_windows.cu, as are the next two.
WindowLayout find_windows(const Params& p, const WindowBlocks& blocks, int64_t least_points,
                          bool one_level);
// What params.windows takes, in bytes.
int64_t windows_scratch(const Params& p, const WindowLayout& layout);
// In half types, chooses on the GPU whether the call is left.
void launch_choice(const Params& p, const WindowLayout& layout, void* stream);

// Of a kernel of half types that serves the call, after the choice.
inline Grid windows_grid(const Params& p, const WindowLayout& layout) {
  return {int64_t(layout.regions) * p.heads, 1, kWindowThreads, layout.bytes,
          DeviceLimits().overlaps_kernels};
}

// with_windows(p, [&](auto zero, auto fused, auto levels) { ... }): a zero of value's half type,
// whether the call is fused, and how many levels it has, as constants.
template <typename Function>
void with_windows(const Params& p, Function&& function) {
  const auto with_levels = [&](auto zero, auto fused) {
    if (p.levels == 3) return function(zero, fused, std::integral_constant<int, 3>{});
    if (p.levels == 4) return function(zero, fused, std::integral_constant<int, 4>{});
    function(zero, fused, std::integral_constant<int, 5>{});
  };
  const auto with_source = [&](auto zero) {
    p.fused() ? with_levels(zero, std::true_type{}) : with_levels(zero, std::false_type{});
  };
  p.value_dtype == DType::f16 ? with_source(half_t{}) : with_source(bfloat16_t{});
}

// ----------------------------------------------------------------------------------------- regions

// A part of a level.
struct Part {
  int32_t column, row, columns, rows;
};

// How a point of a level finds its place in the window.
struct alignas(16) Frame {
  float width, height;     // of the level
  float shift_x, shift_y;  // from the level's pixels to the window's
  float last_x, last_y;    // of northwestern corners whose others are in the window, too
  float pitch, start;      // in pieces of 16 bytes
};

// How the image is cut.
template <int kLevels>
struct Cut {
  Level levels[kLevels];
  int32_t columns[kLevels], rows[kLevels];  // of a window
  int32_t pitch[kLevels], start[kLevels];   // in bytes
  int32_t zeros, zero_pieces;               // where they are, in bytes, and how many
  int32_t across, down;                     // so many regions; 0: the levels are none for windows
};

// A region.
template <int kLevels>
struct Region {
  int32_t x, y;            // of its row and column of regions
  Part queries[kLevels];   // the pixels that are the region's queries
  int32_t first[kLevels];  // of them in the list
  int32_t count;
  int32_t column[kLevels], row[kLevels];  // where the windows begin, from -1 on
  Frame frames[kLevels];
};

// Of a level's side: its product with a number of a half type, of 11 bits, is exact in float.
constexpr int32_t kMostPixels = 1 << 13;

// Cuts the image into regions, and gives the windows their sizes. By one warp; lane i tries i + 1
// regions in a row, and then windows that exceed the region by i pixels.
template <int kLevels>
__device__ __forceinline__ void cut_image(const Params& p, const WindowLayout& layout,
                                          Cut<kLevels>& cut) {
  const int lane = threadIdx.x % 32;
  const Level own = lane < kLevels ? read_level(p, lane) : Level{0, 0, 0};
  float width[kLevels], height[kLevels];
  int32_t pixels = 0;  // of the levels before
  bool usual = true;   // the levels are all the pixels, one after the other
#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    const int32_t columns = __shfl_sync(kAllLanes, own.width, l);
    const int32_t rows = __shfl_sync(kAllLanes, own.height, l);
    usual &= columns > 0 && __shfl_sync(kAllLanes, own.start, l) == pixels;
    usual &= max(columns, rows) < kMostPixels;
    pixels += columns * rows;
    width[l] = columns;
    height[l] = rows;
  }
  usual &= pixels == p.queries;
  const auto pieces_of = [&](float across, float down, float halo) {
    const float part_x = __fdividef(1, across), part_y = __fdividef(1, down);
    float pieces = 0, most_columns = 0;
#pragma unroll
    for (int l = 0; l < kLevels; ++l) {
      const float columns = min(ceilf(width[l] * part_x) + halo, width[l] + 2);
      pieces += layout.window_pieces(columns, min(ceilf(height[l] * part_y) + halo, height[l] + 2));
      most_columns = max(most_columns, columns);
    }
    return pieces + layout.zero_pieces(most_columns);
  };
  const auto rows_of_regions = [&](float across) {
    return floorf(__fdividef(layout.regions + 0.5f, across));
  };
  float across = min(lane + 1, layout.regions), down = rows_of_regions(across);
  const float tried = pieces_of(across, down, layout.usual_halo);
  float least = tried;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    least = min(least, __shfl_xor_sync(kAllLanes, least, offset));
  }
  across = min(__ffs(__ballot_sync(kAllLanes, tried == least)), layout.regions);
  down = rows_of_regions(across);
  const unsigned fits = __ballot_sync(kAllLanes, pieces_of(across, down, lane) <= layout.pieces);
  const float halo = __popc(fits) - 1;
  // Lane l works for level l.
  const float part_x = __fdividef(1, across), part_y = __fdividef(1, down);
  const float columns = min(ceilf(own.width * part_x) + halo, own.width + 2.f);
  const float rows = min(ceilf(own.height * part_y) + halo, own.height + 2.f);
  const int32_t pieces = layout.window_pieces(columns, rows);
  // A part may have one pixel more than the quotient, rounded up, where float rounds.
  const int32_t queries =
      static_cast<int32_t>((ceilf(own.width * part_x) + 1) * (ceilf(own.height * part_y) + 1));
  int32_t before = 0, all_pieces = 0, all_queries = 0;
  float most_columns = 0;
#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    const int32_t pieces_of = __shfl_sync(kAllLanes, pieces, l);
    before += l < lane ? pieces_of : 0;
    all_pieces += pieces_of;
    all_queries += __shfl_sync(kAllLanes, queries, l);
    most_columns = max(most_columns, __shfl_sync(kAllLanes, columns, l));
  }
  if (lane < kLevels) {
    cut.levels[lane] = own;
    cut.columns[lane] = columns;
    cut.rows[lane] = rows;
    cut.pitch[lane] = layout.row_pieces(columns) * 16;
    cut.start[lane] = layout.windows + before * 16;
  }
  if (lane == 0) {
    cut.zeros = layout.windows + all_pieces * 16;
    cut.zero_pieces = layout.zero_pieces(most_columns);
    cut.across = usual && fits != 0 && all_queries <= layout.list_queries ? across : 0;
    cut.down = down;
  }
}

// Where a part of `size` begins; part `parts` begins at its end. In float, as a division of
// integers takes long. It grows with part, whatever is rounded.
__device__ __forceinline__ int32_t start_of_part(int32_t part, int32_t size, int32_t parts) {
  return part == parts ? size : min(size, __float2int_rn(part * __fdividef(size, parts)));
}

// The queries of a region, by its index among across * down. By one warp.
template <int kLevels>
__device__ __forceinline__ void find_region(const Cut<kLevels>& cut, int32_t across, int32_t down,
                                            int32_t index, Region<kLevels>& region) {
  const int lane = threadIdx.x % 32;
  const int32_t y = index / across, x = index - y * across;
  const Level& own = cut.levels[min(lane, kLevels - 1)];
  Part queries;
  queries.column = start_of_part(x, own.width, across);
  queries.row = start_of_part(y, own.height, down);
  queries.columns = start_of_part(x + 1, own.width, across) - queries.column;
  queries.rows = start_of_part(y + 1, own.height, down) - queries.row;
  const int32_t count = queries.columns * queries.rows;
  int32_t first = 0, all = 0;
#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    const int32_t count_of = __shfl_sync(kAllLanes, count, l);
    first += l < lane ? count_of : 0;
    all += count_of;
  }
  if (lane < kLevels) {
    region.queries[lane] = queries;
    region.first[lane] = first;
  }
  if (lane == 0) {
    region.x = x;
    region.y = y;
    region.count = all;
  }
}

struct PixelQuery {
  int32_t query, level, column, row;
};

// Of the region's queries, by its index among them.
template <int kLevels>
__device__ __forceinline__ PixelQuery query_of_region(const Cut<kLevels>& cut,
                                                      const Region<kLevels>& region,
                                                      int32_t index) {
  int level = 0;
#pragma unroll
  for (int l = 1; l < kLevels; ++l) level += index >= region.first[l];
  const Part& part = region.queries[level];
  index -= region.first[level];
  const int32_t row = static_cast<int32_t>(__fdividef(index + 0.5f, part.columns));
  PixelQuery found{0, level, part.column + index - row * part.columns, part.row + row};
  const Level& of = cut.levels[level];
  found.query = of.start + found.row * of.width + found.column;
  return found;
}

}  // namespace ms_deform_attn::cuda
