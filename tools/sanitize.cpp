// Runs the kernels on small problems, under a sanitizer: see sanitize.py.
//
// No torch library is needed: its two functions that the CPU kernels call are defined here on plain
// threads, which the sanitizer understands. Each answer of theirs is compared with that of float64,
// with other numbers of threads bit for bit, and with a call from within a parallel region. What
// the operator is, the tests compare with the reference.
//
// With USE_CUDA, the CUDA kernels are compared with the CPU's. Every tensor has a device allocation
// of its own, so that a sanitizer knows its end.
//
// Level metadata that describes no value (negative, huge, overlapping, ...) is given, too. On a
// GPU, where nobody refuses it before, all results are to be written and finite.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "deformable_detr/ms_deform_attn.h"
#if defined(USE_CUDA)
#include "deformable_detr/cuda/plan.h"
#endif

#include <torch/csrc/stable/ops.h>

#if defined(USE_CUDA)
#include <cuda_runtime.h>
#endif

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
  int32_t coordinates = 0;  // of a reference point: 2 or 4, or 0 for the plain operator
  bool deterministic = false;
  // What the kernels are told, where that is not so.
  std::vector<int64_t> bad_shapes = {}, bad_starts = {};
  // The queries are the pixels, and most of their points are near, as in an encoder. Not in double.
  bool encoder = false;
  bool far = false;            // its points lie anywhere, so that windows leave them
  bool one_reference = false;  // of a query, for all levels
};

template <typename T>
struct Tensors {
  std::vector<int64_t> shapes, starts;
  std::vector<T> value, references, locations, weights, output, grad_output, grad_value,
      grad_locations, grad_weights;
  std::vector<acc_t<T>> grad_references;

  template <typename Function>
  void for_results(Function&& function) {
    function("output", output);
    function("grad_value", grad_value);
    function("grad_sampling_locations", grad_locations);
    function("grad_attention_weights", grad_weights);
    function("grad_reference_points", grad_references);
  }
};

// The points' tensors: fused, locations are offsets and weights logits.
void set_points(BackwardParams& p, const Problem& problem, const void* references,
                const void* locations, const void* weights, void* grad_references,
                void* grad_locations, void* grad_weights) {
  const DType dtype = p.value_dtype;
  if (problem.coordinates > 0) {
    p.reference_points = {references, dtype};
    p.sampling_offsets = {locations, dtype};
    p.attention_logits = {weights, dtype};
    p.grad_reference_points = grad_references;
    p.grad_sampling_offsets = grad_locations;
    p.grad_attention_logits = grad_weights;
  } else {
    p.sampling_locations = {locations, dtype};
    p.attention_weights = {weights, dtype};
    p.grad_sampling_locations = grad_locations;
    p.grad_attention_weights = grad_weights;
  }
}

