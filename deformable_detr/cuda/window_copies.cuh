// Where windows are put (windows.cuh cuts the image), which heads are served through them, and how
// they are filled.
#pragma once

#include "deformable_detr/cuda/matrix.cuh"
#include "deformable_detr/cuda/windows.cuh"

namespace ms_deform_attn::cuda {

// --------------------------------------------------------------------------------------- placement

// The four points of a query in a level, as they are given.
template <typename scalar_t, bool kFused>
struct PointsOfLevel {
  static constexpr int kVec = 16 / sizeof(scalar_t);
  Vec<scalar_t, kVec> xy[8 / kVec];
  Vec<scalar_t, 2> reference;

  __device__ __forceinline__ PointsOfLevel(const Params& p, int32_t levels, int32_t level,
                                           int64_t batch, int32_t head, int32_t query) {
    const int64_t of_batches = batch * p.queries + query;
    const int64_t point = ((of_batches * p.heads + head) * levels + level) * 4;
    const scalar_t* const from =
        static_cast<const scalar_t*>(kFused ? p.sampling_offsets.data : p.sampling_locations.data) +
        point * 2;
#pragma unroll
    for (int i = 0; i < 8 / kVec; ++i) xy[i] = xy[i].load(from + i * kVec);
    if constexpr (kFused) {
      const int64_t at = of_batches * p.reference_levels + (p.reference_levels > 1 ? level : 0);
      reference = reference.load(static_cast<const scalar_t*>(p.reference_points.data) + at * 2);
    }
  }
};

// The same, in pixels.
struct Sampled {
  float share_x, share_y;  // where the query is, as a share of the image
  float x[4], y[4];
  float mean_x, mean_y;  // how far all lanes' points are from their queries' own places, without
                         // those that are far away or NaN
};

// Each lane of the warp samples a level at one of 32 of `count` queries.
__device__ __forceinline__ int32_t sampled_query(int64_t count) {
  return static_cast<int32_t>((threadIdx.x % 32 + 0.5f) * (1.f / 32) * (count - 1));
}
template <typename scalar_t, bool kFused, int kLevels>
__device__ __forceinline__ Sampled sample_level(const Cut<kLevels>& cut, int32_t index,
                                                const PixelQuery& from,
                                                const PointsOfLevel<scalar_t, kFused>& points) {
  const Level level = cut.levels[index], of = cut.levels[from.level];
  Sampled sampled;
  sampled.share_x = __fdividef(from.column + 0.5f, of.width);
  sampled.share_y = __fdividef(from.row + 0.5f, of.height);
  const float own_x = sampled.share_x * level.width - 0.5f;
  const float own_y = sampled.share_y * level.height - 0.5f;
  float of_points[8], x = -0.5f, y = -0.5f;
#pragma unroll
  for (int i = 0; i < 8 / points.kVec; ++i) {
    points.xy[i].unpack(reinterpret_cast<float (&)[points.kVec]>(of_points[i * points.kVec]));
  }
  float scale_x = level.width, scale_y = level.height;
  if constexpr (kFused) {
    float reference[2];
    points.reference.unpack(reference);
    x = fmaf(reference[0], scale_x, x);
    y = fmaf(reference[1], scale_y, y);
    scale_x = scale_y = 1;
  }
  float sum_x = 0, sum_y = 0, count = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sampled.x[i] = fmaf(of_points[2 * i], scale_x, x);
    sampled.y[i] = fmaf(of_points[2 * i + 1], scale_y, y);
    const float dx = sampled.x[i] - own_x, dy = sampled.y[i] - own_y;
    const bool counts = fabsf(dx) < level.width && fabsf(dy) < level.height;
    sum_x += counts ? dx : 0;
    sum_y += counts ? dy : 0;
    count += counts;
  }
  count = max(team_sum<32>(count), 1.f);
  sampled.mean_x = __fdividef(team_sum<32>(sum_x), count);
  sampled.mean_y = __fdividef(team_sum<32>(sum_y), count);
  return sampled;
}

