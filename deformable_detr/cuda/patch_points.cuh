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
    return {Coordinate<float>(x), Coordinate<float>(y)};
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

// ----------------------------------------------------------------------------------- sorted points

// Adds to memory if active, without a branch.
__device__ __forceinline__ void atomic_add_if(float* to, const float (&x)[4], bool active) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %5, 0; @q red.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::
          "l"(to),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(static_cast<int>(active))
      : "memory");
#else
  if (active) atomic_add<4>(to, x);
#endif
}

// The first pixel's column and row of a patch. per_row: 1 / bin_rows, rounded.
__device__ __forceinline__ int2 find_patch(int32_t patch, float per_row, int32_t bin_rows) {
  int32_t column = static_cast<int32_t>(patch * per_row), row = patch - column * bin_rows;
  if (row < 0) --column, row += bin_rows;
  if (row >= bin_rows) ++column, row -= bin_rows;
  return make_int2(column * kCells - 1, row - 1);
}

// Where a warp's part of the sorted points begins: the patch among those that have points, and the
// point. By the whole warp.
__device__ __forceinline__ int2 find_part(const uint32_t* patches, int32_t n_points,
                                          int32_t n_patches, int of_warp) {
  const auto start_of = [&](int32_t i) { return static_cast<int32_t>(patches[i] & 0xffff); };
  const int32_t wanted = (n_points + n_patches * kPatchCost) * of_warp / kPatchWarps;
  int32_t at = 0;
  for (int32_t span = n_patches + 1; span > 1;) {
    const int32_t step = (span + 31) / 32, own = static_cast<int32_t>(threadIdx.x % 32) * step;
    const bool before = own < span && start_of(at + own) + (at + own) * kPatchCost <= wanted;
    const int32_t skipped = (__popc(__ballot_sync(kAllLanes, before)) - 1) * step;
    at += skipped;
    span = min(step, span - skipped);
  }
  const int32_t points = (wanted - start_of(at) - (at + 1) * kPatchCost) / kStep * kStep;
  return make_int2(at, start_of(at) + max(points, 0));
}

// Adds a point whose shares are worked out: a lane has a corner and 4 channels.
template <typename Product>
__device__ __forceinline__ void add_sorted_point(const Params& p, int32_t column, int32_t row,
                                                 float right, float north, float south,
                                                 uint32_t grad_output, const Level& level,
                                                 float* grad_value, int32_t channel,
                                                 int32_t pitch) {
  const int lane = threadIdx.x % 32, corner = lane / 8, of = lane % 8 * 4;
  const int32_t x = column + (corner & 1), y = row + (corner >> 1);
  const float share =
      (corner & 1 ? right : 1 - right) * (corner & 2 ? south : north) * (1 / Product::kScale);
  float add[4];
  Product::load_four(grad_output, lane % 8, add);
#pragma unroll
  for (int c = 0; c < 4; ++c) add[c] *= share;
  const bool inside = is_inside(x, level.width) && is_inside(y, level.height);
  atomic_add_if(grad_value + int64_t(level.start + y * level.width + x) * pitch + of, add,
                inside && channel + of < p.channels);
}

}  // namespace ms_deform_attn::cuda
