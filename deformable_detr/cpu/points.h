// Sampling points of a block of rows, where a row is a (batch, query, head): they are read, then
// placed on the pixels of their levels, and then their corners are found.
//
// Each quantity has an array of its own, so that the compiler vectorises the loops over points. No
// include guard: this file is included once per instruction set.
#include "deformable_detr/cpu/vector.h"

// The points of some rows in some levels.
struct Block {
  int64_t row, row_stride;  // the first row, and how far it is to the next
  int32_t rows;
  int32_t first_level, levels;
  int32_t first_point, points;  // of a row

  int32_t count() const { return rows * points; }
};

MSDA_INLINE Block whole_rows(const Params& p, int64_t row, int32_t rows) {
  return {row, 1, rows, 0, p.levels, 0, p.points};
}

// function(block) for blocks of the rows of each task, which has kTaskRows of them.
template <typename Function>
MSDA_INLINE void for_whole_rows(const Params& p, int32_t rows_at_once, Tasks& tasks,
                                const Function& function) {
  const int64_t all_rows = p.batch * p.queries * p.heads;
  int64_t task;
  while (tasks.take(&task)) {
    const int64_t end = std::min(all_rows, (task + 1) * kTaskRows);
    for (int64_t row = task * kTaskRows; row < end; row += rows_at_once) {
      function(whole_rows(p, row, std::min<int64_t>(rows_at_once, end - row)));
    }
  }
}

template <typename acc>
struct Points {
  // Has room for so many rows with so many points each.
  Points(const Params& p, const std::vector<Level>& levels, int32_t rows, int32_t points)
      : levels(levels),
        capacity(rows * points),
        fused_capacity(p.fused() ? capacity : 0),
        query(rows),
        references(p.fused() ? rows * p.reference_levels * p.reference_coordinates : 0) {
    for (int32_t level = 0; level < p.levels; ++level) {
      units.push_back(offset_units<acc>(p, level, levels[level]));
    }
    for (const Array<acc>& axis : unit) std::fill_n(&axis[0], fused_capacity, acc(1));
  }

  const std::vector<Level>& levels;
  std::vector<OffsetUnits<acc>> units;  // of each level
  const int32_t capacity, fused_capacity;

  Array<int32_t> height{capacity}, width{capacity}, start{capacity};  // of each point's level
  // x and y as they are read, and then in pixels, with what rounding left of them.
  Array<acc> at[2] = {capacity, capacity}, rest[2] = {capacity, capacity};
  Array<acc> weight{capacity};
  Array<acc> stored[2] = {capacity, capacity};  // room for two numbers a point as they are stored

  // In a fused call, the reference points of the block's queries, as they are stored; those of each
  // point; and how many pixels an offset of one moves it.
  Array<int32_t> query;  // of each row, counted from that of the first
  Array<acc> references;
  Array<acc> reference[2] = {fused_capacity, fused_capacity};
  Array<acc> unit[2] = {fused_capacity, fused_capacity};
  Array<acc> unit_rest[2] = {fused_capacity, fused_capacity};

  // As in Corners, but a corner weight is multiplied by the point's weight, and is zero for a
  // corner outside.
  Array<int32_t> pixel[4] = {capacity, capacity, capacity, capacity};
  Array<acc> corner_weight[4] = {capacity, capacity, capacity, capacity};
  Array<acc> right{capacity}, down{capacity};
};

// function(row, level, index of the first point, number of points) for each level of each row.
template <typename Function>
MSDA_INLINE void for_each_level(const Params& p, const Block& block, const Function& function) {
  for (int32_t row = 0, i = 0; row < block.rows; ++row) {
    for (int32_t level = block.first_level; level < block.first_level + block.levels; ++level) {
      const int32_t count = points_of_level(p, level);
      function(row, level, i, count);
      i += count;
    }
  }
}

