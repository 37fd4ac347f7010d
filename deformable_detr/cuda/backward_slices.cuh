// How gather cuts levels into slices, and what it does when more points lie near a slice than fit.
//
// A block owns a slice, a rectangle of a level's pixels, and finds the points that touch it. It
// holds as many at a time as have room in shared memory: kGatherWarps * candidates. What is done
// about more of them, first when the backward is planned (backward_gather.cu), then in the block:
//
// * The plan fits slices to the GPU. choose_slicing() takes as much shared memory as lets
//   kGatherBlocks blocks share a multiprocessor. Where candidates and slices would become too small
//   for that, a block gets a multiprocessor for itself, and then they shrink as far as it takes.
// * The plan cuts. A level has at least `min_slices` slices of kMinCutPixels or more: so many that
//   its points, were they spread evenly, would fit.
// * The block halves. A slice of more than `sum_pixels` pixels near which more points lie is cut in
//   two along its longer side, again and again, and the search starts again in each part.
// * The block works in rounds. The sums of a slice of at most `sum_pixels` pixels stay in shared
//   memory while the block takes as many points at a time as there is room for. With more than
//   kMaxHeld points in a level all slices are that small, so that none is halved: looking for
//   points would take longer than adding them.
#pragma once

#include <algorithm>
#include <utility>

#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/plan.h"
#include "deformable_detr/cuda/points.cuh"

namespace ms_deform_attn::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kMaxCandidates = 512;                      // that a warp holds
constexpr int kMaxHeld = kMaxCandidates * kGatherWarps;  // that a block holds
constexpr int kMaxSlicePixels = 1024;
constexpr int kMaxSliceSide = 64;  // of a slice
constexpr int kCountBins = 32;     // of pixels, by how many points touch them; one for each lane
static_assert(kMaxHeld < 1 << 16, "slots of points and counts of them have 16 bits");

// ------------------------------------------------------------------------------------------- cells

// A point lies in the cell of its north-western corner, of which the first row and column are -1.
// Each point that touches a pixel lies in one of four cells. With nearest sampling, a point lies in
// the cell of its pixel and touches no other; one that is not finite has row or column -1, which is
// no pixel.
struct Cell {
  int32_t row, column;
};
constexpr int32_t kNoCell = -2;

template <typename acc>
__device__ __forceinline__ Cell find_cell(const Position<acc>& at, const Level& level,
                                          Method method) {
  if (method == Method::nearest) {
    return {at.y.nearest(level.height), at.x.nearest(level.width)};
  }
  const bool touches = at.x.touches(level.width) & at.y.touches(level.height);
  return {touches ? static_cast<int32_t>(at.y.floor) : kNoCell,
          touches ? static_cast<int32_t>(at.x.floor) : kNoCell};
}

// Pixels of a level, and the cells of all points that touch them: one more row to the north and
// one more column to the west.
struct Rectangle {
  int32_t row, column, height, width;

  __device__ __forceinline__ int32_t pixels() const { return height * width; }
  __device__ __forceinline__ int32_t cells() const { return (height + 1) * (width + 1); }
  // The index of a cell, row by row, or kOutside.
  __device__ __forceinline__ int32_t index_of(const Cell& cell) const {
    const int32_t south = cell.row - row + 1, east = cell.column - column + 1;
    const bool inside = is_inside(south, height + 1) & is_inside(east, width + 1);
    return inside ? south * (width + 1) + east : kOutside;
  }
  // One of the two parts into which a cut through the longer side divides it.
  __device__ __forceinline__ Rectangle half(bool second) const {
    Rectangle part = *this;
    if (height > width) {
      const int32_t first = ceil_div(height, 2);
      part.row += second ? first : 0;
      part.height = second ? height - first : first;
    } else {
      const int32_t first = ceil_div(width, 2);
      part.column += second ? first : 0;
      part.width = second ? width - first : first;
    }
    return part;
  }
};

// A conservative test of whether a point lies in a cell of a rectangle: false positives, never
// false negatives. One axis at a time, in pixels.
template <typename acc>
struct MayTouch {
  acc size, middle, extent;

  __device__ __forceinline__ MayTouch(int32_t first, int32_t pixels, int32_t of)
      : size(static_cast<acc>(of)),
        middle(static_cast<acc>(first) + acc(0.5) * static_cast<acc>(pixels)),
        extent(acc(0.5) * static_cast<acc>(pixels) + acc(0.51) + rounding(first + pixels)) {}
  __device__ __forceinline__ bool operator()(acc location, Method method) const {
    return is_near(fma(location, size, -middle), 0, method);
  }
  // A reference point moved by some pixels.
  __device__ __forceinline__ bool operator()(acc reference, acc move, Method method) const {
    const acc from = fma(reference, size, -middle);
    return is_near(from + move, rounding(fabs(from) + fabs(move)), method);
  }

