// The gradients of points, for every backward: of locations and attention weights, or in a fused
// call of reference points, offsets and logits.
//
// points_kernel walks over the points as the forward does. Per point, the dot products of
// grad_output with value at the four corners give the gradients of its weight and location. With
// Strategy::direct (kAdd) it also adds grad_output, times attention and corner weight, to
// grad_value at each corner, except on the levels that merge_kernel adds; each addition goes to L2
// by itself.
//
// A fused row has two passes over its points: grad_logit = weight * (grad_weight - sum of weight *
// grad_weight) needs all of them first, and a reference point's gradient is a sum over points. The
// numbers in between are RowGradients.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/merged_levels.cuh"
#include "deformable_detr/cuda/softmax.cuh"
#include "deformable_detr/cuda/windows.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ stores

// Stores a point's N numbers of an operand's gradient, in the operand's dtype.
template <typename scalar_t, int N>
__device__ __forceinline__ void store_gradient(void* grad, const Operand& operand, int64_t point,
                                               const acc_t<scalar_t> (&x)[N]) {
  const auto store = [&](auto zero) {
    using stored_t = decltype(zero);
    stored_t* to = static_cast<stored_t*>(grad) + N * point;
    if constexpr (N == 1) {
      *to = static_cast<stored_t>(x[0]);
    } else {
      Vec<stored_t, N>::pack(x).store(to);
    }
  };
  const bool own = std::is_same_v<scalar_t, acc_t<scalar_t>> || operand.dtype == kDType<scalar_t>;
  own ? store(scalar_t{}) : store(acc_t<scalar_t>{});
}

// ----------------------------------------------------------------------------------- row gradients

// What the fused backward keeps of a row's points until it has seen all of them. The rows of a
// block's teams are interleaved, so that the teams, which are at the same point, use different
// banks of shared memory. Rows of so many points that they do not fit there are kept in scratch, by
// the kernel with one channel a lane, so that the others need no registers for that.
template <typename acc, int kTeams, bool kMayUseScratch>
struct RowGradients {
  // The gradients of the point's attention weight, and of its reference point's coordinates.
  enum Quantity { kWeight, kX, kY, kBoxWidth, kBoxHeight, kQuantities };

  acc* in_shared;   // of this team's row
  acc* in_scratch;  // or null

  static __host__ __device__ int64_t of_block(const BackwardParams& p) {
    return (p.grad_reference_points ? int64_t(kQuantities) : 1) * p.points * kTeams;
  }
  __device__ __forceinline__ acc& at(const Params& p, int quantity, int32_t point) const {
    if constexpr (kMayUseScratch) {
      if (in_scratch) return in_scratch[(int64_t(quantity) * p.points + point) * kTeams];
    }
    return in_shared[(quantity * p.points + point) * kTeams];
  }
};

// ---------------------------------------------------------------------------------------- products

// Adds up four numbers over a group of kLanes lanes. In the first steps a lane keeps half of its
// numbers and gives the others to its partner, so that lane l ends up with the total of number l %
// 4 (in a group of two, of l and l + 2).
template <int kLanes, typename acc>
__device__ __forceinline__ void reduce_corners(acc (&x)[4], int lane) {
  const bool odd = lane & 1;
  const acc keep0 = odd ? x[1] : x[0], give0 = odd ? x[0] : x[1];
  const acc keep2 = odd ? x[3] : x[2], give2 = odd ? x[2] : x[3];
  x[0] = keep0 + __shfl_xor_sync(0xffffffff, give0, 1);
  x[1] = keep2 + __shfl_xor_sync(0xffffffff, give2, 1);
  if constexpr (kLanes >= 4) {
    const bool upper = lane & 2;
    const acc keep = upper ? x[1] : x[0], give = upper ? x[0] : x[1];
    x[0] = keep + __shfl_xor_sync(0xffffffff, give, 2);
  }
#pragma unroll
  for (int offset = 4; offset < kLanes; offset *= 2) {
    x[0] += __shfl_xor_sync(0xffffffff, x[0], offset);
  }
}

// ------------------------------------------------------------------------------------------ kernel

