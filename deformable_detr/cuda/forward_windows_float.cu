// The forward of an encoder in float, over windows of value in shared memory (windows.cuh).
//
// A pixel has twice a half type's bytes: were there two blocks a multiprocessor, regions would be
// so small that preparing one takes long beside its queries. So a block has all of the shared
// memory, and stays (window_items.cuh). On an H100, 2026-11-28, ddetr_encoder_b4 takes 301 us so,
// and 319 with twice as many blocks that serve a region each.
//
// To sum, a warp takes a stage of 32 points, of two queries or, with one level, of eight:
//
//     leave points    each lane works out a point, and leaves its place and shares in shared
//                     memory; its point of the next stage was read long before
//     add outside     corners of points that lie outside their windows, from memory
//     add up          each of four teams of 8 lanes, which hold a pixel's channels, takes 8 points
//     store rows
//
// With five levels, every fourth time the fifth level's points of eight queries are left as well,
// which are those of four stages. A corner takes shared memory a cycle, and that is what limits
// this kernel.
#include "deformable_detr/cuda/window_items.cuh"

namespace ms_deform_attn::cuda {

// ------------------------------------------------------------------------------------------- stage

// How a stage's points are shared out. Each has a slot of 16 bytes: the attention weight, split
// into what goes to the point's north and south, the distance from its western corners, and its
// place. A team's slots are adjacent, and a gap after them keeps the teams in different banks.
template <int kLevels>
struct FloatStage {
  static constexpr int kPoints = kLevels == 1 ? 4 : 16;  // of a query, at most
  static constexpr int kQueries = 32 / kPoints;
  static constexpr int kTeamQueries = kLevels == 1 ? 2 : 1;  // whose points a team has
  static constexpr int kQueryTeams = kLevels == 1 ? 1 : 2;   // that share a query's points
  static constexpr int kSteps = kLevels == 3 ? 6 : 8;        // points of a team
  static constexpr int kSlot = 16, kTeamBytes = 8 * kSlot + 16;
  // The fifth level's slots, of a team two for each of four stages.
  static constexpr int kFifth = 4 * kTeamBytes;
  static constexpr int kBytes = kFifth + (kLevels == 5 ? 32 * kSlot : 0);

  // What a lane works out: a point of a stage's queries. Of two teams that share a query, each has
  // every second point.
  static __device__ __forceinline__ int query(int lane) { return lane / kPoints; }
  static __device__ __forceinline__ int point(int lane) {
    return kQueryTeams == 2 ? lane % 8 * 2 + lane / 8 % 2 : lane % kPoints;
  }
};

// How a point of a level finds its place in the window, in bytes.
struct FloatFrame {
  int32_t width, height;  // of the level
  float shift_x, shift_y;
  float last_x, last_y;
  float pitch, start;

  __device__ __forceinline__ FloatFrame(const Level& level, const Frame& frame)
      : width(level.width),
        height(level.height),
        shift_x(frame.shift_x + 0.5f),
        shift_y(frame.shift_y + 0.5f),
        last_x(frame.last_x),
        last_y(frame.last_y),
        pitch(frame.pitch * 16),
        start(frame.start * 16) {}

  __device__ __forceinline__ void pin() {
    width = pinned(width), height = pinned(height);
    shift_x = pinned(shift_x), shift_y = pinned(shift_y);
    last_x = pinned(last_x), last_y = pinned(last_y);
    pitch = pinned(pitch), start = pinned(start);
  }
};

// ------------------------------------------------------------------------------------------ points

// Reads points of listed queries: a lane its own point of each query.
template <bool kFused, int kLevels>
class OwnPointReader {
 public:
  // As they are stored. Fused, xy is the offset and weight the logit.
  struct Stored {
    Vec<float, 2> xy, reference;
    float weight;
  };

