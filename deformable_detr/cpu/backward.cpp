// Multi-scale deformable attention on the CPU, backward.
//
// The maps are cut into tiles: some rows of one level's map, of one (batch, head). A thread copies
// the value of its tile into memory of its own that stays in the L2 cache, next to the gradient of
// the tile. For every point with a corner in the tile, it adds grad_output times the point's weight
// and the corner weight to that corner's gradient, and takes the dot product of grad_output and the
// corner's value. In the end it writes the gradient out: each element of grad_value once.
//
// The four dot products give the gradients of a point's weight and location. The tile that has the
// point's north corners owns them. For the south corners a tile has a halo: a row of the map whose
// value it reads, and whose gradient it drops. Tiles share nothing and do not depend on the number
// of threads, so neither do the sums.
#include "deformable_detr/cpu/tiles.h"
#include "deformable_detr/cpu/work.h"

namespace ms_deform_attn::cpu {
namespace {

// What the tiles take: locations and weights, of which they give the gradients. In a fused call
// fuse_points has worked out the weights, and pixels that take the place of the locations.
struct TileParams : BackwardParams {
  Operand pixels{}, pixel_rests{};  // [batch, queries, heads, points, 2]
  bool in_pixels() const { return pixels.data != nullptr; }
};

// What the tiles of a fused call take and give, for one batch.
template <typename acc>
struct FusedPoints {
  FusedPoints(int64_t points, bool differentiated)
      : pixels(2 * points, false),
        pixel_rests(2 * points, false),
        weights(points, false),
        grad_locations(differentiated ? 2 * points : 0, false),
        grad_weights(differentiated ? points : 0, false) {
    prefer_huge_pages(pixels.data(), 2 * points * sizeof(acc));
    prefer_huge_pages(pixel_rests.data(), 2 * points * sizeof(acc));
    prefer_huge_pages(weights.data(), points * sizeof(acc));
  }

  Array<acc> pixels, pixel_rests, weights, grad_locations, grad_weights;
};

constexpr int64_t kTaskRows = 256;

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
  const int64_t maps = params.batch * params.heads;
  const Array<uint64_t> tiles_of_block(maps * tiles.blocks);
  Tasks(maps * tiles.blocks).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(find_tiles<scalar_t>(params, tiles, tiles_of_block.data(), tasks));
  });
  Tasks(maps * tiles.tiles.size()).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(backward<scalar_t>(params, tiles, tiles_of_block.data(), tasks));
  });
}

// ------------------------------------------------------------------------------------------ fused

// Turns the gradients of a row's locations and weights into those of its offsets, logits and
// reference points. A gradient of zero stays zero, even if an operand is not finite.
template <typename scalar_t, typename acc = acc_t<scalar_t>>
void differentiate_row(const BackwardParams& p, int64_t row, const acc* weight, acc* grad_weight,
                       acc* grad_location, acc* offset) {
  const bool box = p.reference_coordinates == 4;
  acc* grad_reference = nullptr;
  if (p.grad_reference_points) {
    const int64_t size = int64_t(p.reference_levels) * p.reference_coordinates;
    grad_reference = static_cast<acc*>(p.grad_reference_points) + row * size;
    std::fill_n(grad_reference, size, acc(0));
    if (box) read_elements<scalar_t>(p.sampling_offsets, row * p.points * 2, p.points * 2, offset);
  }
  acc mean = 0;
  for (int32_t i = 0; i < p.points; ++i) mean += weight[i] * grad_weight[i];
  for (int32_t i = 0; i < p.points; ++i) grad_weight[i] = weight[i] * (grad_weight[i] - mean);

  int32_t i = 0;
  for (int32_t level = 0; level < p.levels; ++level) {
    const Reference<acc> reference = read_reference<scalar_t>(p, row / p.heads, level);
    const Level map = read_level(p, level);
    const acc fraction = box ? acc(p.offset_scale / points_of_level(p, level)) : acc(0);
    const acc unit[2] = {box ? fraction * reference.width : acc(1) / map.width,
                         box ? fraction * reference.height : acc(1) / map.height};
    for (const int32_t end = 2 * points_of_level(p, level) + i; i < end; ++i) {
      const acc grad = grad_location[i];
      if (grad == 0) continue;
      grad_location[i] = grad * unit[i % 2];
      if (!grad_reference) continue;
      grad_reference[i % 2] += grad;
      if (box) grad_reference[2 + i % 2] += grad * fraction * offset[i];
    }
    if (grad_reference && p.reference_levels > 1) grad_reference += p.reference_coordinates;
  }
  if (!p.grad_attention_logits) return;
  write_elements<scalar_t>(grad_weight, row * p.points, p.points, p.grad_attention_logits,
                           p.attention_logits.dtype);
  write_elements<scalar_t>(grad_location, row * p.points * 2, p.points * 2, p.grad_sampling_offsets,
                           p.sampling_offsets.dtype);
}

// Each batch has three steps: the points' pixels and weights, the tiles, the points' gradients.
template <typename scalar_t>
void fused_backward(const BackwardParams& params) {
  using acc = acc_t<scalar_t>;
  const int64_t rows = params.queries * params.heads;
  const int64_t values = params.spatial_size * params.heads * params.channels;
  const bool differentiated = params.grad_attention_logits || params.grad_reference_points;
  const FusedPoints<acc> points(rows * params.points, differentiated);
  const std::vector<Level> levels = read_levels(params);

  TileParams tile{params};
  tile.batch = 1;
  tile.pixels = {points.pixels.data(), kDType<acc>};
  tile.pixel_rests = {points.pixel_rests.data(), kDType<acc>};
  tile.sampling_locations.dtype = kDType<acc>;  // the dtype of their gradients
  tile.attention_weights = {points.weights.data(), kDType<acc>};
  tile.grad_sampling_locations = differentiated ? points.grad_locations.data() : nullptr;
  tile.grad_attention_weights = differentiated ? points.grad_weights.data() : nullptr;

  for (int64_t batch = 0; batch < params.batch; ++batch) {
    Tasks((rows + kTaskRows - 1) / kTaskRows).run([&](Tasks& tasks) {
      MSDA_FOR_CAPABILITY(fuse_rows<scalar_t>(params, levels, batch * rows, rows, points, tasks));
    });
    tile.value = static_cast<const scalar_t*>(params.value) + batch * values;
    if (params.grad_value) {
      tile.grad_value = static_cast<scalar_t*>(params.grad_value) + batch * values;
    }
    tile.grad_output =
        static_cast<const scalar_t*>(params.grad_output) + batch * rows * params.channels;
    compute_tiles<scalar_t>(tile);
    if (!differentiated) continue;
    torch::stable::parallel_for(0, rows, kTaskRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * params.points;
        differentiate_row<scalar_t>(params, batch * rows + row, points.weights.data() + first,
                                    points.grad_weights.data() + first,
                                    points.grad_locations.data() + 2 * first,
                                    points.pixels.data() + 2 * first);
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
