// The sampling points of a block of rows, where a row is a (batch, query, head): read, then placed
// on their maps.
//
// No include guard: included once per instruction set. The arrays lie side by side, so that the
// compiler vectorises the loops over points.

// Which points: [first, first + size) of each of `rows` rows, whose points are `stride` apart.
struct Selection {
  int64_t first, stride;
  int32_t rows, size;
};

template <typename acc>
struct Points {
  explicit Points(int64_t capacity)
      : height(capacity),
        width(capacity),
        start(capacity),
        x(capacity),
        y(capacity),
        weight(capacity),
        stored(capacity),
        pixel{capacity, capacity, capacity, capacity},
        share{capacity, capacity, capacity, capacity},
        right(capacity),
        down(capacity) {}

  Array<int32_t> height, width, start;  // of each point's level

  Array<acc> x, y, weight;  // as given
  Array<acc> stored;        // one of them as it is stored

  // As Corners has them, but a share is times the weight, and zero for a corner outside.
  Array<int32_t> pixel[4];
  Array<acc> share[4];
  Array<acc> right, down;
};

// Reads every step-th element of a tensor, from the `offset`-th on.
template <typename scalar_t, typename acc>
MSDA_INLINE void read_elements(const void* tensor, int32_t step, int32_t offset,
                               const Selection& selection, acc* stored, acc* to) {
  constexpr bool convert = !std::is_same_v<scalar_t, acc>;
  scalar_t* packed = reinterpret_cast<scalar_t*>(convert ? stored : to);
  for (int32_t row = 0; row < selection.rows; ++row) {
    const scalar_t* from = static_cast<const scalar_t*>(tensor) + offset +
                           (selection.first + row * selection.stride) * step;
    scalar_t* row_packed = packed + row * selection.size;
#pragma GCC ivdep
    for (int32_t i = 0; i < selection.size; ++i) row_packed[i] = from[i * step];
  }
  if constexpr (convert) {
    const int32_t count = selection.rows * selection.size;
    for (int32_t i = 0; i < count; i += kLanes<acc>) store(to + i, load(packed + i));
  }
}

template <typename scalar_t>
MSDA_INLINE void read_points(const Params& p, const Selection& selection,
                             const Points<acc_t<scalar_t>>& points) {
  using acc = acc_t<scalar_t>;
  acc* stored = points.stored.data();
  if (p.locations_dtype == p.value_dtype) {
    read_elements<scalar_t>(p.sampling_locations, 2, 0, selection, stored, points.x.data());
    read_elements<scalar_t>(p.sampling_locations, 2, 1, selection, stored, points.y.data());
  } else {
    read_elements<acc>(p.sampling_locations, 2, 0, selection, stored, points.x.data());
    read_elements<acc>(p.sampling_locations, 2, 1, selection, stored, points.y.data());
  }
  if (p.weights_dtype == p.value_dtype) {
    read_elements<scalar_t>(p.attention_weights, 1, 0, selection, stored, points.weight.data());
  } else {
    read_elements<acc>(p.attention_weights, 1, 0, selection, stored, points.weight.data());
  }
}

template <Method method, typename acc>
MSDA_INLINE void place_points(const Points<acc>& points, int32_t count) {
  const int32_t *height = points.height.data(), *width = points.width.data(),
                *start = points.start.data();
  const acc *x = points.x.data(), *y = points.y.data(), *weight = points.weight.data();
  int32_t* const pixel[4] = {points.pixel[0].data(), points.pixel[1].data(),
                             points.pixel[2].data(), points.pixel[3].data()};
  acc* const share[4] = {points.share[0].data(), points.share[1].data(), points.share[2].data(),
                         points.share[3].data()};
  acc *right = points.right.data(), *down = points.down.data();
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    const Corners<acc> corners(x[i], y[i], Level{height[i], width[i], start[i]}, method);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      pixel[corner][i] = corners.pixel[corner];
      share[corner][i] =
          corners.pixel[corner] == kOutside ? acc(0) : weight[i] * corners.share(corner);
    }
    right[i] = corners.right;
    down[i] = corners.down;
  }
}

template <typename acc>
MSDA_INLINE void place_points(Method method, const Points<acc>& points, int32_t count) {
  if (method == Method::bilinear) {
    place_points<Method::bilinear>(points, count);
  } else {
    place_points<Method::nearest>(points, count);
  }
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
