// Which instruction set the CPU kernels use. It is chosen at run time from what the processor has.
//
// MSDA_CPU_CAPABILITY = default | avx2 | avx512 lowers it (for tests and comparisons).
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Instruction sets above the portable one need GCC's target pragma: see each_capability.h.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MSDA_X86_LEVELS 1
#else
#define MSDA_X86_LEVELS 0
#endif

namespace ms_deform_attn::cpu {

enum class Capability { portable, avx2, avx512 };

inline Capability detect_capability() {
#if MSDA_X86_LEVELS
  const char* wanted = std::getenv("MSDA_CPU_CAPABILITY");
  const auto wants = [&](const char* name) { return wanted && std::strcmp(wanted, name) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx2 || wants("default")) return Capability::portable;
  if (!avx512 || wants("avx2")) return Capability::avx2;
  return Capability::avx512;
#else
  return Capability::portable;
#endif
}

inline Capability capability() {
  static const Capability level = detect_capability();
  return level;
}

// Calls a function that each_capability.h has compiled for every instruction set.
#if MSDA_X86_LEVELS
#define MSDA_FOR_CAPABILITY(call)                     \
  switch (capability()) {                             \
    case Capability::portable: portable::call; break; \
    case Capability::avx2: avx2::call; break;         \
    case Capability::avx512: avx512::call; break;     \
  }
#else
#define MSDA_FOR_CAPABILITY(call) portable::call
#endif

#define MSDA_INLINE inline __attribute__((always_inline))
#define MSDA_INLINE_LAMBDA __attribute__((always_inline))

// Before a loop: what it writes is not what it reads in another turn, so that it is vectorised.
#if defined(__clang__)
#define MSDA_NO_ALIASES _Pragma("clang loop vectorize(assume_safety)")
#else
#define MSDA_NO_ALIASES _Pragma("GCC ivdep")
#endif

}  // namespace ms_deform_attn::cpu
