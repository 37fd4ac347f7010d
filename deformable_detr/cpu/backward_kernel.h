// The backward for one instruction set: see backward.cpp.
#include "deformable_detr/cpu/fused.h"

// What a thread keeps of its tile, and of the points of the block that it handles.
template <typename acc>
struct Workspace {
  Workspace(int64_t points_of_block, int64_t padded, int64_t pixels_of_tile)
      : points(points_of_block, false),
        offset{points_of_block, points_of_block, points_of_block, points_of_block},
        map_row(points_of_block),
        touched(points_of_block),
        owned(points_of_block),
        dot(4 * points_of_block),
        grad_weight(points_of_block),
        grad_x(points_of_block),
        grad_y(points_of_block),
        grad_output(padded),
        pixels(pixels_of_tile * 2 * padded) {}

  Points<acc> points;
  Array<int64_t> offset[4];  // of each corner's pixel in `pixels`
  Array<int32_t> map_row;    // see find_map_rows
  Array<int32_t> touched;    // whether a corner is in the tile or its halo
  Array<int32_t> owned;      // whether the tile computes the gradients of weight and location
  Array<acc> dot;            // products of grad_output and the values of a point's four corners
  Array<acc> grad_weight, grad_x, grad_y;
  Array<acc> grad_output;  // of one (batch, query, head)
  Array<acc> pixels;       // the value and then the gradient of each pixel, in padded channels
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
      load_numbers(value, channels, to);
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
    } else {
      for (; c + lanes <= channels; c += lanes) store(grad_value + c, load(from + c));
    }
    if (c < channels) store(grad_value + c, load(from + c), channels - c);
  }
  stream_fence();
}

// Finds the row of the map that a point belongs to: that of its north corners, clamped to the map.
// All corners inside the map, and the nearest pixel, lie in this row and the next.
template <bool in_pixels, typename acc>
MSDA_INLINE void find_map_rows(const PointTable<acc>& table, int32_t height, int32_t count,
                               int32_t* map_row) {
  const acc *y = table.y, *y_rest = table.y_rest;
  const acc last = static_cast<acc>(height - 1);
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    const acc north = coordinate<in_pixels>(y, y_rest, i, height).floor;
    const acc not_below = north < last ? north : last;
    map_row[i] = static_cast<int32_t>(not_below > 0 ? not_below : acc(0));
  }
}

template <typename acc>
MSDA_INLINE void find_map_rows(const PointTable<acc>& table, int32_t height, int32_t count,
                               int32_t* map_row) {
  if (table.in_pixels) return find_map_rows<true>(table, height, count, map_row);
  return find_map_rows<false>(table, height, count, map_row);
}

// Finds out which corners are in the tile, and where.
template <typename acc>
MSDA_INLINE void find_in_tile(const Tile& tile, const PointTable<acc>& table, int32_t padded,
                              int32_t count, const Workspace<acc>& space) {
  const int32_t* const pixel[4] = {space.points.pixel[0].data(), space.points.pixel[1].data(),
                                   space.points.pixel[2].data(), space.points.pixel[3].data()};
  int64_t* const offset[4] = {space.offset[0].data(), space.offset[1].data(),
                              space.offset[2].data(), space.offset[3].data()};
  int32_t *map_row = space.map_row.data(), *touched = space.touched.data(),
          *owned = space.owned.data();
  find_map_rows(table, tile.level.height, count, map_row);
  const uint32_t begin = tile.first_pixel(), pixels = tile.pixels_with_halo();
  const int32_t top = tile.top, bottom = tile.bottom;
  const int64_t stride = 2 * int64_t(padded);
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
                             int32_t padded, int32_t channel) {
  constexpr int32_t lanes = kLanes<acc>;
  Vector<acc> grad_output[vectors];
#pragma GCC unroll 4
  for (int32_t v = 0; v < vectors; ++v) {
    grad_output[v] = load(space.grad_output.data() + channel + v * lanes);
  }
  for (int32_t i = first; i < last; ++i) {
    if (!space.touched[i]) continue;
    Vector<acc> dot[4] = {};
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      acc* value = space.pixels.data() + space.offset[corner][i] + channel;
      acc* grad = value + padded;
      [[maybe_unused]] const acc weight = space.points.corner_weight[corner][i];
#pragma GCC unroll 4
      for (int32_t v = 0; v < vectors; ++v) {
        dot[corner] += grad_output[v] * load(value + v * lanes);
        if constexpr (wants_gradients) {
          store(grad + v * lanes, load(grad + v * lanes) + weight * grad_output[v]);
        }
      }
    }
    add_sums(dot, &space.dot[4 * int64_t(i)]);
  }
}