// The first column of a window (or row), for the region at `part` of `parts` in a level of this
// size whose points are moved so far on average.
__device__ __forceinline__ int32_t first_of_window(float moved, int32_t part, int32_t parts,
                                                   int32_t size, int32_t pixels) {
  const float center = __fdividef((part + 0.5f) * size, parts) - 0.5f + moved;
  return max(-1, min(size + 1 - pixels, __float2int_rn(center - 0.5f * (pixels - 1))));
}

// Puts a level's window where its points are on average. By one warp.
template <typename scalar_t, bool kFused, int kLevels>
__device__ __forceinline__ void place_window(const Params& p, const Cut<kLevels>& cut,
                                             Region<kLevels>& region, int32_t index, int64_t batch,
                                             int32_t head) {
  const PixelQuery from = query_of_region(cut, region, sampled_query(region.count));
  const PointsOfLevel<scalar_t, kFused> points(p, kLevels, index, batch, head, from.query);
  const Sampled sampled = sample_level(cut, index, from, points);
  if (threadIdx.x % 32 > 0) return;
  const Level& level = cut.levels[index];
  const int32_t columns = cut.columns[index], rows = cut.rows[index];
  const int32_t column =
      first_of_window(sampled.mean_x, region.x, cut.across, level.width, columns);
  const int32_t row = first_of_window(sampled.mean_y, region.y, cut.down, level.height, rows);
  region.column[index] = column;
  region.row[index] = row;
  region.frames[index] = {static_cast<float>(level.width),
                          static_cast<float>(level.height),
                          -0.5f - column,
                          -0.5f - row,
                          columns - 2.f,
                          rows - 2.f,
                          cut.pitch[index] / 16.f,
                          cut.start[index] / 16.f};
}

// ------------------------------------------------------------------------------------------ choice

// Counts those of a (batch, head)'s sampled points that windows would miss, by one block each; all
// of them, where the levels are none for windows.
template <typename scalar_t, bool kFused, int kLevels>
__global__ void __launch_bounds__(kLevels * 32)
    choose_kernel(const __grid_constant__ Params p, int64_t first_batch, WindowLayout layout) {
#if __CUDA_ARCH__ >= 800 || defined(MSDA_EMULATED)
  __shared__ Cut<kLevels> cut;
  __shared__ Region<kLevels> image;
  __shared__ int32_t missed_points;
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t head = blockIdx.x;
  const int64_t batch = first_batch + blockIdx.z;
  // On their way while the levels arrive.
  const int32_t query = sampled_query(p.queries);
  const PointsOfLevel<scalar_t, kFused> points(p, kLevels, warp, batch, head, query);
  if (warp == 0) {
    cut_image(p, layout, cut);
    __syncwarp();
    find_region(cut, 1, 1, 0, image);
    if (lane == 0) missed_points = cut.across > 0 ? 0 : kLevels * kSampledPoints;
  }
  __syncthreads();
  if (cut.across > 0) {
    const Sampled sampled = sample_level(cut, warp, query_of_region(cut, image, query), points);
    const Level& level = cut.levels[warp];
    const int32_t columns = cut.columns[warp], rows = cut.rows[warp];
    // The window of the query's own region.
    const auto first = [](float share, float moved, int32_t parts, int32_t size, int32_t pixels) {
      const int32_t part = max(0, min(parts - 1, static_cast<int32_t>(share * parts)));
      return first_of_window(moved, part, parts, size, pixels);
    };
    const int32_t column = first(sampled.share_x, sampled.mean_x, cut.across, level.width, columns);
    const int32_t row = first(sampled.share_y, sampled.mean_y, cut.down, level.height, rows);
    int32_t missed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = sampled.x[i], y = sampled.y[i];
      const bool touches = x > -1 && x < level.width && y > -1 && y < level.height;
      missed +=
          touches && !(x >= column && x < column + columns - 1 && y >= row && y < row + rows - 1);
    }
    atomicAdd(&missed_points, missed);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    static_cast<int32_t*>(p.windows)[batch * p.heads + head] = missed_points;
    if (batch == 0 && head == 0) *fetched_tiles(p) = 0;
  }
#endif
}

