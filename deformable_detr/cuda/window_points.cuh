// Points over windows (windows.cuh), as they are left for tensor cores to multiply.
//
// A warp takes a stage of 32 points, of 2 or 8 queries. Each lane works out one of them, and leaves
// in shared memory where its corners are and its shares: corner weight * attention weight. One
// load_matrices() then brings two points of a query: of each its four corners' four pieces of 16
// bytes. In the multiplication, a row of `a` is a channel of the first or second piece of a half of
// the channels, its columns are corners:
//
//     0..3    corners of the first point, first half of the channels
//     4..7    the same, second half
//     8..15   the second point
//
// and a column of `b` has the shares of one query for one half of the channels, everything else
// being zero. A share has two columns, its rounding to the half type and what that left, so that
// sums are as exact as with shares of float. Of the eight columns, half are one query's, the others
// another's; each query has sums of its own, of which only its own columns mean something.
#pragma once

#include "deformable_detr/cuda/matrix.cuh"
#include "deformable_detr/cuda/windows.cuh"

namespace ms_deform_attn::cuda {

// ------------------------------------------------------------------------------------------ shares

template <typename scalar_t>
struct Shares {
  static constexpr bool kIsHalf = std::is_same_v<scalar_t, half_t>;
  static constexpr float kRestScale = kIsHalf ? 2048 : 1;  // what a share left, in fp16's range
  static constexpr uint32_t kOnes = kIsHalf ? 0x3c003c00 : 0x3f803f80;

  // By one instruction; of Vec::pack() the compiler makes two and a permutation now and then.
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    const auto pair = [&] {
      if constexpr (kIsHalf) {
        return __floats2half2_rn(a, b);
      } else {
        return __floats2bfloat162_rn(a, b);
      }
    }();
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// ------------------------------------------------------------------------------------------- stage

// How a stage's points lie in shared memory, in bytes: pairs of queries, of each query the shares
// in four rows of words (north and south, rounded and rest), a word a point; then the places, in
// pieces of 16 bytes, 16 bits each: of all even points, and of all odd ones.
template <int kQueryPoints>
struct Stage {
  static constexpr int kPoints = kQueryPoints;
  static constexpr int kQueries = 32 / kPoints, kPairs = kQueries / 2;
  static constexpr int kShareRow = (kPoints == 16 ? 20 : 4) * 4;  // different banks
  static constexpr int kQuery = 4 * kShareRow;
  static constexpr int kPair = 2 * kQuery + (kPairs > 1 ? 16 : 0);
  static constexpr int kPlaces = kPairs * kPair;
  static constexpr int kOddPlaces = kPairs > 1 ? 32 : 16, kQueryPlaces = kPairs > 1 ? 4 : 32;
  static constexpr int kBytes = kPlaces + 64;

  // What a lane works out: a point of a stage's queries.
  static __device__ __forceinline__ int point(int lane) {
    return lane % 2 + lane / 4 % (kPoints / 2) * 2;
  }
  static __device__ __forceinline__ int query(int lane) {
    return lane / 2 % 2 + (kPairs > 1 ? lane / 8 * 2 : 0);
  }
  static __device__ __forceinline__ uint32_t shares(int lane) {
    return query(lane) / 2 * kPair + query(lane) % 2 * kQuery + point(lane) * 4;
  }
  static __device__ __forceinline__ uint32_t place(int lane) {
    return kPlaces + query(lane) * kQueryPlaces + point(lane) % 2 * kOddPlaces +
           point(lane) / 2 * 2;
  }
  // What it reads for the multiplication: see load_matrices() and multiply_add().
  static __device__ __forceinline__ uint32_t read_shares(int lane) {
    return lane / 16 * kQuery + (lane / 4 % 2 * 2 + lane % 2) * kShareRow;
  }
  static __device__ __forceinline__ uint32_t read_places(int lane) {
    return kPlaces + lane / 16 * kOddPlaces;
  }
};

#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
// The largest logit of a stage's first query, or second, for each lane's own.
__device__ __forceinline__ float largest_of_query(float logit, bool second) {
  // As integers in the same order.
  const auto ordered = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  const int32_t own = ordered(__float_as_int(logit));
  const int32_t first = __reduce_max_sync(kAllLanes, second ? INT32_MIN : own);
  const int32_t other = __reduce_max_sync(kAllLanes, second ? own : INT32_MIN);
  return __int_as_float(ordered(second ? other : first));
}
#endif

// A warp's part of shared memory: a stage, where the corners of two points outside the windows are
// put, and with five levels a stage of the fifth's points of eight queries, which are those of four
// stages of the others.
template <int kLevels>
struct WarpMemory {
  static constexpr int kPixelBytes = cuda::kPixelBytes<half_t>;
  using Stage = cuda::Stage<16>;
  using Fifth = cuda::Stage<4>;
  static constexpr int kSlots = Stage::kBytes;
  static constexpr int kSlotPitch = 2 * kPixelBytes + 16, kSlot = 2 * kSlotPitch;
  static constexpr int kFifth = kSlots + 2 * kSlot;
  static constexpr int kBytes = kFifth + (kLevels == 5 ? Fifth::kBytes : 0);
};

// Where a point is in its window, or in its map.
struct Placed {
  float column, row;  // of the northwestern corner, in the window
  bool in_window;