 private:
  __device__ __forceinline__ bool is_near(acc distance, acc error, Method method) const {
    // Nearest sampling moves points into the map.
    if (method == Method::nearest) distance = min(max(distance, -middle), size - middle);
    return fabs(distance) < extent + error;
  }
  static __device__ __forceinline__ acc rounding(acc pixels) { return acc(1e-6) * pixels; }
};

// ------------------------------------------------------------------------------------------ slices

// Divides integers in [0, 2^31) by a constant of the block, with a multiplication.
struct Divisor {
  uint32_t factor, shift;

  Divisor() = default;
  __device__ __forceinline__ explicit Divisor(int32_t by) {
    // factor = 2^(31 + shift) / by, rounded up, in two steps, because a 64-bit division takes long.
    shift = by > 1 ? 32 - __clz(by - 1) : 0;
    const uint32_t high = (1u << 31) / by, left = (1u << 31) % by;
    const uint64_t rest = uint64_t(left) << shift;
    const auto rounded_up = [&](auto x) { return static_cast<uint32_t>((x + by - 1) / by); };
    factor = (high << shift) +
             (rest < (1u << 31) ? rounded_up(static_cast<uint32_t>(rest)) : rounded_up(rest));
  }
  __device__ __forceinline__ int32_t divide(int32_t x) const {
    return static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(x), factor) >> shift);
  }
};

// The slices of a level, about square, row by row.
struct LevelSlices {
  int32_t count, across;  // in all (none if the level overlaps another), and side by side
  int32_t height, width;  // of the first
  int32_t first_point;    // of the level, in a row's points
  Divisor by_points;      // divides by the points of the level
  bool overlaps;          // another level

  __device__ __forceinline__ Rectangle at(const Level& level, int32_t index) const {
    const int32_t down = index / across;
    const int32_t row = down * height, column = (index - down * across) * width;
    return {row, column, min(height, level.height - row), min(width, level.width - column)};
  }
};

constexpr int kMinCutPixels = 32;  // min_slices does not cut slices smaller than that

// Whether the levels lie one after the other and fill value, as they do in every model. Otherwise
// some may overlap, or leave pixels that belong to none.
template <typename LevelEntry>
__device__ __forceinline__ bool levels_fill_value(const Params& p, const LevelEntry* levels) {
  bool adjacent = true;
  uint32_t covered = 0;
  for (int32_t l = 0; l < p.levels; ++l) {
    const Level& level = levels[l];
    adjacent &= level.height == 0 || static_cast<uint32_t>(level.start) == covered;
    covered += level.height * level.width;
  }
  return adjacent && covered == p.spatial_size;
}

template <typename LevelEntry>
__device__ __forceinline__ LevelSlices cut_level(const Params& p, const Slicing& slicing,
                                                 const LevelEntry* levels, int32_t index,
                                                 bool may_overlap) {
  const Level& level = levels[index];
  LevelSlices slices{};
  for (int32_t l = 0; may_overlap && l < p.levels; ++l) {
    slices.overlaps |= l != index && level.overlaps(levels[l]);
  }
  slices.first_point = first_point_of_level(p, index);
  slices.by_points = Divisor(max(points_of_level(p, index), 1));
  const int32_t all = level.height * level.width;
  if (all == 0 || slices.overlaps) return slices;
  // Unsigned, as sides may be near 2^31.
  const auto parts = [](uint32_t size, uint32_t most) {
    return static_cast<int32_t>(ceil_div(size, most));
  };
  const auto even_part = [&](int32_t size, int32_t most) { return parts(size, parts(size, most)); };
  const int32_t most =
      min(slicing.slice_pixels, max(parts(all, slicing.min_slices), kMinCutPixels));
  const int32_t side = min(static_cast<int32_t>(sqrtf(static_cast<float>(most))), kMaxSliceSide);
  slices.width = even_part(level.width, side);
  slices.height = even_part(level.height, min(most / slices.width, kMaxSliceSide));
  slices.across = parts(level.width, slices.width);
  slices.count = parts(level.height, slices.height) * slices.across;
  return slices;
}

// The image row, in a rectangle, of a pixel's index there. Exact for sides up to kMaxSliceSide and
// up to 2^16 / kMaxSliceSide pixels.
struct RowOfPixel {
  static_assert(kMaxSlicePixels * kMaxSliceSide <= 1 << 16);
  uint32_t factor;  // 2^16 / width, rounded up

