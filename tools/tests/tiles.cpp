// The cutting of levels into tiles by the CPU's backward, for maps that no test can allocate. Each
// line that it prints is a level's tiles: how many, and whether they cover its rows in order.
#include <cstdint>
#include <cstdio>

#include "deformable_detr/cpu/tiles.h"

using namespace ms_deform_attn;

template <typename acc>
void print(int64_t height, int64_t width, int32_t channels) {
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
  bool in_order = true;
  for (const auto& tile : tiles) {
    in_order &= tile.top == row && tile.bottom > row && tile.pixels() > 0;
    row = tile.bottom;
  }
  std::printf("%zu %s\n", tiles.size(), in_order && row == height ? "covered" : "wrong");
}

int main() {
  print<double>(INT32_MAX, 1, 1);
  print<double>(1, INT32_MAX, 1);
  print<float>(INT32_MAX, 1, 256);
  print<float>(46340, 46340, 32);
}