// Of the host's tensors, whose inputs are numbers that Stored has.
template <typename T, typename Stored = T>
BackwardParams make_params(const Problem& problem, Tensors<T>& tensors) {
  BackwardParams p{};
  p.batch = problem.batch;
  p.queries = problem.queries;
  p.heads = problem.heads;
  p.channels = problem.channels;
  p.levels = static_cast<int32_t>(problem.points.size());
  for (int32_t level = 0; level < p.levels; ++level) {
    p.points += p.level_points[level] = problem.points[level];
    tensors.starts.push_back(p.spatial_size);
    p.spatial_size += problem.shapes[2 * level] * problem.shapes[2 * level + 1];
  }
  const std::vector<int32_t> equal(p.levels, problem.points[0]);
  if (problem.points == equal) p.points_per_level = equal[0];
  tensors.shapes = problem.bad_shapes.empty() ? problem.shapes : problem.bad_shapes;
  if (!problem.bad_starts.empty()) tensors.starts = problem.bad_starts;
  p.method = problem.method;
  p.deterministic = problem.deterministic;
  p.value_dtype = std::is_same_v<T, double>   ? DType::f64
                  : std::is_same_v<T, float>  ? DType::f32
                  : std::is_same_v<T, half_t> ? DType::f16
                                              : DType::bf16;
  p.shapes_int64 = p.starts_int64 = true;

  std::mt19937 random(1);
  const auto fill = [&](std::vector<T>& tensor, int64_t size, double low, double high) {
    std::uniform_real_distribution<double> draw(low, high);
    tensor.resize(size);
    for (T& x : tensor) {
      const Stored stored = static_cast<Stored>(static_cast<float>(draw(random)));
      x = static_cast<T>(static_cast<float>(stored));
    }
  };
  const int64_t rows = p.batch * p.queries * p.heads;
  fill(tensors.value, p.batch * p.spatial_size * p.heads * p.channels, -1, 1);
  fill(tensors.locations, rows * p.points * 2, -0.2, 1.2);
  fill(tensors.weights, rows * p.points, 0, 1);
  if (problem.coordinates > 0) {
    p.reference_levels = problem.one_reference ? 1 : p.levels;
    p.reference_coordinates = problem.coordinates;
    p.offset_scale = 0.5;
    const int64_t size = int64_t(p.reference_levels) * problem.coordinates;
    fill(tensors.references, p.batch * p.queries * size, 0, 1);
    tensors.grad_references.assign(rows * size, NAN);
  }
  fill(tensors.grad_output, rows * p.channels, -1, 1);
  if (problem.encoder && !problem.far) move_points(problem, p, tensors);
  tensors.locations[3] = static_cast<T>(NAN);
  tensors.locations[8] = static_cast<T>(INFINITY);
  const T garbage = static_cast<T>(NAN);  // every element is to be written
  tensors.output.assign(rows * p.channels, garbage);
  tensors.grad_value.assign(tensors.value.size(), garbage);
  tensors.grad_locations.assign(tensors.locations.size(), garbage);
  tensors.grad_weights.assign(tensors.weights.size(), garbage);

  p.value = tensors.value.data();
  p.spatial_shapes = tensors.shapes.data();
  p.level_start_index = tensors.starts.data();
  p.output = tensors.output.data();
  p.grad_output = tensors.grad_output.data();
  p.grad_value = tensors.grad_value.data();
  set_points(p, problem, tensors.references.data(), tensors.locations.data(),
             tensors.weights.data(), tensors.grad_references.data(), tensors.grad_locations.data(),
             tensors.grad_weights.data());
  return p;
}

// Moves points near their queries, which are the pixels; one of 50 stays where it is.
template <typename T>
void move_points(const Problem& problem, const Params& p, Tensors<T>& tensors) {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> draw(-4, 4);  // pixels
  const auto set = [](T* xy, float x, float y) {
    xy[0] = static_cast<T>(x);
    xy[1] = static_cast<T>(y);
  };
  for (int64_t batch = 0, query = 0; batch < p.batch; ++batch) {
    for (int32_t level = 0; level < p.levels; ++level) {
      const int64_t height = problem.shapes[2 * level], width = problem.shapes[2 * level + 1];
      for (int64_t pixel = 0; pixel < height * width; ++pixel, ++query) {
        const float x = (pixel % width + 0.5f) / width, y = (pixel / width + 0.5f) / height;
        for (int32_t l = 0; l < p.reference_levels; ++l) {
          set(&tensors.references[(query * p.reference_levels + l) * 2], x, y);
        }
        for (int64_t i = 0; i < p.heads * p.points; ++i) {
          const int32_t of = i % p.points / p.points_per_level;
          const float dx = draw(random), dy = draw(random);
          T* xy = &tensors.locations[(query * p.heads * p.points + i) * 2];
          if (i % 50 == 3) continue;
          problem.coordinates == 2
              ? set(xy, dx, dy)
              : set(xy, x + dx / problem.shapes[2 * of + 1], y + dy / problem.shapes[2 * of]);
        }
      }
    }
  }
}

int failures = 0;

template <typename... Arguments>
void fail(const char* format, Arguments... arguments) {
  ++failures;
  std::printf(format, arguments...);
}

// Of the dtype that was stored.
template <typename T>
constexpr double kTolerance = sizeof(T) == 8   ? 1e-12
                              : sizeof(T) == 4 ? 2e-6
                                               : 4e-3;

template <typename T, typename U>
void compare(const char* what, const std::vector<T>& actual, const std::vector<U>& expected,
             double tolerance) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double wanted = static_cast<double>(expected[i]);
    difference += std::pow(static_cast<double>(actual[i]) - wanted, 2);
    norm += wanted * wanted;
  }
  const double error = std::sqrt(difference / (norm > 0 ? norm : 1));
  if (!(error <= tolerance)) fail("%s is off by %.1e\n", what, error);
}

