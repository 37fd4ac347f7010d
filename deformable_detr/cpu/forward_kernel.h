// The forward for one instruction set: see forward.cpp.
#include "deformable_detr/cpu/fused.h"

// Prefetches a pixel of `vectors` SIMD registers.
template <int32_t vectors, typename scalar_t>
MSDA_INLINE void prefetch(const scalar_t* pixel) {
  constexpr int32_t bytes = vectors * sizeof(Stored<scalar_t>);
#pragma GCC unroll 4
  for (int32_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(pixel) + i);
  }
}

// Adds up a row's samples in `vectors` SIMD registers of channels. Where these are few, corners
// have sums of their own: an addition takes four cycles, and two may start in each cycle.
template <typename scalar_t, int32_t vectors>
MSDA_INLINE void sum_samples(const Points<acc_t<scalar_t>>& points,
                             const Array<int64_t> (&offset)[4], int32_t first, int32_t last,
                             const scalar_t* value, scalar_t* output) {
  using acc = acc_t<scalar_t>;
  constexpr int32_t sums = vectors >= 4 ? 1 : 4 / vectors;
  Vector<acc> sum[sums][vectors] = {};
  for (int32_t i = first; i < last; ++i) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const scalar_t* pixel = value + offset[corner][i];
      prefetch<vectors>(value + offset[corner][i + kPointsAhead]);
      const acc weight = points.corner_weight[corner][i];
#pragma GCC unroll 4
      for (int32_t v = 0; v < vectors; ++v) {
        sum[corner % sums][v] += weight * load(pixel + v * kLanes<acc>);
      }
    }
  }
#pragma GCC unroll 4
  for (int32_t v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
    for (int32_t other = 1; other < sums; ++other) sum[0][v] += sum[other][v];
    store(output + v * kLanes<acc>, sum[0][v]);
  }
}

// The same for fewer channels than a register has lanes.
template <typename scalar_t>
MSDA_INLINE void sum_samples(const Points<acc_t<scalar_t>>& points,
                             const Array<int64_t> (&offset)[4], int32_t first, int32_t last,
                             const scalar_t* value, scalar_t* output, int32_t channels) {
  using acc = acc_t<scalar_t>;
  Vector<acc> sum = {};
  for (int32_t i = first; i < last; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      sum += points.corner_weight[corner][i] * load(value + offset[corner][i], channels);
    }
  }
  store(output, sum, channels);
}

// Works out the offsets in value of the corners of a block of rows.
template <typename acc>
MSDA_INLINE void find_offsets(const Params& p, int64_t row, int32_t rows, const Points<acc>& points,
                              int64_t outside, const Array<int64_t>& origin,
                              const Array<int64_t> (&offset)[4]) {
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  for (int32_t r = 0; r < rows; ++r) {
    const int64_t batch = (row + r) / (p.queries * p.heads), head = (row + r) % p.heads;
    std::fill_n(origin.data() + r * p.points, p.points,
                batch * p.spatial_size * pixel_stride + head * p.channels);
  }
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t* pixel = points.pixel[corner].data();
    const int64_t* from = origin.data();
    int64_t* to = offset[corner].data();
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < rows * p.points; ++i) {
      to[i] = pixel[i] == kOutside ? outside : from[i] + pixel[i] * pixel_stride;
    }
  }
}

// A task is kTaskRows rows.
template <typename scalar_t>
void forward(const Params& p, const std::vector<Level>& levels, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  constexpr int32_t lanes = kLanes<acc>;
  const int64_t all_rows = p.batch * p.queries * p.heads;
  const int32_t rows_of_block = std::max(1, kBlockPoints / p.points);
  const int32_t capacity = rows_of_block * p.points + kPointsAhead;

  const Points<acc> points(capacity, p.fused());
  const Fusion<acc> fusion(p, levels, p.fused() ? rows_of_block : 0);
  const Array<int64_t> offset[4] = {capacity, capacity, capacity, capacity};
  const Array<int64_t> origin(capacity);
  set_levels(p, levels, rows_of_block, points);

  // A corner outside has its offset here.
  const Array<scalar_t> zeros(p.channels);
  const scalar_t* value = static_cast<const scalar_t*>(p.value);
  const int64_t outside =
      (reinterpret_cast<intptr_t>(zeros.data()) - reinterpret_cast<intptr_t>(value)) /
      static_cast<int64_t>(sizeof(scalar_t));

  int64_t task;
  while (tasks.take(&task)) {
    const int64_t end = std::min(all_rows, (task + 1) * kTaskRows);
    for (int64_t row = task * kTaskRows; row < end; row += rows_of_block) {
      const int32_t rows = std::min<int64_t>(rows_of_block, end - row);
      read_points<scalar_t>(p, Selection{row * p.points, 0, 1, rows * p.points}, points);
      if (p.fused()) fuse_points<scalar_t>(p, row, rows, fusion, points);
      find_corners(p.method, points.table(), points, rows * p.points);
      find_offsets(p, row, rows, points, outside, origin, offset);
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t first = r * p.points, last = first + p.points;
        scalar_t* output = static_cast<scalar_t*>(p.output) + (row + r) * p.channels;
        int32_t c = 0;
        for (; c + 4 * lanes <= p.channels; c += 4 * lanes) {
          sum_samples<scalar_t, 4>(points, offset, first, last, value + c, output + c);
        }
        for (; c + 2 * lanes <= p.channels; c += 2 * lanes) {
          sum_samples<scalar_t, 2>(points, offset, first, last, value + c, output + c);
        }
        for (; c + lanes <= p.channels; c += lanes) {
          sum_samples<scalar_t, 1>(points, offset, first, last, value + c, output + c);
        }
        if (c < p.channels) {
          sum_samples<scalar_t>(points, offset, first, last, value + c, output + c, p.channels - c);
        }
      }
    }
  }
}