  __device__ __forceinline__ OwnPointReader(const Params& p, int64_t batch, int32_t head,
                                            int32_t point)
      : heads_points_(p.heads * kPoints),
        reference_levels_(p.reference_levels),
        reference_step_(p.reference_levels > 1 ? 2 : 0) {
    const int64_t first = (batch * p.queries * p.heads + head) * kPoints + point;
    const Operand& xy = kFused ? p.sampling_offsets : p.sampling_locations;
    const Operand& weights = kFused ? p.attention_logits : p.attention_weights;
    xy_ = pinned(static_cast<const float*>(xy.data) + first * 2);
    weights_ = pinned(static_cast<const float*>(weights.data) + first);
    references_ = static_cast<const float*>(p.reference_points.data) +
                  (batch * p.queries * p.reference_levels) * 2 + point / 4 * reference_step_;
  }
  __device__ __forceinline__ Stored read(int32_t query) const {
    Stored point{};
    point.xy = point.xy.load(xy_ + int64_t(query) * heads_points_ * 2);
    point.weight = __ldg(weights_ + int64_t(query) * heads_points_);
    if constexpr (kFused) {
      point.reference = point.reference.load(references_ + int64_t(query) * reference_levels_ * 2);
    }
    return point;
  }
  // The point that is so many points further, in another level.
  __device__ __forceinline__ OwnPointReader moved(int32_t points, int32_t levels) const {
    OwnPointReader other = *this;
    other.xy_ += points * 2;
    other.weights_ += points;
    other.references_ += levels * reference_step_;
    return other;
  }
  // Of four adjacent points, this being the first.
  __device__ __forceinline__ float largest_logit(int32_t query) const {
    float logits[4];
    Vec<float, 4>::load(weights_ + int64_t(query) * heads_points_).unpack(logits);
    return max(max(logits[0], logits[1]), max(logits[2], logits[3]));
  }

