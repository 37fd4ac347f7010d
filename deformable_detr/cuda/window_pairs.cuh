// Pairs of adjacent points over windows, as points_windows_kernel works them out
// (backward_points_windows.cu), and how its lanes exchange dot products.
#pragma once

#include "deformable_detr/cuda/windows.cuh"

namespace ms_deform_attn::cuda {

constexpr int kStageQueries = 4;

// A warp's part of shared memory: where the points are, by parity of their pairs, level and query;
// 16 bits each, in pieces of 16 bytes, two points a word.
template <int kLevels>
struct PlacesMemory {
  static constexpr int kHalf = kLevels * kStageQueries * 4;
  static constexpr int kBytes = 2 * kHalf;
};

// ---------------------------------------------------------------------------------------- products

// The sum of a dot product's halves. Of the products of points a and b it returns a's to lower
// lanes and b's to upper ones: lane l has query l % 4 and corner l / 4 % 4.
__device__ __forceinline__ float add_halves(const float (&product)[4], int lane) {
  const bool upper = lane >= 16;
  const float keep = upper ? product[3] : product[0], give = upper ? product[1] : product[2];
  return keep + __shfl_xor_sync(kAllLanes, give, 16);
}

// Four lanes have the corners of four levels each, lane i corner l ^ i of level l. Afterwards lane
// i has all corners of level i, in order.
__device__ __forceinline__ void exchange_corners(float (&x)[4], int lane) {
  const bool odd = (lane & 4) != 0, high = (lane & 8) != 0;
  const float keep0 = odd ? x[1] : x[0], give0 = odd ? x[0] : x[1];
  const float keep1 = odd ? x[3] : x[2], give1 = odd ? x[2] : x[3];
  const float other0 = __shfl_xor_sync(kAllLanes, give0, 4);
  const float other1 = __shfl_xor_sync(kAllLanes, give1, 4);
  x[0] = high ? keep1 : keep0;
  x[1] = high ? other1 : other0;
  x[2] = __shfl_xor_sync(kAllLanes, high ? keep0 : keep1, 8);
  x[3] = __shfl_xor_sync(kAllLanes, high ? other0 : other1, 8);
}

// Reductions over the lanes of a query. The whole warp takes part.
__device__ __forceinline__ float query_max(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    x = max(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
__device__ __forceinline__ float query_sum(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// ------------------------------------------------------------------------------------------- pairs

constexpr int kPieces = kPixelBytes<half_t> / 16;  // of a pixel, of 16 bytes

// A level and its window, as a lane keeps them for its points.
struct LevelOfLane {
  Level level;
  float first_x, last_x, first_y, last_y;  // of northwestern corners whose others are in the window
  float pitch, start;  // of places, which are counted from the map's first pixel
};

__device__ __forceinline__ LevelOfLane level_of_lane(const Level& level, const Frame& frame) {
  const float x = -0.5f - frame.shift_x, y = -0.5f - frame.shift_y;
  return {level,
          x,
          x + frame.last_x,
          y,
          y + frame.last_y,
          frame.pitch,
          frame.start - fmaf(y, frame.pitch, x * kPieces)};
}

// Two adjacent points of a query in a level, as they are given.
template <typename scalar_t>
struct PointPair {
  Vec<scalar_t, 4> xy;
  Vec<scalar_t, 2> weights;
  Vec<scalar_t, 2> reference;  // fused

  // The product of a half type's number and a size is exact (see kMostPixels), so that rounding
  // leaves less to be kept than in located_pixel() and moved_pixel().
  template <bool kFused>
  __device__ __forceinline__ Position<float> position(int i, const Level& level) const {
    float of_points[4];
    xy.unpack(of_points);
    const float width = level.width, height = level.height;
    if constexpr (!kFused) {
      return {Coordinate<float>(fmaf(of_points[2 * i], width, -0.5f)),
              Coordinate<float>(fmaf(of_points[2 * i + 1], height, -0.5f))};
    } else {
      float of_query[2];
      reference.unpack(of_query);
      // The fraction is so small that the sum with an offset is exact, or near to it.
      const auto moved = [](float from, float offset) {
        const Coordinate<float> of_query(from);
        Coordinate<float> moved(of_query.fraction + offset);
        moved.floor += of_query.floor;
        return moved;
      };
      return {moved(fmaf(of_query[0], width, -0.5f), of_points[2 * i]),
              moved(fmaf(of_query[1], height, -0.5f), of_points[2 * i + 1])};
    }
  }
};

// What is known of two points before their dot products: their fractions, which are zero outside
// the window, and the attention weights. After redo(), the map counts instead of the window.
struct PairOfCorners {
  Corners<float> of[2];
  bool inside[2];
  bool missed[2];  // it touches the map, but is not in the window
  float weight[2];
};

}  // namespace ms_deform_attn::cuda
