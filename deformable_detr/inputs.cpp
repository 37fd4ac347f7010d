// Checks the inputs of a call.
//
// Nothing here reads a tensor that lives on a GPU, so nothing waits for one.
#include "deformable_detr/inputs.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace ms_deform_attn {

using torch::headeronly::ScalarType;

// ---------------------------------------------------------------------------------- error messages

std::string shape_of(const Tensor& tensor) {
  std::ostringstream shape;
  shape << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) shape << (i ? ", " : "") << tensor.size(i);
  shape << ")";
  return shape.str();
}

std::string device_of(const Tensor& tensor) {
  int32_t type, index;
  aoti_torch_get_device_type(tensor.get(), &type);
  aoti_torch_get_device_index(tensor.get(), &index);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  return (type == aoti_torch_device_type_cuda() ? "cuda:"
                                                : "device type " + std::to_string(type) + ":") +
         std::to_string(index);
}

void check_shape(const char* name, const Tensor& tensor,
                 std::initializer_list<Dimension> expected) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const Dimension& dimension : expected) {
    if (!matches) break;
    matches = dimension.size < 0 || tensor.size(i) == dimension.size;
    ++i;
  }
  if (matches) return;
  std::ostringstream shape;
  for (const Dimension& dimension : expected) {
    shape << (shape.tellp() > 0 ? ", " : "") << dimension.name;
    if (dimension.size >= 0) shape << "=" << dimension.size;
  }
  check(false, name, " has shape ", shape_of(tensor), ", expected (", shape.str(), ")");
}

void check_device(const char* name, const Tensor& tensor, const Tensor& value) {
  const bool same = tensor.is_cuda() == value.is_cuda() && tensor.is_cpu() == value.is_cpu() &&
                    tensor.get_device_index() == value.get_device_index();
  if (!same) {
    check(false, name, " is on ", device_of(tensor), ", expected ", device_of(value),
          ", the device of value");
  }
}

// ------------------------------------------------------------------------------------------ dtypes

DType value_dtype(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      check(false, "value has dtype ", torch::headeronly::toString(value.scalar_type()),
            ", expected Float, Half, BFloat16 or Double");
      return {};
  }
}

// Locations and weights have value's dtype, or float beside a half value (as autocast gives them).
DType operand_dtype(const char* name, const Tensor& tensor, const Tensor& value, DType dtype) {
  if (tensor.scalar_type() == value.scalar_type()) return dtype;
  const bool half = is_half(dtype);
  check(half && tensor.scalar_type() == ScalarType::Float, name, " has dtype ",
        torch::headeronly::toString(tensor.scalar_type()), ", expected ",
        torch::headeronly::toString(value.scalar_type()), ", the dtype of value",
        half ? ", or Float" : "");
  return DType::f32;
}

bool is_int64(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Long || dtype == ScalarType::Int, name, " has dtype ",
        torch::headeronly::toString(dtype), ", expected Long or Int");
  return dtype == ScalarType::Long;
}

// ---------------------------------------------------------------------------------- level metadata

// Only for metadata on the CPU. On a GPU the kernels guard themselves.
void check_levels(const Params& params) {
  int64_t total = 0;
  for (int32_t level = 0; level < params.levels; ++level) {
    const int64_t height = read_integer(params.spatial_shapes, params.shapes_int64, 2 * level);
    const int64_t width = read_integer(params.spatial_shapes, params.shapes_int64, 2 * level + 1);
    const int64_t start = read_integer(params.level_start_index, params.starts_int64, level);
    check(height > 0 && width > 0, "spatial_shapes has (", height, ", ", width, ") for level ",
          level, ", expected a positive height and width");
    check(0 <= start && start < params.spatial_size, "level_start_index has ", start, " for level ",
          level, ", expected at least 0 and less than value.size(1)=", params.spatial_size);
    check(read_level(params, level).height > 0, "spatial_shapes has ", height, " * ", width,
          " pixels for level ", level, ", expected at most ", params.spatial_size - start,
          ": value.size(1)=", params.spatial_size, " less its start ", start);
    check(std::max(height, width) <= kMostSide || params.value_dtype == DType::f64,
          "spatial_shapes has (", height, ", ", width, ") for level ", level,
          ", expected at most 2^24, which float32 can count (float64 values: any)");
    total += height * width;
  }
  check(total == params.spatial_size, "spatial_shapes sums to ", total,
        " pixels over its levels, expected value.size(1)=", params.spatial_size);
  for (int32_t level = 1; level < params.levels; ++level) {
    for (int32_t other = 0; other < level; ++other) {
      const Level a = read_level(params, level), b = read_level(params, other);
      check(a.start >= b.start + b.height * b.width || b.start >= a.start + a.height * a.width,
            "level_start_index has ", a.start, " for level ", level,
            ", expected no overlap with level ", other, ", which starts at ", b.start);
    }
  }
}

