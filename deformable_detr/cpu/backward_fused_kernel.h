// What a fused backward does before and after its tiles, for one instruction set: see backward.cpp.
// Both have whole rows as tasks: see for_whole_rows.
#include "deformable_detr/cpu/softmax.h"

// Writes the softmax of the logits.
template <typename scalar_t>
void weigh_rows(const Params& p, acc_t<scalar_t>* weights, Tasks& tasks) {
  for_whole_rows(p, block_rows(p), tasks, [&](const Block& block) MSDA_INLINE_LAMBDA {
    acc_t<scalar_t>* weight = weights + block.row * p.points;
    read_numbers<scalar_t>(p.attention_logits, block.row * p.points, block.count(), weight);
    softmax(weight, block.rows, p.points);
  });
}

// A row's gradients of its reference points. A gradient of zero adds nothing, even if an operand is
// not finite.
template <typename acc>
MSDA_INLINE void add_reference_gradients(const Params& p, const acc* grad_locations,
                                         const acc* offsets, acc* grad_reference) {
  const bool box = p.reference_coordinates == 4;
  std::fill_n(grad_reference, p.reference_levels * p.reference_coordinates, acc(0));
  for (int32_t level = 0, i = 0; level < p.levels; ++level) {
    const acc fraction = box ? acc(p.offset_scale / points_of_level(p, level)) : acc(0);
    for (const int32_t end = i + points_of_level(p, level); i < end; ++i) {
      for (int32_t axis = 0; axis < 2; ++axis) {
        const acc grad = grad_locations[2 * i + axis];
        if (grad == 0) continue;
        grad_reference[axis] += grad;
        if (box) grad_reference[2 + axis] += grad * fraction * offsets[2 * i + axis];
      }
    }
    if (p.reference_levels > 1) grad_reference += p.reference_coordinates;
  }
}

// Sets the moves of a block's locations, as (x, y), by an offset of one.
template <typename acc>
MSDA_INLINE void set_units(const Params& p, const Block& block, const Points<acc>& points,
                           acc* unit) {
  const bool box = p.reference_coordinates == 4;
  for_each_level(
      p, block, [&](int32_t row, int32_t level, int32_t i, int32_t count) MSDA_INLINE_LAMBDA {
        const acc* reference = reference_of(p, row, level, points);
        const acc fraction = points.units[level].box_fraction;
        const acc x = box ? fraction * reference[2] : acc(1) / points.levels[level].width;
        const acc y = box ? fraction * reference[3] : acc(1) / points.levels[level].height;
        for (const int32_t end = i + count; i < end; ++i) {
          unit[2 * i] = x;
          unit[2 * i + 1] = y;
        }
      });
}

// Turns the gradients of locations and weights into those of offsets, logits and reference points.
template <typename scalar_t>
void differentiate_rows(const BackwardParams& p, const std::vector<Level>& levels, Tasks& tasks) {
  using acc = acc_t<scalar_t>;
  const bool box = p.reference_coordinates == 4;
  const int32_t rows_at_once = block_rows(p);
  const Points<acc> points(p, levels, rows_at_once, p.points);
  const Array<acc> offsets(2 * points.capacity), unit(2 * points.capacity),
      grad_offsets(2 * points.capacity);
  if (!box) set_units(p, whole_rows(p, 0, rows_at_once), points, &unit[0]);

  for_whole_rows(p, rows_at_once, tasks, [&](const Block& block) MSDA_INLINE_LAMBDA {
    const int64_t first = block.row * p.points;
    const int32_t count = block.count();
    const acc* grad_locations = static_cast<acc*>(p.grad_sampling_locations) + 2 * first;
    if (p.grad_reference_points) {
      if (box) read_numbers<scalar_t>(p.sampling_offsets, 2 * first, 2 * count, offsets);
      const int32_t size = p.reference_levels * p.reference_coordinates;
      for (int32_t r = 0; r < block.rows; ++r) {
        add_reference_gradients(
            p, grad_locations + 2 * r * p.points, offsets + 2 * r * p.points,
            static_cast<acc*>(p.grad_reference_points) + (block.row + r) * size);
      }
    }
    if (!p.grad_attention_logits) return;
    if (box) {
      read_references<scalar_t>(p, block, points);
      set_units(p, block, points, &unit[0]);
    }
    MSDA_NO_ALIASES
    // One of zero stays zero, even if the unit is not finite.
    for (int32_t i = 0; i < 2 * count; ++i) {
      grad_offsets[i] = grad_locations[i] == 0 ? acc(0) : grad_locations[i] * unit[i];
    }
    acc* grad_weight = static_cast<acc*>(p.grad_attention_weights) + first;
    differentiate_softmax(static_cast<const acc*>(p.attention_weights.data) + first, block.rows,
                          p.points, grad_weight);
    write_numbers<scalar_t>(grad_weight, count, p.grad_attention_logits, p.attention_logits.dtype,
                            first);
    write_numbers<scalar_t>(&grad_offsets[0], 2 * count, p.grad_sampling_offsets,
                            p.sampling_offsets.dtype, 2 * first);
  });
}