// Sets the levels of the points of a block.
template <typename acc>
MSDA_INLINE void set_levels(const Params& p, const Block& block, const Points<acc>& points) {
  const auto set = [&](int32_t level, int32_t i, int32_t count) MSDA_INLINE_LAMBDA {
    std::fill_n(&points.height[i], count, points.levels[level].height);
    std::fill_n(&points.width[i], count, points.levels[level].width);
    std::fill_n(&points.start[i], count, points.levels[level].start);
  };
  if (block.levels == 1) return set(block.first_level, 0, block.count());
  for_each_level(p, block,
                 [&](int32_t, int32_t level, int32_t i, int32_t count)
                     MSDA_INLINE_LAMBDA { set(level, i, count); });
}

// ------------------------------------------------------------------------------------------- read

// Runs of `count` points that lie together in a tensor: the first begins at index `first`, each
// further one `stride` after the one before.
struct Runs {
  int64_t first, stride;
  int32_t number, count;

  Runs(const Params& p, const Block& block)
      : first(block.row * p.points + block.first_point),
        stride(block.row_stride * p.points),
        number(block.rows),
        count(block.points) {
    if (stride != count) return;
    count *= number;
    number = 1;
  }
};

// Reads points of `components` numbers each: two coordinates or one weight. `count` is that of the
// runs, a constant where that helps.
template <typename stored_t, int32_t components, typename acc>
MSDA_INLINE void read_runs(const stored_t* tensor, const Runs& runs, int32_t count,
                           const Points<acc>& points, acc* const (&to)[components]) {
  constexpr bool converts = !std::is_same_v<stored_t, acc>;
  for (int32_t run = 0; run < runs.number; ++run) {
    const int64_t stride = runs.stride * components;
    const auto* from =
        reinterpret_cast<const Bits<stored_t>*>(tensor + runs.first * components + run * stride);
    prefetch<false>(from, stride, count * components);
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int32_t k = 0; k < components; ++k) {
        auto* packed = reinterpret_cast<Bits<stored_t>*>(converts ? &points.stored[k][0] : to[k]);
        packed[run * count + i] = from[i * components + k];
      }
    }
  }
  if constexpr (converts) {
    for (int32_t k = 0; k < components; ++k) {
      convert(reinterpret_cast<const stored_t*>(&points.stored[k][0]), runs.number * count, to[k]);
    }
  }
}

// Told the usual number of points, the compiler writes no loop over them: without, backwards of
// ddetr_encoder_b1 take 1.13 times as long in float32 and 1.25 times in bfloat16.
template <typename Function>
MSDA_INLINE void with_constant(int32_t count, const Function& function) {
  if (count == 4) {
    function(4);
  } else {
    function(count);
  }
}

template <typename scalar_t, int32_t components>
MSDA_INLINE void read_operand(const Operand& operand, const Runs& runs,
                              const Points<acc_t<scalar_t>>& points,
                              acc_t<scalar_t>* const (&to)[components]) {
  dispatch_operand<scalar_t>(operand.dtype, [&](auto zero) MSDA_INLINE_LAMBDA {
    const auto* tensor = static_cast<const decltype(zero)*>(operand.data);
    with_constant(runs.count, [&](int32_t count) MSDA_INLINE_LAMBDA {
      read_runs(tensor, runs, count, points, to);
    });
  });
}

// Reads locations, or the offsets of a fused call.
template <typename scalar_t>
MSDA_INLINE void read_coordinates(const Params& p, const Block& block,
                                  const Points<acc_t<scalar_t>>& points) {
  acc_t<scalar_t>* const to[2] = {points.at[0], points.at[1]};
  read_operand<scalar_t>(p.fused() ? p.sampling_offsets : p.sampling_locations, Runs(p, block),
                         points, to);
}

// Reads weights or logits.
template <typename scalar_t>
MSDA_INLINE void read_weights(const Params& p, const Operand& operand, const Block& block,
                              const Points<acc_t<scalar_t>>& points) {
  acc_t<scalar_t>* const to[1] = {points.weight};
  read_operand<scalar_t>(operand, Runs(p, block), points, to);
}

// ------------------------------------------------------------------------------------------ place

