// The forward of an encoder in half types, over windows of value in shared memory (windows.cuh), on
// tensor cores.
//
// A block serves a region, as prepare_windows() leaves it. A warp takes a stage of two queries at a
// time, of each its 16 points or, with three levels, 12:
//
//     leave points    each lane works out a point, and leaves its place and shares in shared memory
//                     (window_points.cuh); its point of the next stage is read before
//     multiply        the corners of two points of a query at a time
//     add outside     points that lie outside their windows: the same with corners from memory
//     store rows
//
// With five levels, every fourth time the fifth level's points of eight queries are left as well,
// which are those of four stages. Rows that are not finite are done anew at the end.
#include "deformable_detr/cuda/forward_windows.cuh"
#include "deformable_detr/cuda/window_points.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

template <typename scalar_t, bool kFused, int kLevels>
__global__ void __launch_bounds__(kWindowThreads, kWindowBlocks)
    windows_kernel(const __grid_constant__ Params p, int64_t first_batch, WindowLayout layout) {
#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
  using Memory = WarpMemory<kLevels>;
  using Stage = typename Memory::Stage;
  using Fifth = typename Memory::Fifth;
  using Shares = cuda::Shares<scalar_t>;
  extern __shared__ __align__(128) char memory[];
  __shared__ Cut<kLevels> cut;
  __shared__ Region<kLevels> region;
  __shared__ volatile bool not_finite;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t memory_at = shared_address(memory);
  const int32_t index = blockIdx.x / p.heads, head = blockIdx.x - index * p.heads;
  const int64_t batch = first_batch + blockIdx.z;

  const scalar_t* const value =
      static_cast<const scalar_t*>(p.value) + (batch * p.spatial_size * p.heads + head) * 32;
  if (threadIdx.x == 0) not_finite = false;
  if (!prepare_windows<scalar_t, kFused>(p, layout, cut, region, memory, index, batch, head,
                                         kMostMissed, value)) {
    return;
  }

  // This lane's point of a stage. The stage lies in the warp's memory.
  const int point = Stage::point(lane), own_query = Stage::query(lane);
  const bool has_point = point < kLevels * 4;
  const int own_point = min(point, kLevels * 4 - 1), own_level = own_point / 4;
  Frame frame = region.frames[own_level];
  frame = {pinned(frame.width),  pinned(frame.height), pinned(frame.shift_x), pinned(frame.shift_y),
           pinned(frame.last_x), pinned(frame.last_y), pinned(frame.pitch),   pinned(frame.start)};
  const uint32_t zeros = cut.zeros / 16;
  const uint32_t stage = pinned(memory_at + warp * Memory::kBytes);
  const uint32_t own_shares = pinned(stage + Stage::shares(lane));
  const uint32_t own_place = pinned(stage + Stage::place(lane));

  // What it reads for the multiplication. In the tensor cores' layout it has column g, and of that
  // the rows of t.
  const int g = lane / 4, t = lane % 4;
  const int corner = lane % 4, piece = lane % 8 / 4 * 2 + lane / 8 % 2;
  uint32_t corner_at[kLevels];
#pragma unroll
  for (int l = 0; l < kLevels; ++l) {
    corner_at[l] = pinned(memory_at + corner / 2 * cut.pitch[l] +
                          corner % 2 * kPixelBytes<scalar_t> + piece * 16);
  }
  const uint32_t has_shares = t / 2 == g / 2 % 2;
  // Two, so that no branch is made of them.
  const uint32_t loads_first = pinned(has_shares), loads_second = pinned(has_shares * 5);
  const uint32_t read_shares = pinned(stage + Stage::read_shares(lane));
  const uint32_t read_places = pinned(stage + Stage::read_places(lane));
  const uint32_t read_fifth_shares =
      kLevels == 5 ? pinned(stage + Memory::kFifth + Fifth::read_shares(lane)) : 0;
  const bool odd = g % 2 != 0;

  // Its pointers.
  const int64_t first_row = batch * p.queries * p.heads + head;
  const uint32_t* const xy_at = pinned(
      static_cast<const uint32_t*>(kFused ? p.sampling_offsets.data : p.sampling_locations.data) +
      first_row * (kLevels * 4) + own_point);
  const scalar_t* const weight_at = pinned(
      static_cast<const scalar_t*>(kFused ? p.attention_logits.data : p.attention_weights.data) +
      first_row * (kLevels * 4) + own_point);
  const int32_t reference_step = p.reference_levels > 1;
  const uint32_t* const reference_at = static_cast<const uint32_t*>(p.reference_points.data) +
                                       batch * p.queries * p.reference_levels +
                                       own_level * reference_step;
  uint32_t* const output =
      pinned(static_cast<uint32_t*>(p.output) + first_row * 16 + t % 2 * 8 + odd * 4 + g / 2);
  const int32_t points_pitch = p.heads * (kLevels * 4), output_pitch = p.heads * 16;

  // In the list of the region's queries, the one of its point.
  constexpr uint32_t kStep = kWindowWarps * Stage::kQueries * 4;
  const uint32_t list_at = memory_at + layout.list;
  const uint32_t list_end = list_at + region.count * 4;
  uint32_t at = list_at + (warp * Stage::kQueries + own_query) * 4;
  int32_t next_query;
  uint32_t next_xy, next_reference = 0;
  scalar_t next_weight;
  const auto read_next = [&](uint32_t from) {
    next_query = load_shared_word(min(from, list_end - 4));
    next_xy = __ldg(xy_at + int64_t(next_query) * points_pitch);
    next_weight = __ldg(weight_at + int64_t(next_query) * points_pitch);
    if constexpr (kFused) {
      next_reference = __ldg(reference_at + int64_t(next_query) * p.reference_levels);
    }
  };
  const auto position = [](uint32_t xy_bits, uint32_t reference_bits, const Frame& frame) {
    const float2 xy = to_acc_pair(xy_bits, scalar_t{});
    if constexpr (!kFused) {
      return make_float2(fmaf(xy.x, frame.width, frame.shift_x),
                         fmaf(xy.y, frame.height, frame.shift_y));
    }
    const float2 reference = to_acc_pair(reference_bits, scalar_t{});
    return make_float2(fmaf(reference.x, frame.width, xy.x + frame.shift_x),
                       fmaf(reference.y, frame.height, xy.y + frame.shift_y));
  };
  read_next(at);
  wait_for_copies();
  __syncthreads();

  uint2 b0 = make_uint2(0, 0), b1 = b0, b2 = b0, b3 = b0;
  int fifth_pair = 0;
  float fifth_largest = 0;
  int32_t fifth_outside = 0;
  for (; __any_sync(kAllLanes, at < list_end); at += kStep) {
    // Leave points.
    const int32_t query = next_query;
    if constexpr (kLevels == 5) {
      // The fifth level's points, of this stage and the next three.
      if (fifth_pair == 0) {
        const Frame of = region.frames[4];
        const int stages = lane / 8, fifth_point = 16 + Fifth::point(lane);
        const int64_t from = load_shared_word(min(at + stages * kStep, list_end - 4));
        const uint32_t xy = __ldg(xy_at + from * points_pitch + (fifth_point - own_point));
        const scalar_t* const weights = weight_at + from * points_pitch - own_point;
        float weight = to_acc(__ldg(weights + fifth_point));
        uint32_t reference = 0;
        if constexpr (kFused) {
          reference =
              __ldg(reference_at + from * p.reference_levels + (4 - own_level) * reference_step);
          float others[4];
          Vec<scalar_t, 4>::load(weights + Fifth::point(lane) * 4).unpack(others);
          fifth_largest = max(max(max(others[0], others[1]), max(others[2], others[3])), weight);
          fifth_largest = max(fifth_largest, __shfl_xor_sync(kAllLanes, fifth_largest, 1));
          fifth_largest = max(fifth_largest, __shfl_xor_sync(kAllLanes, fifth_largest, 4));
          weight = exponential(weight - fifth_largest);
        }
        const float2 xy_of = position(xy, reference, of);
        fifth_outside = leave_point<scalar_t, Fifth>(of, zeros, xy_of.x, xy_of.y, weight,
                                                     stage + Memory::kFifth + Fifth::shares(lane),
                                                     stage + Memory::kFifth + Fifth::place(lane))
                            .pixel_and_corners(of, cut.levels[4]);
      }
    }
    float weight = to_acc(next_weight);
    if constexpr (kFused) {
      if (kLevels == 3 && !has_point) weight = -INFINITY;
      const float largest =
          kLevels == 5 ? __shfl_sync(kAllLanes, fifth_largest, fifth_pair * 8 + own_query * 2)
                       : largest_of_query(weight, own_query != 0);
      weight = exponential(weight - largest);
    }
    const float2 xy = position(next_xy, next_reference, frame);
    read_next(at + kStep);
    const Placed placed =
        leave_point<scalar_t, Stage>(frame, zeros, xy.x, xy.y, weight, own_shares, own_place);
    const bool all_in_windows = __all_sync(kAllLanes, placed.in_window || !has_point);
    __syncwarp();

    // Multiply.
    float first_sum[4] = {}, second_sum[4] = {}, share_sum[4] = {};
    const auto load_b = [&](uint2& first, uint2& second, uint32_t from) {
      load_if(first, from, loads_first);
      load_if(second, from + 8, loads_second);
    };
    // Four points of each query.
    const auto add = [&](uint32_t first, uint32_t second, int l, const uint2& low,
                         const uint2& high) {
      uint32_t a[4], c[4];
      load_matrices(a, __byte_perm(first, 0, 0x4410) * 16 + corner_at[l]);
      load_matrices(c, __byte_perm(second, 0, 0x4410) * 16 + corner_at[l]);
      multiply_add<scalar_t>(first_sum, a, low.x, low.y);
      multiply_add<scalar_t>(second_sum, c, low.x, low.y);
      load_matrices(a, __byte_perm(first, 0, 0x4432) * 16 + corner_at[l]);
      load_matrices(c, __byte_perm(second, 0, 0x4432) * 16 + corner_at[l]);
      multiply_add<scalar_t>(first_sum, a, high.x, high.y);
      multiply_add<scalar_t>(second_sum, c, high.x, high.y);
      if constexpr (kFused) {
        // The sum of a query's shares is that of its weights.
        const uint32_t ones[4] = {Shares::kOnes, Shares::kOnes, Shares::kOnes, Shares::kOnes};
        multiply_add<scalar_t>(share_sum, ones, low.x, low.y);
        multiply_add<scalar_t>(share_sum, ones, high.x, high.y);
      }
    };
    const uint4 of_first = load_shared(read_places);
    const uint4 of_second = load_shared(read_places + Stage::kQueryPlaces);
    load_b(b0, b1, read_shares);
    load_b(b2, b3, read_shares + 16);
    add(of_first.x, of_second.x, 0, b0, b1);
    add(of_first.y, of_second.y, 1, b2, b3);
    load_b(b0, b1, read_shares + 32);
    if constexpr (kLevels > 3) load_b(b2, b3, read_shares + 48);
    add(of_first.z, of_second.z, 2, b0, b1);
    if constexpr (kLevels > 3) add(of_first.w, of_second.w, 3, b2, b3);
    if constexpr (kLevels == 5) {
      const uint2 places =
          load_shared_pair(stage + Memory::kFifth + Fifth::read_places(lane) + fifth_pair * 8);
      load_b(b0, b1, read_fifth_shares + fifth_pair * Fifth::kPair);
      add(places.x, places.y, 4, b0, b1);
    }

    // Add outside: of those lanes, whose pixel_and_corners() `outside` is.
    const auto add_outside = [&](auto stage_type, unsigned lanes, int32_t outside, float width,
                                 uint32_t shares) {
      using Stage = decltype(stage_type);
      lanes &= __ballot_sync(kAllLanes, outside != 0);
      if (lanes == 0) return;
      const uint32_t slots = stage + Memory::kSlots + lane / 16 * Memory::kSlot;
      const int of_slot = lane / 4 % 4;  // corner
      do {                               // two at a time
        const int first = __ffs(lanes) - 1;
        lanes &= lanes - 1;
        const bool two = lanes != 0;
        const int other = two ? __ffs(lanes) - 1 : first;
        lanes &= lanes - 1;
        const int of = lane / 16 != 0 ? other : first;
        const int32_t what = __shfl_sync(kAllLanes, outside, of);
        const int32_t south = static_cast<int32_t>(__shfl_sync(kAllLanes, width, of));
        uint4 pixel = make_uint4(0, 0, 0, 0);
        if ((what >> of_slot & 1) != 0) {
          const int64_t index = (what >> 4) + of_slot % 2 + (of_slot / 2 != 0 ? south : 0);
          pixel =
              __ldg(reinterpret_cast<const uint4*>(value + index * (p.heads * 32) + lane % 4 * 8));
        }
        uint32_t b[2] = {0, 0};
        load_if(b[0], shares + Stage::point(first) * 4, has_shares != 0 && first / 2 % 2 == g / 4);
        load_if(b[1], shares + Stage::point(other) * 4,
                has_shares != 0 && other / 2 % 2 == g / 4 && two);
        __syncwarp();
        store_shared(slots + of_slot / 2 * Memory::kSlotPitch +
                         of_slot % 2 * kPixelBytes<scalar_t> + lane % 4 * 16,
                     pixel);
        __syncwarp();
        uint32_t a[4];
        load_matrices(a, slots + corner / 2 * Memory::kSlotPitch +
                             corner % 2 * kPixelBytes<scalar_t> + piece * 16);
        // Shares of the other query are zero.
        multiply_add<scalar_t>(first_sum, a, b[0], b[1]);
        multiply_add<scalar_t>(second_sum, a, b[0], b[1]);
      } while (lanes != 0);
    };
    if (!all_in_windows) {
      const int32_t outside =
          has_point ? placed.pixel_and_corners(frame, cut.levels[own_level]) : 0;
      add_outside(Stage{}, kAllLanes, outside, frame.width, read_shares);
    }
    if constexpr (kLevels == 5) {
      if (__any_sync(kAllLanes, fifth_outside != 0)) {
        add_outside(Fifth{}, 0xffu << fifth_pair * 8, fifth_outside, region.frames[4].width,
                    read_fifth_shares + fifth_pair * Fifth::kPair);
      }
      fifth_pair = (fifth_pair + 1) % 4;
    }

    // Store rows.
    const bool upper = t / 2 != 0;
    constexpr float kRest = 1 / Shares::kRestScale;
    float low =
        (upper ? second_sum[0] : first_sum[0]) + (upper ? second_sum[1] : first_sum[1]) * kRest;
    float high =
        (upper ? second_sum[2] : first_sum[2]) + (upper ? second_sum[3] : first_sum[3]) * kRest;
    if constexpr (kFused) {
      const float scale = __fdividef(1, share_sum[0] + share_sum[1] * kRest);
      low *= scale;
      high *= scale;
    }
    const float other = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
    if (at < list_end) {
      __stcs(output + int64_t(query) * output_pitch,
             odd ? Shares::pack(other, high) : Shares::pack(low, other));
    }
    if (!(fabsf(low) + fabsf(high) < INFINITY)) not_finite = true;
  }
  __syncthreads();
  if (not_finite) {
    store_rows_not_finite<scalar_t, kFused>(p, batch, head, list_at, list_end);
  }
#endif
}

