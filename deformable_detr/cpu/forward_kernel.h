// The forward for one instruction set: see forward.cpp.
#include "deformable_detr/cpu/points.h"
#include "deformable_detr/cpu/softmax.h"

// Adds up a row's samples in `vectors` SIMD registers of channels. Where these are few, corners
// have sums of their own: an addition takes four cycles, and two may start in each cycle.
template <int32_t vectors, typename scalar_t>
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
      const auto* ahead = reinterpret_cast<const char*>(value + offset[corner][i + kPointsAhead]);
#pragma GCC unroll 4
      for (size_t byte = 0; byte < vectors * sizeof(Stored<scalar_t>); byte += 64) {
        __builtin_prefetch(ahead + byte);
      }
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

// Works out the offsets in value of the corners of a block of whole rows.
template <typename acc>
MSDA_INLINE void find_offsets(const Params& p, const Block& block, const Points<acc>& points,
                              int64_t outside, const Array<int64_t>& origin,
                              const Array<int64_t> (&offset)[4]) {
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  for (int32_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.row + r, batch = row / (p.queries * p.heads), head = row % p.heads;
    std::fill_n(&origin[r * p.points], p.points,
                batch * p.spatial_size * pixel_stride + head * p.channels);
  }
  const int32_t count = block.count();
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t* pixel = points.pixel[corner];
    const int64_t* from = origin;
    int64_t* to = offset[corner];
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < count; ++i) {
      to[i] = pixel[i] == kOutside ? outside : from[i] + pixel[i] * pixel_stride;
    }
  }
}

// A task is kTaskRows rows.
template <typename scalar_t>
void forward(const Params& p, const std::vector<Level>& levels, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  const int32_t rows_at_once = block_rows(p);
  const int32_t capacity = rows_at_once * p.points + kPointsAhead;

  const Points<acc> points(p, levels, rows_at_once, p.points);
  const Array<int64_t> offset[4] = {capacity, capacity, capacity, capacity};
  const Array<int64_t> origin(capacity);
  set_levels(p, whole_rows(p, 0, rows_at_once), points);

  // A corner outside has its offset here.
  const Array<scalar_t> zeros(p.channels);
  const scalar_t* value = static_cast<const scalar_t*>(p.value);
  const int64_t outside =
      (reinterpret_cast<intptr_t>(&zeros[0]) - reinterpret_cast<intptr_t>(value)) /
      static_cast<int64_t>(sizeof(scalar_t));

  for_whole_rows(p, rows_at_once, tasks, [&](const Block& block) MSDA_INLINE_LAMBDA {
    read_coordinates<scalar_t>(p, block, points);
    read_weights<scalar_t>(p, p.fused() ? p.attention_logits : p.attention_weights, block, points);
    if (p.fused()) softmax<acc>(points.weight, block.rows, p.points);
    place_points<scalar_t>(p, block, points);
    find_corners(p.method, block.count(), points);
    find_offsets(p, block, points, outside, origin, offset);
    for (int32_t r = 0; r < block.rows; ++r) {
      const int32_t first = r * p.points, last = first + p.points;
      scalar_t* output = static_cast<scalar_t*>(p.output) + (block.row + r) * p.channels;
      const int32_t c =
          for_registers<acc>(p.channels, [&](auto vectors, int32_t c) MSDA_INLINE_LAMBDA {
            sum_samples<vectors>(points, offset, first, last, value + c, output + c);
          });
      if (c < p.channels) {
        sum_samples(points, offset, first, last, value + c, output + c, p.channels - c);
      }
    }
  });
}
