// The backward's tiles for one instruction set: see backward.cpp.
#include "deformable_detr/cpu/points.h"

// What a thread keeps of its tile, and of the points of the block that it handles.
template <typename acc>
struct Workspace {
  Workspace(const Params& p, const std::vector<Level>& levels, const Tiles& tiles)
      : points(p, levels, tiles.queries_of_block, tiles.points_of_block / tiles.queries_of_block),
        capacity(points.capacity),
        padded(tiles.padded_channels),
        pixels(tiles.most_pixels * 2 * padded) {}

  Points<acc> points;
  const int32_t capacity, padded;
  Array<int64_t> offset[4] = {capacity, capacity, capacity, capacity};  // of corners in `pixels`
  Array<int32_t> map_row{capacity};                                     // see find_map_rows
  Array<int32_t> touched{capacity};  // whether a corner is in the tile or its halo
  Array<int32_t> owned{
      capacity};  // whether the tile computes the gradients of its weight and location
  Array<acc> dot{
      4 * int64_t(capacity)};  // products of grad_output and the values of a point's four corners
  Array<acc> grad_weight{capacity}, grad_x{capacity}, grad_y{capacity};
  Array<acc> grad_output{padded};  // of one (batch, query, head)
  Array<acc> pixels;  // the value and then the gradient of each pixel, in padded channels
};

// Copies the value of the tile's pixels into the workspace, unless value is null, and sets their
// gradients to zero, unless they are not wanted.
template <typename scalar_t>
MSDA_INLINE void load_tile(const scalar_t* value, bool wants_gradients, int64_t pixel_stride,
                           int32_t channels, int32_t pixels, int32_t padded, acc_t<scalar_t>* to) {
  constexpr int32_t lanes = kLanes<acc_t<scalar_t>>;
  const int32_t end = wants_gradients ? 2 * padded : padded;
  for (int32_t pixel = 0; pixel < pixels; ++pixel, to += 2 * padded) {
    if (value) {
      prefetch<false>(value, pixel_stride, channels);
      convert(value, channels, to);
      value += pixel_stride;
    }
    for (int32_t c = padded; c < end; c += lanes) store(to + c, Vector<acc_t<scalar_t>>{});
  }
}

template <typename scalar_t>
MSDA_INLINE void store_tile(const acc_t<scalar_t>* pixels, int32_t padded, int32_t count,
                            int64_t pixel_stride, int32_t channels, scalar_t* grad_value) {
  constexpr int32_t lanes = kLanes<acc_t<scalar_t>>;
  const bool aligned = (reinterpret_cast<uintptr_t>(grad_value) | pixel_stride * sizeof(scalar_t)) %
                           sizeof(Stored<scalar_t>) ==
                       0;
  for (int32_t i = 0; i < count; ++i, grad_value += pixel_stride) {
    const acc_t<scalar_t>* from = pixels + (2 * int64_t(i) + 1) * padded;
    int32_t c = 0;
    if (aligned) {
      for (; c + lanes <= channels; c += lanes) stream(grad_value + c, load(from + c));
    }
    convert(from + c, channels - c, grad_value + c);
  }
  stream_fence();
}

// ----------------------------------------------------------------------------- points of a tile

// Finds the row of the map that a point belongs to: that of its north corners, clamped to the map.
// All corners inside the map, and the nearest pixel, lie in this row and the next.
template <typename acc>
MSDA_INLINE void find_map_rows(const Points<acc>& points, int32_t height, int32_t count,
                               int32_t* map_row) {
  const acc *y = points.at[1], *y_rest = points.rest[1];
  const acc last = static_cast<acc>(height - 1);
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    const acc north = Coordinate<acc>(Exact<acc>{y[i], y_rest[i]}).floor;
    const acc not_below = north < last ? north : last;
    map_row[i] = static_cast<int32_t>(not_below > 0 ? not_below : acc(0));
  }
}

