// How the CPU kernels cut their work: rows into tasks, points into blocks, and the backward its
// maps into tiles, see backward.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cpu {

constexpr int64_t kTaskRows = 256;
constexpr int32_t kBlockPoints = 128;      // whose tables stay in the L1 cache
constexpr int64_t kTileBytes = 960 << 10;  // with the rest, below 1 MB a thread
constexpr int64_t kFewestTiles = 32;       // of a call, about, so that all threads have work
constexpr int32_t kRegisterBytes = 64;  // of the largest: all instruction sets cut the same tiles

// How many of `rows` rows with so many points each are handled together. Not more than there are,
// so that a small call clears small tables.
inline int32_t block_rows(int32_t points, int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(kBlockPoints / points, rows));
}

// The same for whole rows of a call.
inline int32_t block_rows(const Params& p) {
  return block_rows(p.points, p.batch * p.queries * p.heads);
}

// Some rows of a level's map: those in [top, bottom).
struct Tile {
  Level level;
  int32_t top, bottom;
  int32_t level_index, first_point, points;  // the level's, within a (batch, query, head)

  int32_t first_pixel() const { return level.start + top * level.width; }
  int32_t pixels() const { return (bottom - top) * level.width; }
  int32_t pixels_with_halo() const { return pixels() + (bottom < level.height) * level.width; }
};

struct Tiles {
  int32_t padded_channels;   // to whole registers
  int32_t queries_of_block;  // whose points are handled together
  int32_t points_of_block;   // at most, in one level
  int64_t blocks;            // of a batch
  int64_t most_pixels;       // of a tile, with its halo and the pixel that stands for all elsewhere
  std::vector<Tile> tiles;
};

// A tile has as many rows of a map as fit, but not so many that there are too few tiles.
template <typename acc>
Tiles cut_tiles(const Params& p) {
  constexpr int32_t lanes = kRegisterBytes / sizeof(acc);
  Tiles result{};
  result.padded_channels = (p.channels + lanes - 1) / lanes * lanes;
  const int64_t pixels_that_fit = kTileBytes / (2 * sizeof(acc) * result.padded_channels) - 1;
  const int64_t pixels_of_thread = p.batch * p.heads * p.spatial_size / kFewestTiles;
  int32_t first_point = 0, most_points = 1;
  for (int32_t i = 0; i < p.levels; ++i) {
    const Level level = read_level(p, i);
    const int32_t points = points_of_level(p, i);
    const int64_t width = std::max(1, level.width);
    const int32_t rows = std::max<int64_t>(
        1, std::min(pixels_that_fit / width - 1, pixels_of_thread / width));  // -1: the halo
    for (int64_t top = 0; top < level.height; top += rows) {
      const int64_t bottom = std::min<int64_t>(top + rows, level.height);
      const Tile tile{level, int32_t(top), int32_t(bottom), i, first_point, points};
      result.most_pixels = std::max(result.most_pixels, int64_t(tile.pixels_with_halo()) + 1);
      result.tiles.push_back(tile);
    }
    first_point += points;
    most_points = std::max(most_points, points);
  }
  result.queries_of_block = block_rows(most_points, p.queries);
  result.points_of_block = result.queries_of_block * most_points;
  result.blocks = (p.queries + result.queries_of_block - 1) / result.queries_of_block;
  return result;
}

}  // namespace ms_deform_attn::cpu
