// Multi-scale deformable attention on the CPU, backward.
//
// Work is cut into tiles: some rows of one level's map, of one (batch, head). A thread copies its
// tile's value into memory of its own that stays in the L2 cache, next to the tile's gradient. For
// every point with a corner in the tile, grad_output times weight and share is added to that
// corner's gradient there, and the dot product of grad_output and the corner's value is taken.
// Finished, the gradient is written out: each element of grad_value once.
//
// The four dot products give the gradients of a point's weight and location. They belong to the
// tile of the point's first corner; for the corners below it has a halo, a row whose value it
// reads and whose gradient it drops. Tiles share nothing, and do not depend on the number of
// threads, so sums come out the same for any number.
#include <type_traits>

#include "deformable_detr/cpu/work.h"

namespace ms_deform_attn::cpu {
namespace {

constexpr int64_t kTileBytes = 960 << 10;  // with the rest, below 1 MB a thread
constexpr int64_t kFewestTiles = 32;       // of a call, about: for all threads to have some
constexpr int32_t kBlockPoints = 128;
constexpr int32_t kRegisterBytes = 64;  // the largest: tiles are the same for all

struct Tile {
  Level level;
  int32_t first_row, last_row;
  int32_t first_point, points;  // the level's, in a row of points

  int32_t first_pixel() const { return level.start + first_row * level.width; }
  int32_t pixels() const { return (last_row - first_row) * level.width; }
  int32_t pixels_with_halo() const { return pixels() + (last_row < level.height) * level.width; }
};

struct Tiles {
  int32_t padded_channels;
  int32_t queries_of_block;  // that are looked at together
  int32_t points_of_block;   // at most, in one level
  int64_t blocks;            // of a batch
  int64_t most_pixels;       // of a tile, with its halo and the pixel that stands for all elsewhere
  std::vector<Tile> tiles;
};

// As many rows of a map as fit, but not so many that there is too little to share.
template <typename acc>
Tiles cut_tiles(const Params& p) {
  constexpr int32_t lanes = kRegisterBytes / sizeof(acc);
  Tiles result{};
  result.padded_channels = (p.channels + lanes - 1) / lanes * lanes;
  const int64_t pixels_that_fit = kTileBytes / (2 * sizeof(acc) * result.padded_channels) - 1;
  const int64_t pixels_to_share = p.batch * p.heads * p.spatial_size / kFewestTiles;
  int32_t first_point = 0, most_points = 1;
  for (int32_t i = 0; i < p.levels; ++i) {
    const Level level = read_level(p, i);
    const int32_t points = points_of_level(p, i);
    const int64_t width = std::max(1, level.width);
    const int32_t rows = std::max<int64_t>(
        1, std::min(pixels_that_fit / width - 1, pixels_to_share / width));  // -1: the halo
    for (int64_t row = 0; row < level.height; row += rows) {
      const int32_t last_row = static_cast<int32_t>(std::min<int64_t>(row + rows, level.height));
      const Tile tile{level, static_cast<int32_t>(row), last_row, first_point, points};
      result.most_pixels = std::max<int64_t>(result.most_pixels, tile.pixels_with_halo() + 1);
      result.tiles.push_back(tile);
    }
    first_point += points;
    most_points = std::max(most_points, points);
  }
  result.queries_of_block = std::max(1, kBlockPoints / most_points);
  result.points_of_block = result.queries_of_block * most_points;
  result.blocks = (p.queries + result.queries_of_block - 1) / result.queries_of_block;
  return result;
}

// What the tiles are computed from: locations and weights, of which they give the gradients. In a
// fused call fuse_points has worked out the points' pixels, which stand in for the locations.
struct TileParams : BackwardParams {
  const void *pixels = nullptr,
             *pixel_rests = nullptr;  // [batch, queries, heads, points, 2], acc_t
  bool in_pixels() const { return pixels != nullptr; }
};

// Of one batch: what the tiles take and give. In acc_t, whatever the operands' dtypes.
template <typename acc>
struct FusedPoints {
  explicit FusedPoints(int64_t points)
      : pixels(new acc[2 * points]),
        pixel_rests(new acc[2 * points]),
        weights(new acc[points]),
        grad_locations(new acc[2 * points]),
        grad_weights(new acc[points]) {
    prefer_huge_pages(pixels.get(), 2 * points * sizeof(acc));
    prefer_huge_pages(pixel_rests.get(), 2 * points * sizeof(acc));
    prefer_huge_pages(weights.get(), points * sizeof(acc));
  }

  std::unique_ptr<acc[]> pixels, pixel_rests, weights, grad_locations, grad_weights;
};

constexpr int64_t kFusedRows = 256;

}  // namespace
}  // namespace ms_deform_attn::cpu

#define MSDA_KERNEL "deformable_detr/cpu/backward_kernel.h"
#include "deformable_detr/cpu/each_capability.h"

