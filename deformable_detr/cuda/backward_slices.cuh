// How levels are cut into slices.
#pragma once

#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {

// ----------------------------------------------------------------------------------- gather: cells

// A point lies in the cell of its north-western corner, the first of which are at -1: of all points
// that touch a pixel, each lies in one of four cells. Sampled by nearest, a point lies in that of
// its pixel, and touches no other; where it is not finite, row or column are -1, which no pixel is.
struct Cell {
  int32_t row, column;
};
constexpr int32_t kNoCell = -2;

template <typename acc>
__device__ __forceinline__ Cell find_cell(const Place<acc>& at, const Level& level, Method method) {
  if (method == Method::nearest) {
    return {at.y.nearest(level.height), at.x.nearest(level.width)};
  }
  const bool touches = at.x.touches(level.width) & at.y.touches(level.height);
  return {touches ? static_cast<int32_t>(at.y.floor) : kNoCell,
          touches ? static_cast<int32_t>(at.x.floor) : kNoCell};
}

// Some pixels of a level, and their cells: a row to the north and a column to the west more.
struct Rectangle {
  int32_t row, column, height, width;

  __device__ __forceinline__ int32_t pixels() const { return height * width; }
  __device__ __forceinline__ int32_t cells() const { return (height + 1) * (width + 1); }
  // The number of a cell, row by row, or kOutside.
  __device__ __forceinline__ int32_t number(const Cell& cell) const {
    const int32_t south = cell.row - row + 1, east = cell.column - column + 1;
    const bool inside = is_inside(south, height + 1) & is_inside(east, width + 1);
    return inside ? south * (width + 1) + east : kOutside;
  }
  // Cuts the longer side in two.
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

// Whether a point may lie in a cell of a rectangle: seldom yes where it does not, never no where
// it does. An axis at a time, in pixels.
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
    // Nearest moves points into the map.
    if (method == Method::nearest) distance = min(max(distance, -middle), size - middle);
    return fabs(distance) < extent + error;
  }
  static __device__ __forceinline__ acc rounding(acc pixels) { return acc(1e-6) * pixels; }
};

// ---------------------------------------------------------------------------------- gather: slices

// The most points a level has, of all queries of a (batch, head).
int64_t max_level_points(const Params& p) {
  int64_t points = p.points_per_level;
  for (int32_t l = 0; l < p.levels && p.points_per_level == 0; ++l) {
    points = std::max<int64_t>(points, p.level_points[l]);
  }
  return points * p.queries;
}

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kLookAhead = 4;   // groups of 32 points that a warp looks at together
constexpr int kMaxFound = 512;  // points a warp finds at a time, at most
constexpr int kMaxSide = 64;    // of a slice
constexpr int kFewSlicePixels = 32;

// Divides numbers below 2^31.
struct Divisor {
  uint32_t factor, shift;

  Divisor() = default;
  __device__ __forceinline__ explicit Divisor(int32_t by) {
    // factor = 2^(31 + shift) / by, rounded up: divided in two steps, as in 64 bits it takes long.
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

// The slices of a level: rectangles, about square, row by row.
struct Slices {
  int32_t number, across;  // how many, and how many side by side
  int32_t height, width;   // of the first
  int32_t first_point;     // of the level
  Divisor by_points;

  __device__ __forceinline__ Rectangle at(const Level& level, int32_t index) const {
    const int32_t down = index / across;
    const int32_t row = down * height, column = (index - down * across) * width;
    return {row, column, min(height, level.height - row), min(width, level.width - column)};
  }
};

// What suits a problem.
struct Slicing {
  int32_t pixels;        // of a slice, at most
  int32_t fewest;        // slices of a level, where that makes them kFewSlicePixels or more
  int32_t found;         // points near its pixels that a warp looks for at a time
  int32_t kept_pixels;   // whose sums fit into shared memory
  int32_t reach_chunks;  // of each level, or 0: reach_kernel did not run

  __device__ __forceinline__ Slices cut(const Params& p, int32_t index, const Level& level) const {
    Slices slices{};
    for (int32_t l = 0; l < index; ++l) slices.first_point += points_of_level(p, l);
    slices.by_points = Divisor(max(points_of_level(p, index), 1));
    const int32_t all = level.height * level.width;
    if (all == 0) return slices;
    // Unsigned, as sides may be near 2^31.
    const auto shares = [](uint32_t size, uint32_t most) {
      return static_cast<int32_t>(ceil_div(size, most));
    };
    const auto share = [&](int32_t size, int32_t most) { return shares(size, shares(size, most)); };
    const int32_t most = min(pixels, max(shares(all, fewest), kFewSlicePixels));
    const int32_t side = min(static_cast<int32_t>(sqrtf(static_cast<float>(most))), kMaxSide);
    slices.width = share(level.width, side);
    slices.height = share(level.height, min(most / slices.width, kMaxSide));
    slices.across = shares(level.width, slices.width);
    slices.number = shares(level.height, slices.height) * slices.across;
    return slices;
  }
  // Points a block finds at a time, at most.
  __host__ __device__ __forceinline__ int slots() const { return kGatherWarps * found; }
  // Room for the cells of a slice: even, as two counters share a word.
  __host__ __device__ __forceinline__ int cells() const {
    return (pixels + 2 * kMaxSide + 3) / 2 * 2;
  }
  // About as many slices as all levels have.
  int64_t slices(const Params& p) const {
    return p.spatial_size / pixels * 5 / 4 + int64_t(p.levels) * fewest + 2;
  }
};

// In which row of a rectangle a pixel is: exact for sides up to kMaxSide and up to 2^16 / kMaxSide
// pixels.
struct RowOf {
  uint32_t factor;  // 2^16 / width, rounded up

  __device__ __forceinline__ int32_t operator()(int32_t pixel) const {
    return static_cast<int32_t>(pixel * factor >> 16);
  }
};

// What a block is at: a part of a slice. Slices are halved while there are too many points near.
struct Part {
  int32_t level;  // p.levels: no more slices
  Rectangle slice, pixels;
  int32_t depth, number;  // of 2^depth parts
  RowOf row_of;           // in `pixels`

  // The last levels, which are the coarse ones in most models, come first: their pixels have the
  // most points.
  template <typename LevelType>
  __device__ __forceinline__ void start(const Params& p, const LevelType* levels,
                                        const Slices* slices, int64_t index) {
    for (level = p.levels - 1; level >= 0 && index >= slices[level].number; --level) {
      index -= slices[level].number;
    }
    if (level < 0) {
      level = p.levels;
      return;
    }
    slice = slices[level].at(levels[level], static_cast<int32_t>(index));
    depth = number = 0;
    cut();
  }
  __device__ __forceinline__ void halve() {
    ++depth;
    number *= 2;
    cut();
  }
  // False after the last part.
  __device__ __forceinline__ bool next() {
    for (++number; depth > 0 && number % 2 == 0; --depth) number /= 2;
    if (depth > 0) cut();
    return depth > 0;
  }

 private:
  __device__ __forceinline__ void cut() {
    pixels = slice;
    for (int32_t d = depth - 1; d >= 0; --d) pixels = pixels.half(number >> d & 1);
    row_of.factor = ((1u << 16) + pixels.width - 1) / pixels.width;
  }
};

}  // namespace ms_deform_attn::cuda