// Starts to copy the windows. value: of the block's head.
template <typename scalar_t, int kLevels>
__device__ __forceinline__ void fill_windows(const Params& p, const Cut<kLevels>& cut,
                                             const Region<kLevels>& region, uint32_t memory,
                                             const scalar_t* value) {
  // A lane copies 16 bytes of a pixel. A warp takes a row of the window, 32 columns at a time.
  constexpr int kLanes = kPixelBytes<scalar_t> / 16, kPixels = 32 / kLanes, kTurns = kLanes;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int pixel = threadIdx.x % 32 / kLanes;
  const int byte = threadIdx.x % kLanes * 16;
  const int64_t pixel_bytes = int64_t(p.heads) * kPixelBytes<scalar_t>;
#pragma unroll 1
  for (int l = 0; l < kLevels; ++l) {
    const Level level = cut.levels[l];
    const Part window{region.column[l], region.row[l], cut.columns[l], cut.rows[l]};
    const int64_t step = int64_t(warps) * level.width * pixel_bytes;
    const int32_t pitch = cut.pitch[l];
    for (int32_t column = pixel; column < window.columns; column += 32) {
      const int64_t first =
          level.start + int64_t(window.row + warp) * level.width + window.column + column;
      const char* from[kTurns];
      uint32_t height[kTurns];
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        from[i] = reinterpret_cast<const char*>(value) + (first + i * kPixels) * pixel_bytes + byte;
        height[i] = is_inside(window.column + column + i * kPixels, level.width) ? level.height : 0;
      }
      uint32_t to = memory + cut.start[l] + warp * pitch + column * kPixelBytes<scalar_t> + byte;
      for (int32_t row = warp; row < window.rows; row += warps) {
        const uint32_t y = window.row + row;
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          if (column + i * kPixels < window.columns) {
            copy_async(to + i * (kPixels * kPixelBytes<scalar_t>), from[i], y < height[i]);
          }
          from[i] += step;
        }
        to += warps * pitch;
      }
    }
  }
}

// What a block that serves one region does first: it asks for the choice, cuts the image, places
// its windows, lists its queries and starts the copies. False if it has nothing to serve. value: of
// the block's head; were it worked out here, the forward would be 16 instructions longer.
template <typename scalar_t, bool kFused, int kLevels>
__device__ __forceinline__ bool prepare_windows(const Params& p, const WindowLayout& layout,
                                                Cut<kLevels>& cut, Region<kLevels>& region,
                                                char* memory, int32_t index, int64_t batch,
                                                int32_t head, int most_missed,
                                                const scalar_t* value) {
  const int warp = threadIdx.x / 32;
  const uint32_t memory_at = shared_address(memory);
  const auto is_left = [&] {
    wait_for_previous_kernel();
    if (left_by_windows(p, most_missed, true)) return true;
    // Only here: what is left is served faster where these blocks' shared memory is L1 again.
    let_next_kernel_start();
    return false;
  };
  // The first blocks are there before choose_kernel ends, and prepare meanwhile.
  const bool first = blockIdx.z == 0 && blockIdx.x < layout.first_blocks;
  if (!first && is_left()) return false;
  if (warp == 0) {
    cut_image(p, layout, cut);
    __syncwarp();
    if (index < cut.across * cut.down) find_region(cut, cut.across, cut.down, index, region);
  }
  __syncthreads();
  if (index >= cut.across * cut.down || region.count == 0) {
    if (first) wait_for_previous_kernel();
    return false;
  }
  // Some warps place the windows, the others list the queries.
  if (warp < kLevels) {
    place_window<scalar_t, kFused>(p, cut, region, warp, batch, head);
  } else {
    constexpr int kThreads = kWindowThreads - kLevels * 32;
    int32_t* const list = reinterpret_cast<int32_t*>(memory + layout.list);
    for (int32_t i = threadIdx.x - kLevels * 32; i < region.count; i += kThreads) {
      list[i] = query_of_region(cut, region, i).query;
    }
    for (int32_t i = threadIdx.x - kLevels * 32; i < cut.zero_pieces; i += kThreads) {
      store_shared(memory_at + cut.zeros + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
  if (first && is_left()) return false;
  __syncthreads();
  fill_windows(p, cut, region, memory_at, value);
  return true;
}

}  // namespace ms_deform_attn::cuda
