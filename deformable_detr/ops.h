// Both operators above all backends. What they compute stands in
// torch-ext/deformable_detr/functional.py, what they refuse in inputs.cpp.
#pragma once

#include "deformable_detr/inputs.h"

namespace ms_deform_attn {

// Of shape (0,) if nobody asked for them.
struct __attribute__((visibility("hidden"))) Gradients {  // as Tensor
  Tensor value, coordinates, weights, reference_points;
};

// points: of the coordinates and of the weights.
struct Wanted {
  bool value, points, reference_points = false;
};

Tensor forward(Inputs&& inputs);
Gradients backward(Inputs&& inputs, bool deterministic, const Wanted& wanted);

}  // namespace ms_deform_attn
