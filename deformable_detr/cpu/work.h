// What the CPU kernels share that is the same for every instruction set: levels, memory, threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "deformable_detr/ms_deform_attn.h"

namespace ms_deform_attn::cpu {

inline std::vector<Level> read_levels(const Params& p) {
  std::vector<Level> levels(p.levels);
  for (int32_t level = 0; level < p.levels; ++level) levels[level] = read_level(p, level);
  return levels;
}

// Element `index` of an operand, stored as scalar_t or, beside a half value, as float.
template <typename scalar_t>
acc_t<scalar_t> read_element(const Operand& operand, int64_t index) {
  if (operand.dtype == DType::f32) return static_cast<const float*>(operand.data)[index];
  return static_cast<acc_t<scalar_t>>(static_cast<const scalar_t*>(operand.data)[index]);
}

// A reference point; width and height are zero where it has two coordinates.
template <typename acc>
struct Reference {
  acc x, y, width, height;
};

template <typename scalar_t>
Reference<acc_t<scalar_t>> read_reference(const Params& p, int64_t query, int32_t level) {
  const int64_t first = (query * p.reference_levels + (p.reference_levels == 1 ? 0 : level)) *
                        p.reference_coordinates;
  const auto read = [&](int64_t i) {
    return i < p.reference_coordinates ? read_element<scalar_t>(p.reference_points, first + i)
                                       : acc_t<scalar_t>(0);
  };
  return {read(0), read(1), read(2), read(3)};
}

// Zeros on a cache line's boundary.
template <typename T>
class Array {
 public:
  Array(int64_t size) {
    const size_t bytes = (size * sizeof(T) / 64 + 1) * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) {
      throw std::runtime_error("out of memory: ms_deform_attn on cpu cannot allocate " +
                               std::to_string(bytes) + " bytes");
    }
    std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// The pieces of a call's work. Threads take one after the other, so that none waits for a slower
// one; what a piece computes must not depend on who takes it.
class Work {
 public:
  explicit Work(int64_t pieces) : pieces_(pieces) {}
  bool take(int64_t* piece) { return (*piece = next_++) < pieces_; }

  // worker(*this) on each of torch's threads that there is a piece for. Within a parallel region
  // of the caller's, on this thread alone. What a worker throws is thrown when all have ended, as
  // parallel_for would not tell what it was.
  template <typename Worker>
  void share(const Worker& worker) {
    const int64_t threads = std::min<int64_t>(pieces_, torch::stable::get_num_threads());
    std::atomic<bool> failed{false};
    std::string error;  // of the first that failed
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      try {
        worker(*this);
      } catch (const std::exception& exception) {
        if (!failed.exchange(true)) error = exception.what();
      }
    });
    if (failed) throw std::runtime_error(error);
  }

 private:
  const int64_t pieces_;
  std::atomic<int64_t> next_{0};
};

// A large tensor comes fresh from the system, which hands it out and clears it page by page as it
// is first written. Larger pages make that four times faster, and take no more memory.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace ms_deform_attn::cpu