namespace ms_deform_attn::cpu {
namespace {

template <typename scalar_t>
void compute_tiles(const TileParams& params) {
  const Tiles tiles = cut_tiles<acc_t<scalar_t>>(params);
  const int64_t points = params.batch * params.queries * params.heads * params.points;
  prefer_huge_pages(params.grad_value, params.batch * params.spatial_size * params.heads *
                                           params.channels * sizeof(scalar_t));
  prefer_huge_pages(params.grad_sampling_locations, points * 2 * sizeof(scalar_t));
  prefer_huge_pages(params.grad_attention_weights, points * sizeof(scalar_t));
  const int64_t slices = params.batch * params.heads;
  const Array<uint64_t> tiles_of_block(slices * tiles.blocks);
  Work(slices * tiles.blocks).share([&](Work& work) {
    MSDA_FOR_CAPABILITY(find_tiles<scalar_t>(params, tiles, tiles_of_block.data(), work));
  });
  Work(slices * tiles.tiles.size()).share([&](Work& work) {
    MSDA_FOR_CAPABILITY(backward<scalar_t>(params, tiles, tiles_of_block.data(), work));
  });
}

// ------------------------------------------------------------------------------------------ fused

template <typename scalar_t>
void write_element(void* data, DType dtype, int64_t index, acc_t<scalar_t> x) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[index] = static_cast<float>(x);
  } else {
    static_cast<scalar_t*>(data)[index] = static_cast<scalar_t>(x);
  }
}

// From the gradients of a row's locations and weights to those of its offsets, logits and
// reference points. A gradient of zero stays zero, also where an operand is not finite.
template <typename scalar_t>
void differentiate_row(const BackwardParams& p, int64_t row,
                       const FusedPoints<acc_t<scalar_t>>& points, int64_t first) {
  using acc = acc_t<scalar_t>;
  const acc* weight = points.weights.get() + first;
  const acc* grad_weight = points.grad_weights.get() + first;
  const acc* grad_location = points.grad_locations.get() + 2 * first;
  acc* grad_reference = nullptr;
  if (p.grad_reference_points) {
    const int64_t size = int64_t(p.reference_levels) * p.reference_coordinates;
    grad_reference = static_cast<acc*>(p.grad_reference_points) + row * size;
    std::fill_n(grad_reference, size, acc(0));
  }
  acc mean = 0;
  for (int32_t i = 0; i < p.points; ++i) mean += weight[i] * grad_weight[i];

  int32_t i = 0;
  for (int32_t level = 0; level < p.levels; ++level) {
    const Reference<acc> reference = read_reference<scalar_t>(p, row / p.heads, level);
    const Level map = read_level(p, level);
    const bool box = p.reference_coordinates == 4;
    const acc scale = box ? acc(p.offset_scale / points_of_level(p, level)) : acc(0);
    const acc extent[2] = {box ? scale * reference.width : acc(1) / map.width,
                           box ? scale * reference.height : acc(1) / map.height};
    for (const int32_t end = i + points_of_level(p, level); i < end; ++i) {
      const int64_t point = row * p.points + i;
      write_element<scalar_t>(p.grad_attention_logits, p.attention_logits.dtype, point,
                              weight[i] * (grad_weight[i] - mean));
      for (int32_t axis = 0; axis < 2; ++axis) {
        const acc grad = grad_location[2 * i + axis];
        write_element<scalar_t>(p.grad_sampling_offsets, p.sampling_offsets.dtype, 2 * point + axis,
                                grad == 0 ? acc(0) : grad * extent[axis]);
        if (!grad_reference || grad == 0) continue;
        grad_reference[axis] += grad;
        if (!box) continue;
        grad_reference[2 + axis] +=
            grad * scale * read_element<scalar_t>(p.sampling_offsets, 2 * point + axis);
      }
    }
    if (grad_reference && p.reference_levels > 1) grad_reference += p.reference_coordinates;
  }
}

// Batch by batch: the points' pixels and weights, then the tiles, then the points' gradients.
template <typename scalar_t>
void fused_backward(const BackwardParams& params) {
  using acc = acc_t<scalar_t>;
  const int64_t rows = params.queries * params.heads;
  const int64_t values = params.spatial_size * params.heads * params.channels;
  const FusedPoints<acc> points(rows * params.points);
  const std::vector<Level> levels = read_levels(params);

  TileParams tile{params};
  tile.batch = 1;
  tile.pixels = points.pixels.get();
  tile.pixel_rests = points.pixel_rests.get();
  tile.sampling_locations.dtype = kDType<acc>;  // of their gradients
  tile.attention_weights = {points.weights.get(), kDType<acc>};
  tile.grad_sampling_locations = points.grad_locations.get();
  tile.grad_attention_weights = points.grad_weights.get();

  for (int64_t batch = 0; batch < params.batch; ++batch) {
    Work((rows + kFusedRows - 1) / kFusedRows).share([&](Work& work) {
      MSDA_FOR_CAPABILITY(fuse_rows<scalar_t>(params, levels, batch * rows, rows, points, work));
    });
    tile.value = static_cast<const scalar_t*>(params.value) + batch * values;
    tile.grad_value = static_cast<scalar_t*>(params.grad_value) + batch * values;
    tile.grad_output =
        static_cast<const scalar_t*>(params.grad_output) + batch * rows * params.channels;
    compute_tiles<scalar_t>(tile);
    torch::stable::parallel_for(0, rows, kFusedRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        differentiate_row<scalar_t>(params, batch * rows + row, points, row * params.points);
      }
    });
  }
}

}  // namespace

void backward(const BackwardParams& params) {
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (params.fused()) return fused_backward<scalar_t>(params);
    compute_tiles<scalar_t>(TileParams{params});
  });
}

}  // namespace ms_deform_attn::cpu