  __device__ __forceinline__ int32_t operator()(int32_t pixel) const {
    return static_cast<int32_t>(pixel * factor >> 16);
  }
};

// Where a block is: in a slice, or in one of the parts of a slice that it halved.
struct SliceCursor {
  int32_t level;  // p.levels after the last slice
  Rectangle slice, pixels;
  int32_t depth, part;      // part of 2^depth
  RowOfPixel row_of_pixel;  // in `pixels`

  // Goes to the slice with this index among those of all levels. The last levels, which are the
  // coarse ones in most models, come first, because their pixels have the most points.
  template <typename LevelEntry>
  __device__ __forceinline__ void seek(const Params& p, const LevelEntry* levels,
                                       const LevelSlices* slices, int64_t index) {
    for (level = p.levels - 1; level >= 0 && index >= slices[level].count; --level) {
      index -= slices[level].count;
    }
    if (level < 0) {
      level = p.levels;
      return;
    }
    slice = slices[level].at(levels[level], static_cast<int32_t>(index));
    depth = part = 0;
    cut();
  }
  // Goes to the first half of the present part.
  __device__ __forceinline__ void halve() {
    ++depth;
    part *= 2;
    cut();
  }
  // Goes to the next part. Returns false after the last one.
  __device__ __forceinline__ bool advance() {
    for (++part; depth > 0 && part % 2 == 0; --depth) part /= 2;
    if (depth > 0) cut();
    return depth > 0;
  }

 private:
  __device__ __forceinline__ void cut() {
    pixels = slice;
    for (int32_t d = depth - 1; d >= 0; --d) pixels = pixels.half(part >> d & 1);
    row_of_pixel.factor = ((1u << 16) + pixels.width - 1) / pixels.width;
  }
};

// ---------------------------------------------------------------------------------- shared memory

// The shared memory of a gather block, in this order. A point that it holds is known by its slot.
template <typename acc, typename LevelEntry, int kTeams, int kTeamChannels>
struct GatherMemory {
  PerCorner<acc>* weights;  // [slot], corner weight * attention weight
  acc* sums;                // [pixel][channel], of `sum_pixels` pixels or one for each team
  LevelEntry* levels;
  LevelSlices* slices;     // [level]
  int32_t* query_offsets;  // [slot], of the point's query in grad_output
  int32_t* candidates;     // [slot], the point's index in the level, and later its cell
  uint16_t* cell_starts;   // [cell], of its points in `order`; one more entry holds the end
  uint16_t* warp_cells;    // [warp][cell], the warp's points there, and later where the next goes
  uint16_t* order;         // slots, sorted by cell
  int32_t* count_bins;     // [kCountBins], pixels by how many points touch them

  static __host__ __device__ int slots(const Slicing& slicing) {
    return kGatherWarps * slicing.candidates;
  }
  // Room for the cells of a slice. Even, as two counts of 16 bits share a word.
  static __host__ __device__ int cells(const Slicing& slicing) {
    return (slicing.slice_pixels + 2 * kMaxSliceSide + 3) / 2 * 2;
  }
  static __host__ __device__ int sum_size(const Slicing& slicing) {
    return (slicing.sum_pixels > kTeams ? slicing.sum_pixels : kTeams) * kTeamChannels;
  }
  // With room for the levels of a fused call.
  static int64_t bytes(const Slicing& slicing, int32_t levels) {
    return int64_t(slots(slicing)) *
               (sizeof(PerCorner<acc>) + 2 * sizeof(int32_t) + sizeof(uint16_t)) +
           int64_t(sum_size(slicing)) * sizeof(acc) +
           levels * int64_t(sizeof(FusedLevel<acc>) + sizeof(LevelSlices)) +
           int64_t((1 + kGatherWarps) * cells(slicing) + 2) * sizeof(uint16_t) +
           kCountBins * sizeof(int32_t);
  }
  __device__ GatherMemory(char* memory, const Slicing& slicing, int32_t n_levels) {
    weights = reinterpret_cast<PerCorner<acc>*>(memory);
    sums = reinterpret_cast<acc*>(weights + slots(slicing));
    levels = reinterpret_cast<LevelEntry*>(sums + sum_size(slicing));
    slices = reinterpret_cast<LevelSlices*>(levels + n_levels);
    query_offsets = reinterpret_cast<int32_t*>(slices + n_levels);
    count_bins = query_offsets + slots(slicing);
    candidates = count_bins + kCountBins;
    cell_starts = reinterpret_cast<uint16_t*>(candidates + slots(slicing));
    warp_cells = cell_starts + cells(slicing) + 2;
    order = warp_cells + kGatherWarps * cells(slicing);
  }
};

}  // namespace ms_deform_attn::cuda
