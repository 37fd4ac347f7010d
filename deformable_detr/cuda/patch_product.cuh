// What a block of patches_kernel multiplies: rows of grad_output in shared memory, by shares of
// sorted points (backward_patches.cu).
#pragma once

#include "deformable_detr/cuda/matrix.cuh"
#include "deformable_detr/cuda/window_points.cuh"

namespace ms_deform_attn::cuda {

constexpr int kPatchThreads = 384;
constexpr int kPatchBlocks = 2;  // that share a multiprocessor
constexpr int kPatchWarps = kPatchThreads / 32;
constexpr int kStagePoints = 4;  // of each query, in a level, sorted at a time
constexpr int kOwnPoints = 5;    // of a thread, in a stage
constexpr int kPoints = kPatchThreads * kOwnPoints;
constexpr int kQueries = kPoints / kStagePoints;  // of a block, at a time
constexpr int kThreadQueries = kPatchThreads / kStagePoints;
constexpr int kPatchChannels = 32;  // of a block
constexpr int kPieceChannels = 8;   // 16 bytes
constexpr int kPieces = kPatchChannels / kPieceChannels;
constexpr int kCells = 7;        // of a patch
constexpr float kMiddle = 3.5f;  // of a patch's columns
constexpr int kThreadBins = 4;   // a bin counts the points of a patch, or of some in a large level
constexpr int kBins = kPatchThreads * kThreadBins;
constexpr int kStep = 16;       // points that are multiplied at once
constexpr int kFewPoints = 2;   // of a patch, that are added one by one
constexpr int kMinPoints = 2;   // of a patch on average, or all are added so
constexpr int kPatchCost = 40;  // what a patch costs beside its points, as points

// Rows of grad_output in shared memory, and their product with shares.
//
// In mma's layout a lane is g = lane / 4, t = lane % 4. It has the shares of the pixels g of both
// rows, for points 4 * t to 4 * t + 3, and gets the sums of these pixels: of channels 4 * t to 4 *
// t + 3 and of the same plus 16, for which the channels of a row are put in another order.
template <typename scalar_t>
struct Product {
  using Shares = cuda::Shares<scalar_t>;
  static constexpr int kPitch = 80;  // bytes of a row; many rows lie in different banks
  // Shares are scaled, so that what rounding them to fp16 leaves is in its range, too.
  static constexpr float kScale = Shares::kIsHalf ? 1024 : 1;
  static constexpr float kLargest = Shares::kIsHalf ? 60.f : 3e38f;  // attention weight

  static __device__ __forceinline__ void store_piece(uint32_t row, int piece, const uint4& x) {
    const uint32_t to = row + piece / 2 * 32 + piece % 2 * 8;
    store_shared(to, x.x);
    store_shared(to + 4, x.z);
    store_shared(to + 16, x.y);
    store_shared(to + 20, x.w);
  }
  // Channels 4 * i to 4 * i + 3.
  static __device__ __forceinline__ void load_four(uint32_t row, int i, float (&x)[4]) {
    const uint32_t from = row + i / 4 * 32 + i % 4 * 4;
    const float2 first = to_acc_pair(load_shared_word(from), scalar_t{});
    const float2 second = to_acc_pair(load_shared_word(from + 16), scalar_t{});
    x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
  }

  float sums[4][4] = {};

  // north, south: shares of this lane's points. offsets: of all 16 points' rows, from `rows` on.
  __device__ __forceinline__ void add(const float (&north)[4], const float (&south)[4],
                                      uint32_t rows, const uint16_t* offsets) {
    const int lane = threadIdx.x % 32;
    const int point = lane % 8 / 2 * 4 + lane % 2 + lane / 8 % 2 * 2;
    const uint32_t row = rows + offsets[point] + lane / 16 * 16;
    uint32_t b[2][4];
    load_matrices(b[0], row);
    load_matrices(b[1], row + 32);
    uint32_t a[4], rest[4];
    const auto split = [&](int i, float x, float y) {
      a[i] = Shares::pack(x, y);
      const float2 had = to_acc_pair(a[i], scalar_t{});
      rest[i] = Shares::pack(x - had.x, y - had.y);
    };
    split(0, north[0], north[1]);
    split(1, south[0], south[1]);
    split(2, north[2], north[3]);
    split(3, south[2], south[3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      multiply_add<scalar_t>(sums[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      multiply_add<scalar_t>(sums[j], rest, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  // Ends the sums of the northern row: of this lane's 8 channels. The southern ones become the next
  // patch's northern ones.
  __device__ __forceinline__ void take(float (&of_channels)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      of_channels[i / 4][i % 4] = sums[i / 2][i % 2] * (1 / kScale);
      sums[i / 2][i % 2] = sums[i / 2][i % 2 + 2];
      sums[i / 2][i % 2 + 2] = 0;
    }
  }
};

// Points that are sorted at a time.
struct PointStage {
  int32_t level;
  int32_t first;        // in the level
  int32_t first_point;  // of the level
  int32_t bins;         // 0 and 1 in turn
};

struct PatchMemory {
  // Sorted points, and as many more as a multiplication may read beyond the last.
  alignas(16) float x[kPoints + kStep];      // from the patch's middle
  alignas(16) float north[kPoints + kStep];  // weight * share of the patch's northern row
  alignas(16) float south[kPoints + kStep];
  alignas(16) uint16_t rows[kPoints + kStep];  // of grad_output, in bytes from the first
  alignas(128) char grad_output[kQueries * Product<half_t>::kPitch];
  // Counts of points, then where they start; of this stage, and of the next.
  alignas(16) int32_t bins[2][kBins];
  int32_t owners[kBins];          // the patch of a bin, in a level with more patches than bins
  uint32_t patches[kPoints + 2];  // that have points: the bin, and where its points start
  PointStage stage;
  int32_t count, first_query;  // of the region's queries; of those that are here
  bool any_not_finite;
  int32_t queries[kQueries];
  bool finite[kQueries];  // a query's row of grad_output
};

}  // namespace ms_deform_attn::cuda
