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

// function(pointer, bytes per batch item) for each gradient.
template <typename Function>
void for_each_result(BackwardParams& p, const Function& function) {
  const int64_t points = p.queries * p.heads * p.points;
  const int64_t references = p.queries * p.reference_levels * p.reference_coordinates;
  const int64_t size = element_size(p.value_dtype), acc_size = std::max<int64_t>(size, 4);
  function(p.grad_value, p.spatial_size * p.heads * p.channels * size);
  function(p.grad_sampling_locations, 2 * points * element_size(p.sampling_locations.dtype));
  function(p.grad_attention_weights, points * element_size(p.attention_weights.dtype));
  function(p.grad_sampling_offsets, 2 * points * element_size(p.sampling_offsets.dtype));
  function(p.grad_attention_logits, points * element_size(p.attention_logits.dtype));
  function(p.grad_reference_points, p.heads * references * acc_size);
}

// The `count` batch items from number `first` on, of a fused call.
BackwardParams batch_items(BackwardParams p, int64_t first, int64_t count) {
  const auto skip = [&](auto& data, int64_t bytes) {
    char* const all = const_cast<char*>(static_cast<const char*>(data));
    if (data) data = all + first * bytes;
  };
  const int64_t points = p.queries * p.heads * p.points;
  const int64_t references = p.queries * p.reference_levels * p.reference_coordinates;
  const int64_t size = element_size(p.value_dtype);
  for_each_result(p, skip);
  skip(p.value, p.spatial_size * p.heads * p.channels * size);
  skip(p.grad_output, p.queries * p.heads * p.channels * size);
  skip(p.reference_points.data, references * element_size(p.reference_points.dtype));
  skip(p.sampling_offsets.data, 2 * points * element_size(p.sampling_offsets.dtype));
  skip(p.attention_logits.data, points * element_size(p.attention_logits.dtype));
  p.batch = count;
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
  BackwardParams p = params;
  for_each_result(p, [&](void* data, int64_t bytes) { prefer_huge_pages(data, p.batch * bytes); });
  const std::vector<Level> levels = read_levels(p);
  dispatch(p.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (p.fused()) return fused_backward<scalar_t>(p, levels);
    run_tiles<scalar_t>(p, levels);
  });
}

}  // namespace ms_deform_attn::cpu