// Finds out which corners are in the tile, and where.
template <typename acc>
MSDA_INLINE void find_in_tile(const Tile& tile, int32_t count, const Workspace<acc>& space) {
  const int32_t* const pixel[4] = {space.points.pixel[0], space.points.pixel[1],
                                   space.points.pixel[2], space.points.pixel[3]};
  int64_t* const offset[4] = {space.offset[0], space.offset[1], space.offset[2], space.offset[3]};
  int32_t *map_row = space.map_row, *touched = space.touched, *owned = space.owned;
  find_map_rows(space.points, tile.level.height, count, map_row);
  const uint32_t begin = tile.first_pixel(), pixels = tile.pixels_with_halo();
  const int32_t top = tile.top, bottom = tile.bottom;
  const int64_t stride = 2 * int64_t(space.padded);
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    int32_t any = 0;
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const uint32_t local = static_cast<uint32_t>(pixel[corner][i]) - begin;
      const int32_t inside = local < pixels ? 1 : 0;
      offset[corner][i] = stride * static_cast<int32_t>(inside ? local : pixels);
      any |= inside;
    }
    touched[i] = any;
    owned[i] = (map_row[i] >= top ? 1 : 0) & (map_row[i] < bottom ? 1 : 0);
  }
}

// For the points [first, last), which belong to one (batch, query, head), and for `vectors`
// registers of channels: adds grad_output to the gradients of the corners, if they are wanted, and
// to their dot products, which cost little.
template <bool wants_gradients, int32_t vectors, typename acc>
MSDA_INLINE void add_corners(const Workspace<acc>& space, int32_t first, int32_t last,
                             int32_t channel) {
  constexpr int32_t lanes = kLanes<acc>;
  Vector<acc> grad_output[vectors];
#pragma GCC unroll 4
  for (int32_t v = 0; v < vectors; ++v) {
    grad_output[v] = load(space.grad_output + channel + v * lanes);
  }
  for (int32_t i = first; i < last; ++i) {
    if (!space.touched[i]) continue;
    Vector<acc> dot[4] = {};
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      acc* value = space.pixels + space.offset[corner][i] + channel;
      acc* grad = value + space.padded;
      [[maybe_unused]] const acc weight = space.points.corner_weight[corner][i];
#pragma GCC unroll 4
      for (int32_t v = 0; v < vectors; ++v) {
        dot[corner] += grad_output[v] * load(value + v * lanes);
        if constexpr (wants_gradients) {
          store(grad + v * lanes, load(grad + v * lanes) + weight * grad_output[v]);
        }
      }
    }
    add_sums(dot, space.dot + 4 * int64_t(i));
  }
}

template <typename acc>
MSDA_INLINE void differentiate_points(const Tile& tile, Method method, int32_t count,
                                      const Workspace<acc>& space) {
  const acc *dot = space.dot, *weight = space.points.weight;
  const int32_t* const pixel[4] = {space.points.pixel[0], space.points.pixel[1],
                                   space.points.pixel[2], space.points.pixel[3]};
  const acc *right = space.points.right, *down = space.points.down;
  acc *grad_weight = space.grad_weight, *grad_x = space.grad_x, *grad_y = space.grad_y;
  const Level level = tile.level;
  // What does not count is left out, not multiplied by zero: that makes NaN of what is not finite.
  const bool bilinear = method == Method::bilinear;
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    Corners<acc> corners;
    corners.right = right[i];
    corners.down = down[i];
    const acc* d = dot + 4 * int64_t(i);
    acc corner[4] = {d[0], d[1], d[2], d[3]};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) corner[k] = pixel[k][i] == kOutside ? acc(0) : corner[k];
    grad_weight[i] = corners.sample(corner);
    grad_x[i] = bilinear ? weight[i] * corners.d_location_x(corner, level) : acc(0);
    grad_y[i] = bilinear ? weight[i] * corners.d_location_y(corner, level) : acc(0);
  }
}