 private:
  static constexpr int kPoints = kLevels * 4;
  const float *xy_, *weights_, *references_;
  int32_t heads_points_, reference_levels_, reference_step_;
};

// ------------------------------------------------------------------------------------------ kernel

namespace {

// One block a multiprocessor has larger regions, whose windows exceed them by less. One level has
// few points a query to sum up while the other block fills.
template <int kLevels>
constexpr int kFloatBlocks = kLevels == 1 ? 2 : 1;
template <int kLevels>
constexpr int kFloatThreads = 768 / kFloatBlocks<kLevels>;

template <bool kFused, int kLevels>
__global__ void __launch_bounds__(kFloatThreads<kLevels>, kFloatBlocks<kLevels>)
    float_windows_kernel(const __grid_constant__ Params p, WindowLayout layout) {
#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
  using Stage = FloatStage<kLevels>;
  using Vector = Vec<float, 4>;
  using Indexing = cuda::Indexing<float, 4>;
  using OwnPoint = OwnPointReader<kFused, kLevels>;
  extern __shared__ __align__(128) char memory[];
  __shared__ WindowBlock<kLevels> block;
  const Cut<kLevels>& cut = block.cut;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = lane / 8;
  const uint32_t memory_at = shared_address(memory);

  const auto sum_up = [&](const WindowItem& item, const Region<kLevels>& region,
                          const float* value_of_head, uint32_t list_at, uint32_t list_end,
                          auto&& is_to_sum_up) {
    // This lane's point of a stage. The stage lies in the warp's memory.
    const int point = Stage::point(lane), own_query = Stage::query(lane);
    const bool has_point = point < kLevels * 4;
    const int own_index = min(point, kLevels * 4 - 1), own_level = own_index / 4;
    const OwnPoint own_point(p, item.batch, item.head, own_index);
    FloatFrame frame(cut.levels[own_level], region.frames[own_level]);
    frame.pin();
    const uint32_t zeros = cut.zeros;
    const uint32_t stage = pinned(memory_at + warp * Stage::kBytes);
    const uint32_t own_slot = pinned(stage + team * Stage::kTeamBytes + lane % 8 * Stage::kSlot);

    // What its team adds up, of which it has four channels.
    const uint32_t team_slots = pinned(stage + team * Stage::kTeamBytes);
    const uint32_t channels_at = pinned(memory_at + lane % 8 * 16);
    uint32_t pitch[kLevels];
#pragma unroll
    for (int l = 0; l < kLevels; ++l) pitch[l] = pinned(cut.pitch[l]);
    const float* const value = value_of_head + lane % 8 * 4;
    float* const output =
        pinned(static_cast<float*>(p.output) + (item.batch * p.queries * p.heads + item.head) * 32 +
               lane % 8 * 4);

    // In the list, the query of this lane's point.
    const uint32_t step = (blockDim.x / 32 - 1) * Stage::kQueries * 4;
    uint32_t at = list_at + (warp * Stage::kQueries + own_query) * 4;
    const auto listed_query = [&](uint32_t at) { return load_shared_word(min(at, list_end - 4)); };
    int32_t next_query = listed_query(at);
    typename OwnPoint::Stored next = own_point.read(next_query);
    if (!is_to_sum_up()) return;

    const auto position = [](const typename OwnPoint::Stored& of, const FloatFrame& frame) {
      float xy[2], reference[2];
      of.xy.unpack(xy);
      if constexpr (!kFused) {
        return Position<float>{Coordinate<float>(located_pixel(xy[0], frame.width)),
                               Coordinate<float>(located_pixel(xy[1], frame.height))};
      }
      of.reference.unpack(reference);
      return Position<float>{
          Coordinate<float>(moved_pixel(reference[0], frame.width, Exact<float>{xy[0], 0})),
          Coordinate<float>(moved_pixel(reference[1], frame.height, Exact<float>{xy[1], 0}))};
    };
    // Leaves a point in its slot. If it lies outside its window, `outside` gets its corners,
    // and the slot a place that is zero. Returns whether those that count of all lanes lie
    // inside.
    const auto leave_point = [&](const Position<float>& at, const FloatFrame& frame, int level,
                                 float weight, bool counts, uint32_t slot,
                                 Corners<float>& outside) {
      const float column = at.x.floor + frame.shift_x, row = at.y.floor + frame.shift_y;
      const bool in_window =
          column >= 0 && column <= frame.last_x && row >= 0 && row <= frame.last_y;
      float right = at.x.fraction, down = at.y.fraction;
      const bool all_in_windows = __all_sync(kAllLanes, in_window || !counts);
      if (!all_in_windows) {
        if (!in_window && counts) outside = Corners<float>(at.x, at.y, cut.levels[level]);
        if (!in_window) right = outside.right, down = outside.down;
      }
      const float to_south = weight * down, to_north = weight - to_south;
      const float place = fmaf(row, frame.pitch, fmaf(column, kPixelBytes<float>, frame.start));
      __syncwarp();
      store_shared(slot,
                   make_uint4(__float_as_int(to_north), __float_as_int(to_south),
                              __float_as_int(right), in_window ? __float2uint_rz(place) : zeros));
      __syncwarp();
      return all_in_windows;
    };

    // The fifth level's points of this stage and the next three. fifth_stage: of those, which
    // one this is.
    int fifth_stage = 0;
    [[maybe_unused]] float fifth_largest = 0;  // logit of all the query's points
    bool fifth_in_windows = true;
    Corners<float> fifth_outside;
    const auto leave_fifth_level = [&] {
      const int fifth_point = lane % 4;
      const FloatFrame of(cut.levels[4], region.frames[4]);
      const int32_t query = listed_query(at + (lane / 4 % 2 - own_query) * 4 + lane / 8 * step);
      const auto fifth = own_point.moved(16 + fifth_point - own_index, 4 - own_level).read(query);
      float weight = fifth.weight;
      if constexpr (kFused) {
        const OwnPoint first = own_point.moved(fifth_point * 4 - own_index, 0);
        fifth_largest = team_max<4>(max(first.largest_logit(query), weight));
        weight = exponential(weight - fifth_largest);
      }
      fifth_outside = {};
      fifth_in_windows = leave_point(position(fifth, of), of, 4, weight, true,
                                     stage + Stage::kFifth + lane * Stage::kSlot, fifth_outside);
    };

    for (; __any_sync(kAllLanes, at < list_end); at += step) {
      // Leave points.
      const int32_t query = next_query;
      if constexpr (kLevels == 5) {
        if (fifth_stage == 0) leave_fifth_level();
      }
      float weight = next.weight;
      if constexpr (kFused) {
        if (kLevels == 3 && !has_point) weight = -INFINITY;
        const float largest =
            kLevels == 5 ? __shfl_sync(kAllLanes, fifth_largest, fifth_stage * 8 + own_query * 4)
                         : team_max<Stage::kPoints>(weight);
        weight = exponential(weight - largest);
      }
      const Position<float> own = position(next, frame);
      next_query = listed_query(at + step);
      next = own_point.read(next_query);
      Corners<float> outside;
      const bool all_in_windows =
          leave_point(own, frame, own_level, weight, has_point, own_slot, outside);

      // Add outside: a team's points one after the other, of those that the lanes from `first`
      // on have left in the slots from `slots` on.
      float sums[Stage::kTeamQueries][4] = {};
      [[maybe_unused]] float weights[Stage::kTeamQueries] = {};
      const auto add_outside = [&](const Corners<float>& outside, unsigned lanes, int first,
                                   uint32_t slots) {
        unsigned left = __ballot_sync(kAllLanes, outside.first_pixel() != kOutside);
        left = left >> first & lanes;
        while (__any_sync(kAllLanes, left != 0)) {
          const int i = left != 0 ? __ffs(left) - 1 : 0;
          int32_t pixels[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pixels[j] = __shfl_sync(kAllLanes, outside.pixel[j], first + i);
          }
          if (left != 0) {
            const uint4 point = load_shared(slots + i * Stage::kSlot);
            const float right = __int_as_float(point.z);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (pixels[j] == kOutside) continue;
              const Vector corner =
                  Vector::load(Indexing::at(p, value, Indexing::offset(p, pixels[j])));
              const float of_row = __int_as_float(j < 2 ? point.x : point.y), east = of_row * right;
              const float share = j % 2 ? east : of_row - east;
#pragma unroll
              for (int k = 0; k < Stage::kTeamQueries; ++k) {
                corner.add_to(sums[k], Stage::kTeamQueries == 1 || i / 4 == k ? share : 0);
              }
            }
          }
          left &= left - 1;
        }
      };
      if (!all_in_windows) add_outside(outside, 0xff, team * 8, team_slots);
      [[maybe_unused]] const uint32_t fifth_slots =
          stage + Stage::kFifth + (fifth_stage * 8 + team * 2) * Stage::kSlot;
      if constexpr (kLevels == 5) {
        if (!fifth_in_windows) {
          add_outside(fifth_outside, 3, fifth_stage * 8 + team * 2, fifth_slots);
        }
        fifth_stage = (fifth_stage + 1) % 4;
      }

      // Add up.
      const auto add = [&](int of, uint32_t slot, uint32_t pitch) {
        const uint4 point = load_shared(slot);
        const uint32_t north = point.w + channels_at, south = north + pitch;
        const Vector nw{load_shared(north)}, ne{load_shared(north + kPixelBytes<float>)};
        const Vector sw{load_shared(south)}, se{load_shared(south + kPixelBytes<float>)};
        const float to_north = __int_as_float(point.x), to_south = __int_as_float(point.y);
        const float right = __int_as_float(point.z);
        const float to_ne = to_north * right, to_se = to_south * right;
        nw.add_to(sums[of], to_north - to_ne);
        ne.add_to(sums[of], to_ne);
        sw.add_to(sums[of], to_south - to_se);
        se.add_to(sums[of], to_se);
        if constexpr (kFused) weights[of] += to_north + to_south;
      };
#pragma unroll
      for (int i = 0; i < Stage::kSteps; ++i) {
        add(Stage::kTeamQueries == 2 ? i / 4 : 0, team_slots + i * Stage::kSlot,
            pitch[kLevels == 1 ? 0 : i / 2]);
      }
      if constexpr (kLevels == 5) {
        add(0, fifth_slots, pitch[4]);
        add(0, fifth_slots + Stage::kSlot, pitch[4]);
      }

      // Store rows.
      float all_finite = 0;  // NaN, if one is not
#pragma unroll
      for (int k = 0; k < Stage::kTeamQueries; ++k) {
        float (&sum)[4] = sums[k];
        float scale = 1;
        if constexpr (kFused) {
          if (Stage::kQueryTeams == 2) weights[k] += __shfl_xor_sync(kAllLanes, weights[k], 8);
          scale = __fdividef(1, weights[k]);
        }
        const auto store = [&](auto& sum_of, int32_t query, uint32_t listed, int channel) {
          constexpr int kChannels = std::extent_v<std::remove_reference_t<decltype(sum_of)>>;
#pragma unroll
          for (float& x : sum_of) {
            x *= scale;
            all_finite += x * 0;
          }
          if (listed < list_end) {
            Vec<float, kChannels>::pack(sum_of).store(output + int64_t(query) * (p.heads * 32) +
                                                      channel);
          }
        };
        if constexpr (Stage::kQueryTeams == 2) {
          // Each of the two teams stores half of the channels.
          const bool odd = team % 2 != 0;
          float half[2] = {odd ? sum[2] : sum[0], odd ? sum[3] : sum[1]};
          half[0] += __shfl_xor_sync(kAllLanes, odd ? sum[0] : sum[2], 8);
          half[1] += __shfl_xor_sync(kAllLanes, odd ? sum[1] : sum[3], 8);
          store(half, query, at, odd * 2);
        } else {
          store(sum, __shfl_sync(kAllLanes, query, team * 8 + k * 4),
                at + (team * 2 + k - own_query) * 4, 0);
        }
      }
      if (all_finite != 0) block.not_finite = true;
    }
  };
  serve_items<float, kFused>(p, layout, kMostMissedFloat, memory, block, sum_up);
#endif
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

WindowBlocks float_window_blocks(int32_t levels) {
  const auto of = [](auto levels) {
    constexpr int kLevels = levels.value;
    return WindowBlocks{kFloatBlocks<kLevels>,
                        (kFloatThreads<kLevels> / 32 - 1) * FloatStage<kLevels>::kBytes, 2, 7};
  };
  if (levels == 1) return of(std::integral_constant<int, 1>{});
  return levels == 5 ? of(std::integral_constant<int, 5>{}) : of(std::integral_constant<int, 4>{});
}

void forward_windows_float(const Params& p, const WindowLayout& layout, void* stream) {
  const auto with = [&](auto fused, auto levels) {
    constexpr int kLevels = levels.value;
    launch(choose_kernel<float, fused.value, kLevels>, p, Grid{p.heads, 1, kLevels * 32, 0}, stream,
           layout);
    const auto kernel = float_windows_kernel<fused.value, kLevels>;
    allow_shared_memory(kernel, layout.bytes);
    launch_blocks(kernel,
                  Grid{layout.first_blocks, 1, kFloatThreads<kLevels>, layout.bytes,
                       DeviceLimits().overlaps_kernels},
                  1, stream, p, layout);
  };
  const auto with_levels = [&](auto fused) {
    if (p.levels == 1) return with(fused, std::integral_constant<int, 1>{});
    if (p.levels == 3) return with(fused, std::integral_constant<int, 3>{});
    if (p.levels == 4) return with(fused, std::integral_constant<int, 4>{});
    with(fused, std::integral_constant<int, 5>{});
  };
  p.fused() ? with_levels(std::true_type{}) : with_levels(std::false_type{});
}

}  // namespace ms_deform_attn::cuda
