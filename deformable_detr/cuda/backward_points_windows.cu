// The gradients of points of an encoder in half types, over windows of value in shared memory
// (windows.cuh), on tensor cores.
//
// A warp takes a stage of four queries. Each lane works out two adjacent points of a query in a
// level, and leaves in shared memory where they are. One load_matrices() then brings two points: of
// each its four corners' four pieces of 16 bytes, as rows of eight channels. In the multiplication,
// a row of `a` is a corner with one half of its channels:
//
//     0..3    corners of the first point, first half of the channels
//     4..7    the same, second half
//     8..15   the second point
//
// and two columns of `b` are a query's grad_output: the first half of the channels, and the second.
// So an element of the product is a half of a dot product where row and column are the same half's.
// Products of half types are exact, and their sums are in float. The columns of other queries are
// zeros, so that the products of four queries are collected in one accumulator.
//
// Points outside the windows are done by plain arithmetic, and so are all points of a stage that
// has a dot product that is not finite: there, zeros times an infinity may be NaN.
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/window_copies.cuh"
#include "deformable_detr/cuda/window_pairs.cuh"

namespace ms_deform_attn::cuda {
namespace {

// Serves a region's queries for one head. softmaxes: as points_kernel has them.
template <typename scalar_t, bool kFused, int kLevels>
__global__ void __launch_bounds__(kWindowThreads, kWindowBlocks)
    points_windows_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch,
                          WindowLayout layout, Softmax<float>* softmaxes) {
#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
  using Memory = PlacesMemory<kLevels>;
  using Pair = PointPair<scalar_t>;
  // Of the first four levels, and of the fifth.
  constexpr int kPairs = kLevels == 5 ? 2 : 1;
  extern __shared__ __align__(128) char memory[];
  __shared__ Cut<kLevels> cut;
  __shared__ Region<kLevels> region;

  const int warp = threadIdx.x / 32;
  const uint32_t memory_at = shared_address(memory);
  const int32_t index = blockIdx.x / p.heads, head = blockIdx.x - index * p.heads;
  const int64_t batch = first_batch + blockIdx.z;
  const scalar_t* const value =
      static_cast<const scalar_t*>(p.value) + (batch * p.spatial_size * p.heads + head) * 32;
  if (!prepare_windows<scalar_t, kFused>(p, layout, cut, region, memory, index, batch, head,
                                         kMostMissedBackward<kFused>, value)) {
    return;
  }

  // What this lane works out: query t of a stage, two points of level c. The lanes of the first
  // level work out the fifth's, too.
  const int lane = pinned(threadIdx.x % 32);
  const int g = lane / 4, t = lane % 4, c = g % 4, upper = lane / 16;
  const bool has[2] = {c < kLevels, c == 0};
  const int own_level = min(c, kLevels - 1), own_point = own_level * 4 + upper * 2;
  const uint32_t zeros = cut.zeros / 16;
  const auto level_of = [&](int level) {
    return level_of_lane(cut.levels[level], region.frames[level]);
  };
  LevelOfLane own = level_of(own_level);
  own = {{pinned(own.level.height), pinned(own.level.width), 0},
         pinned(own.first_x),
         pinned(own.last_x),
         pinned(own.first_y),
         pinned(own.last_y),
         pinned(own.pitch),
         pinned(own.start)};
  const uint32_t places = pinned(memory_at + warp * Memory::kBytes);
  const uint32_t own_place = pinned(places + upper * Memory::kHalf + c * 16 + t * 4);

  // What it is for the multiplication.
  const uint32_t read_places = pinned(places + lane / 8 % 2 * Memory::kHalf);
  uint32_t corner_at[kLevels];
#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    const int corner = (lane ^ l) % 4, piece = lane % 8 / 4 * 2 + lane / 16;
    corner_at[l] = pinned(memory_at + corner / 2 * cut.pitch[l] +
                          corner % 2 * kPixelBytes<scalar_t> + piece * 16);
  }

  // All tensors of queries have fewer than 2^31 elements, see find_layout().
  const int32_t first_query = static_cast<int32_t>(batch * p.queries);
  const int32_t first_row = first_query * p.heads + head;
  const int32_t first_point = first_row * (kLevels * 4) + own_point;
  const int32_t points_pitch = p.heads * (kLevels * 4);
  const int32_t reference_step = p.reference_levels > 1;
  const int32_t first_word = first_row * 16 + g % 2 * 8 + t;  // of grad_output
  const scalar_t* const xy_at =
      static_cast<const scalar_t*>(kFused ? p.sampling_offsets.data : p.sampling_locations.data);
  const scalar_t* const weights_at =
      static_cast<const scalar_t*>(kFused ? p.attention_logits.data : p.attention_weights.data);
  scalar_t* const grad_xy_at =
      static_cast<scalar_t*>(kFused ? p.grad_sampling_offsets : p.grad_sampling_locations);
  scalar_t* const grad_weights_at =
      static_cast<scalar_t*>(kFused ? p.grad_attention_logits : p.grad_attention_weights);

