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
//
// A fused call works out its points first, as the tiles read them, and differentiates them after
// the tiles, some batch items per round. It stores 32 bytes a point in float, for the points of a
// round alone: at most 8 MB, unless those of one batch item take more.
#include "deformable_detr/cpu/tiles.h"
#include "deformable_detr/cpu/work.h"

namespace ms_deform_attn::cpu {
namespace {

// The points of a fused call's round, for its tiles: a level of a (batch, head) lies together, each
// quantity in an array of its own, so that a tile reads a block's points from where they lie.
template <typename acc>
struct FusedPoints {
  FusedPoints(const Params& p, bool differentiated)
      : p(p),
        count(p.batch * p.queries * p.heads * p.points),
        numbers(count * numbers_of_point(differentiated), false) {
    prefer_huge_pages(numbers.data(), count * numbers_of_point(differentiated) * sizeof(acc));
  }
  static constexpr int64_t numbers_of_point(bool differentiated) { return differentiated ? 8 : 5; }

  enum Quantity { x, y, x_rest, y_rest, weight, grad_x, grad_y, grad_weight };

  // From `query` on, of the level with `points` points, the first of which is `first_point`.
  acc* at(Quantity quantity, int64_t batch, int64_t head, int32_t first_point, int32_t points,
          int64_t query) const {
    return numbers.data() + quantity * count +
           ((batch * p.heads + head) * p.points + first_point) * p.queries + query * points;
  }

  const Params& p;
  int64_t count;
  Array<acc> numbers;
};

// What a round of a fused call may take for its points, unless a batch item alone takes more.
constexpr int64_t kRoundBytes = 8 << 20;

}  // namespace
}  // namespace ms_deform_attn::cpu

#define MSDA_KERNEL "deformable_detr/cpu/backward_kernel.h"
#include "deformable_detr/cpu/each_capability.h"

namespace ms_deform_attn::cpu {
namespace {

int64_t element_size(DType dtype) {
  int64_t size = 0;
  dispatch(dtype, [&](auto zero) { size = sizeof(zero); });
  return size;
}

void prefer_huge_pages_for_results(const BackwardParams& p) {
  const int64_t points = p.batch * p.queries * p.heads * p.points;
  const auto prefer = [](void* data, DType dtype, int64_t elements) {
    prefer_huge_pages(data, elements * element_size(dtype));
  };
  prefer(p.grad_value, p.value_dtype, p.batch * p.spatial_size * p.heads * p.channels);
  prefer(p.grad_sampling_locations, p.sampling_locations.dtype, 2 * points);
  prefer(p.grad_attention_weights, p.attention_weights.dtype, points);
  prefer(p.grad_sampling_offsets, p.sampling_offsets.dtype, 2 * points);
  prefer(p.grad_attention_logits, p.attention_logits.dtype, points);
}

// Has two steps: which tiles each block touches, and the tiles.
template <typename scalar_t>
void plain_backward(const BackwardParams& params) {
  const Tiles tiles = cut_tiles<acc_t<scalar_t>>(params);
  const int64_t maps = params.batch * params.heads;
  const Array<uint64_t> tiles_of_block(maps * tiles.blocks);
  Tasks(maps * tiles.blocks).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(find_tiles<scalar_t>(params, tiles, tiles_of_block.data(), tasks));
  });
  Tasks(maps * tiles.tiles.size()).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(backward<scalar_t>(params, tiles, tiles_of_block.data(), nullptr, tasks));
  });
}

// ------------------------------------------------------------------------------------------ fused

// The `count` batch items from number `first` on.
BackwardParams batch_items(const BackwardParams& params, int64_t first, int64_t count) {
  BackwardParams p = params;
  p.batch = count;
  // Skips so many elements for each batch item before the first.
  const auto skip = [&](auto& data, DType dtype, int64_t elements) {
    char* const bytes = const_cast<char*>(static_cast<const char*>(data));
    if (data) data = bytes + first * elements * element_size(dtype);
  };
  const int64_t values = p.spatial_size * p.heads * p.channels, rows = p.queries * p.heads,
                references = int64_t(p.reference_levels) * p.reference_coordinates;
  skip(p.value, p.value_dtype, values);
  skip(p.grad_output, p.value_dtype, rows * p.channels);
  skip(p.reference_points.data, p.reference_points.dtype, p.queries * references);
  skip(p.sampling_offsets.data, p.sampling_offsets.dtype, rows * p.points * 2);
  skip(p.attention_logits.data, p.attention_logits.dtype, rows * p.points);
  skip(p.grad_value, p.value_dtype, values);
  skip(p.grad_sampling_offsets, p.sampling_offsets.dtype, rows * p.points * 2);
  skip(p.grad_attention_logits, p.attention_logits.dtype, rows * p.points);
  const DType acc_dtype = p.value_dtype == DType::f64 ? DType::f64 : DType::f32;
  skip(p.grad_reference_points, acc_dtype, rows * references);
  return p;
}

// Three steps: the points' pixels and weights, the tiles, the gradients of offsets and logits.
template <typename scalar_t>
void fused_round(const BackwardParams& p, const std::vector<Level>& levels, bool differentiated) {
  using acc = acc_t<scalar_t>;
  const Tiles tiles = cut_tiles<acc>(p);
  const FusedPoints<acc> points(p, differentiated);
  const Array<uint64_t> tiles_of_block(p.batch * p.heads * tiles.blocks);
  Tasks(p.batch * tiles.blocks).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(
        fuse_blocks<scalar_t>(p, levels, tiles, points, tiles_of_block.data(), tasks));
  });
  Tasks(p.batch * p.heads * tiles.tiles.size()).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(backward<scalar_t>(p, tiles, tiles_of_block.data(), &points, tasks));
  });
  if (!differentiated) return;
  Tasks(p.batch * tiles.blocks).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(differentiate_blocks<scalar_t>(p, levels, tiles, points, tasks));
  });
}

template <typename scalar_t>
void fused_backward(const BackwardParams& params) {
  const bool differentiated = params.grad_attention_logits || params.grad_reference_points;
  const int64_t bytes = params.queries * params.heads * params.points *
                        FusedPoints<acc_t<scalar_t>>::numbers_of_point(differentiated) *
                        sizeof(acc_t<scalar_t>);
  const int64_t most = std::max<int64_t>(1, kRoundBytes / bytes);
  const int64_t rounds = (params.batch + most - 1) / most;
  const int64_t items = (params.batch + rounds - 1) / rounds;
  const std::vector<Level> levels = read_levels(params);
  for (int64_t first = 0; first < params.batch; first += items) {
    const int64_t count = std::min(items, params.batch - first);
    fused_round<scalar_t>(batch_items(params, first, count), levels, differentiated);
  }
}

}  // namespace

void backward(const BackwardParams& params) {
  prefer_huge_pages_for_results(params);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (params.fused()) return fused_backward<scalar_t>(params);
    plain_backward<scalar_t>(params);
  });
}

}  // namespace ms_deform_attn::cpu
