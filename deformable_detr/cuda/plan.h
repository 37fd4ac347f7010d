// The plan of a backward on the GPU. plan_backward() decides it once; the allocation above the
// backends and the launches follow it. Free of CUDA, which the code above is compiled without.
#pragma once

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

// How grad_value is summed: not at all, if nobody asked for it. backward.cu says which one is for
// what, and why. A new one is added to choose_strategy(), adds() and backward() there, and to
// plan_points(), if a kernel after points_kernel reads its softmaxes.
enum class Strategy : int8_t { none, direct, scatter, gather };

// How gather cuts the levels. backward_slices.cuh tells what these are for.
struct Slicing {
  int32_t slice_pixels;  // the most pixels of a slice
  int32_t min_slices;    // of a level, if they have enough pixels
  int32_t candidates;    // the most points that a warp holds at a time
  int32_t sum_pixels;    // pixels whose sums fit into shared memory
  int32_t reach_chunks;  // of each level, in the table of reaches; 0: there is no table
};

// What a backward keeps in params.scratch, by offsets in bytes.
struct Scratch {
  static constexpr int64_t kNone = -1;
  int64_t sums = kNone;       // of grad_value, in float, where that has a half type
  int64_t softmaxes = kNone;  // [batch, queries, heads]: points_kernel -> scatter, gather, merge
  int64_t row_gradients = kNone;  // of each block: points_kernel, if shared memory is full
  int64_t reaches = kNone;        // [batch, heads, levels, chunks]: reach_kernel -> gather
  int64_t bytes = 0;

  int64_t reserve(int64_t size) {
    const int64_t offset = bytes;
    bytes += (size + 15) / 16 * 16;
    return offset;
  }
};

struct BackwardPlan {
  Strategy strategy;
  bool runs_points_kernel;
  bool merges_levels;  // of direct: those with few pixels are left to merge_kernel
  Scratch scratch;
  Slicing slicing;       // of gather
  bool overlaps_points;  // whether gather_kernel may start before points_kernel ends
  bool overlaps_sums;    // whether points_kernel may start before its sums are cleared, and their
                         // conversion before it ends
};

// Of the pointers in params, planning reads only which ones are null.
BackwardPlan plan_backward(const BackwardParams& params);
void backward(const BackwardParams& params, const BackwardPlan& plan, void* stream);

}  // namespace ms_deform_attn::cuda