template <bool wants_gradients, typename acc>
MSDA_INLINE void add_corners(const Workspace<acc>& space, int32_t first, int32_t last,
                             int32_t padded) {
  constexpr int32_t lanes = kLanes<acc>;
  int32_t c = 0;
  for (; c + 4 * lanes <= padded; c += 4 * lanes) {
    add_corners<wants_gradients, 4>(space, first, last, padded, c);
  }
  for (; c + 2 * lanes <= padded; c += 2 * lanes) {
    add_corners<wants_gradients, 2>(space, first, last, padded, c);
  }
  for (; c + lanes <= padded; c += lanes) {
    add_corners<wants_gradients, 1>(space, first, last, padded, c);
  }
}

template <typename acc>
MSDA_INLINE void differentiate_points(const Tile& tile, Method method, const acc* weight,
                                      int32_t count, const Workspace<acc>& space) {
  const acc* dot = space.dot.data();
  const int32_t* const pixel[4] = {space.points.pixel[0].data(), space.points.pixel[1].data(),
                                   space.points.pixel[2].data(), space.points.pixel[3].data()};
  const acc *right = space.points.right.data(), *down = space.points.down.data();
  acc *grad_weight = space.grad_weight.data(), *grad_x = space.grad_x.data(),
      *grad_y = space.grad_y.data();
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

// Writes those of the selected points that the tile owns: see read_stored.
template <typename stored_t, int32_t components, typename acc>
MSDA_INLINE void write_stored(void* tensor, const Selection& selection, int32_t count,
                              const Workspace<acc>& space, const acc* const (&from)[components]) {
  constexpr bool convert = !std::is_same_v<stored_t, acc>;
  const stored_t* packed[components];
  for (int32_t k = 0; k < components; ++k) {
    if constexpr (convert) {
      stored_t* stored = reinterpret_cast<stored_t*>(space.points.stored[k].data());
      for (int32_t i = 0; i < selection.rows * count; i += kLanes<acc>) {
        store(stored + i, load(from[k] + i));
      }
      packed[k] = stored;
    } else {
      packed[k] = from[k];
    }
  }
  const int64_t stride = selection.stride * components;
  for (int32_t row = 0; row < selection.rows; ++row) {
    stored_t* to = static_cast<stored_t*>(tensor) + selection.first * components + row * stride;
    prefetch<true>(to, stride, count * components);
    for (int32_t i = 0; i < count; ++i) {
      if (!space.owned[row * count + i]) continue;
#pragma GCC unroll 2
      for (int32_t k = 0; k < components; ++k) {
        to[i * components + k] = packed[k][row * count + i];
      }
    }
  }
}

template <typename scalar_t, int32_t components>
MSDA_INLINE void write_operand(void* tensor, DType dtype, const Selection& selection, int32_t count,
                               const Workspace<acc_t<scalar_t>>& space,
                               const acc_t<scalar_t>* const (&from)[components]) {
  if (dtype == kDType<scalar_t>) {
    write_stored<scalar_t>(tensor, selection, count, space, from);
  } else {
    write_stored<acc_t<scalar_t>>(tensor, selection, count, space, from);
  }
}

template <typename acc>
MSDA_INLINE void set_level(const Level& level, const Points<acc>& points, int32_t count) {
  std::fill_n(points.height.data(), count, level.height);
  std::fill_n(points.width.data(), count, level.width);
  std::fill_n(points.start.data(), count, level.start);
}

template <typename scalar_t>
MSDA_INLINE void read_tile_points(const BackwardParams& p, const Selection& selection,
                                  int32_t count, const Points<acc_t<scalar_t>>& points) {
  read_coordinates<scalar_t>(p.sampling_locations, selection, count, points);
  read_weights<scalar_t>(p.attention_weights, selection, count, points);
}

template <typename scalar_t>
MSDA_INLINE void write_tile_points(const BackwardParams& p, const Selection& selection,
                                   int32_t count, const Workspace<acc_t<scalar_t>>& space) {
  using acc = acc_t<scalar_t>;
  const acc* const xy[2] = {space.grad_x.data(), space.grad_y.data()};
  const acc* const weight[1] = {space.grad_weight.data()};
  write_operand<scalar_t>(p.grad_sampling_locations, p.sampling_locations.dtype, selection, count,
                          space, xy);
  write_operand<scalar_t>(p.grad_attention_weights, p.attention_weights.dtype, selection, count,
                          space, weight);
}

// ------------------------------------------------------------------------------- blocks and tiles

// The tiles that the points of a block of a (batch, head) may touch: bit t % 64 stands for tile t,
// so that from 64 tiles on a block may be looked at in vain, but is never missed. points_of(tile)
// gives the points of the tile's level.
template <typename PointsOf>
MSDA_INLINE uint64_t tiles_touched(const Tiles& tiles, int32_t rows, int32_t* map_row,
                                   const PointsOf& points_of) {
  uint64_t touched = 0;
  int64_t top = 0, bottom = 0;  // of the level whose points begin with first_point
  int32_t first_point = -1;
  for (size_t t = 0; t < tiles.tiles.size(); ++t) {
    const Tile& tile = tiles.tiles[t];
    if (tile.points == 0) continue;
    if (tile.first_point != first_point) {
      first_point = tile.first_point;
      const int32_t count = rows * tile.points;
      find_map_rows(points_of(tile), tile.level.height, count, map_row);
      top = tile.level.height, bottom = 0;
      for (int32_t i = 0; i < count; ++i) {
        top = std::min<int64_t>(top, map_row[i]);
        bottom = std::max<int64_t>(bottom, int64_t(map_row[i]) + 2);
      }
    }
    touched |= uint64_t(top < tile.bottom && tile.top < bottom) << (t % 64);
  }
  return touched;
}

// A task is a block of a (batch, head).
template <typename scalar_t>
void find_tiles(const BackwardParams& p, const Tiles& tiles, uint64_t* tiles_of_block,
                Tasks& tasks) {
  const Points<acc_t<scalar_t>> points(tiles.points_of_block, false);
  const Array<int32_t> map_row(tiles.points_of_block);
  int64_t task;
  while (tasks.take(&task)) {
    const int64_t head = task % p.heads, block = task / p.heads % tiles.blocks,
                  batch = task / p.heads / tiles.blocks;
    const int64_t query = block * tiles.queries_of_block;
    const int32_t rows = std::min<int64_t>(tiles.queries_of_block, p.queries - query);
    const int64_t row = (batch * p.queries + query) * p.heads + head;
    tiles_of_block[(batch * p.heads + head) * tiles.blocks + block] =
        tiles_touched(tiles, rows, map_row.data(), [&](const Tile& tile) {
          const Selection selection{row * p.points + tile.first_point, int64_t(p.heads) * p.points,
                                    rows, tile.points};
          read_coordinates<scalar_t>(p.sampling_locations, selection, tile.points, points);
          return points.table();
        });
  }
}

template <typename acc>
MSDA_INLINE PointTable<acc> fused_table(const FusedPoints<acc>& points, const Tile& tile,
                                        int64_t batch, int64_t head, int64_t query) {
  using Q = typename FusedPoints<acc>::Quantity;
  const auto at = [&](Q quantity) {
    return points.at(quantity, batch, head, tile.first_point, tile.points, query);
  };
  return {true, at(Q::x), at(Q::y), at(Q::x_rest), at(Q::y_rest), at(Q::weight)};
}

// Copies the numbers of the points that the tile owns.
template <typename acc>
MSDA_INLINE void copy_owned(const Array<acc>& from, const Array<int32_t>& owned, int32_t count,
                            acc* to) {
  const acc* source = from.data();
  const int32_t* mask = owned.data();
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    if (mask[i]) to[i] = source[i];
  }
}

