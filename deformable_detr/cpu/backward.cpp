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
    for (int32_t row = 0; row < level.height; row += rows) {
      const Tile tile{level, row, std::min(row + rows, level.height), first_point, points};
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

}  // namespace
}  // namespace ms_deform_attn::cpu

#define MSDA_KERNEL "deformable_detr/cpu/backward_kernel.h"
#include "deformable_detr/cpu/each_capability.h"

namespace ms_deform_attn::cpu {

void backward(const BackwardParams& params) {
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
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
  });
}

}  // namespace ms_deform_attn::cpu