// The second pass of a fused row, from its RowGradients.
template <typename scalar_t, int kTeam, typename Gradients>
__device__ __forceinline__ void finish_fused_row(const BackwardParams& p, const TeamRow& row,
                                                 const Softmax<acc_t<scalar_t>>& softmax,
                                                 const Gradients& gradients,
                                                 acc_t<scalar_t> lane_sum) {
  using acc = acc_t<scalar_t>;
  const int lane = threadIdx.x % kTeam;
  const acc sum_of_row = team_sum<kTeam>(lane_sum);
  __syncwarp();
  for (int32_t i = lane; i < row.points; i += kTeam) {
    const int64_t point = row.index * p.points + i;
    const acc weight = softmax.weight(load_element<scalar_t>(p.attention_logits, point));
    const acc grad_weight = gradients.at(p, Gradients::kWeight, i);
    store_gradient<scalar_t, 1>(p.grad_attention_logits, p.attention_logits, point,
                                {weight * (grad_weight - sum_of_row)});
  }
  if (!p.grad_reference_points || !row.active()) return;
  const int32_t coordinates = p.reference_levels * p.reference_coordinates;
  for (int32_t i = lane; i < coordinates; i += kTeam) {
    const int32_t level = i / p.reference_coordinates;
    const int quantity = Gradients::kX + (i - level * p.reference_coordinates);
    int32_t point = first_point_of_level(p, level);
    const int32_t end = p.reference_levels > 1 ? point + points_of_level(p, level) : p.points;
    acc sum = 0;
    for (; point < end; ++point) sum += gradients.at(p, quantity, point);
    static_cast<acc*>(p.grad_reference_points)[row.index * coordinates + i] = sum;
  }
}

// Whether anyone asked for the gradients of the points.
__host__ __device__ __forceinline__ bool wants_points(const BackwardParams& p) {
  return (p.fused() ? p.grad_attention_logits : p.grad_attention_weights) != nullptr;
}

// kSplit groups of kLanes lanes share a row's points. softmaxes: Softmax<acc> [batch, queries,
// heads], written in a fused call if another kernel is to sum grad_value, else null. row_gradients:
// of acc, in scratch, or null where they fit into shared memory. merges_levels: whether
// merge_kernel adds some. kIfLeft: the call is an encoder's that points_windows_kernel may have
// served, or still serves. Its reference points have no box; were that left to run time, the fused
// kernel would spill.
template <typename scalar_t, Source kSource, int kVec, int kLanes, int kSplit, bool kAdd,
          bool kIfLeft = false>
