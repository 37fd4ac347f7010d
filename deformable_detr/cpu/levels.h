// Reading what the Params point at, on the CPU.
#pragma once

#include <vector>

#include "deformable_detr/bilinear.h"
#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cpu {

inline std::vector<Level> read_levels(const Params& p) {
  const auto integer = [](const void* data, bool int64, int64_t index) {
    return int64 ? static_cast<const int64_t*>(data)[index]
                 : static_cast<const int32_t*>(data)[index];
  };
  std::vector<Level> levels(p.levels);
  for (int32_t level = 0; level < p.levels; ++level) {
    levels[level] = make_level(integer(p.spatial_shapes, p.shapes_int64, 2 * level),
                               integer(p.spatial_shapes, p.shapes_int64, 2 * level + 1),
                               integer(p.level_start_index, p.starts_int64, level), p.spatial_size);
  }
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

}  // namespace ms_deform_attn::cpu
