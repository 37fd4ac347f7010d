// The contract between the checks above (ms_deform_attn.cpp) and the backends below (cpu/, cuda/).
//
// Every tensor is contiguous; all but the level metadata start on a 16-byte boundary. Each pointer
// has its tensor's shape beside it.
#pragma once

#include "deformable_detr/bilinear.h"
#include "deformable_detr/dispatch.h"

namespace ms_deform_attn {

// Levels may have numbers of points of their own (D-FINE), up to this many levels.
constexpr int32_t kMaxUnequalLevels = 32;

// A tensor that tells where points lie or what they weigh, in a dtype of its own: value's, or f32
// beside a half value.
struct Operand {
  const void* data;
  DType dtype;
};

struct Params {
  int64_t batch;
  int64_t spatial_size;  // sum(height * width) over the levels, below 2^31
  int64_t queries;
  int32_t heads;
  int32_t levels;
  int32_t points;                           // of one (batch, query, head), over all levels
  int32_t points_per_level;                 // the same in each level, or 0: see level_points
  int32_t channels;                         // per head; heads * channels is below 2^28
  int32_t level_points[kMaxUnequalLevels];  // of each level, where points_per_level is 0
  Method method;

  DType value_dtype;  // also of output, grad_output
  bool shapes_int64;  // else int32
  bool starts_int64;  // else int32

  const void* value;              // [batch, spatial_size, heads, channels]
  const void* spatial_shapes;     // [levels, 2] as (height, width)
  const void* level_start_index;  // [levels]
  void* output;                   // [batch, queries, heads, channels]

  // The plain operator's points. Null in a fused call.
  Operand sampling_locations;  // [batch, queries, heads, points, 2] as (x, y)
  Operand attention_weights;   // [batch, queries, heads, points]

  // The fused operator's: a location is a reference point moved by an offset (see OffsetUnits), and
  // the weights are the softmax of the logits over the points. Null in a plain call.
  Operand reference_points;       // [batch, queries, reference_levels, reference_coordinates]
  Operand sampling_offsets;       // [batch, queries, heads, points, 2] as (x, y)
  Operand attention_logits;       // [batch, queries, heads, points]
  int32_t reference_levels;       // levels, or 1: the same reference point for each level
  int32_t reference_coordinates;  // 2: (x, y), or 4: (x, y, width, height)
  double offset_scale;            // for 4 coordinates

  // Scratch of the forward on a GPU, if its plan wants some: see cuda::ForwardPlan.
  void* windows;

  MSDA_HOST_DEVICE bool fused() const { return reference_points.data != nullptr; }
};

struct BackwardParams : Params {
  const void* grad_output;  // [batch, queries, heads, channels]

  bool deterministic;  // sums in a fixed order (the CPU's always are)

  // Null is what nobody asked for. Of the points either both gradients are wanted, or none; on a
  // GPU they are, if those of the reference points are.
  //
  // Every element is written.
  void* grad_value;  // [batch, spatial_size, heads, channels]
  // As the operands are.
  void *grad_sampling_locations, *grad_attention_weights;  // plain
  void *grad_sampling_offsets, *grad_attention_logits;     // fused
  void* grad_reference_points;  // [batch, queries, heads, reference_levels, reference_coordinates]
                                // of acc_t
  void* scratch;                // see cuda::BackwardPlan
};

// An element of the level metadata.
MSDA_HOST_DEVICE int64_t read_integer(const void* data, bool int64, int64_t index) {
  return int64 ? static_cast<const int64_t*>(data)[index]
               : static_cast<const int32_t*>(data)[index];
}

MSDA_HOST_DEVICE Level read_level(const Params& p, int64_t level) {
  return make_level(read_integer(p.spatial_shapes, p.shapes_int64, 2 * level),
                    read_integer(p.spatial_shapes, p.shapes_int64, 2 * level + 1),
                    read_integer(p.level_start_index, p.starts_int64, level), p.spatial_size);
}

MSDA_HOST_DEVICE int32_t points_of_level(const Params& p, int32_t level) {
  return p.points_per_level > 0 ? p.points_per_level : p.level_points[level];
}

// How far a sampling offset of one moves a point. With 2 reference coordinates, that is one pixel;
// with 4, a fraction of the reference box: location = (x, y) + offset / points_of_level * (width,
// height) * offset_scale.
template <typename acc_t>
struct OffsetUnits {
  Exact<acc_t> x, y;  // in pixels, for a box as large as the level
  acc_t box_fraction;
};

template <typename acc_t>
MSDA_HOST_DEVICE OffsetUnits<acc_t> offset_units(const Params& p, int32_t level_index,
                                                 const Level& level) {
  const double fraction = p.offset_scale / points_of_level(p, level_index);
  return {exact<acc_t>(fraction * level.width), exact<acc_t>(fraction * level.height),
          static_cast<acc_t>(fraction)};
}

// The backends read and write nothing outside their tensors, whatever the level metadata and the
// locations hold: a level that does not fit into spatial_size contributes zero. There is at least
// one point, and something to compute. On a GPU, whose device has to be the current one, they only
// enqueue, on `stream`. They throw std::runtime_error.
//
// To add a backend, write these functions for it in a folder of its own, call them in
// ms_deform_attn.cpp for its device, register the ops for that device in torch-ext/
// torch_binding.cpp, and list the sources in build.toml. Checks, limits and allocation are shared.
namespace cpu {
void forward(const Params& params);
void backward(const BackwardParams& params);
}  // namespace cpu

// On a GPU both follow plans: see cuda/plan.h.

}  // namespace ms_deform_attn
