// The backward of multi-scale deformable attention on a CPU, for one instruction set: see
// backward.cpp.
#include "deformable_detr/cpu/vector.h"
#include "deformable_detr/cpu/points.h"

// What a thread works with; a tile's pixels are in `pixels`, see backward.cpp.
template <typename acc>
struct Workspace {
  Workspace(int64_t points_of_block, int64_t padded, int64_t pixels_of_tile)
      : points(points_of_block),
        offset{points_of_block, points_of_block, points_of_block, points_of_block},
        touched(points_of_block),
        owned(points_of_block),
        dot{points_of_block, points_of_block, points_of_block, points_of_block},
        grad_weight(points_of_block),
        grad_x(points_of_block),
        grad_y(points_of_block),
        grad_output(padded),
        pixels(pixels_of_tile * 2 * padded) {}

  Points<acc> points;
  Array<int64_t> offset[4];  // of the corner's pixel in `pixels`
  Array<int32_t> touched;    // whether a corner is in the tile
  Array<int32_t> owned;      // whether the tile computes the point's own gradients
  Array<acc> dot[4];         // of grad_output and the corner's value
  Array<acc> grad_weight, grad_x, grad_y;
  Array<acc> grad_output;  // of one row
  Array<acc> pixels;       // per pixel its value, then its gradient, padded to whole registers
};

// Value of the tile's pixels into the workspace, their gradients to zero.
template <typename scalar_t>
MSDA_INLINE void load_tile(const scalar_t* value, int64_t pixel_stride, int32_t channels,
                           int32_t pixels, int32_t padded, acc_t<scalar_t>* to) {
  constexpr int32_t lanes = kLanes<acc_t<scalar_t>>;
  for (int32_t pixel = 0; pixel < pixels; ++pixel, value += pixel_stride, to += 2 * padded) {
    int32_t c = 0;
    for (; c + lanes <= channels; c += lanes) store(to + c, load(value + c));
    if (c < channels) store(to + c, load(value + c, channels - c));
    for (c = padded; c < 2 * padded; c += lanes) store(to + c, Vector<acc_t<scalar_t>>{});
  }
}

template <typename scalar_t>
MSDA_INLINE void store_tile(const acc_t<scalar_t>* pixels, int32_t padded, int32_t count,
                            int64_t pixel_stride, int32_t channels, scalar_t* grad_value) {
  constexpr int32_t lanes = kLanes<acc_t<scalar_t>>;
  for (int32_t i = 0; i < count; ++i, grad_value += pixel_stride) {
    const acc_t<scalar_t>* from = pixels + (2 * int64_t(i) + 1) * padded;
    int32_t c = 0;
    for (; c + lanes <= channels; c += lanes) store(grad_value + c, load(from + c));
    if (c < channels) store(grad_value + c, load(from + c), channels - c);
  }
}

// Where the points' corners are in the tile.
template <typename acc>
MSDA_INLINE void find_in_tile(const Tile& tile, int32_t padded, int32_t count,
                              const Workspace<acc>& space) {
  const int32_t* const pixel[4] = {space.points.pixel[0].data(), space.points.pixel[1].data(),
                                   space.points.pixel[2].data(), space.points.pixel[3].data()};
  int64_t* const offset[4] = {space.offset[0].data(), space.offset[1].data(),
                              space.offset[2].data(), space.offset[3].data()};
  int32_t *touched = space.touched.data(), *owned = space.owned.data();
  const uint32_t begin = tile.first_pixel(), with_halo = tile.pixels_with_halo();
  const uint32_t own = tile.pixels();
  const int32_t elsewhere = tile.first_row == 0;
  const int64_t stride = 2 * int64_t(padded);
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    int32_t any = 0, first = kOutside;
#pragma GCC unroll 4
    for (int corner = 3; corner >= 0; --corner) {
      const uint32_t local = static_cast<uint32_t>(pixel[corner][i]) - begin;
      const int32_t inside = local < with_halo ? 1 : 0;
      offset[corner][i] = stride * static_cast<int32_t>(inside ? local : with_halo);
      any |= inside;
      first = pixel[corner][i] == kOutside ? first : pixel[corner][i];
    }
    touched[i] = any;
    owned[i] = first == kOutside ? elsewhere : static_cast<uint32_t>(first) - begin < own ? 1 : 0;
  }
}

