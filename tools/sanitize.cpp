// Runs the CPU kernels on small problems, under a sanitizer: see sanitize.py.
//
// No torch library is needed: its two functions that the kernels call are defined here on plain
// threads, which the sanitizer understands. Each answer is compared with a loop in double, with
// other numbers of threads bit for bit, and with a call from within a parallel region.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "deformable_detr/ms_deform_attn.h"

#include <torch/csrc/stable/ops.h>

namespace {
uint32_t num_threads = 1;
thread_local bool nested = false;
}  // namespace

extern "C" AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = nested ? 1 : num_threads;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body,
                                             void* context) {
  if (nested) {
    body(begin, end, context);
    return AOTI_TORCH_SUCCESS;
  }
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) {
    threads.emplace_back([=] {
      nested = true;
      body(i, i + 1, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}

namespace ms_deform_attn {
namespace {

struct Problem {
  int64_t batch, queries;
  int32_t heads, channels;
  std::vector<int64_t> shapes;  // height, width by level
  std::vector<int32_t> points;  // by level
  Method method;
};

template <typename T>
struct Tensors {
  std::vector<T> value, locations, weights, output, grad_output, grad_value, grad_locations,
      grad_weights;
};

template <typename T>
BackwardParams make_params(const Problem& problem, std::vector<int64_t>& starts,
                           Tensors<T>& tensors) {
  BackwardParams p{};
  p.batch = problem.batch;
  p.queries = problem.queries;
  p.heads = problem.heads;
  p.channels = problem.channels;
  p.levels = static_cast<int32_t>(problem.points.size());
  for (int32_t level = 0; level < p.levels; ++level) {
    p.points += p.level_points[level] = problem.points[level];
    starts.push_back(p.spatial_size);
    p.spatial_size += problem.shapes[2 * level] * problem.shapes[2 * level + 1];
  }
  p.method = problem.method;
  p.value_dtype = std::is_same_v<T, double>   ? DType::f64
                  : std::is_same_v<T, float>  ? DType::f32
                  : std::is_same_v<T, half_t> ? DType::f16
                                              : DType::bf16;
  p.locations_dtype = p.weights_dtype = p.value_dtype;
  p.shapes_int64 = p.starts_int64 = true;

  std::mt19937 random(1);
  const auto fill = [&](std::vector<T>& tensor, int64_t size, double low, double high) {
    std::uniform_real_distribution<double> draw(low, high);
    tensor.resize(size);
    for (T& x : tensor) x = static_cast<T>(static_cast<float>(draw(random)));
  };
  const int64_t rows = p.batch * p.queries * p.heads;
  fill(tensors.value, p.batch * p.spatial_size * p.heads * p.channels, -1, 1);
  fill(tensors.locations, rows * p.points * 2, -0.2, 1.2);
  fill(tensors.weights, rows * p.points, 0, 1);
  fill(tensors.grad_output, rows * p.channels, -1, 1);
  tensors.locations[3] = static_cast<T>(NAN);
  tensors.locations[8] = static_cast<T>(INFINITY);
  const T garbage = static_cast<T>(NAN);  // every element is to be written
  tensors.output.assign(rows * p.channels, garbage);
  tensors.grad_value.assign(tensors.value.size(), garbage);
  tensors.grad_locations.assign(tensors.locations.size(), garbage);
  tensors.grad_weights.assign(tensors.weights.size(), garbage);

  p.value = tensors.value.data();
  p.spatial_shapes = problem.shapes.data();
  p.level_start_index = starts.data();
  p.sampling_locations = tensors.locations.data();
  p.attention_weights = tensors.weights.data();
  p.output = tensors.output.data();
  p.grad_output = tensors.grad_output.data();
  p.grad_value = tensors.grad_value.data();
  p.grad_sampling_locations = tensors.grad_locations.data();
  p.grad_attention_weights = tensors.grad_weights.data();
  return p;
}

// The definition, in double, of the stored inputs.
template <typename T>
Tensors<double> expect(const BackwardParams& p, const Tensors<T>& in) {
  Tensors<double> out;
  out.output.resize(in.output.size());
  out.grad_value.resize(in.value.size());
  out.grad_locations.resize(in.locations.size());
  out.grad_weights.resize(in.weights.size());
  for (int64_t row = 0; row < p.batch * p.queries * p.heads; ++row) {
    const int64_t batch = row / (p.queries * p.heads), head = row % p.heads;
    int64_t point = row * p.points;
    for (int32_t i = 0; i < p.levels; ++i) {
      const Level level = read_level(p, i);
      for (int32_t k = 0; k < p.level_points[i]; ++k, ++point) {
        const double location_x = in.locations[2 * point], location_y = in.locations[2 * point + 1];
        if (!std::isfinite(location_x) || !std::isfinite(location_y)) continue;
        const bool nearest = p.method == Method::nearest;
        double x = location_x * level.width - 0.5, y = location_y * level.height - 0.5;
        if (nearest) {
          x = std::clamp(std::floor(x + 1), 0.0, level.width - 1.0);
          y = std::clamp(std::floor(y + 1), 0.0, level.height - 1.0);
        }
        const double left = std::floor(x), top = std::floor(y), weight = in.weights[point];
        for (int corner = 0; corner < 4; ++corner) {
          const int east = corner & 1, south = corner >> 1;
          const double column = left + east, pixel_row = top + south;
          if (column < 0 || column >= level.width || pixel_row < 0 || pixel_row >= level.height)
            continue;
          const double share_x = east ? x - left : 1 - (x - left);
          const double share_y = south ? y - top : 1 - (y - top);
          const int64_t pixel = level.start + int64_t(pixel_row) * level.width + int64_t(column);
          const int64_t offset = ((batch * p.spatial_size + pixel) * p.heads + head) * p.channels;
          double dot = 0;
          for (int32_t c = 0; c < p.channels; ++c) {
            const double grad = in.grad_output[row * p.channels + c];
            dot += grad * in.value[offset + c];
            out.output[row * p.channels + c] += weight * share_x * share_y * in.value[offset + c];
            out.grad_value[offset + c] += weight * share_x * share_y * grad;
          }
          out.grad_weights[point] += share_x * share_y * dot;
          if (nearest) continue;
          out.grad_locations[2 * point] += weight * level.width * (east ? 1 : -1) * share_y * dot;
          out.grad_locations[2 * point + 1] +=
              weight * level.height * (south ? 1 : -1) * share_x * dot;
        }
      }
    }
  }
  return out;
}

int failures = 0;

template <typename T>
void compare(const char* what, const std::vector<T>& actual, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    difference += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  const double error = std::sqrt(difference / (norm > 0 ? norm : 1));
  const double tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 2e-6 : 4e-3;
  if (error <= tolerance) return;
  ++failures;
  std::printf("%s is off by %.1e\n", what, error);
}

template <typename T>
void test(const Problem& problem) {
  std::vector<T> first[4];
  for (const int threads : {1, 4, 0}) {  // 0: from within a parallel region
    Tensors<T> tensors;
    std::vector<int64_t> starts;
    const BackwardParams p = make_params(problem, starts, tensors);
    nested = threads == 0;
    num_threads = std::max(threads, 1);
    cpu::forward(p);
    cpu::backward(p);
    nested = false;
    const std::vector<T>* results[4] = {&tensors.output, &tensors.grad_value,
                                        &tensors.grad_locations, &tensors.grad_weights};
    if (threads == 1) {
      const Tensors<double> expected = expect(p, tensors);
      compare("output", tensors.output, expected.output);
      compare("grad_value", tensors.grad_value, expected.grad_value);
      compare("grad_sampling_locations", tensors.grad_locations, expected.grad_locations);
      compare("grad_attention_weights", tensors.grad_weights, expected.grad_weights);
    }
    for (int i = 0; i < 4; ++i) {
      if (threads == 1) first[i] = *results[i];
      if (std::memcmp(first[i].data(), results[i]->data(), first[i].size() * sizeof(T)) == 0)
        continue;
      ++failures;
      std::printf("result %d differs between 1 and %d threads\n", i, threads);
    }
  }
}

}  // namespace
}  // namespace ms_deform_attn

int main() {
  using namespace ms_deform_attn;
  for (const Method method : {Method::bilinear, Method::nearest}) {
    const Problem problems[] = {
        {2, 70, 3, 32, {20, 27, 10, 14, 5, 7}, {3, 6, 4}, method},  // unequal points
        {1, 50, 1, 5, {90, 40}, {4}, method},                       // few pieces of work
        {1, 9, 2, 71, {40, 60, 1, 1, 1, 9}, {200, 1, 2}, method},   // many points and channels
    };
    for (const Problem& problem : problems) {
      test<float>(problem);
      test<double>(problem);
      test<half_t>(problem);
      test<bfloat16_t>(problem);
    }
  }
  std::printf(failures ? "%d failures\n" : "all well\n", failures);
  return failures != 0;
}