  constexpr uint32_t kStep = kWindowWarps * kStageQueries * 4;
  const uint32_t list_at = memory_at + layout.list;
  const uint32_t list_end = list_at + region.count * 4;
  uint32_t at = list_at + (warp * kStageQueries + t) * 4;
  const uint32_t to_column = (g / 2 - t) * 4;
  int32_t next_query;
  Pair next[kPairs];
  uint2 next_b;
  // fifth: of the fifth level.
  const auto read_pair = [&](int32_t query, int fifth) {
    const int32_t point = first_point + query * points_pitch + fifth * 16;
    Pair pair{Vec<scalar_t, 4>::load(xy_at + point * 2),
              Vec<scalar_t, 2>::load(weights_at + point)};
    if constexpr (kFused) {
      const int32_t level = reference_step * (own_level + fifth * 4);
      const int32_t at = (first_query + query) * p.reference_levels + level;
      pair.reference =
          pair.reference.load(static_cast<const scalar_t*>(p.reference_points.data) + at * 2);
    }
    return pair;
  };
  const auto read_next = [&](uint32_t from) {
    next_query = load_shared_word(min(from, list_end - 4));
    next[0] = read_pair(next_query, 0);
    if (kPairs == 2 && has[1]) next[kPairs - 1] = read_pair(next_query, 1);
    const int32_t of_column = load_shared_word(min(from + to_column, list_end - 4));
    const uint32_t* const words =
        static_cast<const uint32_t*>(p.grad_output) + (first_word + of_column * (p.heads * 16));
    next_b = make_uint2(__ldg(words), __ldg(words + 4));
  };

  // Works out a pair of points, and leaves their places.
  const auto place = [&](const Pair& pair, const LevelOfLane& of, bool exists, uint32_t to) {
    PairOfCorners placed;
    uint32_t of_points[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Position<float> position = pair.template position<kFused>(i, of.level);
      const float column = position.x.floor, row = position.y.floor;
      const bool inside = exists && column >= of.first_x && column <= of.last_x &&
                          row >= of.first_y && row <= of.last_y;
      const float piece = fmaf(row, of.pitch, fmaf(column, kPieces, of.start));
      of_points[i] = inside ? __float2uint_rz(piece) : zeros;
      placed.inside[i] = inside;
      placed.missed[i] = exists && !inside && position.x.touches(of.level.width) &&
                         position.y.touches(of.level.height);
      placed.of[i].right = inside ? position.x.fraction : 0;
      placed.of[i].down = inside ? position.y.fraction : 0;
    }
    if (exists) store_shared(to, of_points[0] | of_points[1] << 16);
    return placed;
  };