// Writes the gradients, of `components` numbers each, of those points that the tile owns: see
// read_runs.
template <typename stored_t, int32_t components, typename acc>
MSDA_INLINE void write_runs(stored_t* tensor, const Runs& runs, int32_t count,
                            const Workspace<acc>& space, acc* const (&from)[components]) {
  const stored_t* packed[components];
  for (int32_t k = 0; k < components; ++k) {
    if constexpr (std::is_same_v<stored_t, acc>) {
      packed[k] = from[k];
    } else {
      stored_t* stored = reinterpret_cast<stored_t*>(&space.points.stored[k][0]);
      convert(from[k], runs.number * count, stored);
      packed[k] = stored;
    }
  }
  const int64_t stride = runs.stride * components;
  for (int32_t run = 0; run < runs.number; ++run) {
    stored_t* to = tensor + runs.first * components + run * stride;
    prefetch<true>(to, stride, count * components);
    for (int32_t i = 0; i < count; ++i) {
      if (!space.owned[run * count + i]) continue;
#pragma GCC unroll 2
      for (int32_t k = 0; k < components; ++k) {
        to[i * components + k] = packed[k][run * count + i];
      }
    }
  }
}

template <typename scalar_t, int32_t components>
MSDA_INLINE void write_operand(void* tensor, DType dtype, const Runs& runs,
                               const Workspace<acc_t<scalar_t>>& space,
                               acc_t<scalar_t>* const (&from)[components]) {
  dispatch_operand<scalar_t>(dtype, [&](auto zero) MSDA_INLINE_LAMBDA {
    auto* to = static_cast<decltype(zero)*>(tensor);
    with_constant(runs.count, [&](int32_t count)
                                  MSDA_INLINE_LAMBDA { write_runs(to, runs, count, space, from); });
  });
}

// ------------------------------------------------------------------------------- blocks and tiles

// The points of a tile's level of so many queries of a (batch, head).
MSDA_INLINE Block block_of_tile(const Params& p, const Tiles& tiles, const Tile& tile,
                                int64_t batch, int64_t head, int64_t block) {
  const int64_t query = block * tiles.queries_of_block;
  const int32_t queries = std::min<int64_t>(tiles.queries_of_block, p.queries - query);
  return {(batch * p.queries + query) * p.heads + head,
          p.heads,
          queries,
          tile.level_index,
          1,
          tile.first_point,
          tile.points};
}

// Finds the tiles that the points of each block of a (batch, head) may touch: bit t % 64 stands for
// tile t, so that from 64 tiles on a block may be looked at in vain, but is never missed. A task is
// a block.
template <typename scalar_t>
void find_tiles(const BackwardParams& p, const std::vector<Level>& levels, const Tiles& tiles,
                uint64_t* tiles_of_block, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  const Points<acc> points(p, levels, tiles.queries_of_block,
                           tiles.points_of_block / tiles.queries_of_block);
  const Array<int32_t> map_row(points.capacity);
  int64_t task;
  while (tasks.take(&task)) {
    const int64_t head = task % p.heads, index = task / p.heads % tiles.blocks,
                  batch = task / p.heads / tiles.blocks;
    uint64_t touched = 0;
    int64_t top = 0, bottom = 0;  // of the level
    int32_t level = -1;
    for (size_t t = 0; t < tiles.tiles.size(); ++t) {
      const Tile& tile = tiles.tiles[t];
      if (tile.points == 0) continue;
      if (tile.level_index != level) {
        level = tile.level_index;
        const Block block = block_of_tile(p, tiles, tile, batch, head, index);
        set_levels(p, block, points);
        read_coordinates<scalar_t>(p, block, points);
        place_points<scalar_t>(p, block, points);
        find_map_rows(points, tile.level.height, block.count(), map_row);
        top = tile.level.height, bottom = 0;
        for (int32_t i = 0; i < block.count(); ++i) {
          top = std::min<int64_t>(top, map_row[i]);
          bottom = std::max<int64_t>(bottom, int64_t(map_row[i]) + 2);
        }
      }
      touched |= uint64_t(top < tile.bottom && tile.top < bottom) << (t % 64);
    }
    tiles_of_block[(batch * p.heads + head) * tiles.blocks + index] = touched;
  }
}

