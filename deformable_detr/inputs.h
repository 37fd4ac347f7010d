// The inputs of a call, and every limit on them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn {

using torch::stable::Tensor;

constexpr int64_t kMostSide = 1 << 24;  // in float32: see bilinear.h

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A dimension of an expected shape: its name, and its size where the inputs so far fix it.
struct Dimension {
  const char* name;
  int64_t size = -1;
};

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<Dimension> expected);
void check_device(const char* name, const Tensor& tensor, const Tensor& value);
std::string device_of(const Tensor& tensor);
Tensor aligned(const Tensor& tensor);

// The op's arguments. Fused, sampling_locations are offsets from the reference points and
// attention_weights are logits.
struct __attribute__((visibility("hidden"))) Inputs {  // as Tensor
  Tensor value, spatial_shapes, level_start_index, sampling_locations, attention_weights;
  const std::optional<std::vector<int64_t>>& points_per_level;
  bool nearest;
  std::optional<Tensor> reference_points = std::nullopt;
  double offset_scale = 0;

  const char* locations_name() const {
    return reference_points ? "sampling_offsets" : "sampling_locations";
  }
  const char* weights_name() const {
    return reference_points ? "attention_logits" : "attention_weights";
  }

  // Replaces the tensors by aligned ones and says what the backends need to know of them.
  void check_and_align(Params& params);

 private:
  void check_value(Params& params) const;
  void check_equal_points(Params& params) const;
  void check_listed_points(Params& params, const std::vector<int64_t>& numbers) const;
  void check_and_align_reference(Params& params);
};

}  // namespace ms_deform_attn
