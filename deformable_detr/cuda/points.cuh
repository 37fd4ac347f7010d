// How points are given, read and located.
#pragma once

#include <type_traits>

#include "deformable_detr/cuda/layout.cuh"

namespace ms_deform_attn::cuda {

// ------------------------------------------------------------------------------------------ source

// How points are given: as locations and weights, or fused as reference points, offsets and logits;
// all in value's dtype, or mixed: some of them as float beside a half value.
enum class Source { same, mixed, fused, fused_mixed };

template <Source kSource>
constexpr bool kIsFused = kSource == Source::fused || kSource == Source::fused_mixed;
template <Source kSource>
constexpr bool kIsMixed = kSource == Source::mixed || kSource == Source::fused_mixed;

// ------------------------------------------------------------------------------------------ levels

// What kernels keep of a level in shared memory.
template <typename acc>
struct FusedLevel : Level {
  OffsetUnits<acc> units;
};
template <typename scalar_t, Source kSource>
using LevelOf = std::conditional_t<kIsFused<kSource>, FusedLevel<acc_t<scalar_t>>, Level>;

// Fills the table of levels. A block's threads load() it to registers, may load other things
// meanwhile, and store() it for all.
template <typename LevelType>
struct LevelLoader {
  LevelType level;

  __device__ __forceinline__ void load(const Params& p) {
    if (threadIdx.x < p.levels) level = read(p, threadIdx.x);
  }
  __device__ __forceinline__ void store(const Params& p, LevelType* table) {
    if (threadIdx.x < p.levels) table[threadIdx.x] = level;
    for (int i = threadIdx.x + blockDim.x; i < p.levels; i += blockDim.x) table[i] = read(p, i);
    __syncthreads();
  }
  static __device__ __forceinline__ LevelType read(const Params& p, int32_t i) {
    LevelType level;
    static_cast<Level&>(level) = read_level(p, i);
    if constexpr (!std::is_same_v<LevelType, Level>) {
      if (p.reference_coordinates == 4) {
        level.units = offset_units<decltype(level.units.box_share)>(p, i, level);
      }
    }
    return level;
  }
};

// The level of a lane's point, while the lane steps from stage to stage.
struct PointCursor {
  int32_t level, point;  // point: in the level

  __device__ __forceinline__ PointCursor(const Params& p, int lane) : level(0), point(lane) {
    settle(p);
  }
  __device__ __forceinline__ void advance(const Params& p, int32_t step) {
    point += step;
    settle(p);
  }

 private:
  // Beyond the last point, the level is whatever it is.
  __device__ __forceinline__ void settle(const Params& p) {
    if (p.points_per_level > 0) {
      for (; point >= p.points_per_level; point -= p.points_per_level) ++level;
    } else {
      for (; level < p.levels && point >= p.level_points[level]; ++level) {
        point -= p.level_points[level];
      }
    }
  }
};

// ------------------------------------------------------------------------------------------ points

template <typename acc>
struct Location {
  acc x, y;
};

// A query's reference point for a level; its box where it has one.
template <typename acc>
struct Reference {
  acc x, y, width, height;
};

// Element `index` of an operand, stored as scalar_t or, beside a half value, as float.
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> load_operand(const Operand& operand, int64_t index) {
  if (operand.dtype == DType::f32) return static_cast<const float*>(operand.data)[index];
  return to_acc(static_cast<const scalar_t*>(operand.data)[index]);
}

// N numbers as they are stored. They are not converted yet, as that would wait for them.
template <typename scalar_t, int N, bool kMixed>
struct Stored {
  Vec<scalar_t, N> bits;

  static __device__ __forceinline__ int32_t bytes(DType) { return N * sizeof(scalar_t); }
  __device__ __forceinline__ void read(const char* at, DType) {
    bits = Vec<scalar_t, N>::load(reinterpret_cast<const scalar_t*>(at));
  }
  __device__ __forceinline__ void unpack(acc_t<scalar_t> (&x)[N], DType) const { bits.unpack(x); }
};
// scalar_t is a half type; they may be float.
template <typename scalar_t, int N>
struct Stored<scalar_t, N, true> {
  typename Bits<4 * N>::type bits{};

  static __device__ __forceinline__ int32_t bytes(DType dtype) {
    return N * (dtype == DType::f32 ? sizeof(float) : sizeof(scalar_t));
  }
  __device__ __forceinline__ void read(const char* at, DType dtype) {
    if (dtype == DType::f32) {
      bits = Vec<float, N>::load(reinterpret_cast<const float*>(at)).bits;
    } else {
      reinterpret_cast<Vec<scalar_t, N>&>(bits) =
          Vec<scalar_t, N>::load(reinterpret_cast<const scalar_t*>(at));
    }
  }
  __device__ __forceinline__ void unpack(float (&x)[N], DType dtype) const {
    if (dtype == DType::f32) {
      reinterpret_cast<const Vec<float, N>&>(bits).unpack(x);
    } else {
      reinterpret_cast<const Vec<scalar_t, N>&>(bits).unpack(x);
    }
  }
};

// Reads points, each before it is needed.
template <typename scalar_t, Source kSource>
struct PointReader {
  using acc = acc_t<scalar_t>;
  static constexpr bool kMixed = kIsMixed<kSource>;

