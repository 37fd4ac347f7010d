// How work is laid out over the GPU, the same in forward and backward.
//
// A team of kLanes lanes (a power of two, inside one warp) serves one (batch, query, head). Each lane
// owns kVec adjacent channels. The geometry of the points is worked out once: each lane takes one
// point of a stage of kLanes points and leaves it in shared memory, where the whole team reads it.
//
// A block serves a tile: some queries, and as many heads as make a 128-byte line of value, so that
// a line brought into L1 is used whole. Tiles are numbered with the queries fastest, then the heads,
// then the batch. Where the queries are the pixels of the levels themselves, as in an encoder, a
// tile's queries are a rectangle of one level, whose points share most of their corners.
#pragma once

#include <cstdint>
#include <utility>

#include "deformable_detr/bilinear.h"
#include "deformable_detr/cuda/vec.cuh"
#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 1024;

template <typename integer_t>
__host__ __device__ constexpr integer_t ceil_div(integer_t a, integer_t b) {
  return (a + b - 1) / b;
}

// ---------------------------------------------------------------------------------------- operands

__device__ __forceinline__ int64_t load_integer(const void* data, bool int64, int64_t index) {
  return int64 ? static_cast<const int64_t*>(data)[index]
               : static_cast<const int32_t*>(data)[index];
}

// A location or weight is stored as scalar_t or, beside a half value, as float.
template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> load_weight(const Params& p, int64_t point) {
  if (p.weights_dtype == DType::f32) return static_cast<const float*>(p.attention_weights)[point];
  return to_acc(static_cast<const scalar_t*>(p.attention_weights)[point]);
}

template <typename acc>
struct Location {
  acc x, y;
};

template <typename scalar_t>
__device__ __forceinline__ Location<acc_t<scalar_t>> load_location(const Params& p, int64_t point) {
  if (p.locations_dtype == DType::f32) {
    const auto xy = Vec<float, 2>::load(static_cast<const float*>(p.sampling_locations) + 2 * point);
    return {xy.data[0], xy.data[1]};
  }
  const auto xy =
      Vec<scalar_t, 2>::load(static_cast<const scalar_t*>(p.sampling_locations) + 2 * point);
  return {to_acc(xy.data[0]), to_acc(xy.data[1])};
}