  // The dot products of a level's points, of which each lane gets a corner.
  uint2 b[kStageQueries];
  const auto multiply = [&](int l, float& first, float& second) {
    const uint4 of_level = load_shared(read_places + l * 16);
    const uint32_t of_query[4] = {of_level.x, of_level.y, of_level.z, of_level.w};
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int q = 0; q < kStageQueries; ++q) {
      uint32_t a[4];
      load_matrices<false>(a, __byte_perm(of_query[q], 0, 0x4410) * 16 + corner_at[l]);
      multiply_add<scalar_t>(low, a, b[q].x, b[q].y);
      load_matrices<false>(a, __byte_perm(of_query[q], 0, 0x4432) * 16 + corner_at[l]);
      multiply_add<scalar_t>(high, a, b[q].x, b[q].y);
    }
    first = add_halves(low, lane);
    second = add_halves(high, lane);
  };

  // By plain arithmetic, the dot products of points that windows miss, or of all: of two lanes at a
  // time. Their points are read again, so that nobody keeps them.
  const auto redo = [&](PairOfCorners(&placed)[kPairs], float (&dots)[kPairs][2][4], int32_t query,
                        bool all) {
    int left = 0;  // a bit for each of this lane's points
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        left |= (all ? has[k] : placed[k].missed[i]) << (2 * k + i);
      }
    }
    for (;;) {
      const unsigned lanes = __ballot_sync(kAllLanes, left != 0), others = lanes & (lanes - 1);
      if (lanes == 0) break;
      const int one = __ffs(lanes) - 1, two = others != 0 ? __ffs(others) - 1 : one;
      const int own_bit = left & -left;
      const int fifth = kPairs == 2 && own_bit > 2;
      Pair pair{};
      if (left != 0) pair = read_pair(query, fifth);
      if ((own_bit & 10) != 0) pair.xy.bits.x = pair.xy.bits.y;
      const Level level = cut.levels[fifth ? 4 : own_level];
      const Position<float> position = pair.template position<kFused>(0, level);
      const Corners<float> corners(position.x, position.y, level);
      const int from = upper ? two : one;
      int32_t pixel = kOutside;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int32_t of_corner = __shfl_sync(kAllLanes, corners.pixel[k], from);
        if (c == k) pixel = of_corner;
      }
      const int32_t row = __shfl_sync(kAllLanes, query, from);
      float dot = 0;
      if (pixel != kOutside) {
        float x[8], grad[8];
        const int64_t channel = int64_t(head) * 32 + t * 8;
        Vec<scalar_t, 8>::load(static_cast<const scalar_t*>(p.value) +
                               (batch * p.spatial_size + pixel) * (p.heads * 32) + channel)
            .unpack(x);
        Vec<scalar_t, 8>::load(static_cast<const scalar_t*>(p.grad_output) +
                               (batch * p.queries + row) * (p.heads * 32) + channel)
            .unpack(grad);
#pragma unroll
        for (int i = 0; i < 8; ++i) dot += grad[i] * x[i];
      }
      dot = team_sum<4>(dot);
      const bool mine = lane == one || lane == two;
      float of_corners[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        of_corners[k] = __shfl_sync(kAllLanes, dot, (lane == one ? 0 : 16) + k * 4);
      }
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!mine || own_bit != 1 << (2 * k + i)) continue;
          placed[k].inside[i] = corners.first_pixel() != kOutside;
          placed[k].of[i].right = corners.right;
          placed[k].of[i].down = corners.down;
#pragma unroll
          for (int j = 0; j < 4; ++j) dots[k][i][j] = of_corners[j];
        }
      }
      if (mine) left ^= own_bit;
    }
  };

  // Stores a pair's gradients, and returns the reference point's.
  const auto store = [&](const PairOfCorners& placed, const float (&dots)[2][4],
                         const float (&grad_weights)[2], const Level& level, int32_t point) {
    float grad_xy[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      grad_xy[2 * i] = placed.weight[i] * placed.of[i].d_location_x(dots[i], level);
      grad_xy[2 * i + 1] = placed.weight[i] * placed.of[i].d_location_y(dots[i], level);
    }
    const float2 of_reference = make_float2(grad_xy[0] + grad_xy[2], grad_xy[1] + grad_xy[3]);
    if constexpr (kFused) {
      // An offset of one is a pixel. Zero for a point outside the map.
      const float move_x = __fdividef(1, max(level.width, 1));
      const float move_y = __fdividef(1, max(level.height, 1));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        grad_xy[2 * i] = placed.inside[i] ? grad_xy[2 * i] * move_x : 0;
        grad_xy[2 * i + 1] = placed.inside[i] ? grad_xy[2 * i + 1] * move_y : 0;
      }
    }
    Vec<scalar_t, 2>::pack(grad_weights).store(grad_weights_at + point);
    Vec<scalar_t, 4>::pack(grad_xy).store(grad_xy_at + point * 2);
    return of_reference;
  };

  read_next(at);
  wait_for_copies();
  __syncthreads();

  for (; __any_sync(kAllLanes, at < list_end); at += kStep) {
    const int32_t query = next_query;
    const bool active = at < list_end;
    const Pair pairs[2] = {next[0], next[kPairs - 1]};
    PairOfCorners placed[kPairs];
    LevelOfLane levels[2] = {own};
    if constexpr (kPairs == 2) levels[1] = level_of(4);
#pragma unroll
    for (int q = 0; q < kStageQueries; ++q) {
      b[q].x = g / 2 == q ? next_b.x : 0;
      b[q].y = g / 2 == q ? next_b.y : 0;
    }
    read_next(at + kStep);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      placed[k] = place(pairs[k], levels[k], has[k], own_place + k * 64);
      pairs[k].weights.unpack(placed[k].weight);
    }
    __syncwarp();

    if constexpr (kFused) {
      // So far, the weights are logits.
      Softmax<float> softmax{-INFINITY, 1};
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!has[k]) placed[k].weight[i] = -INFINITY;
          softmax.largest = max(softmax.largest, placed[k].weight[i]);
        }
      }
      softmax.largest = query_max(softmax.largest);
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        sum += softmax.weight(placed[k].weight[0]) + softmax.weight(placed[k].weight[1]);
      }
      softmax.scale = __fdividef(1, query_sum(sum));
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) placed[k].weight[i] = softmax.weight(placed[k].weight[i]);
      }
      if (softmaxes != nullptr && g == 0 && active) {
        softmaxes[first_row + query * p.heads] = softmax;
      }
    }

    float dots[kPairs][2][4] = {};
