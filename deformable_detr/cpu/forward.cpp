// Multi-scale deformable attention on the CPU, forward.
//
// Rows come in blocks. First the corners of all points of a block are found, several points in a
// SIMD register. Then, row by row, the corners' channels are added up in registers.
#include <type_traits>

#include "deformable_detr/cpu/work.h"

namespace ms_deform_attn::cpu {
namespace {
constexpr int32_t kPointsAhead = 8;  // how far ahead pixels are prefetched
}  // namespace
}  // namespace ms_deform_attn::cpu

#define MSDA_KERNEL "deformable_detr/cpu/forward_kernel.h"
#include "deformable_detr/cpu/each_capability.h"

namespace ms_deform_attn::cpu {

void forward(const Params& params) {
  const std::vector<Level> levels = read_levels(params);
  dispatch(params.value_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t rows = params.batch * params.queries * params.heads;
    prefer_huge_pages(params.output, rows * params.channels * sizeof(scalar_t));
    row_tasks(params).run(
        [&](Tasks& tasks) { MSDA_FOR_CAPABILITY(forward<scalar_t>(params, levels, tasks)); });
  });
}

}  // namespace ms_deform_attn::cpu
