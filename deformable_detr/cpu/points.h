// The sampling points of a block of rows, where a row is a (batch, query, head): read, then placed
// on their maps.
//
// No include guard: included once per instruction set. The arrays lie side by side, so that the
// compiler vectorises the loops over points.
#include "deformable_detr/cpu/vector.h"

// Which points: some of each of `rows` rows. The first row's begin with point `first` of the
// tensor, the next row's `stride` later.
struct Selection {
  int64_t first, stride;
  int32_t rows;
};

template <typename acc>
struct Points {
  Points(int64_t capacity, bool fused)
      : fused(fused),
        height(capacity),
        width(capacity),
        start(capacity),
        x(capacity),
        y(capacity),
        weight(capacity),
        x_rest(fused ? capacity : 0),
        y_rest(fused ? capacity : 0),
        stored{capacity, capacity},
        pixel{capacity, capacity, capacity, capacity},
        share{capacity, capacity, capacity, capacity},
        right(capacity),
        down(capacity) {}

  const bool fused;
  Array<int32_t> height, width, start;  // of each point's level

  Array<acc> x, y, weight;    // as given; fused, see fuse_points
  Array<acc> x_rest, y_rest;  // fused only
  Array<acc> stored[2];       // the same in half precision, as stored

  // As Corners has them, but a share is times the weight, and zero for a corner outside.
  Array<int32_t> pixel[4];
  Array<acc> share[4];
  Array<acc> right, down;
};

// Reads `size` points of each row: their two coordinates or their weight.
template <int32_t parts, typename stored_t, typename acc>
MSDA_INLINE void read_operand(const void* tensor, const Selection& selection, int32_t size,
                              acc* const (&stored)[2], acc* const (&to)[parts]) {
  constexpr bool convert = !std::is_same_v<stored_t, acc>;
  for (int32_t row = 0; row < selection.rows; ++row) {
    const int64_t stride = selection.stride * parts;
    const stored_t* from =
        static_cast<const stored_t*>(tensor) + selection.first * parts + row * stride;
    prefetch<false>(from, stride, size * parts);
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < size; ++i) {
#pragma GCC unroll 2
      for (int32_t part = 0; part < parts; ++part) {
        stored_t* packed = reinterpret_cast<stored_t*>(convert ? stored[part] : to[part]);
        packed[row * size + i] = from[i * parts + part];
      }
    }
  }
  if constexpr (convert) {
    for (int32_t part = 0; part < parts; ++part) {
      const stored_t* packed = reinterpret_cast<const stored_t*>(stored[part]);
      for (int32_t i = 0; i < selection.rows * size; i += kLanes<acc>) {
        store(to[part] + i, load(packed + i));
      }
    }
  }
}

// The coordinates of points: locations, offsets or pixels.
template <typename scalar_t>
MSDA_INLINE void read_coordinates(const Operand& operand, const Selection& selection, int32_t size,
                                  const Points<acc_t<scalar_t>>& points) {
  using acc = acc_t<scalar_t>;
  acc* const stored[2] = {points.stored[0].data(), points.stored[1].data()};
  acc* const xy[2] = {points.x.data(), points.y.data()};
  if (operand.dtype == kDType<scalar_t>) {
    read_operand<2, scalar_t>(operand.data, selection, size, stored, xy);
  } else {
    read_operand<2, acc>(operand.data, selection, size, stored, xy);
  }
}

// Weights or logits.
template <typename scalar_t>
MSDA_INLINE void read_weights(const Operand& operand, const Selection& selection, int32_t size,
                              const Points<acc_t<scalar_t>>& points) {
  using acc = acc_t<scalar_t>;
  acc* const stored[2] = {points.stored[0].data(), points.stored[1].data()};
  acc* const weight[1] = {points.weight.data()};
  if (operand.dtype == kDType<scalar_t>) {
    read_operand<1, scalar_t>(operand.data, selection, size, stored, weight);
  } else {
    read_operand<1, acc>(operand.data, selection, size, stored, weight);
  }
}

template <typename scalar_t>
MSDA_INLINE void read_points(const Params& p, const Selection& selection, int32_t size,
                             const Points<acc_t<scalar_t>>& points) {
  const bool fused = p.fused();
  read_coordinates<scalar_t>(fused ? p.sampling_offsets : p.sampling_locations, selection, size,
                             points);
  read_weights<scalar_t>(fused ? p.attention_logits : p.attention_weights, selection, size, points);
}

// A point on one axis. Fused, it is given as a pixel, else as a location.
template <bool fused, typename acc>
MSDA_INLINE Coordinate<acc> coordinate(const acc* at, const acc* rest, int32_t i, int32_t size) {
  if constexpr (fused) return Coordinate<acc>(Exact<acc>{at[i], rest[i]});
  return Coordinate<acc>(at[i], size);
}

template <Method method, bool fused, typename acc>
MSDA_INLINE void place_points(const Points<acc>& points, int32_t count) {
  const int32_t *height = points.height.data(), *width = points.width.data(),
                *start = points.start.data();
  const acc *x = points.x.data(), *y = points.y.data(), *weight = points.weight.data();
  const acc *x_rest = points.x_rest.data(), *y_rest = points.y_rest.data();
  int32_t* const pixel[4] = {points.pixel[0].data(), points.pixel[1].data(), points.pixel[2].data(),
                             points.pixel[3].data()};
  acc* const share[4] = {points.share[0].data(), points.share[1].data(), points.share[2].data(),
                         points.share[3].data()};
  acc *right = points.right.data(), *down = points.down.data();
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    const Corners<acc> corners(coordinate<fused>(x, x_rest, i, width[i]),
                               coordinate<fused>(y, y_rest, i, height[i]),
                               Level{height[i], width[i], start[i]}, method);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      pixel[corner][i] = corners.pixel[corner];
      share[corner][i] =
          corners.pixel[corner] == kOutside ? acc(0) : weight[i] * corners.corner_weight(corner);
    }
    right[i] = corners.right;
    down[i] = corners.down;
  }
}

template <typename acc>
MSDA_INLINE void place_points(Method method, const Points<acc>& points, int32_t count) {
  if (points.fused) {
    if (method == Method::bilinear) return place_points<Method::bilinear, true>(points, count);
    return place_points<Method::nearest, true>(points, count);
  }
  if (method == Method::bilinear) return place_points<Method::bilinear, false>(points, count);
  return place_points<Method::nearest, false>(points, count);
}

// The levels of the points of `rows` whole rows.
template <typename acc>
MSDA_INLINE void set_levels(const Params& p, const std::vector<Level>& levels, int32_t rows,
                            const Points<acc>& points) {
  int32_t i = 0;
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t level = 0; level < p.levels; ++level) {
      for (int32_t point = 0; point < points_of_level(p, level); ++point, ++i) {
        points.height[i] = levels[level].height;
        points.width[i] = levels[level].width;
        points.start[i] = levels[level].start;
      }
    }
  }
}