// A task is a tile of a (batch, head). `fused` has the points of a fused call.
template <typename scalar_t>
void backward(const BackwardParams& p, const Tiles& tiles, const uint64_t* tiles_of_block,
              const FusedPoints<acc_t<scalar_t>>* fused, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  using Q = typename FusedPoints<acc>::Quantity;
  const bool differentiated =
      p.grad_attention_weights || p.grad_attention_logits || p.grad_reference_points;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  const int32_t padded = tiles.padded_channels;
  const Workspace<acc> space(tiles.points_of_block, padded, tiles.most_pixels);

  int64_t task;
  while (tasks.take(&task)) {
    const int64_t head = task % p.heads, t = task / p.heads % tiles.tiles.size(),
                  batch = task / p.heads / tiles.tiles.size();
    const Tile& tile = tiles.tiles[t];
    const uint64_t* touched = tiles_of_block + (batch * p.heads + head) * tiles.blocks;
    const int64_t origin =
        (batch * p.spatial_size + tile.first_pixel()) * pixel_stride + head * p.channels;
    load_tile(differentiated ? static_cast<const scalar_t*>(p.value) + origin : nullptr,
              p.grad_value != nullptr, pixel_stride, p.channels, tile.pixels_with_halo(), padded,
              space.pixels.data());
    std::fill_n(space.pixels.data() + int64_t(tile.pixels_with_halo()) * 2 * padded, 2 * padded,
                acc(0));

    set_level(tile.level, space.points, tiles.queries_of_block * tile.points);

    for (int64_t block = 0; tile.points > 0 && block < tiles.blocks; ++block) {
      if (!(touched[block] >> (t % 64) & 1)) continue;
      const int64_t query = block * tiles.queries_of_block;
      const int64_t row = (batch * p.queries + query) * p.heads + head;
      const int32_t rows = std::min<int64_t>(tiles.queries_of_block, p.queries - query);
      const Selection selection{row * p.points + tile.first_point, int64_t(p.heads) * p.points,
                                rows, tile.points};
      const int32_t count = rows * tile.points;
      PointTable<acc> table = space.points.table();
      // Told the usual number of points, the compiler writes no loop over them.
      if (fused) {
        table = fused_table(*fused, tile, batch, head, query);
      } else if (tile.points == 4) {
        read_tile_points<scalar_t>(p, selection, 4, space.points);
      } else {
        read_tile_points<scalar_t>(p, selection, tile.points, space.points);
      }
      find_corners(p.method, table, space.points, count);
      find_in_tile(tile, table, padded, count, space);
      std::fill_n(space.dot.data(), 4 * int64_t(count), acc(0));

      for (int32_t r = 0; r < rows; ++r) {
        const int32_t first = r * tile.points, last = first + tile.points;
        int32_t any = 0;
        for (int32_t i = first; i < last; ++i) any |= space.touched[i];
        if (!any) continue;
        const scalar_t* grad_output =
            static_cast<const scalar_t*>(p.grad_output) + (row + int64_t(r) * p.heads) * p.channels;
        prefetch<false>(grad_output, pixel_stride, p.channels);
        load_numbers(grad_output, p.channels, space.grad_output.data());
        if (p.grad_value) {
          add_corners<true>(space, first, last, padded);
        } else {
          add_corners<false>(space, first, last, padded);
        }
      }
      if (!differentiated) continue;
      differentiate_points(tile, p.method, table.weight, count, space);
      if (fused) {
        const auto at = [&](Q quantity) {
          return fused->at(quantity, batch, head, tile.first_point, tile.points, query);
        };
        copy_owned(space.grad_x, space.owned, count, at(Q::grad_x));
        copy_owned(space.grad_y, space.owned, count, at(Q::grad_y));
        copy_owned(space.grad_weight, space.owned, count, at(Q::grad_weight));
      } else if (tile.points == 4) {
        write_tile_points<scalar_t>(p, selection, 4, space);
      } else {
        write_tile_points<scalar_t>(p, selection, tile.points, space);
      }
    }
    if (!p.grad_value) continue;
    store_tile(space.pixels.data(), padded, tile.pixels(), pixel_stride, p.channels,
               static_cast<scalar_t*>(p.grad_value) + origin);
  }
}