// The points [first, last) of a row: the corners' dot products, and grad_output added to the
// corners' gradients, for `vectors` registers of channels.
template <int32_t vectors, typename acc>
MSDA_INLINE void visit_corners(const Workspace<acc>& space, int32_t first, int32_t last,
                               int32_t padded, int32_t channel) {
  constexpr int32_t lanes = kLanes<acc>;
  Vector<acc> grad_output[vectors];
#pragma GCC unroll 4
  for (int32_t v = 0; v < vectors; ++v) {
    grad_output[v] = load(space.grad_output.data() + channel + v * lanes);
  }
  for (int32_t i = first; i < last; ++i) {
    if (!space.touched[i]) continue;
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const acc* value = space.pixels.data() + space.offset[corner][i] + channel;
      acc* grad = const_cast<acc*>(value) + padded;
      const acc share = space.points.share[corner][i];
      Vector<acc> dot = {};
#pragma GCC unroll 4
      for (int32_t v = 0; v < vectors; ++v) {
        dot += grad_output[v] * load(value + v * lanes);
        store(grad + v * lanes, load(grad + v * lanes) + share * grad_output[v]);
      }
      space.dot[corner][i] += sum<acc, lanes>(dot);
    }
  }
}

template <typename acc>
MSDA_INLINE void differentiate_points(const Tile& tile, Method method, int32_t count,
                                      const Workspace<acc>& space) {
  const acc* const dot[4] = {space.dot[0].data(), space.dot[1].data(), space.dot[2].data(),
                             space.dot[3].data()};
  const acc *weight = space.points.weight.data(), *right = space.points.right.data(),
            *down = space.points.down.data();
  acc *grad_weight = space.grad_weight.data(), *grad_x = space.grad_x.data(),
      *grad_y = space.grad_y.data();
  const Level level = tile.level;
  const acc moves = method == Method::bilinear ? 1 : 0;
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    Corners<acc> corners;
    corners.right = right[i];
    corners.down = down[i];
    const acc corner[4] = {dot[0][i], dot[1][i], dot[2][i], dot[3][i]};
    grad_weight[i] = corners.sample(corner);
    grad_x[i] = moves * weight[i] * corners.d_location_x(corner, level);
    grad_y[i] = moves * weight[i] * corners.d_location_y(corner, level);
  }
}

// Writes the gradients of the points that the tile owns.
template <typename stored_t, typename acc>
MSDA_INLINE void write_elements(void* tensor, int32_t step, int32_t offset,
                                const Selection& selection, const Workspace<acc>& space,
                                const acc* from) {
  constexpr bool convert = !std::is_same_v<stored_t, acc>;
  const stored_t* stored = reinterpret_cast<const stored_t*>(from);
  if constexpr (convert) {
    stored_t* packed = reinterpret_cast<stored_t*>(space.points.stored.data());
    const int32_t count = selection.rows * selection.size;
    for (int32_t i = 0; i < count; i += kLanes<acc>) store(packed + i, load(from + i));
    stored = packed;
  }
  for (int32_t row = 0; row < selection.rows; ++row) {
    stored_t* to = static_cast<stored_t*>(tensor) + offset +
                   (selection.first + row * selection.stride) * step;
    for (int32_t i = 0; i < selection.size; ++i) {
      const int32_t point = row * selection.size + i;
      if (space.owned[point]) to[i * step] = stored[point];
    }
  }
}

