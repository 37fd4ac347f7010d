// Points of patches_kernel (backward_patches.cu): where they lie, and how those are added to memory
// one by one that have no part in a product.
#pragma once

#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/patch_product.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {

// Where a point's cell is, and how far in it the point.
struct CellPoint {
  int32_t column, row;  // of the northwestern pixel; may be -1
  float right, down;
  bool touches;  // a pixel
};

// The position of a point, in pixels. Of operands in a half type one rounding to float does no
// harm: the gradient of value is continuous.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ Position<float> find_rounded_position(
    const Params& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelEntry<scalar_t, kSource>& level) {
  if constexpr (sizeof(scalar_t) == 2 && !kIsMixed<kSource>) {
    const Xy<float> xy = point.xy(p);
    const float width = level.width, height = level.height;
    float x, y;
    if constexpr (kIsFused<kSource>) {
      const Reference<float> reference = point.reference(p, level_index);
      x = xy.x, y = xy.y;
      if (p.reference_coordinates == 4) {
        x *= reference.width * level.units.x.rounded;
        y *= reference.height * level.units.y.rounded;
      }
      x = fmaf(reference.x, width, x - 0.5f);
      y = fmaf(reference.y, height, y - 0.5f);
    } else {
      x = fmaf(xy.x, width, -0.5f);
      y = fmaf(xy.y, height, -0.5f);
    }
    Position<float> position{Coordinate<float>({0, 0}), Coordinate<float>({0, 0})};
    position.x.floor = floorf(x);
    position.x.fraction = x - position.x.floor;
    position.y.floor = floorf(y);
    position.y.fraction = y - position.y.floor;
    return position;
  } else {
    return find_position(p, point, level_index, level);
  }
}

template <typename scalar_t, Source kSource>
__device__ __forceinline__ CellPoint find_cell(const Params& p,
                                               const PointReader<scalar_t, kSource>& reader,
                                               int32_t level_index,
                                               const LevelEntry<scalar_t, kSource>& level) {
  const auto position = find_rounded_position<scalar_t, kSource>(p, reader, level_index, level);
  CellPoint point;
  point.touches = position.x.touches(level.width) && position.y.touches(level.height);
  point.column = static_cast<int32_t>(point.touches ? position.x.floor : 0);
  point.row = static_cast<int32_t>(point.touches ? position.y.floor : 0);
  point.right = position.x.fraction;
  point.down = position.y.fraction;
  return point;
}

// A point, worked out anew.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ CellPoint read_cell(const Params& p, int64_t query_index, int32_t head,
                                               int32_t point, int32_t level_index,
                                               const LevelEntry<scalar_t, kSource>& level,
                                               const Softmax<float>* softmaxes, float& weight) {
  const int64_t row = query_index * p.heads + head;
  PointReader<scalar_t, kSource> reader;
  reader.seek(p, row, query_index, point);
  reader.read(p);
  Softmax<float> softmax;
  if constexpr (kIsFused<kSource>) softmax = softmaxes[row];
  weight = find_weight(p, reader, softmax);
  return find_cell<scalar_t, kSource>(p, reader, level_index, level);
}

// What a warp adds for one point: a lane has a corner and 4 channels. Only channels of pieces that
// are finite, or that are not: the other ones are left to others.
template <typename scalar_t>
__device__ __forceinline__ void add_point(const BackwardParams& p, const CellPoint& point,
                                          float weight, int64_t batch, int64_t query_index,
                                          int32_t head, int32_t channel, const Level& level,
                                          bool adds_finite) {
  const int lane = threadIdx.x % 32, corner = lane / 8;
  channel += lane % 8 * 4;
  const int32_t column = point.column + (corner & 1), row = point.row + (corner >> 1);
  if (!is_inside(column, level.width) || !is_inside(row, level.height) || channel >= p.channels) {
    return;
  }
  const scalar_t* const grad_output = static_cast<const scalar_t*>(p.grad_output) +
                                      (query_index * p.heads + head) * p.channels + channel;
  using Piece = Vec<scalar_t, kPieceChannels>;
  float piece[kPieceChannels], finite = 0;
  Piece::load(grad_output - lane % 2 * 4).unpack(piece);
#pragma unroll
  for (int c = 0; c < kPieceChannels; ++c) finite += piece[c] * 0;
  if ((finite == 0) != adds_finite) return;
  const float share = weight * ((corner & 1 ? point.right : 1 - point.right) *
                                (corner & 2 ? point.down : 1 - point.down));
  float add[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) add[c] = share * (lane % 2 ? piece[c + 4] : piece[c]);
  const int64_t pixel = batch * p.spatial_size + level.start + row * level.width + column;
  atomic_add<4>(static_cast<float*>(p.grad_value) + (pixel * p.heads + head) * p.channels + channel,
                add);
}

// Adds points of a warp one by one. Bit i of a lane's `alone` stands for its point of
// own_query[i * kThreadQueries].
template <typename scalar_t, Source kSource>
__device__ __noinline__ void add_alone(const BackwardParams& p, unsigned alone, int64_t batch,
                                       int32_t head, int32_t channel, int32_t level_index,
                                       const LevelEntry<scalar_t, kSource>& level, int32_t point,
                                       const int32_t* own_query, const Softmax<float>* softmaxes) {
#pragma unroll 1
  for (int i = 0; i < kOwnPoints; ++i) {
    unsigned lanes = __ballot_sync(kAllLanes, alone >> i & 1);
    if (lanes == 0) continue;
    const int64_t own_index = batch * p.queries + own_query[i * kThreadQueries];
    float own_weight;
    const CellPoint own = read_cell<scalar_t, kSource>(p, own_index, head, point, level_index,
                                                       level, softmaxes, own_weight);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int from = __ffs(lanes) - 1;
      const CellPoint of{
          __shfl_sync(kAllLanes, own.column, from), __shfl_sync(kAllLanes, own.row, from),
          __shfl_sync(kAllLanes, own.right, from), __shfl_sync(kAllLanes, own.down, from), true};
      add_point<scalar_t>(p, of, __shfl_sync(kAllLanes, own_weight, from), batch,
                          __shfl_sync(kAllLanes, own_index, from), head, channel, level, true);
    }
  }
}

// Adds what was left out of the product: pieces of rows of grad_output that are not finite, of
// which a share of zero would make NaN.
template <typename scalar_t, Source kSource>
__device__ __noinline__ void add_not_finite(const BackwardParams& p,
                                            const LevelEntry<scalar_t, kSource>* levels,
                                            int64_t batch, int32_t head, int32_t channel,
                                            const int32_t* queries, const bool* finite,
                                            int32_t n_queries, const Softmax<float>* softmaxes) {
  for (int32_t i = threadIdx.x / 32; i < n_queries; i += kPatchWarps) {
    if (finite[i]) continue;
    const int64_t query_index = batch * p.queries + queries[i];
    PointCursor cursor(p, 0);
    for (int32_t point = 0; point < p.points; ++point, cursor.advance(p, 1)) {
      const LevelEntry<scalar_t, kSource>& level = levels[cursor.level];
      float weight;
      const CellPoint cell = read_cell<scalar_t, kSource>(p, query_index, head, point, cursor.level,
                                                          level, softmaxes, weight);
      if (!cell.touches) continue;
      add_point<scalar_t>(p, cell, weight, batch, query_index, head, channel, level, false);
    }
  }
}

}  // namespace ms_deform_attn::cuda