template <typename scalar_t>
__device__ __forceinline__ void store_weight(const BackwardParams& p, int64_t point,
                                             acc_t<scalar_t> x) {
  if (p.weights_dtype == DType::f32) {
    static_cast<float*>(p.grad_attention_weights)[point] = static_cast<float>(x);
  } else {
    static_cast<scalar_t*>(p.grad_attention_weights)[point] = from_acc<scalar_t>(x);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store_location(const BackwardParams& p, int64_t point,
                                               const Location<acc_t<scalar_t>>& x) {
  if (p.locations_dtype == DType::f32) {
    Vec<float, 2>{static_cast<float>(x.x), static_cast<float>(x.y)}.store(
        static_cast<float*>(p.grad_sampling_locations) + 2 * point);
  } else {
    Vec<scalar_t, 2>{from_acc<scalar_t>(x.x), from_acc<scalar_t>(x.y)}.store(
        static_cast<scalar_t*>(p.grad_sampling_locations) + 2 * point);
  }
}

// ------------------------------------------------------------------------------------------- tiles

// A level and the number of tiles that its pixels make, as queries.
struct TiledLevel : Level {
  int32_t first_tile;
};

struct Tiling {
  int32_t tile_width, tile_height;  // queries per tile; in order, if not a rectangle: the product
  int32_t tile_heads;
  int32_t head_groups;  // ceil_div(heads, tile_heads)
  bool queries_are_pixels;  // what the sizes allow; the levels decide

  __host__ __device__ int32_t tile_queries() const { return tile_width * tile_height; }
};

// The block's table of levels, in shared memory.
struct Levels {
  const TiledLevel* level;
  int64_t tiles;  // of queries: per batch and group of heads
  bool rectangles;
};

// Fills `table` (levels + 1 entries of shared memory) by the whole block.
__device__ __forceinline__ Levels load_levels(const Params& p, const Tiling& tiling,
                                              TiledLevel* table) {
  for (int i = threadIdx.x; i < p.levels; i += kThreads) {
    static_cast<Level&>(table[i]) =
        make_level(load_integer(p.spatial_shapes, p.shapes_int64, 2 * i),
                   load_integer(p.spatial_shapes, p.shapes_int64, 2 * i + 1),
                   load_integer(p.level_start_index, p.starts_int64, i), p.spatial_size);
  }
  __syncthreads();
  const int64_t tiles_in_order = ceil_div<int64_t>(p.queries, tiling.tile_queries());
  if (!tiling.queries_are_pixels) return {table, tiles_in_order, false};

  // Rectangles serve every query once only if the levels follow each other without gap or overlap.
  if (threadIdx.x == 0) {
    int32_t tiles = 0;
    int64_t pixels = 0;
    bool adjacent = true;
    for (int i = 0; i < p.levels; ++i) {
      adjacent &= table[i].start == pixels && table[i].height > 0;
      pixels += int64_t(table[i].height) * table[i].width;
      table[i].first_tile = tiles;
      tiles += ceil_div(table[i].height, tiling.tile_height) *
               ceil_div(table[i].width, tiling.tile_width);
    }
    table[p.levels].first_tile = adjacent && pixels == p.queries ? tiles : -1;
  }
  __syncthreads();
  const int32_t tiles = table[p.levels].first_tile;
  return tiles < 0 ? Levels{table, tiles_in_order, false} : Levels{table, tiles, true};
}

// The query at place `slot` of tile `tile`, or -1 if there is none.
__device__ __forceinline__ int64_t tile_query(const Params& p, const Tiling& tiling,
                                              const Levels& levels, int64_t tile, int slot) {
  if (!levels.rectangles) {
    const int64_t query = tile * tiling.tile_queries() + slot;
    return query < p.queries ? query : -1;
  }
  int i = 0;
  while (tile >= levels.level[i + 1].first_tile) ++i;
  const TiledLevel& level = levels.level[i];
  const int32_t in_level = static_cast<int32_t>(tile) - level.first_tile;
  const int32_t columns = ceil_div(level.width, tiling.tile_width);
  const int32_t row = in_level / columns * tiling.tile_height + slot / tiling.tile_width;
  const int32_t column = in_level % columns * tiling.tile_width + slot % tiling.tile_width;
  if (row >= level.height || column >= level.width) return -1;
  return level.start + row * level.width + column;
}

// What a team serves: one (batch, query, head).
struct Work {
  int64_t batch, query;
  int32_t head;

  __device__ __forceinline__ int64_t row(const Params& p) const {
    return (batch * p.queries + query) * p.heads + head;
  }
};

// The work of team `team` (of a block's) in tile `tile`; query is -1 if there is none.
__device__ __forceinline__ Work tile_work(const Params& p, const Tiling& tiling,
                                          const Levels& levels, int64_t tile, int team) {
  const int64_t group = tile / levels.tiles;
  Work work;
  work.batch = group / tiling.head_groups;
  work.head = static_cast<int32_t>(group % tiling.head_groups) * tiling.tile_heads +
              team % tiling.tile_heads;
  work.query = tile_query(p, tiling, levels, tile % levels.tiles, team / tiling.tile_heads);
  if (work.head >= p.heads) work.query = -1;
  return work;
}

// ------------------------------------------------------------------------------------------ launch

// teams: how many a block has.
inline Tiling make_tiling(const Params& p, int teams, int64_t row_bytes) {
  Tiling tiling;
  tiling.tile_heads = 1;
  while (tiling.tile_heads < teams && tiling.tile_heads * row_bytes < 128 &&
         tiling.tile_heads < p.heads) {
    tiling.tile_heads *= 2;
  }
  tiling.head_groups = ceil_div(p.heads, tiling.tile_heads);
  const int queries = teams / tiling.tile_heads;
  tiling.tile_width = queries < 8 ? queries : 8;
  tiling.tile_height = queries / tiling.tile_width;
  tiling.queries_are_pixels = p.queries == p.spatial_size;
  return tiling;
}

// Launches a kernel(params, tiling) over all tiles. Returns null, or the error.
template <typename ParamsType>
const char* launch(void (*kernel)(ParamsType, Tiling), const ParamsType& p, const Tiling& tiling,
                   void* stream) {
  if (p.levels > kMaxLevels) return "more than 1024 levels";
  const size_t table_bytes = (p.levels + 1) * sizeof(TiledLevel);
  int64_t blocks =
      ceil_div<int64_t>(p.queries, tiling.tile_queries()) * tiling.head_groups * p.batch;
  if (tiling.queries_are_pixels) {
    // How many rectangles there are only the GPU knows: its blocks walk over them.
    int device, multiprocessors, resident;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, table_bytes);
    }
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int64_t wave = int64_t(multiprocessors) * resident;
    if (blocks > wave) blocks = wave;
  }
  if (blocks > INT32_MAX) blocks = INT32_MAX;  // each then walks over several
  kernel<<<static_cast<unsigned>(blocks), kThreads, table_bytes, static_cast<cudaStream_t>(stream)>>>(
      p, tiling);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// with_lanes(n, [&](auto lanes) { ... lanes.value ... }): n as a compile-time power of two up to 32.
template <int kMin, typename Function>
auto with_lanes(int64_t n, Function&& function) {
  if constexpr (kMin < 32) {
    if (n > kMin) return with_lanes<kMin * 2>(n, std::forward<Function>(function));
  }
  return function(std::integral_constant<int, kMin>{});
}

}  // namespace ms_deform_attn::cuda