__global__ void __launch_bounds__(kThreads, kAdd ? 3 : 4)
    points_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch, void* softmaxes,
                  void* row_gradients, bool merges_levels) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  constexpr int kTeam = Layout::kTeam;
  constexpr bool kFused = kIsFused<kSource>;
  constexpr bool kMayMerge = kAdd && kSplit == 1;  // see can_merge()
  extern __shared__ __align__(32) char memory[];
  __shared__ int4 offsets[Layout::kSlots];                       // of each corner in value
  __shared__ PerCorner<acc> weights[kAdd ? Layout::kSlots : 1];  // corner weight * attention weight
  __shared__ PerCorner<acc> dots[Layout::kSlots];  // of grad_output with value at each corner
  LevelEntry* levels = reinterpret_cast<LevelEntry*>(memory);

  let_next_kernel_start();
  if constexpr (kIfLeft) {
    // One block waits for windows, and with it whatever follows in the stream.
    if (blockIdx.x == 0) wait_for_previous_kernel();
    if (!left_by_windows(p, kMostMissedBackward<kFused>)) return;
  }
  const int lane = threadIdx.x % kTeam, group = lane / kLanes;
  const int32_t all_points = p.points;
  const int first_slot = Layout::first_slot();
  const int own_slot = first_slot + lane * Layout::kPitch;
  const bool strips = queries_are_pixels(p);

  TeamRow row = find_row<Layout>(p, first_batch + blockIdx.z, blockIdx.y, blockIdx.x);
  PointReader<scalar_t, kSource> reader;
  const auto read_first = [&] {
    reader.seek(p, row.index, row.query_index(p), lane);
    if (lane < row.points) reader.read(p);
  };
  // The first points are on their way while the levels arrive.
  LevelLoader<LevelEntry> level_loader;
  level_loader.load(p);
  if (!strips) read_first();
  level_loader.store(p, levels);
  if (strips) {
    follow_strips(p, levels, row);
    read_first();
  }
  Softmax<acc> softmax;
  using RowGradients = cuda::RowGradients<acc, Layout::kTeams, kVec == 1>;
  RowGradients gradients{};
  acc lane_sum = 0;  // of weight * grad_weight, over this lane's points
  if constexpr (kFused) {
    softmax = find_softmax<scalar_t, kTeam>(p, row.index);
    if ((!kAdd || kMayMerge) && softmaxes && lane == 0 && row.active()) {
      static_cast<Softmax<acc>*>(softmaxes)[row.index] = softmax;
    }
    gradients.in_shared = reinterpret_cast<acc*>(levels + p.levels) + threadIdx.x / kTeam;
    if (kVec == 1 && row_gradients) {
      const int64_t block = (row.batch * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      gradients.in_scratch = static_cast<acc*>(row_gradients) + block * RowGradients::of_block(p) +
                             threadIdx.x / kTeam;
    }
  }

  if constexpr (kAdd) wait_for_previous_kernel();  // which clears the sums
  const bool differentiates = wants_points(p);
  if (!kAdd && !differentiates) return;

  const int64_t origin = (row.batch * p.spatial_size * p.heads + row.head) * p.channels;
  PointCursor cursor(p, lane);
  for (int32_t first = 0; first < all_points; first += kTeam) {
    // Each lane works out one point.
    const bool has_point = first + lane < row.points;
    Corners<acc> corners;
    Xy<acc> offset = {};  // fused
    Reference<acc> reference = {};
    acc weight = 0;
    if (has_point) {
      weight = find_weight(p, reader, softmax);
      corners = find_corners(p, reader, cursor.level, levels[cursor.level]);
      if constexpr (kFused) {
        offset = reader.xy(p);
        reference = reader.reference(p, cursor.level);
      }
    }
    reader.skip(p, kTeam);
    if (first + kTeam + lane < row.points) reader.read(p);
    __syncwarp();
    offsets[own_slot] = Indexing::offsets(p, corners.pixel);
    unsigned adds = ~0u;  // a bit for each point of the stage, from this group's first on
    if constexpr (kAdd) {
      if (kMayMerge && merges_levels) {
        const bool merged = has_point && is_merged(p, cursor.level, levels[cursor.level]);
        adds = __ballot_sync(0xffffffff, !merged) >> (threadIdx.x % 32 - lane + group);
      }
      weights[own_slot] = weigh_corners(corners, weight);
    }
    dots[own_slot] = {};
    __syncwarp();

    // The team walks over its channels, and for each vector of them over the points. A team of
    // fewer than 8 lanes holds all channels.
    const int32_t end_channel = kLanes < 8 ? 1 : p.channels;
    for (int32_t team_channel = 0; team_channel < end_channel; team_channel += kLanes * kVec) {
      const int32_t channel = team_channel + lane % kLanes * kVec;
      const bool has_channel = row.active() && channel < p.channels;
      const bool reads_value = has_channel && differentiates;
      const scalar_t* value = opaque(static_cast<const scalar_t*>(p.value) + origin + channel);
      acc* grad_value = opaque(static_cast<acc*>(p.grad_value) + origin + channel);
      acc grad[kVec] = {};
      if (has_channel) {
        Vector::load(static_cast<const scalar_t*>(p.grad_output) + row.index * p.channels + channel)
            .unpack(grad);
      }
      Vector corner[4];  // one outside the map is not loaded, and its dot product not used
#pragma unroll(kLanes < 32 ? kLanes : 4)  // 32 times would be up to 9000 instructions
      for (int i = 0; i < kLanes; ++i) {
        if (i * kSplit % 4 == 0 && first + i * kSplit >= all_points) break;
        const int slot = first_slot + (i * kSplit + group) * Layout::kPitch;
        const int4 offset4 = offsets[slot];
        const bool adds_point = has_channel && (adds >> i * kSplit & 1);
        const int32_t offset_of[4] = {offset4.x, offset4.y, offset4.z, offset4.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (offset_of[j] >= 0 && reads_value) {
            corner[j] = Vector::load(Indexing::at(p, value, offset_of[j]));
          }
        }
        acc dot[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc x[kVec];
          corner[j].unpack(x);
#pragma unroll
          for (int c = 0; c < kVec; ++c) dot[j] += grad[c] * x[c];
          if constexpr (kAdd) {
            const acc corner_weight = weights[slot].corner[j];
            acc add[kVec];
#pragma unroll
            for (int c = 0; c < kVec; ++c) add[c] = grad[c] * corner_weight;
            if (offset_of[j] >= 0 && adds_point) {
              atomic_add<kVec>(Indexing::at(p, grad_value, offset_of[j]), add);
            }
          }
        }
        reduce_corners<kLanes>(dot, lane);
#pragma unroll
        for (int j = 0; j < 4; j += kLanes) {
          if (lane % kLanes + j < 4) {
            dots[slot].corner[lane % kLanes + j] += dot[j / kLanes];
          }
        }
      }
    }

    // Each lane finishes its point.
    __syncwarp();
    if (has_point && differentiates) {
      PerCorner<acc> dot = dots[own_slot];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) dot.corner[j] = 0;
      }
      const int64_t point = row.index * all_points + first + lane;
      const LevelEntry& level = levels[cursor.level];
      const acc grad_weight = corners.sample(dot.corner);
      const bool bilinear = p.method == Method::bilinear;
      const acc grad_x = bilinear ? weight * corners.d_location_x(dot.corner, level) : 0;
      const acc grad_y = bilinear ? weight * corners.d_location_y(dot.corner, level) : 0;
      if constexpr (!kFused) {
        store_gradient<scalar_t, 1>(p.grad_attention_weights, p.attention_weights, point,
                                    {grad_weight});
        store_gradient<scalar_t, 2>(p.grad_sampling_locations, p.sampling_locations, point,
                                    {grad_x, grad_y});
      } else {
        gradients.at(p, RowGradients::kWeight, first + lane) = grad_weight;
        lane_sum += weight * grad_weight;
        // grad_x and grad_y are by location, which an offset of one moves by this much.
        const bool box = !kIfLeft && p.reference_coordinates == 4;
        const acc box_fraction = box ? level.units.box_fraction : 0;
        const acc move_x =
            box ? reference.width * box_fraction : 1 / static_cast<acc>(max(level.width, 1));
        const acc move_y =
            box ? reference.height * box_fraction : 1 / static_cast<acc>(max(level.height, 1));
        // Zero for a point outside the map, whose offset or box may not be finite.
        const bool inside = corners.first_pixel() != kOutside;
        store_gradient<scalar_t, 2>(p.grad_sampling_offsets, p.sampling_offsets, point,
                                    {inside ? grad_x * move_x : 0, inside ? grad_y * move_y : 0});
        if (p.grad_reference_points) {
          const auto keep = [&](int quantity, acc x) {
            gradients.at(p, quantity, first + lane) = x;
          };
          keep(RowGradients::kX, grad_x);
          keep(RowGradients::kY, grad_y);
          keep(RowGradients::kBoxWidth, inside ? grad_x * offset.x * box_fraction : 0);
          keep(RowGradients::kBoxHeight, inside ? grad_y * offset.y * box_fraction : 0);
        }
      }
    }
    cursor.advance(p, kTeam);
  }

  if constexpr (kFused) {
    if (differentiates) finish_fused_row<scalar_t, kTeam>(p, row, softmax, gradients, lane_sum);
  }
}

