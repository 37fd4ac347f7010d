#include "deformable_detr/inputs.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

namespace ms_deform_attn {

using torch::headeronly::ScalarType;

std::string device_of(const Tensor& tensor) {
  int32_t type, index;
  aoti_torch_get_device_type(tensor.get(), &type);
  aoti_torch_get_device_index(tensor.get(), &index);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  return (type == aoti_torch_device_type_cuda() ? "cuda:"
                                                : "device type " + std::to_string(type) + ":") +
         std::to_string(index);
}

namespace {

std::string shape_of(const Tensor& tensor) {
  std::ostringstream shape;
  shape << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) shape << (i ? ", " : "") << tensor.size(i);
  shape << ")";
  return shape.str();
}

// A dimension of an expected shape: its name, and its size where the inputs so far fix it.
struct Dimension {
  const char* name;
  int64_t size = -1;
};

void check_shape(const char* name, const Tensor& tensor, const std::vector<Dimension>& expected) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; matches && i < expected.size(); ++i) {
    matches = expected[i].size < 0 || tensor.size(i) == expected[i].size;
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

void check_dtype(const char* name, const Tensor& tensor, bool fits, const char* expected,
                 const char* rest = "") {
  check(fits, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()), ", expected ",
        expected, rest);
}

DType value_dtype(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: check_dtype("value", value, false, "Float, Half, BFloat16 or Double"); return {};
  }
}

bool is_int64(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check_dtype(name, tensor, dtype == ScalarType::Long || dtype == ScalarType::Int, "Long or Int");
  return dtype == ScalarType::Long;
}

Tensor contiguous_or_copy(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Makes the tensor contiguous, on a 16-byte boundary: the backends read it in vectors.
const void* align(Tensor& tensor) {
  tensor = contiguous_or_copy(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  if (!aligned) tensor = torch::stable::clone(tensor);
  return tensor.data_ptr();
}

void align_operand(Operand& operand, Tensor& tensor) {
  if (operand.dtype == DType::f32 && tensor.scalar_type() != ScalarType::Float) {
    tensor = torch::stable::to(tensor, ScalarType::Float);
  }
  operand.data = align(tensor);
}

// Of metadata on the CPU only. What lies on a GPU is not read back: there the kernels take a level
// that does not fit for an empty one.
void check_levels(const Params& params) {
  std::vector<std::pair<int32_t, int32_t>> levels_by_start;
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
    check(std::max(height, width) <= kMaxSide || params.value_dtype == DType::f64,
          "spatial_shapes has (", height, ", ", width, ") for level ", level,
          ", expected at most 2^24, which float32 can count (float64 values: any)");
    total += height * width;
    levels_by_start.emplace_back(start, level);
  }
  check(total == params.spatial_size, "spatial_shapes sums to ", total,
        " pixels over its levels, expected value.size(1)=", params.spatial_size);
  std::sort(levels_by_start.begin(), levels_by_start.end());
  for (int32_t i = 1; i < params.levels; ++i) {
    const auto [start, level] = levels_by_start[i];
    const int32_t before = levels_by_start[i - 1].second;
    const Level b = read_level(params, before);
    check(start >= b.start + b.height * b.width, "level_start_index has ", start, " for level ",
          level, ", expected no overlap with level ", before, ", which starts at ", b.start);
  }
}

}  // namespace

Params Inputs::check_and_align() {
  Params params{};
  check_value(params);
  check_shape("spatial_shapes", spatial_shapes, {{"levels"}, {"2", 2}});
  check(spatial_shapes.size(0) <= kMaxLevels, "spatial_shapes has ", spatial_shapes.size(0),
        " levels, expected fewer than 2^31");
  check(!value.is_cuda() || spatial_shapes.size(0) <= kMaxGpuLevels, "spatial_shapes has ",
        spatial_shapes.size(0), " levels, expected at most ", kMaxGpuLevels, " on a GPU");
  params.levels = static_cast<int32_t>(spatial_shapes.size(0));
  check_shape("level_start_index", level_start_index, {{"levels", params.levels}});
  check_points(params);
  params.method = nearest ? Method::nearest : Method::bilinear;
  params.shapes_int64 = is_int64("spatial_shapes", spatial_shapes);
  params.starts_int64 = is_int64("level_start_index", level_start_index);
  check_device("spatial_shapes", spatial_shapes, value);
  check_device("level_start_index", level_start_index, value);
  Operand& xy = fused() ? params.sampling_offsets : params.sampling_locations;
  Operand& weight = fused() ? params.attention_logits : params.attention_weights;
  xy.dtype = check_operand(coordinates_name(), coordinates, params.value_dtype);
  weight.dtype = check_operand(weights_name(), weights, params.value_dtype);
  if (fused()) check_reference_points(params);
  if (grad_output) check_grad_output(params);
  spatial_shapes = contiguous_or_copy(spatial_shapes);
  level_start_index = contiguous_or_copy(level_start_index);
  params.spatial_shapes = spatial_shapes.data_ptr();
  params.level_start_index = level_start_index.data_ptr();
  if (value.is_cpu()) check_levels(params);

  // All is well: only now are tensors copied.
  params.value = align(value);
  align_operand(xy, coordinates);
  align_operand(weight, weights);
  if (fused()) align_operand(params.reference_points, *reference_points);
  if (grad_output) align(*grad_output);
  return params;
}