  // If it touches the map beside the window: the index of the northwestern corner, and which of the
  // four are inside, in bits 0 to 3. Else 0.
  __device__ __forceinline__ int32_t pixel_and_corners(const Frame& frame,
                                                       const Level& level) const {
    const float x = column - (frame.shift_x + 0.5f), y = row - (frame.shift_y + 0.5f);
    if (in_window || !(x >= -1 && x < frame.width && y >= -1 && y < frame.height)) return 0;
    const int32_t west = static_cast<int32_t>(x), north = static_cast<int32_t>(y);
    const int west_east = is_inside(west, level.width) | is_inside(west + 1, level.width) << 1;
    return (level.start + north * level.width + west) * 16 |
           (is_inside(north, level.height) ? west_east : 0) |
           (is_inside(north + 1, level.height) ? west_east << 2 : 0);
  }
};

// Leaves a point's shares and place for the multiplication. The whole warp takes part.
template <typename scalar_t, typename Stage>
__device__ __forceinline__ Placed leave_point(const Frame& frame, uint32_t zeros, float x, float y,
                                              float weight, uint32_t own_shares,
                                              uint32_t own_place) {
  using Shares = cuda::Shares<scalar_t>;
  const Placed placed{
      floorf(x), floorf(y),
      floorf(x) >= 0 && floorf(x) <= frame.last_x && floorf(y) >= 0 && floorf(y) <= frame.last_y};
  const float right = x - placed.column, down = y - placed.row;
  const float south = weight * down, north = weight - south;
  const float se = south * right, sw = south - se, ne = north * right, nw = north - ne;
  const float piece =
      fmaf(placed.row, frame.pitch, fmaf(placed.column, kPixelBytes<scalar_t> / 16, frame.start));
  const uint32_t place = placed.in_window ? __float2uint_rz(piece) : zeros;
  const uint32_t north_pair = Shares::pack(nw, ne), south_pair = Shares::pack(sw, se);
  const float2 north_had = to_acc_pair(north_pair, scalar_t{});
  const float2 south_had = to_acc_pair(south_pair, scalar_t{});
  constexpr float kScale = Shares::kRestScale;
  const uint32_t north_rest =
      Shares::pack((nw - north_had.x) * kScale, (ne - north_had.y) * kScale);
  const uint32_t south_rest =
      Shares::pack((sw - south_had.x) * kScale, (se - south_had.y) * kScale);
  __syncwarp();
  store_shared(own_shares, north_pair);
  store_shared(own_shares + Stage::kShareRow, south_pair);
  store_shared(own_shares + 2 * Stage::kShareRow, north_rest);
  store_shared(own_shares + 3 * Stage::kShareRow, south_rest);
  store_shared(own_place, static_cast<uint16_t>(place));
  return placed;
}

}  // namespace ms_deform_attn::cuda