// A task is a tile of a (batch, head).
template <typename scalar_t>
void backward(const BackwardParams& p, const std::vector<Level>& levels, const Tiles& tiles,
              const uint64_t* tiles_of_block, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  const Workspace<acc> space(p, levels, tiles);
  const int32_t padded = space.padded;
  int64_t task;
  while (tasks.take(&task)) {
    const int64_t head = task % p.heads, t = task / p.heads % tiles.tiles.size(),
                  batch = task / p.heads / tiles.tiles.size();
    const Tile& tile = tiles.tiles[t];
    const uint64_t* touched = tiles_of_block + (batch * p.heads + head) * tiles.blocks;
    const int64_t origin =
        (batch * p.spatial_size + tile.first_pixel()) * pixel_stride + head * p.channels;
    load_tile(p.grad_attention_weights ? static_cast<const scalar_t*>(p.value) + origin : nullptr,
              p.grad_value != nullptr, pixel_stride, p.channels, tile.pixels_with_halo(), padded,
              &space.pixels[0]);
    std::fill_n(space.pixels + int64_t(tile.pixels_with_halo()) * 2 * padded, 2 * padded, acc(0));
    if (tile.points > 0) set_levels(p, block_of_tile(p, tiles, tile, batch, head, 0), space.points);

    for (int64_t b = 0; tile.points > 0 && b < tiles.blocks; ++b) {
      if (!(touched[b] >> (t % 64) & 1)) continue;
      const Block block = block_of_tile(p, tiles, tile, batch, head, b);
      const int32_t count = block.count();
      read_coordinates<scalar_t>(p, block, space.points);
      read_weights<scalar_t>(p, p.attention_weights, block, space.points);
      place_points<scalar_t>(p, block, space.points);
      find_corners(p.method, count, space.points);
      find_in_tile(tile, count, space);
      std::fill_n(&space.dot[0], 4 * int64_t(count), acc(0));

      for (int32_t r = 0; r < block.rows; ++r) {
        const int32_t first = r * tile.points, last = first + tile.points;
        int32_t any = 0;
        for (int32_t i = first; i < last; ++i) any |= space.touched[i];
        if (!any) continue;
        const scalar_t* grad_output = static_cast<const scalar_t*>(p.grad_output) +
                                      (block.row + int64_t(r) * p.heads) * p.channels;
        prefetch<false>(grad_output, pixel_stride, p.channels);
        convert(grad_output, p.channels, &space.grad_output[0]);
        for_registers<acc>(padded, [&](auto vectors, int32_t c) MSDA_INLINE_LAMBDA {
          if (p.grad_value) {
            add_corners<true, vectors>(space, first, last, c);
          } else {
            add_corners<false, vectors>(space, first, last, c);
          }
        });
      }
      if (!p.grad_attention_weights) continue;
      differentiate_points(tile, p.method, count, space);
      const Runs runs(p, block);
      acc* const grad_xy[2] = {space.grad_x, space.grad_y};
      acc* const grad_weight[1] = {space.grad_weight};
      write_operand<scalar_t>(p.grad_sampling_locations, p.sampling_locations.dtype, runs, space,
                              grad_xy);
      write_operand<scalar_t>(p.grad_attention_weights, p.attention_weights.dtype, runs, space,
                              grad_weight);
    }
    if (!p.grad_value) continue;
    store_tile(space.pixels, padded, tile.pixels(), pixel_stride, p.channels,
               static_cast<scalar_t*>(p.grad_value) + origin);
  }
}

#include "deformable_detr/cpu/backward_fused_kernel.h"