// factor: of the tolerances; those of one side are for one side's rounding.
template <typename T, typename U>
void compare_all(const Tensors<T>& actual, const Tensors<U>& expected, double factor) {
  const double tolerance = factor * kTolerance<T>;
  compare("output", actual.output, expected.output, tolerance);
  compare("grad_value", actual.grad_value, expected.grad_value, tolerance);
  compare("grad_sampling_locations", actual.grad_locations, expected.grad_locations, tolerance);
  compare("grad_attention_weights", actual.grad_weights, expected.grad_weights, tolerance);
  compare("grad_reference_points", actual.grad_references, expected.grad_references,
          factor * kTolerance<acc_t<T>>);
}

template <typename T>
void expect_finite(const char* what, const std::vector<T>& results) {
  for (const T x : results) {
    if (std::isfinite(static_cast<double>(x))) continue;
    fail("%s is not finite\n", what);
    return;
  }
}

template <typename T, typename Stored = T>
void run_on_cpu(const Problem& problem, Tensors<T>& tensors, int threads) {
  BackwardParams p = make_params<T, Stored>(problem, tensors);
  nested = threads == 0;
  num_threads = std::max(threads, 1);
  cpu::forward(p);
  cpu::backward(p);
  nested = false;
}

template <typename T>
void test_cpu(const Problem& problem) {
  Tensors<T> first;
  for (const int threads : {1, 4, 0}) {  // 0: from within a parallel region
    Tensors<T> tensors;
    run_on_cpu(problem, tensors, threads);
    if (!problem.bad_shapes.empty()) continue;
    if (threads == 1) {
      tensors.for_results([](const char* what, auto& results) { expect_finite(what, results); });
      Tensors<double> exact;
      run_on_cpu<double, T>(problem, exact, 1);
      compare_all(tensors, exact, 1);
      first = tensors;
    }
    const void* of_first[5];
    int i = 0;
    first.for_results([&](const char*, auto& results) { of_first[i++] = results.data(); });
    i = 0;
    tensors.for_results([&](const char* what, auto& results) {
      const size_t bytes = results.size() * sizeof(results[0]);
      if (bytes > 0 && std::memcmp(of_first[i], results.data(), bytes) != 0)
        fail("%s differs between 1 and %d threads\n", what, threads);
      ++i;
    });
  }
}

#if defined(USE_CUDA)
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// A tensor on the GPU.
class OnGpu {
 public:
  OnGpu(const void* host, size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&memory_, bytes_));
    if (host) check(cudaMemcpy(memory_, host, bytes_, cudaMemcpyHostToDevice));
  }
  OnGpu(const OnGpu&) = delete;
  ~OnGpu() { cudaFree(memory_); }

  void* data() { return memory_; }
  void read(void* host) { check(cudaMemcpy(host, memory_, bytes_, cudaMemcpyDeviceToHost)); }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
};

template <typename T>
OnGpu copy(const std::vector<T>& tensor) {
  return OnGpu(tensor.data(), tensor.size() * sizeof(T));
}
// Not written yet.
template <typename T>
OnGpu space(const std::vector<T>& tensor) {
  return OnGpu(nullptr, tensor.size() * sizeof(T));
}

template <typename T>
void run_on_gpu(const Problem& problem, Tensors<T>& tensors) {
  BackwardParams p = make_params(problem, tensors);
  OnGpu value = copy(tensors.value), shapes = copy(tensors.shapes), starts = copy(tensors.starts),
        locations = copy(tensors.locations), weights = copy(tensors.weights),
        references = copy(tensors.references), grad_output = copy(tensors.grad_output);
  OnGpu output = space(tensors.output), grad_locations = space(tensors.grad_locations),
        grad_weights = space(tensors.grad_weights),
        grad_references = space(tensors.grad_references);
  p.value = value.data();
  p.spatial_shapes = shapes.data();
  p.level_start_index = starts.data();
  p.grad_output = grad_output.data();
  p.output = output.data();
  set_points(p, problem, references.data(), locations.data(), weights.data(),
             grad_references.data(), grad_locations.data(), grad_weights.data());
  OnGpu grad_value = space(tensors.grad_value);
  p.grad_value = grad_value.data();
  const cuda::BackwardPlan plan = cuda::plan_backward(p);
  OnGpu scratch(nullptr, plan.scratch.bytes);
  p.scratch = scratch.data();
  const cuda::ForwardPlan forward_plan = cuda::plan_forward(p);
  OnGpu windows(nullptr, forward_plan.scratch_bytes);
  p.windows = windows.data();
  cuda::forward(p, forward_plan, nullptr);
  cuda::backward(p, plan, nullptr);
  check(cudaDeviceSynchronize());

  output.read(tensors.output.data());
  grad_value.read(tensors.grad_value.data());
  grad_locations.read(tensors.grad_locations.data());
  grad_weights.read(tensors.grad_weights.data());
  grad_references.read(tensors.grad_references.data());
}

