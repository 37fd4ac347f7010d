// Multi-scale deformable attention on the GPU, forward: output = sum over points of
// weight * (bilinear sample of value). launch.cuh tells how teams of lanes share the work.
#include "deformable_detr/cuda/launch.cuh"

namespace ms_deform_attn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ kernel

// One point, ready to be added up: its corners' pixels, and weight times share of each.
template <typename acc>
struct alignas(4 * sizeof(acc)) Shares {
  acc corner[4];
};

// kSplit teams of kLanes lanes share a (batch, query, head): each adds up every kSplit-th point.
template <typename scalar_t, int kVec, int kLanes, int kSplit>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ Params p, const __grid_constant__ Tiling tiling) {
  using acc = acc_t<scalar_t>;
  constexpr int kTeam = kLanes * kSplit;
  extern __shared__ TiledLevel table[];
  __shared__ int4 pixels[kThreads];
  __shared__ Shares<acc> shares[kThreads];

  const int lane = threadIdx.x % kTeam;
  const int first_slot = threadIdx.x - lane;
  const int split = lane / kLanes;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  const int32_t all_points = p.levels * p.points;

  const Levels levels = load_levels(p, tiling, table);
  const int64_t tiles = levels.tiles * tiling.head_groups * p.batch;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = tile_work(p, tiling, levels, tile, threadIdx.x / kTeam);
    const bool active = work.query >= 0;
    const int64_t row = active ? work.row(p) : 0;
    const scalar_t* value = static_cast<const scalar_t*>(p.value) +
                            work.batch * p.spatial_size * pixel_stride +
                            int64_t(work.head) * p.channels;

    for (int32_t channel = lane % kLanes * kVec; channel - lane % kLanes * kVec < p.channels;
         channel += kLanes * kVec) {
      acc sum[kVec] = {};
      for (int32_t first = 0; first < all_points; first += kTeam) {
        // Each lane works out one point.
        const int32_t point = first + lane;
        Corners<acc> corners;
        acc weight = 0;
        if (active && point < all_points) {
          const auto location = load_location<scalar_t>(p, row * all_points + point);
          weight = load_weight<scalar_t>(p, row * all_points + point);
          corners = Corners<acc>(location.x, location.y, levels.level[point / p.points]);
        }
        __syncwarp();
        pixels[threadIdx.x] =
            make_int4(corners.pixel[0], corners.pixel[1], corners.pixel[2], corners.pixel[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) shares[threadIdx.x].corner[i] = weight * corners.share(i);
        __syncwarp();

        // Each team adds up its points.
        if (channel < p.channels) {
#pragma unroll
          for (int i = 0; i < kLanes; ++i) {
            if (first + i * kSplit >= all_points) break;
            const int slot = first_slot + i * kSplit + split;
            const int4 pixel = pixels[slot];
            const Shares<acc> share = shares[slot];
            const int32_t pixel_of[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
            Vec<scalar_t, kVec> corner[4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (pixel_of[j] != kOutside) {
                corner[j] = Vec<scalar_t, kVec>::load(value + pixel_of[j] * pixel_stride + channel);
              }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (int k = 0; k < kVec; ++k) sum[k] += share.corner[j] * to_acc(corner[j].data[k]);
            }
          }
        }
      }
#pragma unroll
      for (int offset = kLanes; offset < kTeam; offset *= 2) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[k] += __shfl_xor_sync(0xffffffff, sum[k], offset);
      }
      if (active && split == 0 && channel < p.channels) {
        Vec<scalar_t, kVec> output;
#pragma unroll
        for (int k = 0; k < kVec; ++k) output.data[k] = from_acc<scalar_t>(sum[k]);
        output.store(static_cast<scalar_t*>(p.output) + row * p.channels + channel);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

template <typename scalar_t, int kVec, int kLanes, int kSplit>
const char* launch_forward(const Params& p, void* stream) {
  const Tiling tiling =
      make_tiling(p, kThreads / (kLanes * kSplit), int64_t(p.channels) * sizeof(scalar_t));
  return launch(forward_kernel<scalar_t, kVec, kLanes, kSplit>, p, tiling, stream);
}

// Few rows leave most of the GPU idle unless the points of each are spread over several teams.
constexpr int64_t kFewLanes = 132 * 2048 / 2;

}  // namespace

// ------------------------------------------------------------------------------------------- entry

const char* forward(const Params& params, void* stream) {
  const char* error = nullptr;
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (params.channels % kVec != 0) {
      error = launch_forward<scalar_t, 1, 32, 1>(params, stream);
      return;
    }
    error = with_lanes<2>(params.channels / kVec, [&](auto lanes) {
      if constexpr (lanes.value <= 8) {
        if (params.batch * params.queries * params.heads * lanes.value <= kFewLanes) {
          return launch_forward<scalar_t, kVec, lanes.value, 4>(params, stream);
        }
      }
      return launch_forward<scalar_t, kVec, lanes.value, 1>(params, stream);
    });
  });
  return error;
}

}  // namespace ms_deform_attn::cuda