// ------------------------------------------------------------------------------------------ fused

// Not std::copy_n, which calls memmove where the number is not a constant.
template <typename acc>
MSDA_INLINE void copy_numbers(const acc* from, int32_t count, acc* to) {
  for (int32_t i = 0; i < count; ++i) to[i] = from[i];
}

// Copies between arrays of whole rows' points and the points of a round, level by level.
// copy(index in the rows' arrays, index in the round's, numbers) for each level of each row.
template <typename acc, typename Copy>
MSDA_INLINE void for_each_level(const Params& p, const FusedPoints<acc>& points, int64_t first,
                                int32_t rows, const Copy& copy) {
  int32_t i = 0;
  int64_t head = first % p.heads, query = first / p.heads % p.queries,
          batch = first / p.heads / p.queries;
  for (int32_t row = 0; row < rows; ++row) {
    int32_t first_point = 0;
    for (int32_t level = 0; level < p.levels; ++level) {
      const int32_t count = points_of_level(p, level);
      acc* const at = points.at(FusedPoints<acc>::x, batch, head, first_point, count, query);
      // Told the usual numbers of points, the compiler writes no loop over them.
      switch (count) {
        case 2: copy(i, at, 2); break;
        case 4: copy(i, at, 4); break;
        case 8: copy(i, at, 8); break;
        default: copy(i, at, count);
      }
      first_point += count, i += count;
    }
    if (++head < p.heads) continue;
    head = 0;
    if (++query < p.queries) continue;
    query = 0, ++batch;
  }
}

