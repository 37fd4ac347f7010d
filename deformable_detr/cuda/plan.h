// The plans of forward and backward on the GPU. plan_forward() and plan_backward() decide them
// once; the allocation above the backends and the launches follow them. Free of CUDA, which the
// code above is compiled without.
#pragma once

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cuda {

// ----------------------------------------------------------------------------------------- windows

// A block's dynamic shared memory, in bytes from its start: what the kernel has for each warp, the
// list of the region's queries, the windows, and a place that is zero, as large as two pixels in
// each of two rows.
struct WindowLayout {
  int32_t regions;       // of a (batch, head), at most
  int32_t first_blocks;  // so many run at once
  int32_t list;
  int32_t list_queries;
  int32_t windows;
  int32_t pieces;        // of 16 bytes, for all windows and zeros
  int32_t pixel_pieces;  // of a pixel
  int32_t row_gap;       // pieces at the end of a row that are left free
  float usual_halo;      // see WindowBlocks
  int32_t bytes;

  MSDA_HOST_DEVICE float row_pieces(float columns) const {
    return columns * pixel_pieces + row_gap;
  }
  // What windows of `columns` x `rows` pixels take.
  MSDA_HOST_DEVICE float window_pieces(float columns, float rows) const {
    return row_pieces(columns) * rows;
  }
  // And zeros, for windows of up to so many columns.
  MSDA_HOST_DEVICE float zero_pieces(float columns) const {
    return row_pieces(columns) + 2 * pixel_pieces;
  }
};

// ----------------------------------------------------------------------------------------- forward

struct ForwardPlan {
  WindowLayout windows;       // without regions: value does not pass through windows
  int64_t scratch_bytes = 0;  // of params.windows
};

// Of the pointers in params, planning reads only which ones are null.
ForwardPlan plan_forward(const Params& params);
void forward(const Params& params, const ForwardPlan& plan, void* stream);

// ---------------------------------------------------------------------------------------- backward

// How grad_value is summed: not at all, if nobody asked for it. backward.cu says which one is for
// what, and why. A new one is added to choose_strategy(), adds() and backward() there, and to
// plan_points(), if a kernel after points_kernel reads its softmaxes.
enum class Strategy : int8_t { none, direct, patches, scatter, gather };

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
  int64_t sums = kNone;           // of grad_value, in float, where that has a half type
  int64_t softmaxes = kNone;      // [batch, queries, heads]: points_kernel -> the kernels after it
  int64_t row_gradients = kNone;  // of each block: points_kernel, if shared memory is full
  int64_t windows = kNone;        // Params::windows, of points_windows_kernel
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
  WindowLayout windows;  // where scratch has windows
  Slicing slicing;       // of gather
  bool overlaps_points;  // whether gather_kernel may start before points_kernel ends
  bool overlaps_sums;    // whether points_kernel may start before its sums are cleared, and their
                         // conversion before it ends
};

// Of the pointers in params, planning reads only which ones are null.
BackwardPlan plan_backward(const BackwardParams& params);
void backward(const BackwardParams& params, const BackwardPlan& plan, void* stream);

}  // namespace ms_deform_attn::cuda