void Inputs::check_value(Params& params) const {
  check_shape("value", value, {{"batch"}, {"sum(h*w)"}, {"heads"}, {"channels"}});
  params.value_dtype = value_dtype(value);
  params.batch = value.size(0);
  params.spatial_size = value.size(1);
  check(params.spatial_size <= kMaxPixels, "value has ", params.spatial_size,
        " pixels in dimension 1, expected fewer than 2^31");
  // Each by itself first: the product of sizes may overflow.
  const bool fits = std::max(value.size(2), value.size(3)) <= kMaxPixelSize &&
                    value.size(2) * value.size(3) <= kMaxPixelSize;
  check(fits, "value has ", value.size(2), " heads of ", value.size(3),
        " channels, expected a product below 2^28");
  check(!value.is_cuda() || value.size(2) <= kMaxGpuHeads, "value has ", value.size(2),
        " heads, expected at most ", kMaxGpuHeads, " on a GPU");
  params.heads = static_cast<int32_t>(value.size(2));
  params.channels = static_cast<int32_t>(value.size(3));
}

// Points have a dimension for the levels, or one for all levels' points: see points_per_level.
void Inputs::check_points(Params& params) const {
  std::vector<Dimension> shape{{"batch", params.batch}, {"queries"}, {"heads", params.heads}};
  if (!points_per_level) shape.push_back({"levels", params.levels});
  shape.push_back({"points"});
  shape.push_back({"2", 2});
  check_shape(coordinates_name(), coordinates, shape);
  params.queries = coordinates.size(1);
  const int64_t points = coordinates.size(coordinates.dim() - 2);
  if (points_per_level) {
    check(points <= kMaxPoints, coordinates_name(), " has ", points,
          " points, expected fewer than 2^30");
    params.points = static_cast<int32_t>(points);
  } else {
    check(points <= kMaxPoints && params.levels * points <= kMaxPoints, coordinates_name(), " has ",
          points, " points in each of ", params.levels, " levels, expected fewer than 2^30 in all");
    params.points_per_level = static_cast<int32_t>(points);
    params.points = params.levels * params.points_per_level;
  }
  shape.pop_back();
  shape.back().size = points;
  shape[1].size = params.queries;
  check_shape(weights_name(), weights, shape);
  if (points_per_level) check_points_per_level(params, *points_per_level);
}

void Inputs::check_points_per_level(Params& params, const std::vector<int64_t>& counts) const {
  const int32_t points = params.points;
  check(counts.size() == static_cast<size_t>(params.levels), "points_per_level has ", counts.size(),
        " numbers, expected levels=", params.levels);
  int64_t total = 0;
  bool equal = true;
  for (int32_t level = 0; level < params.levels; ++level) {
    check(0 <= counts[level] && counts[level] <= points, "points_per_level has ", counts[level],
          " for level ", level, ", expected at least 0 and at most ", points, ", the points of ",
          coordinates_name());
    total += counts[level];
    equal = equal && counts[level] == counts[0];
  }
  check(total == points, "points_per_level sums to ", total, ", expected ", points,
        ", the points of ", coordinates_name());
  if (equal) {
    params.points_per_level = counts.empty() ? 0 : static_cast<int32_t>(counts[0]);
    return;
  }
  check(params.levels <= kMaxUnequalLevels, "points_per_level has different numbers for ",
        params.levels, " levels, expected at most ", kMaxUnequalLevels, " levels");
  std::copy(counts.begin(), counts.end(), params.level_points);
}

void Inputs::check_reference_points(Params& params) const {
  check_shape("reference_points", *reference_points,
              {{"batch", params.batch}, {"queries", params.queries}, {"levels or 1"}, {"2 or 4"}});
  const int64_t levels = reference_points->size(2), size = reference_points->size(3);
  check(levels == params.levels || levels == 1, "reference_points has ", levels,
        " levels, expected levels=", params.levels, " or 1");
  check(size == 2 || size == 4, "reference_points has ", size,
        " coordinates, expected 2 (x, y) or 4 (x, y, width, height)");
  params.reference_levels = static_cast<int32_t>(levels);
  params.reference_coordinates = static_cast<int32_t>(size);
  params.reference_points.dtype =
      check_operand("reference_points", *reference_points, params.value_dtype);
  params.offset_scale = offset_scale;
}

// Operands may have any dtype below float64, or float64 as value has. The backends read value's
// dtype, and float beside a half type (as autocast gives them); others are converted to float.
DType Inputs::check_operand(const char* name, const Tensor& tensor, DType dtype) const {
  const ScalarType actual = tensor.scalar_type();
  const bool mixes =
      actual == ScalarType::Float || actual == ScalarType::Half || actual == ScalarType::BFloat16;
  if (dtype == DType::f64) {
    check_dtype(name, tensor, actual == ScalarType::Double, "Double", ", the dtype of value");
  } else {
    check_dtype(name, tensor, mixes, "Float, Half or BFloat16", ", as value is not Double");
  }
  check_device(name, tensor, value);
  return actual == value.scalar_type() ? dtype : DType::f32;
}

void Inputs::check_grad_output(const Params& params) const {
  check_shape("grad_output", *grad_output,
              {{"batch", params.batch},
               {"queries", params.queries},
               {"heads*channels", int64_t(params.heads) * params.channels}});
  check_dtype("grad_output", *grad_output, grad_output->scalar_type() == value.scalar_type(),
              torch::headeronly::toString(value.scalar_type()), ", the dtype of value");
  check_device("grad_output", *grad_output, value);
}

}  // namespace ms_deform_attn
