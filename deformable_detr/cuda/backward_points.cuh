// The gradients of points.
#pragma once

#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {

// ----------------------------------------------------------------------------------------- overlap

// points_kernel and the kernel after it are independent, unless fused. On sm_90 the second may
// start while the first still runs, and ends after it.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------ output

// The gradients of a weight or a logit, and of a location or an offset, in the operand's dtype.
template <typename scalar_t>
__device__ __forceinline__ void store_weight(void* grad, DType dtype, int64_t point,
                                             acc_t<scalar_t> x) {
  if (dtype == DType::f32) {
    static_cast<float*>(grad)[point] = static_cast<float>(x);
  } else {
    static_cast<scalar_t*>(grad)[point] = from_acc<scalar_t>(x);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store_location(void* grad, DType dtype, int64_t point,
                                               const Location<acc_t<scalar_t>>& x) {
  if (dtype == DType::f32) {
    const float xy[2] = {static_cast<float>(x.x), static_cast<float>(x.y)};
    Vec<float, 2>::pack(xy).store(static_cast<float*>(grad) + 2 * point);
  } else {
    const acc_t<scalar_t> xy[2] = {x.x, x.y};
    Vec<scalar_t, 2>::pack(xy).store(static_cast<scalar_t*>(grad) + 2 * point);
  }
}

// ----------------------------------------------------------------------------------- points kernel

// Adds up four numbers over a team. Halves are exchanged instead of copied where possible: lane l
// ends up with the total of number l % 4 (of a team of two: of l and l + 2).
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

// What the fused backward keeps of a row's points until it has seen all: in shared memory, for each
// number and point one of each team, side by side.
template <typename acc, int kTeams>
struct Kept {
  acc* of_team;
  static constexpr int kNumbers = 5;  // grad_weight; grad of the reference point's x, y, box

  static int64_t bytes(const BackwardParams& p) {
    if (!p.fused()) return 0;
    return int64_t(p.grad_reference_points ? kNumbers : 1) * p.points * kTeams * sizeof(acc);
  }
  __device__ __forceinline__ acc& at(const Params& p, int number, int32_t point) const {
    return of_team[(number * p.points + point) * kTeams];
  }
};

// kAdd: adds to grad_value, too. kSplit: groups of lanes that share a row's points.
template <typename scalar_t, Source kSource, int kVec, int kLanes, int kSplit, bool kAdd>
__global__ void __launch_bounds__(kThreads, kAdd ? 3 : 4)
    points_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Layout = cuda::Layout<kLanes, kSplit>;
  constexpr int kTeam = Layout::kTeam;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  constexpr bool kFused = kIsFused<kSource>;
  extern __shared__ __align__(32) char memory[];
  __shared__ int4 offsets[Layout::kSlots];                      // of each corner in value
  __shared__ PerCorner<acc> shares[kAdd ? Layout::kSlots : 1];  // times the point's weight
  __shared__ PerCorner<acc> dots[Layout::kSlots];  // of grad_output with value at each corner
  LevelOf<scalar_t, kSource>* levels = reinterpret_cast<LevelOf<scalar_t, kSource>*>(memory);
  const Kept<acc, Layout::kTeams> kept{reinterpret_cast<acc*>(levels + p.levels) +
                                       threadIdx.x / kTeam};

  let_next_kernel_start();
  const int lane = threadIdx.x % kTeam, group = lane / kLanes;
  const int32_t all_points = p.points;
  const int first_slot = Layout::first_slot();
  const int own_slot = first_slot + lane * Layout::kPitch;
  const bool strips = queries_are_pixels(p);

  Work work = find_work<Layout>(p, blockIdx.x);
  PointReader<scalar_t, kSource> next;
  const auto start = [&] {
    next.start(p, work.row, work.query_row(p), lane);
    if (lane < work.points) next.read(p);
  };
  // The first points are on their way while the levels arrive.
  LevelLoader<LevelOf<scalar_t, kSource>> level_loader;
  level_loader.load(p);
  if (!strips) start();
  level_loader.store(p, levels);
  if (strips) {
    follow_strips(p, levels, work);
    start();
  }
  Softmax<acc> softmax;
  acc kept_sum = 0;  // of weight times its gradient, over this lane's points
  if constexpr (kFused) {
    softmax = find_softmax<scalar_t, kTeam>(p, work.row);
    if (!kAdd && lane == 0 && work.active()) softmaxes<scalar_t>(p)[work.row] = softmax;
  }

  const int64_t origin = (work.batch * p.spatial_size * p.heads + work.head) * p.channels;
  PointCursor cursor(p, lane);
  for (int32_t first = 0; first < all_points; first += kTeam) {
    // Each lane works out one point.
    const bool has_point = first + lane < work.points;
    Corners<acc> corners;
    Location<acc> offset = {};  // fused
    Reference<acc> reference = {};
    acc weight = 0;
    if (has_point) {
      weight = find_weight(p, next, softmax);
      corners = place(p, next, cursor.level, levels[cursor.level]);
      if constexpr (kFused) {
        offset = next.location(p);
        reference = next.reference(p, cursor.level);
      }
    }
    next.skip(p, kTeam);
    if (first + kTeam + lane < work.points) next.read(p);
    __syncwarp();
    offsets[own_slot] = Rows::offsets(p, corners.pixel);
    if constexpr (kAdd) {
#pragma unroll
      for (int j = 0; j < 4; ++j) shares[own_slot].corner[j] = weight * corners.share(j);
    }
    dots[own_slot] = {};
    __syncwarp();

    // The team walks over the channels, and for each part of them over the points.
    for (int32_t part = 0; part < p.channels; part += kLanes * kVec) {
      const int32_t channel = part + lane % kLanes * kVec;
      const bool has_channel = work.active() && channel < p.channels;
      const scalar_t* value = settled(static_cast<const scalar_t*>(p.value) + origin + channel);
      acc* grad_value = settled(static_cast<acc*>(p.grad_value) + origin + channel);
      acc grad[kVec] = {};
      if (has_channel) {
        Row::load(static_cast<const scalar_t*>(p.grad_output) + work.row * p.channels + channel)
            .unpack(grad);
      }
      Row corner[4];  // outside: not loaded, and the dot product not used
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (i * kSplit % 4 == 0 && first + i * kSplit >= all_points) break;
        const int slot = first_slot + (i * kSplit + group) * Layout::kPitch;
        const int4 offset = offsets[slot];
        const int32_t offset_of[4] = {offset.x, offset.y, offset.z, offset.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (offset_of[j] >= 0 && has_channel) {
            corner[j] = Row::load(Rows::at(p, value, offset_of[j]));
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
            const acc share = shares[slot].corner[j];
            acc add[kVec];
#pragma unroll
            for (int c = 0; c < kVec; ++c) add[c] = grad[c] * share;
            if (offset_of[j] >= 0 && has_channel) {
              atomic_add<kVec>(Rows::at(p, grad_value, offset_of[j]), add);
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
    if (has_point) {
      PerCorner<acc> dot = dots[own_slot];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) dot.corner[j] = 0;
      }
      const int64_t point = work.row * all_points + first + lane;
      const LevelOf<scalar_t, kSource>& level = levels[cursor.level];
      const acc grad_weight = corners.sample(dot.corner);
      const bool bilinear = p.method == Method::bilinear;
      const acc grad_x = bilinear ? weight * corners.d_location_x(dot.corner, level) : 0;
      const acc grad_y = bilinear ? weight * corners.d_location_y(dot.corner, level) : 0;
      if constexpr (!kFused) {
        store_weight<scalar_t>(p.grad_attention_weights, p.attention_weights.dtype, point,
                               grad_weight);
        store_location<scalar_t>(p.grad_sampling_locations, p.sampling_locations.dtype, point,
                                 {grad_x, grad_y});
      } else {
        kept.at(p, 0, first + lane) = grad_weight;
        kept_sum += weight * grad_weight;
        // grad_x and grad_y are by location; an offset of one moves that by this much.
        const bool box = p.reference_coordinates == 4;
        const acc box_share = box ? level.units.box_share : 0;
        const acc move_x =
            box ? reference.width * box_share : 1 / static_cast<acc>(max(level.width, 1));
        const acc move_y =
            box ? reference.height * box_share : 1 / static_cast<acc>(max(level.height, 1));
        // Nothing for a point outside: it may not be finite.
        const bool inside = corners.first_pixel() != kOutside;
        store_location<scalar_t>(p.grad_sampling_offsets, p.sampling_offsets.dtype, point,
                                 {inside ? grad_x * move_x : 0, inside ? grad_y * move_y : 0});
        if (p.grad_reference_points) {
          kept.at(p, 1, first + lane) = grad_x;
          kept.at(p, 2, first + lane) = grad_y;
          kept.at(p, 3, first + lane) = inside ? grad_x * offset.x * box_share : 0;
          kept.at(p, 4, first + lane) = inside ? grad_y * offset.y * box_share : 0;
        }
      }
    }
    cursor.advance(p, kTeam);
  }

  if constexpr (kFused) {
    // grad_logit = weight * (grad_weight - sum of weight * grad_weight).
#pragma unroll
    for (int offset = 1; offset < kTeam; offset *= 2) {
      kept_sum += __shfl_xor_sync(0xffffffff, kept_sum, offset);
    }
    __syncwarp();
    for (int32_t i = lane; i < work.points; i += kTeam) {
      const int64_t point = work.row * all_points + i;
      const acc weight = softmax.weight(load_operand<scalar_t>(p.attention_logits, point));
      store_weight<scalar_t>(p.grad_attention_logits, p.attention_logits.dtype, point,
                             weight * (kept.at(p, 0, i) - kept_sum));
    }
    if (p.grad_reference_points && work.active()) {
      const int32_t numbers = p.reference_levels * p.reference_coordinates;
      for (int32_t i = lane; i < numbers; i += kTeam) {
        const int32_t level = i / p.reference_coordinates;
        const int number = i - level * p.reference_coordinates + 1;
        int32_t point = 0;
        for (int32_t l = 0; l < level; ++l) point += points_of_level(p, l);
        const int32_t end = p.reference_levels > 1 ? point + points_of_level(p, level) : all_points;
        acc sum = 0;
        for (; point < end; ++point) sum += kept.at(p, number, point);
        static_cast<acc*>(p.grad_reference_points)[work.row * numbers + i] = sum;
      }
    }
  }
}

constexpr char kTooManyPoints[] =
    "attention_logits has too many points for the shared memory of this GPU";

template <typename scalar_t, int kVec, int kLanes, int kSplit, bool kAdd>
const char* launch_points(const BackwardParams& p, void* stream) {
  using Layout = cuda::Layout<kLanes, kSplit>;
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t bytes = p.levels * sizeof(LevelOf<scalar_t, source.value>) +
                          Kept<acc_t<scalar_t>, Layout::kTeams>::bytes(p);
    const auto kernel = points_kernel<scalar_t, source.value, kVec, kLanes, kSplit, kAdd>;
    const char* error = allow_shared_memory(kernel, bytes, kTooManyPoints);
    if (error) return error;
    return launch(kernel, p, tile_blocks<Layout>(p, 1), head_blocks<Layout>(p), kThreads, bytes,
                  false, stream);
  });
}

constexpr int kSharing = 16;   // lanes that share a row's points, where rows are few
constexpr int kFewPoints = 8;  // of a row, too few to share

template <typename scalar_t, int kMax, bool kAdd>
const char* launch_points(const BackwardParams& p, void* stream) {
  const char* error = with_row<scalar_t, kMax>(p, [&](auto vec, auto lanes) {
    constexpr int kVec = vec.value, kLanes = lanes.value;
    // In the kernels for the 32 channels that most models have, so that the library stays small.
    if constexpr (kVec * kLanes == 32 && kVec > 1) {
      if (p.batch * p.queries * p.heads <= kFewRows && p.points > kFewPoints) {
        return launch_points<scalar_t, kVec, kLanes, kSharing / kLanes, kAdd>(p, stream);
      }
    }
    return launch_points<scalar_t, kVec, kLanes, 1, kAdd>(p, stream);
  });
  // Fused, a block keeps its rows' points: then fewer rows a block.
  return error == kTooManyPoints ? launch_points<scalar_t, 1, 32, 1, kAdd>(p, stream) : error;
}

}  // namespace ms_deform_attn::cuda
