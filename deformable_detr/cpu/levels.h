// Reading what the Params point at, and walking over the points, on the CPU.
#pragma once

#include <vector>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cpu {

inline std::vector<Level> read_levels(const Params& p) {
  std::vector<Level> levels(p.levels);
  for (int32_t level = 0; level < p.levels; ++level) levels[level] = read_level(p, level);
  return levels;
}

// Element `index` of a tensor stored as scalar_t or, beside a half value, as float.
template <typename scalar_t>
acc_t<scalar_t> load_operand(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  return static_cast<acc_t<scalar_t>>(static_cast<const scalar_t*>(data)[index]);
}

template <typename scalar_t>
void store_operand(void* data, DType dtype, int64_t index, acc_t<scalar_t> x) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[index] = static_cast<float>(x);
  } else {
    static_cast<scalar_t*>(data)[index] = static_cast<scalar_t>(x);
  }
}

// body(point, weight, corners, level) for the points of a row: a (batch, query, head).
template <typename scalar_t, typename Body>
inline __attribute__((always_inline)) void for_each_point(const Params& p, const Level* levels,
                                                          int64_t row, const Body& body) {
  using acc = acc_t<scalar_t>;
  int64_t point = row * p.points;
  for (int32_t level = 0; level < p.levels; ++level) {
    for (int32_t i = 0; i < points_of_level(p, level); ++i, ++point) {
      const Corners<acc> corners(
          load_operand<scalar_t>(p.sampling_locations, p.locations_dtype, 2 * point),
          load_operand<scalar_t>(p.sampling_locations, p.locations_dtype, 2 * point + 1),
          levels[level]);
      body(point, load_operand<scalar_t>(p.attention_weights, p.weights_dtype, point), corners,
           levels[level]);
    }
  }
}

}  // namespace ms_deform_attn::cpu
