// The inputs of a call: their checks, and every limit on them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn {

using torch::stable::Tensor;
using PointsPerLevel = std::optional<std::vector<int64_t>>;

// ------------------------------------------------------------------------------------------ limits

// Of value's dimension 1: the index of a pixel is an int32_t.
constexpr int64_t kMaxPixels = INT32_MAX;
// Of heads * channels: the size of a pixel in bytes is an int32_t, also in float64.
constexpr int64_t kMaxPixelSize = (1 << 28) - 1;
// Of the levels: an int32_t counts them.
constexpr int64_t kMaxLevels = INT32_MAX;
// Of the points of a (batch, query, head): an int32_t counts their coordinates, and a few more.
constexpr int64_t kMaxPoints = (1 << 30) - 1;
// Of the heads and of the levels on a GPU: a grid has so many blocks in y, and the levels are kept
// in shared memory, which on the smallest GPUs holds fewer.
constexpr int64_t kMaxGpuHeads = 65535;
constexpr int64_t kMaxGpuLevels = 1024;
// Of a level's height and width, unless value is float64: float32 holds each integer up to here.
constexpr int64_t kMaxSide = 1 << 24;
// Of the levels where their numbers of points differ: kMaxUnequalLevels, in ms_deform_attn.h.

// ------------------------------------------------------------------------------------------ checks

template <typename... Parts>
void check(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

std::string device_of(const Tensor& tensor);

// The arguments of a plain or of a fused call. The latter has reference points.
struct __attribute__((visibility("hidden"))) Inputs {  // as Tensor
  Tensor value, spatial_shapes, level_start_index;
  Tensor coordinates;  // sampling_locations, or fused sampling_offsets
  Tensor weights;      // attention_weights, or fused attention_logits
  const PointsPerLevel& points_per_level;
  bool nearest;
  std::optional<Tensor> grad_output = std::nullopt;
  std::optional<Tensor> reference_points = std::nullopt;
  double offset_scale = 0;

  // Returns what the backends need to know. Tensors that they could not read are replaced by
  // copies; this struct must live as long as the pointers returned.
  //
  // No tensor that lives on a GPU is read, so nothing waits for one.
  Params check_and_align();

 private:
  bool fused() const { return reference_points.has_value(); }
  const char* coordinates_name() const {
    return fused() ? "sampling_offsets" : "sampling_locations";
  }
  const char* weights_name() const { return fused() ? "attention_logits" : "attention_weights"; }
  void check_value(Params& params) const;
  void check_points(Params& params) const;
  void check_points_per_level(Params& params, const std::vector<int64_t>& counts) const;
  void check_reference_points(Params& params) const;
  void check_grad_output(const Params& params) const;
  DType check_operand(const char* name, const Tensor& tensor, DType value_dtype) const;
};

}  // namespace ms_deform_attn
