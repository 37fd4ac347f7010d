// Sampling points on the GPU: the levels they lie in, how they are read, and where they fall.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "deformable_detr/cuda/vec.cuh"
#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

// ------------------------------------------------------------------------------------------ source

// How points are given: plain as locations and weights, or fused as reference points, offsets and
// logits. All of them are in value's dtype, or they are mixed: some are float, beside a half value.
enum class Source { plain, plain_mixed, fused, fused_mixed };

template <Source kSource>
constexpr bool kIsFused = kSource == Source::fused || kSource == Source::fused_mixed;
template <Source kSource>
constexpr bool kIsMixed = kSource == Source::plain_mixed || kSource == Source::fused_mixed;

// with_source<scalar_t>(p, [&](auto source) { ... source.value ... }): the source, as a constant.
template <typename scalar_t, typename Function>
auto with_source(const Params& p, Function&& function) {
  const auto with = [&](auto uniform, auto mixed, std::initializer_list<Operand> operands) {
    if constexpr (!std::is_same_v<scalar_t, acc_t<scalar_t>>) {
      for (const Operand& operand : operands) {
        if (operand.dtype != p.value_dtype) return function(mixed);
      }
    }
    return function(uniform);
  };
  if (p.fused()) {
    return with(std::integral_constant<Source, Source::fused>{},
                std::integral_constant<Source, Source::fused_mixed>{},
                {p.reference_points, p.sampling_offsets, p.attention_logits});
  }
  return with(std::integral_constant<Source, Source::plain>{},
              std::integral_constant<Source, Source::plain_mixed>{},
              {p.sampling_locations, p.attention_weights});
}

// with_types(p, [&](auto zero, auto source) { ... }): a zero of value's type, and the source. There
// is a kernel for float64, unless told otherwise.
template <bool kTakesDouble = true, typename Function>
void with_types(const Params& p, Function&& function) {
  dispatch(p.value_dtype, [&](auto zero) {
    if constexpr (kTakesDouble || !std::is_same_v<decltype(zero), double>) {
      with_source<decltype(zero)>(p, [&](auto source) { function(zero, source); });
    } else {
      throw std::logic_error("float64 has no such kernel");
    }
  });
}

// ------------------------------------------------------------------------------------------ params

// Params of a call in the usual shape, which is constant to kernels that know this type.
struct UsualParams : Params {
  static constexpr int32_t points_per_level = 4, channels = 32, reference_coordinates = 2;
  static constexpr Method method = Method::bilinear;

  static bool fit(const Params& p) {
    return p.points_per_level == points_per_level && p.channels == channels && p.method == method &&
           (!p.fused() || p.reference_coordinates == reference_coordinates);
  }
};

// ------------------------------------------------------------------------------------------ levels

// What kernels keep of a level in shared memory.
template <typename acc>
struct FusedLevel : Level {
  OffsetUnits<acc> units;
};
template <typename scalar_t, Source kSource>
using LevelEntry = std::conditional_t<kIsFused<kSource>, FusedLevel<acc_t<scalar_t>>, Level>;

template <typename Entry>
__device__ __forceinline__ Entry read_level_entry(const Params& p, int32_t index) {
  Entry entry;
  static_cast<Level&>(entry) = read_level(p, index);
  if constexpr (!std::is_same_v<Entry, Level>) {
    if (p.reference_coordinates == 4) {
      entry.units = offset_units<decltype(entry.units.box_fraction)>(p, index, entry);
    }
  }
  return entry;
}

// Fills the table of levels. A block's threads load() its first entries to registers, may load
// other things meanwhile, and store() the table.
template <typename Entry>
struct LevelLoader {
  Entry entry;

  __device__ __forceinline__ void load(const Params& p) {
    if (threadIdx.x < p.levels) entry = read_level_entry<Entry>(p, threadIdx.x);
  }
  __device__ __forceinline__ void store(const Params& p, Entry* table) {
    if (threadIdx.x < p.levels) table[threadIdx.x] = entry;
    for (int i = threadIdx.x + blockDim.x; i < p.levels; i += blockDim.x) {
      table[i] = read_level_entry<Entry>(p, i);
    }
    __syncthreads();
  }
};

__device__ __forceinline__ int32_t first_point_of_level(const Params& p, int32_t level) {
  int32_t point = 0;
  for (int32_t l = 0; l < level; ++l) point += points_of_level(p, l);
  return point;
}

// The level of a lane's point, while the lane steps from stage to stage.
struct PointCursor {
  int32_t level, point;  // the point's index in the level

  template <typename ParamsType>
  __device__ __forceinline__ PointCursor(const ParamsType& p, int lane) : level(0), point(lane) {
    settle(p);
  }
  template <typename ParamsType>
  __device__ __forceinline__ void advance(const ParamsType& p, int32_t step) {
    point += step;
    settle(p);
  }