template <typename scalar_t>
MSDA_INLINE void write_points(const BackwardParams& p, const Selection& selection,
                              const Workspace<acc_t<scalar_t>>& space) {
  using acc = acc_t<scalar_t>;
  const acc *weight = space.grad_weight.data(), *x = space.grad_x.data(), *y = space.grad_y.data();
  if (p.locations_dtype == p.value_dtype) {
    write_elements<scalar_t>(p.grad_sampling_locations, 2, 0, selection, space, x);
    write_elements<scalar_t>(p.grad_sampling_locations, 2, 1, selection, space, y);
  } else {
    write_elements<acc>(p.grad_sampling_locations, 2, 0, selection, space, x);
    write_elements<acc>(p.grad_sampling_locations, 2, 1, selection, space, y);
  }
  if (p.weights_dtype == p.value_dtype) {
    write_elements<scalar_t>(p.grad_attention_weights, 1, 0, selection, space, weight);
  } else {
    write_elements<acc>(p.grad_attention_weights, 1, 0, selection, space, weight);
  }
}

// Takes pieces of work: a tile of a (batch, head) each.
template <typename scalar_t>
void backward(const BackwardParams& p, const Tiles& tiles, Work& work) {
  using acc = acc_t<scalar_t>;
  constexpr int32_t lanes = kLanes<acc>;
  const int64_t pixel_stride = int64_t(p.heads) * p.channels;
  const int32_t padded = tiles.padded_channels;
  const Workspace<acc> space(std::max(kBlockPoints, p.points), padded, tiles.largest);

  int64_t piece;
  while (work.take(&piece)) {
    const int64_t head = piece % p.heads;
    const Tile& tile = tiles.tiles[piece / p.heads % tiles.tiles.size()];
    const int64_t batch = piece / p.heads / tiles.tiles.size();
    const int64_t origin = (batch * p.spatial_size + tile.first_pixel()) * pixel_stride +
                           head * p.channels;
    load_tile(static_cast<const scalar_t*>(p.value) + origin, pixel_stride, p.channels,
              tile.pixels_with_halo(), padded, space.pixels.data());
    std::fill_n(space.pixels.data() + int64_t(tile.pixels_with_halo()) * 2 * padded, 2 * padded,
                acc(0));

    const int32_t queries_of_block = tile.points ? std::max(1, kBlockPoints / tile.points) : 0;
    const int32_t capacity = queries_of_block * tile.points;
    std::fill_n(space.points.height.data(), capacity, tile.level.height);
    std::fill_n(space.points.width.data(), capacity, tile.level.width);
    std::fill_n(space.points.start.data(), capacity, tile.level.start);

    for (int64_t query = 0; tile.points && query < p.queries; query += queries_of_block) {
      const int64_t row = (batch * p.queries + query) * p.heads + head;
      const int32_t rows = std::min<int64_t>(queries_of_block, p.queries - query);
      const Selection selection{row * p.points + tile.first_point, int64_t(p.heads) * p.points,
                                rows, tile.points};
      const int32_t count = rows * tile.points;
      read_points<scalar_t>(p, selection, space.points);
      place_points(p.method, space.points, count);
      find_in_tile(tile, padded, count, space);
      for (const Array<acc>& dot : space.dot) std::fill_n(dot.data(), count, acc(0));

      for (int32_t r = 0; r < rows; ++r) {
        const int32_t first = r * tile.points, last = first + tile.points;
        int32_t any = 0;
        for (int32_t i = first; i < last; ++i) any |= space.touched[i];
        if (!any) continue;
        const scalar_t* grad_output = static_cast<const scalar_t*>(p.grad_output) +
                                      (row + int64_t(r) * p.heads) * p.channels;
        load_tile(grad_output, 0, p.channels, 1, 0, space.grad_output.data());
        int32_t c = 0;
        for (; c + 4 * lanes <= padded; c += 4 * lanes) {
          visit_corners<4>(space, first, last, padded, c);
        }
        for (; c + 2 * lanes <= padded; c += 2 * lanes) {
          visit_corners<2>(space, first, last, padded, c);
        }
        for (; c + lanes <= padded; c += lanes) visit_corners<1>(space, first, last, padded, c);
      }
      differentiate_points(tile, p.method, count, space);
      write_points<scalar_t>(p, selection, space);
    }
    store_tile(space.pixels.data(), padded, tile.pixels(), pixel_stride, p.channels,
               static_cast<scalar_t*>(p.grad_value) + origin);
  }
}
