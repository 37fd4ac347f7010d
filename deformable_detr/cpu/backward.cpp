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
// A fused call computes its weights before the tiles, and turns the gradients of locations and
// weights, as the tiles of a plain call give them, into those of its own operands after the tiles.
// It does so for some batch items per round: weights and gradients take 16 bytes a point in float,
// for the points of a round alone: at most 8 MB, unless those of one batch item take more.
#include <type_traits>

#include "deformable_detr/cpu/work.h"

namespace ms_deform_attn::cpu {
namespace {

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

// Two steps: the tiles that each block touches, and the tiles.
template <typename scalar_t>
void run_tiles(const BackwardParams& p, const std::vector<Level>& levels) {
  const Tiles tiles = cut_tiles<acc_t<scalar_t>>(p);
  const int64_t maps = p.batch * p.heads;
  const Array<uint64_t> tiles_of_block(maps * tiles.blocks);
  Tasks(maps * tiles.blocks).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(find_tiles<scalar_t>(p, levels, tiles, tiles_of_block, tasks));
  });
  Tasks(maps * tiles.tiles.size()).run([&](Tasks& tasks) {
    MSDA_FOR_CAPABILITY(backward<scalar_t>(p, levels, tiles, tiles_of_block, tasks));
  });
}

// A round's tiles get what those of a plain call have: weights, and room for the gradients of
// locations and weights.
template <typename scalar_t>
void run_round(BackwardParams p, const std::vector<Level>& levels, bool differentiated) {
  using acc = acc_t<scalar_t>;
  const int64_t points = p.batch * p.queries * p.heads * p.points;
  const int64_t gradients = differentiated ? points : 0;
  const Array<acc> weights(points, false), grad_weights(gradients, false);
  const Array<acc> grad_locations(2 * gradients, false);
  prefer_huge_pages(weights, points * sizeof(acc));
  prefer_huge_pages(grad_weights, gradients * sizeof(acc));
  prefer_huge_pages(grad_locations, 2 * gradients * sizeof(acc));
  row_tasks(p).run(
      [&](Tasks& tasks) { MSDA_FOR_CAPABILITY(weigh_rows<scalar_t>(p, weights, tasks)); });
  p.attention_weights = {weights, kDType<acc>};
  p.sampling_locations.dtype = kDType<acc>;
  if (differentiated) {
    p.grad_sampling_locations = grad_locations;
    p.grad_attention_weights = grad_weights;
  }
  run_tiles<scalar_t>(p, levels);
  if (!differentiated) return;
  row_tasks(p).run(
      [&](Tasks& tasks) { MSDA_FOR_CAPABILITY(differentiate_rows<scalar_t>(p, levels, tasks)); });
}

template <typename scalar_t>
void fused_backward(const BackwardParams& p, const std::vector<Level>& levels) {
  const bool differentiated = p.grad_attention_logits || p.grad_reference_points;
  const int64_t bytes =
      p.queries * p.heads * p.points * (differentiated ? 4 : 1) * sizeof(acc_t<scalar_t>);
  const int64_t most = std::max<int64_t>(1, kRoundBytes / bytes);
  const int64_t rounds = (p.batch + most - 1) / most;
  const int64_t items = (p.batch + rounds - 1) / rounds;
  for (int64_t first = 0; first < p.batch; first += items) {
    const int64_t count = std::min(items, p.batch - first);
    run_round<scalar_t>(batch_items(p, first, count), levels, differentiated);
  }
}

}  // namespace

void backward(const BackwardParams& params) {
  prefer_huge_pages_for_results(params);
  const std::vector<Level> levels = read_levels(params);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (params.fused()) return fused_backward<scalar_t>(params, levels);
    run_tiles<scalar_t>(params, levels);
  });
}

}  // namespace ms_deform_attn::cpu