// A task of a fused call: a block of queries of a batch item, with all heads.
struct QueryBlock {
  int64_t index, batch, query, queries;

  QueryBlock(const Params& p, const Tiles& tiles, int64_t task)
      : index(task % tiles.blocks),
        batch(task / tiles.blocks),
        query(index * tiles.queries_of_block),
        queries(std::min<int64_t>(tiles.queries_of_block, p.queries - query)) {}

  // function(the first row, the number of rows), with at most `rows_at_once` of them at a time.
  template <typename Function>
  MSDA_INLINE void for_rows(const Params& p, int32_t rows_at_once, Function&& function) const {
    const int64_t begin = (batch * p.queries + query) * p.heads, end = begin + queries * p.heads;
    for (int64_t row = begin; row < end; row += rows_at_once) {
      function(row, static_cast<int32_t>(std::min<int64_t>(rows_at_once, end - row)));
    }
  }
};

// Works out the fused operator's pixels and weights, and which tiles they touch.
template <typename scalar_t>
void fuse_blocks(const BackwardParams& p, const std::vector<Level>& levels, const Tiles& tiles,
                 const FusedPoints<acc_t<scalar_t>>& to, uint64_t* tiles_of_block, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  const int32_t rows_at_once = std::max(1, kBlockPoints / p.points);
  const Points<acc> points(rows_at_once * p.points, true);
  const Array<int32_t> map_row(tiles.points_of_block);
  const Fusion<acc> fusion(p, levels, rows_at_once);
  set_levels(p, levels, rows_at_once, points);

  int64_t task;
  while (tasks.take(&task)) {
    const QueryBlock block(p, tiles, task);
    block.for_rows(p, rows_at_once, [&](int64_t row, int32_t rows) {
      read_points<scalar_t>(p, Selection{row * p.points, 0, 1, rows * p.points}, points);
      fuse_points<scalar_t>(p, row, rows, fusion, points);
      const PointTable<acc> table = points.table();
      for_each_level(p, to, row, rows, [&](int32_t i, acc* at, int32_t count) {
        copy_numbers(table.x + i, count, at);
        copy_numbers(table.y + i, count, at + to.count);
        copy_numbers(table.x_rest + i, count, at + 2 * to.count);
        copy_numbers(table.y_rest + i, count, at + 3 * to.count);
        copy_numbers(table.weight + i, count, at + 4 * to.count);
      });
    });
    for (int64_t head = 0; head < p.heads; ++head) {
      tiles_of_block[(block.batch * p.heads + head) * tiles.blocks + block.index] = tiles_touched(
          tiles, block.queries, map_row.data(),
          [&](const Tile& tile) { return fused_table(to, tile, block.batch, head, block.query); });
    }
  }
}