#pragma unroll
    for (int l = 0; l < min(kLevels, 4); ++l) multiply(l, dots[0][0][l], dots[0][1][l]);
    exchange_corners(dots[0][0], lane);
    exchange_corners(dots[0][1], lane);
    if constexpr (kPairs == 2) {
      multiply(4, dots[1][0][0], dots[1][1][0]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int k = 1; k < 4; ++k) {
          dots[1][i][k] = __shfl_xor_sync(kAllLanes, dots[1][i][0], k * 4);
        }
      }
    }

    float grad_weights[kPairs][2];
    const auto sample = [&] {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum += grad_weights[k][i] = placed[k].of[i].sample(dots[k][i]);
        }
      }
      return sum;
    };
    // What is not finite of the dot products is in the samples, too.
    const bool finite = fabsf(sample()) < INFINITY;
    bool missed = false;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) missed |= placed[k].missed[0] || placed[k].missed[1];
    if (__any_sync(kAllLanes, missed || !finite)) {
      redo(placed, dots, query, __any_sync(kAllLanes, !finite));
      sample();
    }

    const int32_t point = first_point + query * points_pitch;
    if constexpr (kFused) {
      float of_row = 0;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (has[k]) of_row += placed[k].weight[i] * grad_weights[k][i];
        }
      }
      of_row = query_sum(of_row);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          grad_weights[k][i] = placed[k].weight[i] * (grad_weights[k][i] - of_row);
        }
      }
    }
    float2 grad_reference[kPairs] = {};
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (active && has[k]) {
        grad_reference[k] =
            store(placed[k], dots[k], grad_weights[k], levels[k].level, point + k * 16);
      }
    }
    if constexpr (kFused) {
      if (p.grad_reference_points == nullptr) continue;
      float* const to = static_cast<float*>(p.grad_reference_points) +
                        (first_row + query * p.heads) * p.reference_levels * 2;
      if (reference_step) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          const float x = grad_reference[k].x + __shfl_xor_sync(kAllLanes, grad_reference[k].x, 16);
          const float y = grad_reference[k].y + __shfl_xor_sync(kAllLanes, grad_reference[k].y, 16);
          if (active && has[k] && !upper) {
            Vec<float, 2>::pack({x, y}).store(to + (own_level + k * 4) * 2);
          }
        }
      } else {
        float x = grad_reference[0].x, y = grad_reference[0].y;
        if constexpr (kPairs == 2) {
          x += grad_reference[1].x;
          y += grad_reference[1].y;
        }
        x = query_sum(x);
        y = query_sum(y);
        if (active && g == 0) Vec<float, 2>::pack({x, y}).store(to);
      }
    }
  }
#endif
}

// ------------------------------------------------------------------------------------------- entry

// To choose, and to end the blocks of a call that is left, takes some 12 us.
WindowLayout find_layout(const Params& p) {
  if (!is_half(p.value_dtype)) return {};
  if (count_rows(p) * std::max(2 * p.points, p.channels) > INT32_MAX) return {};
  return find_windows(p, {kWindowBlocks, kWindowWarps * PlacesMemory<5>::kBytes, 1, 8}, 16384,
                      false);
}

}  // namespace

void plan_points_windows(const BackwardParams& params, BackwardPlan& plan) {
  plan.windows = find_layout(params);
  const int64_t bytes = windows_scratch(params, plan.windows);
  if (bytes > 0) plan.scratch.windows = plan.scratch.reserve(bytes);
}

void launch_points_windows(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  launch_choice(params, plan.windows, stream);
  with_windows(params, [&](auto zero, auto fused, auto levels) {
    launch(points_windows_kernel<decltype(zero), fused.value, levels.value>, params,
           windows_grid(params, plan.windows), stream, plan.windows,
           in_scratch<Softmax<float>>(params, plan.scratch.softmaxes));
  });
}

}  // namespace ms_deform_attn::cuda
