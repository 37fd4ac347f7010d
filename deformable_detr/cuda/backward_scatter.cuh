// The gradient of value by scattering.
#pragma once

#include "deformable_detr/cuda/backward_gather.cuh"

namespace ms_deform_attn::cuda {

// ---------------------------------------------------------------------------------------- scatter

constexpr int kScatterThreads = 256;
constexpr int kScatterQueries = 128;
constexpr int kScatterStrip = 8;  // rows of queries
constexpr int kPointsPerThread = 4;
constexpr int kScatterPoints = kScatterThreads * kPointsPerThread;  // sorted at a time
constexpr int kStagePoints = kScatterPoints / kScatterQueries;      // of each query
constexpr int kBins = 1024;                                         // by the number of the pixel

template <typename scalar_t, Source kSource, int kVec, int kLanes>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ BackwardParams p) {
  using acc = acc_t<scalar_t>;
  using Row = Vec<scalar_t, kVec>;
  using Rows = cuda::Rows<scalar_t, kVec>;
  constexpr int kRow = kLanes * kVec;
  constexpr int kTeams = kScatterThreads / kLanes;
  constexpr int kBinsPerThread = kBins / kScatterThreads;
  extern __shared__ __align__(32) char memory[];
  LevelOf<scalar_t, kSource>* levels = reinterpret_cast<LevelOf<scalar_t, kSource>*>(memory);
  __shared__ PerCorner<acc> shares[kScatterPoints];  // of each corner, times the weight
  __shared__ int4 pixels[kScatterPoints];
  __shared__ uint16_t order[kScatterPoints];  // of the points
  __shared__ int32_t bins[kBins];             // how many points, then where they start
  __shared__ int32_t queries[kScatterQueries];

  LevelLoader<LevelOf<scalar_t, kSource>> level_loader;
  level_loader.load(p);
  level_loader.store(p, levels);
  const int team = threadIdx.x / kLanes;
  const int32_t parts = ceil_div(p.channels, kRow);
  const int32_t blocks = static_cast<int32_t>(ceil_div<int64_t>(p.queries, kScatterQueries));
  const int32_t row = blockIdx.x / blocks;
  const int32_t head = row / parts;
  const int32_t channel = row % parts * kRow + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = p.first_batch + blockIdx.z;
  const int64_t first_query = int64_t(blockIdx.x % blocks) * kScatterQueries;
  const int32_t n_queries =
      static_cast<int32_t>(min(int64_t(kScatterQueries), p.queries - first_query));
  acc* grad_value = settled(static_cast<acc*>(p.grad_value) +
                            (batch * p.spatial_size * p.heads + head) * p.channels + channel);
  const scalar_t* grad_output =
      settled(static_cast<const scalar_t*>(p.grad_output) +
              (batch * p.queries * p.heads + head) * p.channels + channel);

  if (threadIdx.x < n_queries) {
    queries[threadIdx.x] =
        static_cast<int32_t>(query_in_strips<kScatterStrip>(p, levels, first_query + threadIdx.x));
  }
  __syncthreads();

  // This thread's points in each stage: some adjacent ones of a query.
  constexpr int kThreadsPerQuery = kStagePoints / kPointsPerThread;
  const int own_query = threadIdx.x / kThreadsPerQuery;
  const int own_first = threadIdx.x % kThreadsPerQuery * kPointsPerThread;
  const bool has_query = own_query < n_queries;
  const int64_t query_row = has_query ? batch * p.queries + queries[own_query] : 0;
  Softmax<acc> softmax;
  if constexpr (kIsFused<kSource>) softmax = softmaxes<scalar_t>(p)[query_row * p.heads + head];

  PointCursor cursor(p, own_first);
  for (int32_t first = 0; first < p.points; first += kStagePoints) {
    for (int i = threadIdx.x; i < kBins; i += kScatterThreads) bins[i] = 0;
    __syncthreads();

    int32_t own_bin[kPointsPerThread], rank[kPointsPerThread];
    PointReader<scalar_t, kSource> point;
    point.start(p, query_row * p.heads + head, query_row, first + own_first);
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      const int slot = threadIdx.x * kPointsPerThread + i;
      own_bin[i] = -1;
      if (has_query && first + own_first + i < p.points) {
        point.read(p);
        const acc weight = find_weight(p, point, softmax);
        const Corners<acc> corners = place(p, point, cursor.level, levels[cursor.level]);
        pixels[slot] =
            make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) shares[slot].corner[j] = weight * corners.share(j);
        const int32_t pixel = corners.first_pixel();
        if (pixel != kOutside) {
          own_bin[i] = pixel % kBins;
          rank[i] = atomicAdd(bins + own_bin[i], 1);
        }
      }
      point.skip(p, 1);
      cursor.advance(p, 1);
    }
    cursor.advance(p, kStagePoints - kPointsPerThread);
    __syncthreads();

    // Points sorted by bin.
    int32_t in_bins[kBinsPerThread], count = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      in_bins[i] = bins[threadIdx.x * kBinsPerThread + i];
      count += in_bins[i];
    }
    int32_t all;
    int32_t start = sum_before<kScatterThreads / 32>(count, all);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      bins[threadIdx.x * kBinsPerThread + i] = start;
      start += in_bins[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
      if (own_bin[i] >= 0) {
        order[bins[own_bin[i]] + rank[i]] =
            static_cast<uint16_t>(threadIdx.x * kPointsPerThread + i);
      }
    }
    __syncthreads();

    // Each team adds up its share of the sorted points: in registers, until the pixels change.
    const int share_size = (all + kTeams - 1) / kTeams;
    const int begin = min(team * share_size, all), end = min(begin + share_size, all);
    int4 current = make_int4(kOutside, kOutside, kOutside, kOutside);
    acc sums[4][kVec] = {};
    const auto flush = [&](int corner, int32_t pixel) {
      if (pixel != kOutside && has_channel) {
        atomic_add<kVec>(Rows::at(p, grad_value, Rows::offset(p, pixel)), sums[corner]);
      }
    };
    for (int i = begin; i < end; ++i) {
      const int slot = order[i];
      const int4 pixel = pixels[slot];
      const PerCorner<acc> share = shares[slot];
      Row row;
      if (has_channel) {
        const int32_t query = queries[slot / kStagePoints];
        row = Row::load(Rows::at(p, grad_output, Rows::offset(p, query)));
      }
      if (pixel.x != current.x || pixel.y != current.y || pixel.z != current.z ||
          pixel.w != current.w) {
        // The eastern pixels may be the next point's western ones.
        const bool next_column = pixel.x == current.y && pixel.z == current.w;
        flush(0, current.x);
        flush(2, current.z);
        if (!next_column) {
          flush(1, current.y);
          flush(3, current.w);
        }
#pragma unroll
        for (int c = 0; c < kVec; ++c) {
          sums[0][c] = next_column ? sums[1][c] : acc(0);
          sums[2][c] = next_column ? sums[3][c] : acc(0);
          sums[1][c] = 0;
          sums[3][c] = 0;
        }
        current = pixel;
      }
      acc x[kVec];
      row.unpack(x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) sums[j][c] += share.corner[j] * x[c];
      }
    }
    flush(0, current.x);
    flush(1, current.y);
    flush(2, current.z);
    flush(3, current.w);
    __syncthreads();
  }
}

template <typename scalar_t, int kVec, int kLanes>
const char* launch_scatter(const BackwardParams& p, void* stream) {
  return with_source<scalar_t>(p, [&](auto source) {
    const int64_t rows = int64_t(p.heads) * ceil_div(p.channels, kLanes * kVec);
    return launch(scatter_kernel<scalar_t, source.value, kVec, kLanes>, p,
                  ceil_div<int64_t>(p.queries, kScatterQueries) * rows, 1, kScatterThreads,
                  p.levels * sizeof(LevelOf<scalar_t, source.value>), false, stream);
  });
}

}  // namespace ms_deform_attn::cuda