  // The next point to read is number `point` of the row. query_row: see Work.
  __device__ __forceinline__ void start(const Params& p, int64_t row, int64_t query_row,
                                        int32_t point) {
    const int64_t index = row * p.points + point;
    location_at_ = static_cast<const char*>(coordinates(p).data) + index * location_bytes(p);
    weight_at_ = static_cast<const char*>(weights(p).data) + index * weight_bytes(p);
    if constexpr (kIsFused<kSource>) {
      references_at_ = static_cast<const char*>(p.reference_points.data) +
                       query_row * p.reference_levels * reference_bytes(p);
    }
  }
  __device__ __forceinline__ void skip(const Params& p, int32_t points) {
    location_at_ += int64_t(points) * location_bytes(p);
    weight_at_ += int64_t(points) * weight_bytes(p);
  }
  // On to the same point of a query further on.
  __device__ __forceinline__ void skip_queries(const Params& p, int32_t queries) {
    const int64_t points = int64_t(p.heads) * p.points;
    location_at_ += queries * (points * location_bytes(p));
    weight_at_ += queries * (points * weight_bytes(p));
    if constexpr (kIsFused<kSource>) {
      references_at_ += queries * (int64_t(p.reference_levels) * reference_bytes(p));
    }
  }
  __device__ __forceinline__ void read_location(const Params& p) {
    location_.read(location_at_, coordinates(p).dtype);
  }
  __device__ __forceinline__ void read_weight(const Params& p) {
    weight_.read(weight_at_, weights(p).dtype);
  }
  __device__ __forceinline__ void read(const Params& p) {
    read_location(p);
    read_weight(p);
  }

  // The location, or fused the offset.
  __device__ __forceinline__ Location<acc> location(const Params& p) const {
    acc xy[2];
    location_.unpack(xy, coordinates(p).dtype);
    return {xy[0], xy[1]};
  }
  // The weight, or fused the logit.
  __device__ __forceinline__ acc weight(const Params& p) const {
    acc x[1];
    weight_.unpack(x, weights(p).dtype);
    return x[0];
  }
  // Of the point's query. Read only now: all heads and points of a query share it.
  __device__ __forceinline__ Reference<acc> reference(const Params& p, int32_t level) const {
    const char* at = references_at_ + (p.reference_levels > 1 ? level * reference_bytes(p) : 0);
    const bool has_box = p.reference_coordinates == 4;
    Pair point, box;
    point.read(at, p.reference_points.dtype);
    if (has_box) box.read(at + Pair::bytes(p.reference_points.dtype), p.reference_points.dtype);
    acc xy[2], extent[2] = {};
    point.unpack(xy, p.reference_points.dtype);
    if (has_box) box.unpack(extent, p.reference_points.dtype);
    return {xy[0], xy[1], extent[0], extent[1]};
  }

 private:
  using Pair = Stored<scalar_t, 2, kMixed>;
  using One = Stored<scalar_t, 1, kMixed>;
  const char *location_at_, *weight_at_, *references_at_;
  Pair location_;
  One weight_;

  // Of the points: the locations, or fused the offsets.
  static __device__ __forceinline__ const Operand& coordinates(const Params& p) {
    return kIsFused<kSource> ? p.sampling_offsets : p.sampling_locations;
  }
  // The weights, or fused the logits.
  static __device__ __forceinline__ const Operand& weights(const Params& p) {
    return kIsFused<kSource> ? p.attention_logits : p.attention_weights;
  }
  static __device__ __forceinline__ int32_t location_bytes(const Params& p) {
    return Pair::bytes(coordinates(p).dtype);
  }
  static __device__ __forceinline__ int32_t weight_bytes(const Params& p) {
    return One::bytes(weights(p).dtype);
  }
  static __device__ __forceinline__ int32_t reference_bytes(const Params& p) {
    return p.reference_coordinates / 2 * Pair::bytes(p.reference_points.dtype);
  }
};

// The coordinates of a point that was read, in this level.
template <typename acc>
struct Place {
  Coordinate<acc> x, y;
};

template <typename scalar_t, Source kSource>
__device__ __forceinline__ Place<acc_t<scalar_t>> locate(
    const Params& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelOf<scalar_t, kSource>& level) {
  using acc = acc_t<scalar_t>;
  const Location<acc> location = point.location(p);
  if constexpr (!kIsFused<kSource>) {
    return {Coordinate<acc>(location.x, level.width), Coordinate<acc>(location.y, level.height)};
  } else {
    const Reference<acc> reference = point.reference(p, level_index);
    Exact<acc> move_x{location.x, 0}, move_y{location.y, 0};
    if (p.reference_coordinates == 4) {
      move_x = multiply(location.x, multiply(reference.width, level.units.x));
      move_y = multiply(location.y, multiply(reference.height, level.units.y));
    }
    return {Coordinate<acc>(moved_pixel(reference.x, level.width, move_x)),
            Coordinate<acc>(moved_pixel(reference.y, level.height, move_y))};
  }
}

// Its corners there.
template <typename scalar_t, Source kSource>
__device__ __forceinline__ Corners<acc_t<scalar_t>> place(
    const Params& p, const PointReader<scalar_t, kSource>& point, int32_t level_index,
    const LevelOf<scalar_t, kSource>& level) {
  const auto at = locate(p, point, level_index, level);
  return Corners<acc_t<scalar_t>>(at.x, at.y, level, p.method);
}

// exp(x) of x <= 0, to a few units of the last place of 1.
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// A number for each corner of a point.
template <typename acc>
struct alignas(4 * sizeof(acc)) PerCorner {
  acc corner[4];
};

}  // namespace ms_deform_attn::cuda
