// Multi-scale deformable attention on the GPU, backward.
//
// points_kernel walks over the points as the forward does. Per point, the dot products of
// grad_output with value at the four corners give the gradients of its weight and location. What
// the corners' pixels get, grad_output times weight and share, is added to grad_value in one of
// three ways, each the fastest for some problems (see find_method):
//
// * directly, by points_kernel, corner by corner;
// * by scatter_kernel, where queries are pixels: a block takes a square of them, sorts their points
//   by pixel and adds up what falls on the same one before it adds that to memory;
// * by gather_kernel: a block owns a rectangle of pixels, looks for the points near it, sorts them,
//   and writes each pixel once. Sums have a fixed order, there is no need to clear grad_value
//   first, and its dtype is value's. For few queries, and for all problems if that is asked for.
#include "deformable_detr/cuda/backward_gather.cuh"
#include "deformable_detr/cuda/backward_points.cuh"
#include "deformable_detr/cuda/backward_scatter.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ method

enum class AddMethod { direct, scatter, gather };

AddMethod find_method(const BackwardParams& p) {
  if (p.deterministic) return AddMethod::gather;
  if (queries_are_pixels(p) && p.value_dtype != DType::f64) return AddMethod::scatter;
  // To add to grad_value it has to be cleared first, and in a half type a float copy of it, too.
  // Where points are few and pixels are many, that costs more than looking for points.
  const int64_t elements = p.batch * p.spatial_size * p.heads * p.channels;
  const int64_t points = max_level_points(p);
  const bool gather =
      is_half(p.value_dtype)
          ? points <= 4096 && elements >= (points <= 2048 ? 1 << 22 : 1 << 23)
          : points >= 1024 && points <= 4096 && elements >= (points <= 2048 ? 1 << 24 : 1 << 23);
  return gather ? AddMethod::gather : AddMethod::direct;
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

BackwardNeeds backward_needs(const BackwardParams& params) {
  const AddMethod method = find_method(params);
  if (method == AddMethod::direct) return {true, 0};
  const bool gather = method == AddMethod::gather;
  return {!gather, gather && has_reaches(params) ? reach_offset(params) + reach_bytes(params)
                                                 : softmax_bytes(params)};
}

const char* backward(const BackwardParams& params, void* stream) {
  const AddMethod method = find_method(params);
  constexpr int64_t kMostPoints = INT32_MAX - kLookAhead * kGatherThreads;
  if (params.points > kMostPoints ||
      (method == AddMethod::gather && max_level_points(params) > kMostPoints)) {
    return "sampling_locations has too many points in a level, expected below 2^31";
  }
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    // A lane's channels fill 16 bytes of sums, so that what a team adds is contiguous.
    constexpr int kSumVec = 16 / sizeof(acc_t<scalar_t>);
    if (method == AddMethod::direct) {
      error = launch_points<scalar_t, kSumVec, true>(params, stream);
      return;
    }
    if (method == AddMethod::gather && has_reaches(params)) {
      error = launch_reach<scalar_t>(params, stream);
      if (error) return;
    }
    error = launch_points<scalar_t, kVec, false>(params, stream);
    if (error) return;
    if (method == AddMethod::gather) {
      error = with_row<scalar_t, kVec>(params, [&](auto vec, auto lanes) {
        return launch_gather<scalar_t, vec.value, lanes.value>(params, stream);
      });
    } else if constexpr (!std::is_same_v<scalar_t, double>) {
      error = with_row<scalar_t, kSumVec>(params, [&](auto vec, auto lanes) {
        return launch_scatter<scalar_t, vec.value, lanes.value>(params, stream);
      });
    }
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