// ---------------------------------------------------------------------------------------- launcher

constexpr int kSharingLanes = 16;  // that share a row's points, where rows are few
constexpr int kFewPoints = 8;      // of a row, too few to share

// with_layout<scalar_t, kAdd>(p, plan, [&](auto vec, auto lanes, auto split) { ... }): the kernel's
// layout, as constants.
template <typename scalar_t, bool kAdd, typename Function>
auto with_layout(const BackwardParams& p, const BackwardPlan& plan, Function&& function) {
  // To add, a lane's channels fill 16 bytes of sums, so that what a team adds is contiguous.
  constexpr int kMaxVec = 16 / (kAdd ? sizeof(acc_t<scalar_t>) : sizeof(scalar_t));
  const auto unshared = std::integral_constant<int, 1>{};
  if (plan.scratch.row_gradients != Scratch::kNone) {
    return function(unshared, std::integral_constant<int, 32>{}, unshared);
  }
  return with_vectors<scalar_t, kMaxVec>(p, [&](auto vec, auto lanes) {
    if (plan.scratch.windows != Scratch::kNone) return function(vec, lanes, unshared);
    // Only for the 32 channels that most models have, so that the library stays small.
    if constexpr (vec.value * lanes.value == 32 && vec.value > 1) {
      if (count_rows(p) <= kFewRows && p.points > kFewPoints) {
        return function(vec, lanes, std::integral_constant<int, kSharingLanes / lanes.value>{});
      }
    }
    return function(vec, lanes, unshared);
  });
}