// A row's gradients of its reference points. A gradient of zero adds nothing, even if an operand is
// not finite.
template <typename acc>
MSDA_INLINE void add_reference_gradients(const Params& p, const acc* grad_x, const acc* grad_y,
                                         const acc* offsets, acc* grad_reference) {
  const bool box = p.reference_coordinates == 4;
  std::fill_n(grad_reference, p.reference_levels * p.reference_coordinates, acc(0));
  for (int32_t level = 0, i = 0; level < p.levels; ++level) {
    const acc fraction = box ? acc(p.offset_scale / points_of_level(p, level)) : acc(0);
    for (const int32_t end = i + points_of_level(p, level); i < end; ++i) {
      const acc grad[2] = {grad_x[i], grad_y[i]};
      for (int32_t axis = 0; axis < 2; ++axis) {
        if (grad[axis] == 0) continue;
        grad_reference[axis] += grad[axis];
        if (box) grad_reference[2 + axis] += grad[axis] * fraction * offsets[2 * i + axis];
      }
    }
    if (p.reference_levels > 1) grad_reference += p.reference_coordinates;
  }
}

// Turns the gradients of rows' weights into those of their logits, in place.
template <typename acc>
MSDA_INLINE void differentiate_softmax(const acc* weight, int32_t rows, int32_t size,
                                       acc* grad_weight) {
  for (int32_t row = 0; row < rows; ++row, weight += size, grad_weight += size) {
    acc mean = 0;
    for (int32_t i = 0; i < size; ++i) mean += weight[i] * grad_weight[i];
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < size; ++i) grad_weight[i] = weight[i] * (grad_weight[i] - mean);
  }
}

// The gradients of offsets, where `unit` is the move of the location by an offset of one. One of
// zero stays zero, even if the unit is not finite.
template <typename acc>
MSDA_INLINE void differentiate_offsets(const Array<acc>& grad_x, const Array<acc>& grad_y,
                                       const Array<acc> (&unit)[2], int32_t count,
                                       acc* grad_offsets) {
  const acc *x = grad_x.data(), *y = grad_y.data();
  const acc *unit_x = unit[0].data(), *unit_y = unit[1].data();
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < count; ++i) {
    grad_offsets[2 * i] = x[i] == 0 ? acc(0) : x[i] * unit_x[i];
    grad_offsets[2 * i + 1] = y[i] == 0 ? acc(0) : y[i] * unit_y[i];
  }
}

