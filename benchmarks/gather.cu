// The gather ceiling: the loads of the forward kernel, with an xor in place of the interpolation.
//
// As in deformable_detr/cuda, some lanes serve a (batch, query, head) and hold 16 bytes of its row
// each; a block serves adjacent queries, and as many heads as make a 128-byte line of value. Every
// location and weight is read once, and its corners are worked out once; every corner's row inside
// the map is loaded. What was loaded is combined by xor and written where the output would be. No
// kernel that brings every corner's row into registers this way can be faster.
//
// The file knows as little of the kernels as it can, so that they may change: it has the geometry
// from bilinear.h, and the order of the queries from its caller. probe.py compiles it into a
// library of its own; the tests check what it loads.
#include "deformable_detr/bilinear.h"
#include "deformable_detr/cuda/vec.cuh"

namespace {

using namespace ms_deform_attn;
using cuda::Vec;

constexpr int kThreads = 256;
constexpr int kMaxLevels = 32;

struct Problem {
  int64_t batch, spatial_size, queries;
  int32_t heads, levels, points;
  int32_t row_vectors;               // of 16 bytes, in a row of value
  int32_t level_points[kMaxLevels];  // of one (batch, query, head); `points` is their sum

  const uint4* value;                // [batch, spatial_size, heads, row_vectors]
  const int64_t* spatial_shapes;     // [levels, 2]
  const int64_t* level_start_index;  // [levels]
  const void* sampling_locations;    // [batch, queries, heads, points, 2]
  const void* attention_weights;     // [batch, queries, heads, points]
  const int32_t* order;              // [queries], the query served at each place, or null
  uint4* output;                     // [batch, queries, heads, row_vectors]
};

// ------------------------------------------------------------------------------------------ kernel

__device__ __forceinline__ void xor_into(uint4& sum, const uint4& x) {
  sum.x ^= x.x;
  sum.y ^= x.y;
  sum.z ^= x.z;
  sum.w ^= x.w;
}

template <typename point_t>
struct Point {
  Vec<point_t, 2> location;
  Vec<point_t, 1> weight;

  __device__ __forceinline__ void read(const Problem& p, int64_t index) {
    location = Vec<point_t, 2>::load(static_cast<const point_t*>(p.sampling_locations) + 2 * index);
    weight = Vec<point_t, 1>::load(static_cast<const point_t*>(p.attention_weights) + index);
  }
  __device__ __forceinline__ Corners<acc_t<point_t>> corners(const Level& level) const {
    acc_t<point_t> xy[2], w[1];
    location.unpack(xy);
    weight.unpack(w);
    // True of every weight but NaN: a reason to read it.
    if (w[0] != w[0]) return {};
    using Coordinate = ms_deform_attn::Coordinate<acc_t<point_t>>;
    return {Coordinate(located_pixel(xy[0], level.width)),
            Coordinate(located_pixel(xy[1], level.height)), level};
  }
};

// kSplit groups of kLanes lanes share a (batch, query, head): each loads every kSplit-th point.
template <typename point_t, int kLanes, int kSplit>
__global__ void __launch_bounds__(kThreads, 4) gather_kernel(const __grid_constant__ Problem p) {
  constexpr int kTeam = kLanes * kSplit;
  constexpr int kTileHeads = kLanes < 8 ? 8 / kLanes : 1;
  constexpr int kTileQueries = kThreads / kTeam / kTileHeads;
  // Points are handed round in shared memory, as far apart as keeps them in different banks.
  constexpr int kWarpTeams = 32 / kTeam;
  constexpr int kPitch = kWarpTeams + (kWarpTeams > 4 ? kWarpTeams / 4 : kWarpTeams > 1);
  __shared__ int4 corners_of[kThreads / 32 * kTeam * kPitch];  // where in value, or negative
  __shared__ Level levels[kMaxLevels];

  const int lane = threadIdx.x % kTeam;
  const int team = threadIdx.x / kTeam;
  const int64_t batch = blockIdx.z;
  const int64_t place = int64_t(blockIdx.x) * kTileQueries + team / kTileHeads;
  const int32_t head = blockIdx.y * kTileHeads + team % kTileHeads;
  const bool active = place < p.queries && head < p.heads;
  const int64_t query = active && p.order != nullptr ? p.order[place] : place;
  const int64_t row = active ? (batch * p.queries + query) * p.heads + head : 0;

  // The first points are on their way while the levels arrive.
  Point<point_t> next;
  if (active && lane < p.points) next.read(p, row * p.points + lane);
  if (threadIdx.x < p.levels) {
    const int64_t* shape = p.spatial_shapes + 2 * threadIdx.x;
    levels[threadIdx.x] =
        make_level(shape[0], shape[1], p.level_start_index[threadIdx.x], p.spatial_size);
  }
  __syncthreads();

  const int32_t pixel_vectors = p.heads * p.row_vectors;
  const int32_t vector = lane % kLanes;
  const bool has_vector = active && vector < p.row_vectors;
  const uint4* value =
      p.value + batch * p.spatial_size * pixel_vectors + head * p.row_vectors + vector;
  int4* slots = corners_of + threadIdx.x / 32 * kTeam * kPitch + threadIdx.x % 32 / kTeam;
  uint4 sum{};
  int32_t level = 0, point_of_level = lane;
  for (int32_t first = 0; first < p.points; first += kTeam) {
    // Each lane works out one point.
    int4 offsets = {-1, -1, -1, -1};
    if (active && first + lane < p.points) {
      for (; point_of_level >= p.level_points[level]; ++level) {
        point_of_level -= p.level_points[level];
      }
      const auto corners = next.corners(levels[level]);
      const auto offset = [&](int j) {
        return corners.pixel[j] == kOutside ? -1 : corners.pixel[j] * pixel_vectors;
      };
      offsets = {offset(0), offset(1), offset(2), offset(3)};
      if (first + kTeam + lane < p.points) next.read(p, row * p.points + first + kTeam + lane);
    }
    point_of_level += kTeam;
    __syncwarp();
    slots[lane * kPitch] = offsets;
    __syncwarp();

    // Each group of lanes loads the rows of its points.
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (i % 4 == 0 && first + i * kSplit >= p.points) break;
      const int4 at = slots[(lane / kLanes + i * kSplit) * kPitch];
      const int32_t offset[4] = {at.x, at.y, at.z, at.w};
      uint4 corner[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (has_vector && offset[j] >= 0) corner[j] = __ldg(value + offset[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) xor_into(sum, corner[j]);
    }
  }

#pragma unroll
  for (int distance = kLanes; distance < kTeam; distance *= 2) {
    uint4 other;
    other.x = __shfl_xor_sync(0xffffffff, sum.x, distance);
    other.y = __shfl_xor_sync(0xffffffff, sum.y, distance);
    other.z = __shfl_xor_sync(0xffffffff, sum.z, distance);
    other.w = __shfl_xor_sync(0xffffffff, sum.w, distance);
    xor_into(sum, other);
  }
  if (has_vector && lane < kLanes) __stcs(p.output + row * p.row_vectors + vector, sum);
}

// ---------------------------------------------------------------------------------------- launcher

template <typename point_t, int kLanes, int kSplit>
const char* launch(const Problem& p, cudaStream_t stream) {
  constexpr int64_t kTileHeads = kLanes < 8 ? 8 / kLanes : 1;
  constexpr int64_t kTileQueries = kThreads / (kLanes * kSplit) / kTileHeads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.queries + kTileQueries - 1) / kTileQueries),
                        static_cast<unsigned>((p.heads + kTileHeads - 1) / kTileHeads),
                        static_cast<unsigned>(p.batch));
  config.blockDim = kThreads;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, gather_kernel<point_t, kLanes, kSplit>, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename point_t, int kLanes = 2>