// ------------------------------------------------------------------------------------------ inputs

Tensor contiguous_or_copy(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// What the backends read in vectors must start on a 16-byte boundary.
Tensor aligned(const Tensor& tensor) {
  const Tensor contiguous = contiguous_or_copy(tensor);
  if (reinterpret_cast<uintptr_t>(contiguous.data_ptr()) % 16 == 0) return contiguous;
  return torch::stable::clone(contiguous);
}

void Inputs::check_and_align(Params& params) {
  check_value(params);
  check_shape("spatial_shapes", spatial_shapes, {{"levels"}, {"2", 2}});
  check(spatial_shapes.size(0) <= INT32_MAX, "spatial_shapes has ", spatial_shapes.size(0),
        " levels, expected fewer than 2^31");
  params.levels = static_cast<int32_t>(spatial_shapes.size(0));
  check_shape("level_start_index", level_start_index, {{"levels", params.levels}});
  if (points_per_level) {
    check_listed_points(params, *points_per_level);
  } else {
    check_equal_points(params);
  }
  params.method = nearest ? Method::nearest : Method::bilinear;

  params.shapes_int64 = is_int64("spatial_shapes", spatial_shapes);
  params.starts_int64 = is_int64("level_start_index", level_start_index);
  Operand& locations = reference_points ? params.sampling_offsets : params.sampling_locations;
  Operand& weights = reference_points ? params.attention_logits : params.attention_weights;
  locations.dtype = operand_dtype(locations_name(), sampling_locations, value, params.value_dtype);
  weights.dtype = operand_dtype(weights_name(), attention_weights, value, params.value_dtype);

  check_device("spatial_shapes", spatial_shapes, value);
  check_device("level_start_index", level_start_index, value);
  check_device(locations_name(), sampling_locations, value);
  check_device(weights_name(), attention_weights, value);

  value = aligned(value);
  spatial_shapes = contiguous_or_copy(spatial_shapes);
  level_start_index = contiguous_or_copy(level_start_index);
  sampling_locations = aligned(sampling_locations);
  attention_weights = aligned(attention_weights);

  params.value = value.data_ptr();
  params.spatial_shapes = spatial_shapes.data_ptr();
  params.level_start_index = level_start_index.data_ptr();
  locations.data = sampling_locations.data_ptr();
  weights.data = attention_weights.data_ptr();
  if (reference_points) check_and_align_reference(params);
  if (value.is_cpu()) check_levels(params);
}

void Inputs::check_value(Params& params) const {
  check_shape("value", value, {{"batch"}, {"sum(h*w)"}, {"heads"}, {"channels"}});
  params.value_dtype = value_dtype(value);
  params.batch = value.size(0);
  params.spatial_size = value.size(1);
  check(params.spatial_size <= INT32_MAX, "value has ", params.spatial_size,
        " pixels in dimension 1, expected fewer than 2^31");
  // Each by itself first: the product of sizes may overflow.
  const bool fits = std::max(value.size(2), value.size(3)) < (1 << 28) &&
                    value.size(2) * value.size(3) < (1 << 28);
  check(fits, "value has ", value.size(2), " heads of ", value.size(3),
        " channels, expected a product below 2^28");
  params.heads = static_cast<int32_t>(value.size(2));
  params.channels = static_cast<int32_t>(value.size(3));
}

// Each level has as many points as dimension 4 says.
void Inputs::check_equal_points(Params& params) const {
  check_shape(locations_name(), sampling_locations,
              {{"batch", params.batch},
               {"queries"},
               {"heads", params.heads},
               {"levels", params.levels},
               {"points"},
               {"2", 2}});
  params.queries = sampling_locations.size(1);
  check(params.levels * sampling_locations.size(4) <= INT32_MAX, locations_name(), " has ",
        sampling_locations.size(4), " points in each of ", params.levels,
        " levels, expected fewer than 2^31 in all");
  params.points_per_level = static_cast<int32_t>(sampling_locations.size(4));
  params.points = params.levels * params.points_per_level;
  check_shape(weights_name(), attention_weights,
              {{"batch", params.batch},
               {"queries", params.queries},
               {"heads", params.heads},
               {"levels", params.levels},
               {"points", params.points_per_level}});
}

// Each level has as many points as points_per_level says; dimension 3 runs over all of them.
void Inputs::check_listed_points(Params& params, const std::vector<int64_t>& numbers) const {
  check_shape(
      locations_name(), sampling_locations,
      {{"batch", params.batch}, {"queries"}, {"heads", params.heads}, {"points"}, {"2", 2}});
  params.queries = sampling_locations.size(1);
  const int64_t points = sampling_locations.size(3);
  check(points <= INT32_MAX, locations_name(), " has ", points,
        " points, expected fewer than 2^31");
  params.points = static_cast<int32_t>(points);
  check_shape(weights_name(), attention_weights,
              {{"batch", params.batch},
               {"queries", params.queries},
               {"heads", params.heads},
               {"points", params.points}});

  check(numbers.size() == static_cast<size_t>(params.levels), "points_per_level has ",
        numbers.size(), " numbers, expected levels=", params.levels);
  int64_t total = 0;
  bool equal = true;
  for (int32_t level = 0; level < params.levels; ++level) {
    check(0 <= numbers[level] && numbers[level] <= points, "points_per_level has ", numbers[level],
          " for level ", level, ", expected at least 0 and at most ", points, ", the points of ",
          locations_name());
    total += numbers[level];
    equal = equal && numbers[level] == numbers[0];
  }
  check(total == points, "points_per_level sums to ", total, ", expected ", points,
        ", the points of ", locations_name());
  if (equal) {
    params.points_per_level = numbers.empty() ? 0 : static_cast<int32_t>(numbers[0]);
    return;
  }
  check(params.levels <= kMaxUnequalLevels, "points_per_level has different numbers for ",
        params.levels, " levels, expected at most ", kMaxUnequalLevels, " levels");
  for (int32_t level = 0; level < params.levels; ++level) {
    params.level_points[level] = static_cast<int32_t>(numbers[level]);
  }
}

void Inputs::check_and_align_reference(Params& params) {
  Tensor& reference = *reference_points;
  check_shape("reference_points", reference,
              {{"batch", params.batch}, {"queries", params.queries}, {"levels or 1"}, {"2 or 4"}});
  const int64_t levels = reference.size(2), coordinates = reference.size(3);
  check(levels == params.levels || levels == 1, "reference_points has ", levels,
        " levels, expected levels=", params.levels, " or 1");
  check(coordinates == 2 || coordinates == 4, "reference_points has ", coordinates,
        " coordinates, expected 2 (x, y) or 4 (x, y, width, height)");
  params.reference_levels = static_cast<int32_t>(levels);
  params.reference_coordinates = static_cast<int32_t>(coordinates);
  params.reference_points.dtype =
      operand_dtype("reference_points", reference, value, params.value_dtype);
  check_device("reference_points", reference, value);
  params.offset_scale = offset_scale;
  reference = aligned(reference);
  params.reference_points.data = reference.data_ptr();
}

}  // namespace ms_deform_attn
