// Rows whose sum is not finite, by plain arithmetic.
#pragma once

#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {

// A compact kernel has no table of levels.
template <bool kCompact, typename LevelEntry>
__device__ __forceinline__ decltype(auto) find_level(const Params& p, const LevelEntry* levels,
                                                     int32_t index) {
  if constexpr (kCompact) {
    return read_level_entry<LevelEntry>(p, index);
  } else {
    return (levels[index]);
  }
}

// Stores the channels of lanes whose sum is not finite. The forward's kernels multiply what they
// have in the place of a corner outside the map by zero, which makes NaN of an infinity that is no
// corner of the point. Here such corners are left out. Not inlined and with its arguments by value,
// so that it takes no registers from the kernel, to which it costs one test a row. To zero the
// corners in the kernel instead costs 14 to 21%. The whole warp takes part, as a call by some of
// its lanes would change the uniform registers of the others.
template <typename scalar_t, Source kSource, int kVec, bool kCompact, typename LevelEntry>
__device__ __noinline__ void store_not_finite(const Params& p, const LevelEntry* levels,
                                              TeamRow row, int32_t channel, bool stores,
                                              Softmax<acc_t<scalar_t>> softmax) {
  using acc = acc_t<scalar_t>;
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                          (row.batch * p.spatial_size * p.heads + row.head) * p.channels + channel;
  acc sum[kVec] = {};
  PointCursor cursor(p, 0);
  PointReader<scalar_t, kSource> reader;
  reader.seek(p, row.index, row.query_index(p), 0);
  for (int32_t point = 0; point < p.points; ++point) {
    if (stores) {
      reader.read(p);
      const acc weight = find_weight(p, reader, softmax);
      const Corners<acc> corners =
          find_corners(p, reader, cursor.level, find_level<kCompact>(p, levels, cursor.level));
      for (int j = 0; j < 4; ++j) {
        if (corners.pixel[j] == kOutside) continue;
        acc x[kVec];
        Vector::load(Indexing::at(p, value, Indexing::offset(p, corners.pixel[j]))).unpack(x);
#pragma unroll
        for (int c = 0; c < kVec; ++c) sum[c] += weight * corners.corner_weight(j) * x[c];
      }
    }
    reader.skip(p, 1);
    cursor.advance(p, 1);
  }
  if (!stores) return;
  Vector::pack(sum).store(static_cast<scalar_t*>(p.output) + row.index * p.channels + channel);
}

}  // namespace ms_deform_attn::cuda
