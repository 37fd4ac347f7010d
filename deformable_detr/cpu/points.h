// Sampling points of a block of rows, where a row is a (batch, query, head): they are read, and
// then their corners are found.
//
// Each quantity has an array of its own, so that the compiler vectorises the loops over points. No
// include guard: this file is included once per instruction set.
#include "deformable_detr/cpu/vector.h"

// Some points of each of `rows` rows: `count` adjacent ones. The first row's begin at index `first`
// of the tensor, each further row's `stride` after those of the row before.
struct Selection {
  int64_t first, stride;
  int32_t rows, count;
};

// Where the points of a block have their coordinates and weights. Coordinates are locations, or
// pixels with what rounding left of them: see fuse_points.
template <typename acc>
struct PointTable {
  bool in_pixels;
  const acc *x, *y, *x_rest, *y_rest, *weight;
};

template <typename acc>
struct Points {
  Points(int64_t capacity, bool in_pixels)
      : in_pixels(in_pixels),
        height(capacity),
        width(capacity),
        start(capacity),
        x(capacity),
        y(capacity),
        weight(capacity),
        x_rest(in_pixels ? capacity : 0),
        y_rest(in_pixels ? capacity : 0),
        stored{capacity, capacity},
        pixel{capacity, capacity, capacity, capacity},
        corner_weight{capacity, capacity, capacity, capacity},
        right(capacity),
        down(capacity) {}

  const bool in_pixels;
  Array<int32_t> height, width, start;  // of each point's level

  PointTable<acc> table() const {
    return {in_pixels, x.data(), y.data(), x_rest.data(), y_rest.data(), weight.data()};
  }
  Array<acc> x, y, weight, x_rest, y_rest;
  Array<acc> stored[2];  // room for two numbers a point in the dtype they are stored in

  // As in Corners, but a corner weight is multiplied by the point's weight, and is zero for a
  // corner outside.
  Array<int32_t> pixel[4];
  Array<acc> corner_weight[4];
  Array<acc> right, down;
};

// Reads the selected points, of `components` numbers each: two coordinates or one weight.
template <typename stored_t, int32_t components, typename acc>
MSDA_INLINE void read_stored(const void* tensor, const Selection& selection, int32_t count,
                             const Points<acc>& points, acc* const (&to)[components]) {
  constexpr bool convert = !std::is_same_v<stored_t, acc>;
  for (int32_t row = 0; row < selection.rows; ++row) {
    const int64_t stride = selection.stride * components;
    const stored_t* from =
        static_cast<const stored_t*>(tensor) + selection.first * components + row * stride;
    prefetch<false>(from, stride, count * components);
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int32_t k = 0; k < components; ++k) {
        stored_t* packed = reinterpret_cast<stored_t*>(convert ? points.stored[k].data() : to[k]);
        packed[row * count + i] = from[i * components + k];
      }
    }
  }
  if constexpr (convert) {
    for (int32_t k = 0; k < components; ++k) {
      const stored_t* packed = reinterpret_cast<const stored_t*>(points.stored[k].data());
      for (int32_t i = 0; i < selection.rows * count; i += kLanes<acc>) {
        store(to[k] + i, load(packed + i));
      }
    }
  }
}

template <typename scalar_t, int32_t components>
MSDA_INLINE void read_operand(const Operand& operand, const Selection& selection, int32_t count,
                              const Points<acc_t<scalar_t>>& points,
                              acc_t<scalar_t>* const (&to)[components]) {
  if (operand.dtype == kDType<scalar_t>) {
    read_stored<scalar_t>(operand.data, selection, count, points, to);
  } else {
    read_stored<acc_t<scalar_t>>(operand.data, selection, count, points, to);
  }
}

// Locations, offsets or pixels. `count` is that of the selection, a constant where that helps.
template <typename scalar_t>
MSDA_INLINE void read_coordinates(const Operand& operand, const Selection& selection, int32_t count,
                                  const Points<acc_t<scalar_t>>& points) {
  acc_t<scalar_t>* const xy[2] = {points.x.data(), points.y.data()};
  read_operand<scalar_t>(operand, selection, count, points, xy);
}

// Weights or logits.
template <typename scalar_t>
MSDA_INLINE void read_weights(const Operand& operand, const Selection& selection, int32_t count,
                              const Points<acc_t<scalar_t>>& points) {
  acc_t<scalar_t>* const weight[1] = {points.weight.data()};
  read_operand<scalar_t>(operand, selection, count, points, weight);
}

template <typename scalar_t>
MSDA_INLINE void read_points(const Params& p, const Selection& selection,
                             const Points<acc_t<scalar_t>>& points) {
  const bool fused = p.fused();
  read_coordinates<scalar_t>(fused ? p.sampling_offsets : p.sampling_locations, selection,
                             selection.count, points);
  read_weights<scalar_t>(fused ? p.attention_logits : p.attention_weights, selection,
                         selection.count, points);
}

template <bool in_pixels, typename acc>
MSDA_INLINE Coordinate<acc> coordinate(const acc* at, const acc* rest, int32_t i, int32_t size) {
  if constexpr (in_pixels) return Coordinate<acc>(Exact<acc>{at[i], rest[i]});
  return Coordinate<acc>(at[i], size);
}

template <Method method, bool in_pixels, typename acc>
MSDA_INLINE void find_corners(const PointTable<acc>& table, const Points<acc>& points,
                              int32_t count) {
  const int32_t *height = points.height.data(), *width = points.width.data(),
                *start = points.start.data();
  const acc *x = table.x, *y = table.y, *weight = table.weight;
  const acc *x_rest = table.x_rest, *y_rest = table.y_rest;
  int32_t* const pixel[4] = {points.pixel[0].data(), points.pixel[1].data(), points.pixel[2].data(),
                             points.pixel[3].data()};
  acc* const corner_weight[4] = {points.corner_weight[0].data(), points.corner_weight[1].data(),
                                 points.corner_weight[2].data(), points.corner_weight[3].data()};
  acc *right = points.right.data(), *down = points.down.data();
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    const Corners<acc> corners(coordinate<in_pixels>(x, x_rest, i, width[i]),
                               coordinate<in_pixels>(y, y_rest, i, height[i]),
                               Level{height[i], width[i], start[i]}, method);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      pixel[corner][i] = corners.pixel[corner];
      corner_weight[corner][i] =
          corners.pixel[corner] == kOutside ? acc(0) : weight[i] * corners.corner_weight(corner);
    }
    right[i] = corners.right;
    down[i] = corners.down;
  }
}

template <typename acc>
MSDA_INLINE void find_corners(Method method, const PointTable<acc>& table,
                              const Points<acc>& points, int32_t count) {
  const bool bilinear = method == Method::bilinear;
  if (table.in_pixels) {
    if (bilinear) return find_corners<Method::bilinear, true>(table, points, count);
    return find_corners<Method::nearest, true>(table, points, count);
  }
  if (bilinear) return find_corners<Method::bilinear, false>(table, points, count);
  return find_corners<Method::nearest, false>(table, points, count);
}

// Sets the levels of the points of `rows` whole rows.
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