// Reads the reference points of a block's queries.
template <typename scalar_t>
MSDA_INLINE void read_references(const Params& p, const Block& block,
                                 const Points<acc_t<scalar_t>>& points) {
  const int32_t size = p.reference_levels * p.reference_coordinates;
  const int64_t query = block.row / p.heads;
  const int64_t last = (block.row + (block.rows - 1) * block.row_stride) / p.heads;
  read_numbers<scalar_t>(p.reference_points, query * size, int32_t(last - query + 1) * size,
                         points.references);
  for (int32_t row = 0; row < block.rows; ++row) {
    points.query[row] = (block.row + row * block.row_stride) / p.heads - query;
  }
}

// That of a row, in a level.
template <typename acc>
MSDA_INLINE const acc* reference_of(const Params& p, int32_t row, int32_t level,
                                    const Points<acc>& points) {
  const int32_t index =
      points.query[row] * p.reference_levels + (p.reference_levels > 1 ? level : 0);
  return points.references + index * p.reference_coordinates;
}

// Turns the locations that were read, or the offsets of a fused call, into pixels.
template <typename scalar_t>
MSDA_INLINE void place_points(const Params& p, const Block& block,
                              const Points<acc_t<scalar_t>>& points) {
  using acc = acc_t<scalar_t>;
  if (p.fused()) {
    read_references<scalar_t>(p, block, points);
    for_each_level(p, block,
                   [&](int32_t row, int32_t level, int32_t i, int32_t count) MSDA_INLINE_LAMBDA {
                     const acc* reference = reference_of(p, row, level, points);
                     for (int32_t k = i; k < i + count; ++k) {
                       points.reference[0][k] = reference[0];
                       points.reference[1][k] = reference[1];
                     }
                     if (p.reference_coordinates == 2) return;
                     const OffsetUnits<acc>& units = points.units[level];
                     const Exact<acc> unit[2] = {multiply(reference[2], units.x),
                                                 multiply(reference[3], units.y)};
                     for (int32_t axis = 0; axis < 2; ++axis) {
                       std::fill_n(&points.unit[axis][i], count, unit[axis].rounded);
                       std::fill_n(&points.unit_rest[axis][i], count, unit[axis].rest);
                     }
                   });
  }
  const int32_t count = block.count();
  for (int32_t axis = 0; axis < 2; ++axis) {
    const int32_t* size = axis == 0 ? points.width : points.height;
    acc *at = points.at[axis], *rest = points.rest[axis];
    const acc *reference = points.reference[axis], *unit = points.unit[axis],
              *unit_rest = points.unit_rest[axis];
    if (p.fused()) {
      MSDA_NO_ALIASES
      for (int32_t i = 0; i < count; ++i) {
        const Exact<acc> move = multiply(at[i], Exact<acc>{unit[i], unit_rest[i]});
        const Exact<acc> pixel = moved_pixel(reference[i], size[i], move);
        at[i] = pixel.rounded;
        rest[i] = pixel.rest;
      }
    } else {
      MSDA_NO_ALIASES
      for (int32_t i = 0; i < count; ++i) {
        const Exact<acc> pixel = located_pixel(at[i], size[i]);
        at[i] = pixel.rounded;
        rest[i] = pixel.rest;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- corners

template <Method method, typename acc>
MSDA_INLINE void find_corners(int32_t count, const Points<acc>& points) {
  const int32_t *height = points.height, *width = points.width, *start = points.start;
  const acc *x = points.at[0], *x_rest = points.rest[0], *y = points.at[1],
            *y_rest = points.rest[1];
  const acc* weight = points.weight;
  acc *right = points.right, *down = points.down;
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    const Corners<acc> corners(Coordinate<acc>(Exact<acc>{x[i], x_rest[i]}),
                               Coordinate<acc>(Exact<acc>{y[i], y_rest[i]}),
                               Level{height[i], width[i], start[i]}, method);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      points.pixel[corner][i] = corners.pixel[corner];
      points.corner_weight[corner][i] =
          corners.pixel[corner] == kOutside ? acc(0) : weight[i] * corners.corner_weight(corner);
    }
    right[i] = corners.right;
    down[i] = corners.down;
  }
}

template <typename acc>
MSDA_INLINE void find_corners(Method method, int32_t count, const Points<acc>& points) {
  if (method == Method::bilinear) return find_corners<Method::bilinear>(count, points);
  find_corners<Method::nearest>(count, points);
}