 private:
  // Beyond the last point, the level has no meaning.
  template <typename ParamsType>
  __device__ __forceinline__ void settle(const ParamsType& p) {
    if constexpr (std::is_same_v<ParamsType, UsualParams>) {
      level += point / p.points_per_level;
      point %= p.points_per_level;
    } else if (p.points_per_level > 0) {
      for (; point >= p.points_per_level; point -= p.points_per_level) ++level;
    } else {
      for (; level < p.levels && point >= p.level_points[level]; ++level) {
        point -= p.level_points[level];
      }
    }
  }
};

// ---------------------------------------------------------------------------------------- operands

// Element `index` of an operand beside a value of scalar_t.
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> load_element(const Operand& operand, int64_t index) {
  if (operand.dtype == DType::f32) return static_cast<const float*>(operand.data)[index];
  return to_acc(static_cast<const scalar_t*>(operand.data)[index]);
}

// N elements of an operand, as they are stored: in scalar_t or, mixed, in that or float, which only
// the operand's dtype tells. Converting them would wait for their arrival, so it is left to
// unpack().
template <typename scalar_t, int N, bool kMixed>
struct Stored {
  using wide_t = std::conditional_t<kMixed, float, scalar_t>;
  using Own = Vec<scalar_t, N>;
  using Wide = Vec<wide_t, N>;
  typename Wide::bits_t bits{};

  static __device__ __forceinline__ bool is_wide(DType dtype) {
    return kMixed && dtype == DType::f32;
  }
  static __device__ __forceinline__ int32_t bytes(DType dtype) {
    return N * (is_wide(dtype) ? sizeof(wide_t) : sizeof(scalar_t));
  }
  __device__ __forceinline__ void read(const char* at, DType dtype) {
    if (is_wide(dtype)) {
      bits = Wide::load(reinterpret_cast<const wide_t*>(at)).bits;
    } else {
      reinterpret_cast<Own&>(bits) = Own::load(reinterpret_cast<const scalar_t*>(at));
    }
  }
  __device__ __forceinline__ void unpack(acc_t<scalar_t> (&x)[N], DType dtype) const {
    if (is_wide(dtype)) {
      reinterpret_cast<const Wide&>(bits).unpack(x);
    } else {
      reinterpret_cast<const Own&>(bits).unpack(x);
    }
  }
};

template <typename T>
struct Xy {
  T x, y;
};

// A reference point of a query in a level, with its box where it has one.
template <typename acc>
struct Reference {
  acc x, y, width, height;
};

// Reads points, each before it is needed.
template <typename scalar_t, Source kSource>
struct PointReader {
  using acc = acc_t<scalar_t>;
  static constexpr bool kMixed = kIsMixed<kSource>;

  // Makes the point with index `point` in the row the next one to read. query_index: TeamRow's.
  __device__ __forceinline__ void seek(const Params& p, int64_t row, int64_t query_index,
                                       int32_t point) {
    const int64_t index = row * p.points + point;
    xy_at_ = static_cast<const char*>(xy_operand(p).data) + index * xy_bytes(p);
    weight_at_ = static_cast<const char*>(weight_operand(p).data) + index * weight_bytes(p);
    if constexpr (kIsFused<kSource>) {
      references_at_ = static_cast<const char*>(p.reference_points.data) +
                       query_index * p.reference_levels * reference_bytes(p);
    }
  }
  __device__ __forceinline__ void skip(const Params& p, int32_t points) {
    xy_at_ += int64_t(points) * xy_bytes(p);
    weight_at_ += int64_t(points) * weight_bytes(p);
  }
  // On to the same point of a query further on.
  __device__ __forceinline__ void skip_queries(const Params& p, int32_t queries) {
    const int64_t points = int64_t(p.heads) * p.points;
    xy_at_ += queries * (points * xy_bytes(p));
    weight_at_ += queries * (points * weight_bytes(p));
    if constexpr (kIsFused<kSource>) {
      references_at_ += queries * (int64_t(p.reference_levels) * reference_bytes(p));
    }
  }
  // The same, of a call whose points of a query take fewer bytes than 2^31: one multiply-add each.
  __device__ __forceinline__ void skip_few_bytes(const Params& p, int32_t queries) {
    const int32_t points = p.heads * p.points;
    xy_at_ += int64_t(queries) * (points * xy_bytes(p));
    weight_at_ += int64_t(queries) * (points * weight_bytes(p));
    if constexpr (kIsFused<kSource>) {
      references_at_ += int64_t(queries) * (p.reference_levels * reference_bytes(p));
    }
  }
  __device__ __forceinline__ void read_xy(const Params& p) {
    xy_.read(xy_at_, xy_operand(p).dtype);
  }
  __device__ __forceinline__ void read(const Params& p) {
    read_xy(p);
    weight_.read(weight_at_, weight_operand(p).dtype);
  }

