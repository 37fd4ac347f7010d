// What the CPU kernels share that does not depend on the instruction set: levels, operands, memory
// and threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "deformable_detr/cpu/tiles.h"

namespace ms_deform_attn::cpu {

inline std::vector<Level> read_levels(const Params& p) {
  std::vector<Level> levels(p.levels);
  for (int32_t level = 0; level < p.levels; ++level) levels[level] = read_level(p, level);
  return levels;
}

// Zeros, unless told otherwise, from a cache line's boundary on. Whole cache lines are allocated,
// so that SIMD registers, which are no longer, may be stored beyond the last element. By malloc, as
// aligned_alloc of glibc before 2.38 does not hand out again what was freed last: a backward makes
// 70 arrays and more.
template <typename T>
class Array {
 public:
  Array(int64_t size, bool zero = true) {
    constexpr size_t line = 64;
    const size_t bytes = (size * sizeof(T) / line + 1) * line;
    memory_.reset(std::malloc(bytes + line));
    if (!memory_) {
      throw std::runtime_error("out of memory: ms_deform_attn on cpu cannot allocate " +
                               std::to_string(bytes) + " bytes");
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + line - 1) / line * line);
    if (zero) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  operator T*() const { return data_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  T* data_;
};

// The tasks of a call. Threads take one after the other, so that none waits for a slower one. What
// a task computes must not depend on the thread that takes it.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}
  bool take(int64_t* task) { return (*task = next_++) < count_; }

  // Calls worker(*this) on each of torch's threads, but on no more than there are tasks. Inside a
  // parallel region of the caller, only this thread works. What a worker throws is thrown here when
  // all have ended: parallel_for would not tell what it was. (std::exception_ptr is of no libstdc++
  // that manylinux allows.)
  template <typename Worker>
  void run(const Worker& worker) {
    const int64_t threads = std::min<int64_t>(count_, torch::stable::get_num_threads());
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
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

// See for_whole_rows.
inline Tasks row_tasks(const Params& p) {
  return Tasks((p.batch * p.queries * p.heads + kTaskRows - 1) / kTaskRows);
}

// The system hands out the memory of a new large tensor page by page, and clears each page at its
// first write. Huge pages make that four times faster and take no more memory.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHugePage;
  if (data && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace ms_deform_attn::cpu