// How an offset of one moves a location, for rows from `first` on.
template <typename scalar_t>
MSDA_INLINE void set_units(const Params& p, int64_t first, int32_t rows,
                           const Fusion<acc_t<scalar_t>>& fusion,
                           const Array<acc_t<scalar_t>> (&unit)[2]) {
  using acc = acc_t<scalar_t>;
  const bool box = p.reference_coordinates == 4;
  const int32_t size = box ? read_references<scalar_t>(p, first, rows, fusion) : 0;
  int32_t i = 0;
  for (int32_t row = 0; row < rows; ++row) {
    const acc* reference =
        fusion.references.data() + ((first + row) / p.heads - first / p.heads) * size;
    for (int32_t level = 0; level < p.levels; ++level) {
      const acc fraction = box ? acc(p.offset_scale / points_of_level(p, level)) : acc(0);
      const acc x = box ? fraction * reference[2] : acc(1) / fusion.levels[level].width;
      const acc y = box ? fraction * reference[3] : acc(1) / fusion.levels[level].height;
      for (const int32_t end = i + points_of_level(p, level); i < end; ++i) {
        unit[0][i] = x;
        unit[1][i] = y;
      }
      if (box && p.reference_levels > 1) reference += p.reference_coordinates;
    }
  }
}

// Turns the gradients of the points' locations and weights into those of offsets, logits and
// reference points. Tasks are those of fuse_blocks.
template <typename scalar_t>
void differentiate_blocks(const BackwardParams& p, const std::vector<Level>& levels,
                          const Tiles& tiles, const FusedPoints<acc_t<scalar_t>>& of,
                          Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  using Q = FusedPoints<acc>;
  const bool box = p.reference_coordinates == 4;
  const int32_t rows_at_once = std::max(1, kBlockPoints / p.points);
  const int32_t capacity = rows_at_once * p.points;
  const Array<acc> weight(capacity), grad_weight(capacity), grad_x(capacity), grad_y(capacity),
      offsets(2 * capacity), grad_offsets(2 * capacity);
  const Array<acc> unit[2] = {capacity, capacity};
  const Fusion<acc> fusion(p, levels, rows_at_once);
  if (!box) set_units<scalar_t>(p, 0, rows_at_once, fusion, unit);

  int64_t task;
  while (tasks.take(&task)) {
    QueryBlock(p, tiles, task).for_rows(p, rows_at_once, [&](int64_t row, int32_t rows) {
      const int32_t count = rows * p.points;
      for_each_level(p, of, row, rows, [&](int32_t i, const acc* at, int32_t points) {
        copy_numbers(at + Q::weight * of.count, points, &weight[i]);
        copy_numbers(at + Q::grad_x * of.count, points, &grad_x[i]);
        copy_numbers(at + Q::grad_y * of.count, points, &grad_y[i]);
        copy_numbers(at + Q::grad_weight * of.count, points, &grad_weight[i]);
      });
      if (p.grad_reference_points) {
        if (box) {
          load_numbers<scalar_t>(p.sampling_offsets, row * p.points * 2, 2 * count, offsets.data());
        }
        const int32_t size = p.reference_levels * p.reference_coordinates;
        for (int32_t r = 0; r < rows; ++r) {
          add_reference_gradients(p, &grad_x[r * p.points], &grad_y[r * p.points],
                                  &offsets[2 * r * p.points],
                                  static_cast<acc*>(p.grad_reference_points) + (row + r) * size);
        }
      }
      if (!p.grad_attention_logits) return;
      if (box) set_units<scalar_t>(p, row, rows, fusion, unit);
      differentiate_softmax(weight.data(), rows, p.points, grad_weight.data());
      differentiate_offsets(grad_x, grad_y, unit, count, grad_offsets.data());
      store_numbers<scalar_t>(grad_weight.data(), count, row * p.points, p.grad_attention_logits,
                              p.attention_logits.dtype);
      store_numbers<scalar_t>(grad_offsets.data(), 2 * count, 2 * row * p.points,
                              p.grad_sampling_offsets, p.sampling_offsets.dtype);
    });
  }
}
