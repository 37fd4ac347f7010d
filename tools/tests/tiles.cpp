// The cutting of levels into tiles by the CPU's backward, for maps that no test can allocate. Exits
// with 1 if the tiles do not cover a level's rows in order, or if there are too many.
#include <cstdint>

#include "deformable_detr/cpu/tiles.h"

using namespace ms_deform_attn;

template <typename acc>
bool covers(int64_t height, int64_t width, int32_t channels, size_t most) {
  const int64_t shape[2] = {height, width}, start[1] = {0};
  Params p{};
  p.batch = p.queries = p.heads = p.levels = 1;
  p.spatial_size = height * width;
  p.points = p.points_per_level = (1 << 30) - 1;
  p.channels = channels;
  p.shapes_int64 = p.starts_int64 = true;
  p.spatial_shapes = shape;
  p.level_start_index = start;
  const auto tiles = cpu::cut_tiles<acc>(p).tiles;
  int64_t row = 0;
  bool in_order = tiles.size() <= most;
  for (const auto& tile : tiles) {
    in_order &= tile.top == row && tile.bottom > row && tile.pixels() > 0;
    row = tile.bottom;
  }
  return in_order && row == height;
}

int main() {
  // A tile is 960 KB of values and gradients, or a 32nd of the map; one row has one tile.
  const bool covered =
      covers<double>(INT32_MAX, 1, 1, 10'000'000) && covers<double>(1, INT32_MAX, 1, 1) &&
      covers<float>(INT32_MAX, 1, 256, 10'000'000) && covers<float>(46340, 46340, 32, 10'000'000);
  return covered ? 0 : 1;
}