// The kernel for a problem, how it is launched, and what a block's RowGradients take besides.
struct PointsLaunch {
  void (*kernel)(BackwardParams, int64_t, void*, void*, bool);
  Grid grid;
  int64_t gradient_bytes;
};

PointsLaunch choose_kernel(const BackwardParams& p, const BackwardPlan& plan) {
  PointsLaunch result;
  with_types(p, [&](auto zero, auto source) {
    using scalar_t = decltype(zero);
    using acc = acc_t<scalar_t>;
    const auto choose = [&](auto add) {
      with_layout<scalar_t, add.value>(p, plan, [&](auto vec, auto lanes, auto split) {
        using Layout = cuda::Layout<lanes.value, split.value>;
        using RowGradients = cuda::RowGradients<acc, Layout::kTeams, vec.value == 1>;
        result = {
            points_kernel<scalar_t, source.value, vec.value, lanes.value, split.value, add.value>,
            {Layout::query_blocks(p), Layout::head_blocks(p), kThreads,
             p.levels * int64_t(sizeof(LevelEntry<scalar_t, source.value>)), plan.overlaps_sums},
            p.fused() ? RowGradients::of_block(p) * int64_t(sizeof(acc)) : 0};
        if constexpr (sizeof(scalar_t) == 2 && vec.value * lanes.value == UsualParams::channels &&
                      vec.value > 1 && split.value == 1 && !add.value && !kIsMixed<source.value>) {
          if (plan.scratch.windows == Scratch::kNone) return;
          result.kernel =
              points_kernel<scalar_t, source.value, vec.value, lanes.value, 1, false, true>;
          result.grid.overlaps_previous = DeviceLimits().overlaps_kernels;
        }
      });
    };
    if constexpr (!std::is_same_v<scalar_t, double>) {
      if (plan.strategy == Strategy::direct) return choose(std::true_type{});
    }
    choose(std::false_type{});
  });
  return result;
}

}  // namespace

// ----------------------------------------------------------------------------------------- entries

void plan_points(const BackwardParams& params, BackwardPlan& plan) {
  Scratch& scratch = plan.scratch;
  const bool has_successor = plan.strategy == Strategy::patches ||
                             plan.strategy == Strategy::scatter ||
                             plan.strategy == Strategy::gather || plan.merges_levels;
  plan.runs_points_kernel = wants_points(params) || plan.strategy == Strategy::direct ||
                            (params.fused() && has_successor);
  if (plan.strategy != Strategy::direct && wants_points(params)) {
    plan_points_windows(params, plan);
  }
  if (!params.fused() || !plan.runs_points_kernel) return;
  if (has_successor) {
    const int64_t size =
        params.value_dtype == DType::f64 ? sizeof(Softmax<double>) : sizeof(Softmax<float>);
    scratch.softmaxes = scratch.reserve(count_rows(params) * size);
  }
  const PointsLaunch usual = choose_kernel(params, plan);
  if (fits_shared_memory(usual.kernel, usual.grid.shared_memory + usual.gradient_bytes)) return;
  scratch.row_gradients = scratch.bytes;  // so that choose_kernel takes the kernel for it
  const PointsLaunch chosen = choose_kernel(params, plan);
  scratch.row_gradients = scratch.reserve(params.batch * chosen.grid.blocks_x *
                                          chosen.grid.blocks_y * chosen.gradient_bytes);
}

void launch_points(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  if (plan.scratch.windows != Scratch::kNone) launch_points_windows(params, plan, stream);
  PointsLaunch chosen = choose_kernel(params, plan);
  void* row_gradients = in_scratch<void>(params, plan.scratch.row_gradients);
  if (!row_gradients) chosen.grid.shared_memory += chosen.gradient_bytes;
  launch(chosen.kernel, params, chosen.grid, stream,
         in_scratch<void>(params, plan.scratch.softmaxes), row_gradients, plan.merges_levels);
}

}  // namespace ms_deform_attn::cuda