template <typename T>
void test_gpu(const Problem& problem) {
  Tensors<T> on_gpu, on_cpu;
  run_on_gpu(problem, on_gpu);
  on_gpu.for_results([](const char* what, auto& results) { expect_finite(what, results); });
  if (!problem.bad_shapes.empty()) return;
  run_on_cpu(problem, on_cpu, 1);
  compare_all(on_gpu, on_cpu, 2);
}
#endif

template <typename T>
void test(const Problem& problem) {
  // An encoder's kernels are for float and half types. Fused or far, one half type will do.
  if (problem.encoder && sizeof(T) == 8) return;
  const bool usual = problem.coordinates == 0 && !problem.far;
  if (problem.encoder && !usual && std::is_same_v<T, ms_deform_attn::bfloat16_t>) return;
  const int before = failures;
#if defined(USE_CUDA)
  test_gpu<T>(problem);
#else
  test_cpu<T>(problem);
#endif
  if (failures == before) return;
  std::printf(
      "  in: batch %d, queries %d, heads %d, channels %d, %zu levels, %d bytes, %s, "
      "%d coordinates%s%s\n",
      int(problem.batch), int(problem.queries), problem.heads, problem.channels,
      problem.points.size(), int(sizeof(T)),
      problem.method == Method::nearest ? "nearest" : "bilinear", problem.coordinates,
      problem.deterministic ? ", deterministic" : "",
      problem.bad_shapes.empty() ? "" : ", bad levels");
  for (size_t i = 0; i < problem.bad_starts.size(); ++i) {
    std::printf("    level (%lld, %lld) at %lld\n",
                static_cast<long long>(problem.bad_shapes[2 * i]),
                static_cast<long long>(problem.bad_shapes[2 * i + 1]),
                static_cast<long long>(problem.bad_starts[i]));
  }
}