// ------------------------------------------------------------------------------------------- entry

// To choose, and to end the blocks of a call that is left, takes 5 to 10 us. So small calls are not
// asked, which in float gain more: on an H100, 2026-11-28, in us, in half types mask2former_b2
// would gain 8 of 93, ddetr_encoder_b1 4 of 65, and one level nothing; in float they gain 14 of
// 144, 14 of 101, and bevformer_tsa 31 of 138.
WindowLayout find_layout(const Params& p) {
  if (p.value_dtype == DType::f32)
    return find_windows(p, float_window_blocks(p.levels), 16384, true);
  return find_windows(p, {kWindowBlocks, kWindowWarps * WarpMemory<5>::kBytes, 1, 8}, 65536, false);
}

}  // namespace

WindowLayout find_windows(const Params& p, const WindowBlocks& blocks, int64_t least_points,
                          bool one_level) {
  const auto has_value_dtype = [&](std::initializer_list<Operand> operands) {
    for (const Operand& operand : operands) {
      if (operand.data != nullptr && operand.dtype != p.value_dtype) return false;
    }
    return true;
  };
  if (p.value_dtype == DType::f64) return {};
  const bool half = is_half(p.value_dtype);
  const bool fits = has_value_dtype({p.sampling_locations, p.attention_weights, p.reference_points,
                                     p.sampling_offsets, p.attention_logits}) &&
                    UsualParams::fit(p) && queries_are_pixels(p) && p.levels <= 5 &&
                    (p.levels >= 3 || (one_level && p.levels == 1)) && p.batch <= kMaxBlocksYZ &&
                    (half ? Indexing<half_t, 8>::fits(p) : Indexing<float, 4>::fits(p)) &&
                    p.spatial_size < (1 << 26);  // packed with four corners
  if (!fits) return {};
  const DeviceLimits limits;
  if (!limits.has_matrices || count_rows(p) * p.points < least_points * limits.multiprocessors) {
    return {};
  }
  return plan_windows(p, blocks, limits);
}

int64_t windows_scratch(const Params& p, const WindowLayout& layout) {
  return layout.regions > 0 ? (count_slices(p) + 1) * int64_t(sizeof(int32_t)) : 0;
}

void launch_choice(const Params& p, const WindowLayout& layout, void* stream) {
  with_windows(p, [&](auto zero, auto fused, auto levels) {
    launch(choose_kernel<decltype(zero), fused.value, levels.value>, p,
           Grid{p.heads, 1, levels.value * 32, 0}, stream, layout);
  });
}

ForwardPlan plan_forward(const Params& p) {
  const WindowLayout layout = find_layout(p);
  return {layout, windows_scratch(p, layout)};
}

void forward_windows(const Params& p, const WindowLayout& layout, void* stream) {
  if (p.value_dtype == DType::f32) return forward_windows_float(p, layout, stream);
  launch_choice(p, layout, stream);
  with_windows(p, [&](auto zero, auto fused, auto levels) {
    launch(windows_kernel<decltype(zero), fused.value, levels.value>, p, windows_grid(p, layout),
           stream, layout);
  });
}

}  // namespace ms_deform_attn::cuda
