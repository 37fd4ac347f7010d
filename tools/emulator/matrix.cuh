// What deformable_detr/cuda/matrix.cuh has in assembly, for the emulator: see sanitize.py. A copy
// is finished at once, and a shared address counts from the start of the dynamic shared memory,
// where all that is addressed so lies.
#pragma once

#include <cstdint>

#include "deformable_detr/dispatch.h"

namespace ms_deform_attn::cuda {

inline uint32_t shared_address(const void* shared) {
  return static_cast<const char*>(shared) - emulator::dynamic_shared;
}
template <typename T>
T& shared_at(uint32_t address) {
  return *reinterpret_cast<T*>(emulator::dynamic_shared + address);
}

inline void copy_async(uint32_t to, const void* from, bool present) {
  shared_at<uint4>(to) = present ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}
inline void wait_for_copies() {}

template <bool kTransposed = true>
void load_matrices(uint32_t (&a)[4], uint32_t row) {
  const emulator::Exchange rows = emulator::meet_warp(row);
  const unsigned lane = emulator::thread_index.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned of_four = lane % 4 * 2 + i, of_eight = lane / 4;
      const uint32_t from = rows.of_lane[matrix * 8 + (kTransposed ? of_four : of_eight)];
      elements[i] = shared_at<uint16_t>(from + (kTransposed ? of_eight : of_four) * 2);
    }
    a[matrix] = elements[0] | uint32_t(elements[1]) << 16;
  }
  emulator::meet_warp(0);  // nobody writes there before all have read
}

// A lane holds of `a` the rows lane / 4 and 8 more, of both the columns 2 * (lane % 4) and the
// next, and the same 8 further on; of `b` column lane / 4, in the same rows as `a`'s columns.
template <typename scalar_t>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Exchange low = emulator::meet_warp(a[0] | uint64_t(a[1]) << 32);
  const emulator::Exchange high = emulator::meet_warp(a[2] | uint64_t(a[3]) << 32);
  const emulator::Exchange b = emulator::meet_warp(b0 | uint64_t(b1) << 32);
  const auto element = [](uint64_t words, unsigned index) {
    const uint16_t bits = words >> 16 * index;
    return static_cast<float>(reinterpret_cast<const scalar_t&>(bits));
  };
  const unsigned lane = emulator::thread_index.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const emulator::Exchange& of_a = k < 8 ? low : high;
      c[i] += element(of_a.of_lane[lane / 4 * 4 + k % 8 / 2], i / 2 * 2 + k % 2) *
              element(b.of_lane[column * 4 + k % 8 / 2], k / 8 * 2 + k % 2);
    }
  }
}

template <typename T>
void load_if(T& x, uint32_t from, bool active) {
  if (active) x = shared_at<T>(from);
}
inline uint4 load_shared(uint32_t from) { return shared_at<uint4>(from); }
inline uint2 load_shared_pair(uint32_t from) { return shared_at<uint2>(from); }
inline int32_t load_shared_word(uint32_t from) { return shared_at<int32_t>(from); }
template <typename T>
void store_shared(uint32_t to, T x) {
  shared_at<T>(to) = x;
}
template <typename T>
T pinned(T x) {
  return x;
}

}  // namespace ms_deform_attn::cuda