std::vector<Problem> make_problems() {
  std::vector<Problem> problems;
  for (const Method method : {Method::bilinear, Method::nearest}) {
    for (const int32_t coordinates : {0, 2, 4}) {
      const Problem some[] = {
          {2, 70, 3, 32, {20, 27, 10, 14, 5, 7}, {3, 6, 4}, method, coordinates},  // unequal points
          {1, 50, 1, 5, {90, 40}, {4}, method, coordinates},  // few pieces of work
          {1, 9, 2, 71, {40, 60, 1, 1, 1, 9}, {200, 1, 2}, method, coordinates},  // much of each
          {2, 236, 2, 16, {12, 17, 4, 8}, {4, 4}, method, coordinates},  // queries are pixels
      };
      problems.insert(problems.end(), std::begin(some), std::end(some));
    }
  }
#if defined(USE_CUDA)
  const std::vector<Problem> once = problems;
  for (Problem problem : once) {
    problem.deterministic = true;
    problems.push_back(problem);
  }
  // More points and slices than blocks of gather_kernel hold at once.
  problems.push_back(
      {1, 1000, 1, 32, {12, 17, 1, 900, 700, 1}, {4, 4, 4}, Method::bilinear, 0, true});
  problems.push_back({1, 2100, 1, 30, {30, 40, 2, 3}, {1, 4}, Method::bilinear, 2, true});
  // One level for points_kernel between two for merge_kernel.
  const std::vector<int64_t> shapes = {20, 30, 40, 43, 1, 9};
  problems.push_back({2, 1100, 8, 20, shapes, {2, 1, 2}, Method::bilinear, 0});
  problems.push_back({2, 1100, 8, 36, shapes, {2, 1, 2}, Method::bilinear, 4});
  problems.push_back({2, 1100, 8, 16, shapes, {2, 1, 2}, Method::nearest, 2});
  // Encoders that are served through windows and patches: with as many points and rows as that
  // takes.
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const auto add_encoder = [&](std::vector<int64_t> shapes, int32_t coordinates, bool far = false,
                               std::vector<int64_t> told = {}, std::vector<int64_t> starts = {}) {
    constexpr int32_t kHeads = 3;
    int64_t queries = 0;
    for (size_t i = 0; i < shapes.size(); i += 2) queries += shapes[i] * shapes[i + 1];
    const std::vector<int32_t> points(shapes.size() / 2, 4);
    const int64_t of_batch = queries * kHeads * points.size() * 4;
    const int64_t batch =
        std::max(65536 * multiprocessors / of_batch, 16384 / (queries * kHeads)) + 1;
    problems.push_back({batch, queries, kHeads, 32, shapes, points, Method::bilinear, coordinates,
                        false, told, starts, true, far});
  };
  add_encoder({20, 20}, 0);
  add_encoder({20, 20}, 2);
  add_encoder({20, 20, 10, 10, 5, 5}, 2);
  add_encoder({32, 48, 16, 24, 8, 12, 4, 6}, 0);
  add_encoder({24, 20, 12, 10, 6, 5, 3, 3, 2, 2}, 2);
  add_encoder({20, 20, 10, 10, 5, 5}, 0, true);
  add_encoder({24, 20, 12, 10, 6, 5, 3, 3}, 2, true);
  add_encoder({12, 17, 4, 8, 2, 3}, 0, false, {12, 18, 4, 8, 2, 3}, {0, 204, 236});
  // With twice as many patches as a block has bins. Fused, as the gradients of locations, by the
  // width of the map, would not fit into fp16.
  add_encoder({2, 5400}, 2);
  add_encoder({2, 5400}, 2, true);
  add_encoder({24, 20, 12, 10, 6, 5, 3, 3}, 2);
  problems.back().deterministic = problems.back().one_reference = true;
#endif
  // Levels of 12 * 17 and 4 * 8 pixels, which say that they are others.
  constexpr int64_t kHuge = int64_t(1) << 62, kInt32 = int64_t(1) << 31;
  const std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> bad_levels = {
      {{12, 17, 4, 8}, {-1, 204}},
      {{12, 17, 4, 8}, {0, 236}},
      {{12, 17, 4, 8}, {0, 205}},
      {{12, 17, 4, 8}, {kHuge, -kHuge}},
      {{-12, -17, 4, 8}, {0, 204}},
      {{-12, 17, 4, -8}, {0, 204}},
      {{0, 17, 4, 0}, {0, 204}},
      {{12, 18, 4, 8}, {0, 204}},
      {{3, 4, 2, 2}, {10, 100}},
      {{kHuge, kHuge, 4, 8}, {0, 204}},
      {{kInt32, kInt32, 1, kInt32}, {0, 0}},
      {{kInt32 + 1, 1, 4, 8}, {0, kInt32}},
      {{1, 237, 237, 1}, {0, 0}},
      {{INT64_MAX, 2, INT64_MIN, -1}, {INT64_MAX, INT64_MIN}},
  };
  // On the CPU the checks above the kernels refuse levels that overlap.
  const std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> overlapping = {
      {{12, 17, 4, 8}, {0, 10}},
      {{12, 17, 12, 17}, {0, 0}},
      {{1, 236, 236, 1}, {0, 0}},
      {{12, 17, 4, 8}, {32, 0}},
  };
  const auto add = [&](const auto& levels) {
    for (const auto& [shapes, starts] : levels) {
      for (const int32_t coordinates : {0, 4}) {
        for (const int64_t queries : {20, 236}) {
          for (const bool deterministic : {false, true}) {
#if !defined(USE_CUDA)
            if (queries == 236 || deterministic) continue;  // the same to these kernels
#endif
            problems.push_back({2,
                                queries,
                                2,
                                16,
                                {12, 17, 4, 8},
                                {3, 3},
                                Method::bilinear,
                                coordinates,
                                deterministic,
                                shapes,
                                starts});
          }
        }
      }
    }
  };
  add(bad_levels);
#if defined(USE_CUDA)
  add(overlapping);
#endif
  return problems;
}

}  // namespace
}  // namespace ms_deform_attn

// Arguments `part parts` choose every parts-th problem from the part-th on, for one of several
// processes.
int main(int argc, char** argv) {
  using namespace ms_deform_attn;
  const size_t part = argc > 2 ? std::atoi(argv[1]) : 0, parts = argc > 2 ? std::atoi(argv[2]) : 1;
  const std::vector<Problem> problems = make_problems();
  size_t count = 0;
  for (size_t i = part; i < problems.size(); i += parts, ++count) {
    const Problem& problem = problems[i];
    test<float>(problem);
    test<double>(problem);
    test<half_t>(problem);
    test<ms_deform_attn::bfloat16_t>(problem);  // Arm's headers have one, too
  }
  std::printf("%zu problems in 4 dtypes: %d failures\n", count, failures);
  return failures != 0;
}