  // The location; in a fused call, the offset.
  __device__ __forceinline__ Xy<acc> xy(const Params& p) const {
    acc xy[2];
    xy_.unpack(xy, xy_operand(p).dtype);
    return {xy[0], xy[1]};
  }
  // The attention weight; in a fused call, the logit.
  __device__ __forceinline__ acc weight(const Params& p) const {
    acc x[1];
    weight_.unpack(x, weight_operand(p).dtype);
    return x[0];
  }
  // Of the point's query. Read only when asked for, as the query's heads and points share it.
  template <typename ParamsType>
  __device__ __forceinline__ Reference<acc> reference(const ParamsType& p, int32_t level) const {
    const DType dtype = p.reference_points.dtype;
    const char* at = references_at_ + (p.reference_levels > 1 ? level * reference_bytes(p) : 0);
    const bool has_box = p.reference_coordinates == 4;
    Pair point, box;
    point.read(at, dtype);
    if (has_box) box.read(at + Pair::bytes(dtype), dtype);
    acc xy[2], extent[2] = {};
    point.unpack(xy, dtype);
    if (has_box) box.unpack(extent, dtype);
    return {xy[0], xy[1], extent[0], extent[1]};
  }

 private:
  using Pair = Stored<scalar_t, 2, kMixed>;
  using One = Stored<scalar_t, 1, kMixed>;
  const char *xy_at_, *weight_at_, *references_at_;
  Pair xy_;
  One weight_;

  static __device__ __forceinline__ const Operand& xy_operand(const Params& p) {
    return kIsFused<kSource> ? p.sampling_offsets : p.sampling_locations;
  }
  static __device__ __forceinline__ const Operand& weight_operand(const Params& p) {
    return kIsFused<kSource> ? p.attention_logits : p.attention_weights;
  }
  static __device__ __forceinline__ int32_t xy_bytes(const Params& p) {
    return Pair::bytes(xy_operand(p).dtype);
  }
  static __device__ __forceinline__ int32_t weight_bytes(const Params& p) {
    return One::bytes(weight_operand(p).dtype);
  }
  template <typename ParamsType>
  static __device__ __forceinline__ int32_t reference_bytes(const ParamsType& p) {
    return p.reference_coordinates / 2 * Pair::bytes(p.reference_points.dtype);
  }
};

// --------------------------------------------------------------------------------------- positions

// A point's position in its level, in pixels.
template <typename acc>
using Position = Xy<Coordinate<acc>>;

template <typename scalar_t, Source kSource, typename ParamsType>
__device__ __forceinline__ Position<acc_t<scalar_t>> find_position(
    const ParamsType& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelEntry<scalar_t, kSource>& level) {
  using acc = acc_t<scalar_t>;
  const Xy<acc> xy = point.xy(p);
  if constexpr (!kIsFused<kSource>) {
    return {Coordinate<acc>(located_pixel(xy.x, level.width)),
            Coordinate<acc>(located_pixel(xy.y, level.height))};
  } else {
    const Reference<acc> reference = point.reference(p, level_index);
    Exact<acc> move_x{xy.x, 0}, move_y{xy.y, 0};
    if (p.reference_coordinates == 4) {
      move_x = multiply(xy.x, multiply(reference.width, level.units.x));
      move_y = multiply(xy.y, multiply(reference.height, level.units.y));
    }
    return {Coordinate<acc>(moved_pixel(reference.x, level.width, move_x)),
            Coordinate<acc>(moved_pixel(reference.y, level.height, move_y))};
  }
}

template <typename scalar_t, Source kSource, typename ParamsType>
__device__ __forceinline__ Corners<acc_t<scalar_t>> find_corners(
    const ParamsType& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelEntry<scalar_t, kSource>& level) {
  const auto position = find_position(p, point, level_index, level);
  return Corners<acc_t<scalar_t>>(position.x, position.y, level, p.method);
}

// A number for each corner of a point, in bilinear.h's order.
template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

// Corner weight * attention weight.
template <typename acc>
__device__ __forceinline__ PerCorner<acc> weigh_corners(const Corners<acc>& corners, acc weight) {
  PerCorner<acc> weights;
#pragma unroll
  for (int j = 0; j < 4; ++j) weights.corner[j] = weight * corners.corner_weight(j);
  return weights;
}

// What a lane adds up for the corners that some sorted points share.
template <int kVec>
struct CornerSums {
  float of[4][kVec] = {};

  template <typename Vector>
  __device__ __forceinline__ void add(const PerCorner<float>& weights, const Vector& row) {
#pragma unroll
    for (int j = 0; j < 4; ++j) row.add_to(of[j], weights.corner[j]);
  }
  // On to other corners, of which the western ones may be the eastern ones so far.
  __device__ __forceinline__ void move(bool next_column) {
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      of[0][c] = next_column ? of[1][c] : 0;
      of[2][c] = next_column ? of[3][c] : 0;
      of[1][c] = of[3][c] = 0;
    }
  }
};

}  // namespace ms_deform_attn::cuda