const char* with_lanes(const Problem& p, int split, cudaStream_t stream) {
  if constexpr (kLanes < 32) {
    if (p.row_vectors > kLanes) return with_lanes<point_t, 2 * kLanes>(p, split, stream);
  }
  if (split == 1) return launch<point_t, kLanes, 1>(p, stream);
  if constexpr (kLanes <= 8) {
    if (split == 4) return launch<point_t, kLanes, 4>(p, stream);
  }
  return "rows of this width do not have this split";
}

}  // namespace

// ------------------------------------------------------------------------------------------- entry

// Enqueues the kernel; returns null, or what went wrong. Shapes are those of Problem; level_points
// is on the host. A point's location and weight are of point_dtype, a DType.
extern "C" const char* msda_gather(int split, int64_t batch, int64_t spatial_size, int64_t queries,
                                   int32_t heads, int32_t levels, const int32_t* level_points,
                                   int32_t row_vectors, int point_dtype, const void* value,
                                   const void* spatial_shapes, const void* level_start_index,
                                   const void* sampling_locations, const void* attention_weights,
                                   const void* order, void* output, void* stream) {
  if (levels > kMaxLevels) return "more than 32 levels";
  if (row_vectors < 1 || row_vectors > 32) return "rows are not of 16 to 512 bytes";
  if (spatial_size * heads * row_vectors > INT32_MAX) return "value is too large";
  Problem p{batch, spatial_size, queries, heads, levels, 0, row_vectors};
  for (int32_t i = 0; i < levels; ++i) p.points += p.level_points[i] = level_points[i];
  p.value = static_cast<const uint4*>(value);
  p.spatial_shapes = static_cast<const int64_t*>(spatial_shapes);
  p.level_start_index = static_cast<const int64_t*>(level_start_index);
  p.sampling_locations = sampling_locations;
  p.attention_weights = attention_weights;
  p.order = static_cast<const int32_t*>(order);
  p.output = static_cast<uint4*>(output);

  const char* error = nullptr;
  dispatch(static_cast<DType>(point_dtype), [&](auto zero) {
    error = with_lanes<decltype(zero)>(p, split, static_cast<cudaStream_t>(stream));
  });
  return error;
}
