// Strategy::scatter: the gradient of value for problems whose queries are the pixels, by fewer
// atomics than one for each corner of each point.
//
// Neighbouring queries sample neighbouring pixels, so many of their points fall on the same ones. A
// block takes the queries of all levels in a region of the image, sorts their points by pixel
// (modulo kBins), and adds up in registers what falls on the same four corners before it adds that
// to grad_value. Sums are in any order. Squares of 16 x 8 queries of one level take longer:
// ddetr_encoder_b4 fp32 496 instead of 436 us (H100).
#include "deformable_detr/cuda/backward_kernels.h"
#include "deformable_detr/cuda/block_scan.cuh"
#include "deformable_detr/cuda/launch.cuh"
#include "deformable_detr/cuda/layout.cuh"
#include "deformable_detr/cuda/query_regions.cuh"
#include "deformable_detr/cuda/softmax.cuh"

namespace ms_deform_attn::cuda {
namespace {

constexpr int kScatterThreads = 256;
constexpr int kScatterQueries = 128;  // of a block, at a time
constexpr int kPointsPerThread = 4;
constexpr int kScatterPoints = kScatterThreads * kPointsPerThread;  // sorted at a time
constexpr int kStagePoints = kScatterPoints / kScatterQueries;      // of each query
constexpr int kBins = 1024;                                         // pixel index modulo kBins

template <typename scalar_t, Source kSource, int kVec, int kLanes>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ BackwardParams p, int64_t first_batch, int32_t regions,
                   const Softmax<float>* softmaxes) {
  using Vector = Vec<scalar_t, kVec>;
  using Indexing = cuda::Indexing<scalar_t, kVec>;
  using LevelEntry = cuda::LevelEntry<scalar_t, kSource>;
  constexpr int kTeamChannels = kLanes * kVec;
  constexpr int kTeams = kScatterThreads / kLanes;
  constexpr int kBinsPerThread = kBins / kScatterThreads;
  extern __shared__ __align__(32) char memory[];
  LevelEntry* levels = reinterpret_cast<LevelEntry*>(memory);
  QueryPart* parts = reinterpret_cast<QueryPart*>(levels + p.levels);
  __shared__ PerCorner<float> weights[kScatterPoints];  // corner weight * attention weight
  __shared__ int4 pixels[kScatterPoints];               // of the corners
  __shared__ uint16_t order[kScatterPoints];            // of the points, by bin
  __shared__ int32_t bins[kBins];  // the count of points, then where they start
  __shared__ int32_t queries[kScatterQueries];
  __shared__ int32_t region_queries;
  static_assert(sizeof(weights) + sizeof(pixels) + sizeof(order) + sizeof(bins) + sizeof(queries) +
                    1024 <=
                48 * 1024 - kFreeSharedMemory);

  LevelLoader<LevelEntry> level_loader;
  level_loader.load(p);
  level_loader.store(p, levels);
  const int team = threadIdx.x / kLanes;
  const int32_t channel_blocks = ceil_div(p.channels, kTeamChannels);
  const int32_t head_and_channels = blockIdx.x / regions;
  const int32_t region = blockIdx.x - head_and_channels * regions;
  const int32_t head = head_and_channels / channel_blocks;
  const int32_t channel =
      head_and_channels % channel_blocks * kTeamChannels + threadIdx.x % kLanes * kVec;
  const bool has_channel = channel < p.channels;
  const int64_t batch = first_batch + blockIdx.z;
  float* grad_value = opaque(static_cast<float*>(p.grad_value) +
                             (batch * p.spatial_size * p.heads + head) * p.channels + channel);
  const scalar_t* grad_output = opaque(static_cast<const scalar_t*>(p.grad_output) +
                                       (batch * p.queries * p.heads + head) * p.channels + channel);

  if (threadIdx.x < 32) {
    const int32_t across = choose_across(p, levels, regions, kScatterQueries);
    const int32_t down = regions / across;
    int32_t count = 0;
    if (region < across * down) count = find_parts(p, levels, across, down, region, parts);
    if (threadIdx.x == 0) region_queries = count;
  }
  __syncthreads();

  for (int32_t first_query = 0; first_query < region_queries; first_query += kScatterQueries) {
    const int32_t n_queries = min(kScatterQueries, region_queries - first_query);
    if (threadIdx.x < n_queries) {
      queries[threadIdx.x] = query_of_parts(p, parts, first_query + threadIdx.x);
    }
    __syncthreads();

    // This thread's points in each stage: some adjacent ones of a query.
    constexpr int kThreadsPerQuery = kStagePoints / kPointsPerThread;
    const int own_query = threadIdx.x / kThreadsPerQuery;
    const int own_first = threadIdx.x % kThreadsPerQuery * kPointsPerThread;
    const bool has_query = own_query < n_queries;
    const int64_t query_index = has_query ? batch * p.queries + queries[own_query] : 0;
    Softmax<float> softmax;
    if constexpr (kIsFused<kSource>) softmax = softmaxes[query_index * p.heads + head];

    PointCursor cursor(p, own_first);
    for (int32_t first = 0; first < p.points; first += kStagePoints) {
      for (int i = threadIdx.x; i < kBins; i += kScatterThreads) bins[i] = 0;
      __syncthreads();

      int32_t own_bin[kPointsPerThread], rank[kPointsPerThread];
      PointReader<scalar_t, kSource> reader;
      reader.seek(p, query_index * p.heads + head, query_index, first + own_first);
#pragma unroll
      for (int i = 0; i < kPointsPerThread; ++i) {
        const int slot = threadIdx.x * kPointsPerThread + i;
        own_bin[i] = -1;
        if (has_query && first + own_first + i < p.points) {
          reader.read(p);
          const float weight = find_weight(p, reader, softmax);
          const Corners<float> corners =
              find_corners(p, reader, cursor.level, levels[cursor.level]);
          pixels[slot] =
              make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
          weights[slot] = weigh_corners(corners, weight);
          const int32_t pixel = corners.first_pixel();
          if (pixel != kOutside) {
            own_bin[i] = pixel % kBins;
            rank[i] = atomicAdd(bins + own_bin[i], 1);
          }
        }
        reader.skip(p, 1);
        cursor.advance(p, 1);
      }
      cursor.advance(p, kStagePoints - kPointsPerThread);
      __syncthreads();

      // A counting sort of the points by bin.
      int32_t in_bins[kBinsPerThread], of_thread = 0;
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        in_bins[i] = bins[threadIdx.x * kBinsPerThread + i];
        of_thread += in_bins[i];
      }
      int32_t total;
      int32_t start = exclusive_scan<kScatterThreads / 32>(of_thread, total);
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

      // Each team adds up an equal run of the sorted points, in registers until the corners change.
      const int of_team = (total + kTeams - 1) / kTeams;
      const int begin = min(team * of_team, total), end = min(begin + of_team, total);
      int4 current = make_int4(kOutside, kOutside, kOutside, kOutside);
      CornerSums<kVec> sums;
      // Adds what the western corners have, and the eastern ones.
      const auto flush = [&](bool eastern) {
        const int32_t of_corner[4] = {current.x, current.y, current.z, current.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (of_corner[j] == kOutside || !has_channel || (j & 1 && !eastern)) continue;
          float* to = Indexing::at(p, grad_value, Indexing::offset(p, of_corner[j]));
          atomic_add<kVec>(to, sums.of[j]);
        }
      };
      for (int i = begin; i < end; ++i) {
        const int slot = order[i];
        const int4 pixel = pixels[slot];
        const PerCorner<float> weight = weights[slot];
        Vector row;
        if (has_channel) {
          const int32_t query = queries[slot / kStagePoints];
          row = Vector::load(Indexing::at(p, grad_output, Indexing::offset(p, query)));
        }
        if (pixel.x != current.x || pixel.y != current.y || pixel.z != current.z ||
            pixel.w != current.w) {
          // The eastern pixels may be the next point's western ones.
          const bool next_column = pixel.x == current.y && pixel.z == current.w;
          flush(!next_column);
          sums.move(next_column);
          current = pixel;
        }
        sums.add(weight, row);
      }
      flush(true);
      __syncthreads();
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

void launch_scatter(const BackwardParams& params, const BackwardPlan& plan, void* stream) {
  // Not for float64: its gradients are deterministic, and its points would take 55 KB of static
  // shared memory, where a kernel may have 48.
  with_types<false>(params, [&](auto zero, auto source) {
    using scalar_t = decltype(zero);
    // A lane's channels fill 16 bytes of sums, so that what a team adds is contiguous.
    with_vectors<scalar_t, 4>(params, [&](auto vec, auto lanes) {
      // Regions differ; with this many few have more queries than a block takes at a time.
      const int32_t regions = static_cast<int32_t>(params.queries / (0.92 * kScatterQueries)) + 1;
      const int64_t blocks =
          int64_t(regions) * params.heads * ceil_div(params.channels, lanes.value * vec.value);
      const int64_t of_level = sizeof(LevelEntry<scalar_t, source.value>) + sizeof(QueryPart);
      const Grid grid{blocks, 1, kScatterThreads,
                      params.levels * of_level + int64_t(sizeof(QueryPart))};
      launch(scatter_kernel<scalar_t, source.value, vec.value, lanes.value>, params, grid, stream,
             regions, in_scratch<const Softmax<float>>(params, plan.scratch.softmaxes));
    });
  });
}

}  // namespace ms_deform_attn::cuda
