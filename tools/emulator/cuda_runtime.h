// A GPU on the CPU, to run the CUDA kernels where there is none, under a sanitizer that knows more
// than compute-sanitizer does: each tensor, shared array and dynamic shared memory has its own
// bounds, and overflow of signed integers is seen. See emulate() in sanitize.py.
//
// Blocks run one after the other, a block's threads as fibers that only give way where they wait
// for each other. So races and missing barriers between threads are not found (racecheck does), and
// times mean nothing. Compiled as C++ beside the toolkit's headers of vector and half types; this
// one stands in for the runtime and for what nvcc declares by itself, as far as it is used here.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

// The thread that runs: its index, and those of its block and grid.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;
extern char* dynamic_shared;  // memory of the block, of the size that was asked for

// Runs a block's threads for each block of the grid.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// What each lane of the warp brought when all had come, and who did not run any more.
struct Exchange {
  uint64_t of_lane[32];
  bool present[32];
};
const Exchange& meet_warp(uint64_t own);
// Whether any thread of the block brought true.
bool meet_block(bool own);

template <typename T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <typename Predicate>
unsigned lanes(const Exchange& exchange, Predicate&& predicate) {
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (exchange.present[lane] && predicate(exchange.of_lane[lane])) mask |= 1u << lane;
  }
  return mask;
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, Kernel kernel, Arguments... arguments) {
  run(*config, [=] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace emulator

// ------------------------------------------------------------------------------- between threads

inline void __syncthreads() { emulator::meet_block(false); }
inline int __syncthreads_or(int x) { return emulator::meet_block(x != 0); }
inline void __syncwarp() { emulator::meet_warp(0); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const auto& all = emulator::meet_warp(emulator::to_bits(x));
  return emulator::from_bits<T>(all.of_lane[emulator::thread_index.x % 32 ^ mask]);
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  const auto& all = emulator::meet_warp(emulator::to_bits(x));
  return emulator::from_bits<T>(all.of_lane[lane]);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, unsigned by) {
  const auto& all = emulator::meet_warp(emulator::to_bits(x));
  const unsigned lane = emulator::thread_index.x % 32;
  return lane < by ? x : emulator::from_bits<T>(all.of_lane[lane - by]);
}
inline int __reduce_add_sync(unsigned, int x) {
  const auto& all = emulator::meet_warp(emulator::to_bits(x));
  x = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (all.present[lane]) x += emulator::from_bits<int>(all.of_lane[lane]);
  }
  return x;
}
inline int __reduce_max_sync(unsigned, int x) {
  const auto& all = emulator::meet_warp(emulator::to_bits(x));
  for (int lane = 0; lane < 32; ++lane) {
    if (all.present[lane]) x = std::max(x, emulator::from_bits<int>(all.of_lane[lane]));
  }
  return x;
}
inline unsigned __ballot_sync(unsigned, int x) {
  return emulator::lanes(emulator::meet_warp(x != 0), [](uint64_t bits) { return bits != 0; });
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return !__any_sync(mask, !x); }
template <typename T>
unsigned __match_any_sync(unsigned, T x) {
  const uint64_t own = emulator::to_bits(x);
  return emulator::lanes(emulator::meet_warp(own), [&](uint64_t bits) { return bits == own; });
}
template <typename T, typename U>
T atomicAdd(T* address, U x) {
  const T before = *address;
  *address = before + x;
  return before;
}
template <typename T>
T atomicCAS(T* address, T expected, T x) {
  const T before = *address;
  if (before == expected) *address = x;
  return before;
}

// ------------------------------------------------------------------------------------ arithmetic

inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
// Of the bytes 0 to 3 of x and 4 to 7 of y, those that the selector's digits name.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | uint64_t(y) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
// Conversions saturate, and make zero of NaN.
inline int to_int(float x) {
  if (x != x) return 0;
  return x >= 2147483648.f ? INT32_MAX : x < -2147483648.f ? INT32_MIN : static_cast<int>(x);
}
inline int __float2int_rn(float x) { return to_int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return to_int(std::floor(x)); }
inline unsigned __float2uint_rz(float x) { return x > 0 ? static_cast<unsigned>(x) : 0; }
inline int __float_as_int(float x) { return emulator::from_bits<int>(emulator::to_bits(x)); }
inline float __int_as_float(int x) { return emulator::from_bits<float>(emulator::to_bits(x)); }
inline unsigned __float_as_uint(float x) {
  return emulator::from_bits<unsigned>(emulator::to_bits(x));
}
inline float __saturatef(float x) { return x > 0 ? std::fmin(x, 1.f) : 0; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
template <typename A, typename B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(a) < T(b) ? T(a) : T(b);
}
template <typename A, typename B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

// ---------------------------------------------------------------------------------------- memory

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T x) {
  *address = x;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int byte, size_t bytes) {
  if (bytes > 0) std::memset(memory, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------- runtime

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small H100, or with EMULATED_SHARED_KB a GPU with less shared memory.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* kilobytes = std::getenv("EMULATED_SHARED_KB");
  const int shared = kilobytes ? std::atoi(kilobytes) * 1024 : 227 * 1024;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared + 1024; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {};
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
