// One source, several instruction sets: picks at run time what the processor has.
//
// A loop written plainly is compiled once per level: `flatten` pulls it and everything it calls
// into a function with that level's target attribute, where the compiler vectorises it. Flags on
// the command line could not do this: build.toml has none per machine.
//
// MSDA_CPU_CAPABILITY = default | avx2 | avx512 lowers the level (for tests and comparisons).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace ms_deform_attn::cpu {

enum class Capability { portable, avx2, avx512 };

inline Capability detect_capability() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* wanted = std::getenv("MSDA_CPU_CAPABILITY");
  if (wanted && std::strcmp(wanted, "default") == 0) return Capability::portable;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wanted && std::strcmp(wanted, "avx2") == 0) {
    return has_avx2 ? Capability::avx2 : Capability::portable;
  }
  if (has_avx512) return Capability::avx512;
  if (has_avx2) return Capability::avx2;
#endif
  return Capability::portable;
}

inline Capability capability() {
  static const Capability level = detect_capability();
  return level;
}

#if defined(__x86_64__) && defined(__GNUC__)
template <typename Body>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"), flatten,
               noinline)) void run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <typename Body>
__attribute__((target("avx2,fma,f16c"), flatten, noinline)) void run_avx2(const Body& body,
                                                                          int64_t begin,
                                                                          int64_t end) {
  body(begin, end);
}
#endif

// body(begin, end), compiled for this processor.
template <typename Body>
void run_vectorised(const Body& body, int64_t begin, int64_t end) {
#if defined(__x86_64__) && defined(__GNUC__)
  switch (capability()) {
    case Capability::avx512: return run_avx512(body, begin, end);
    case Capability::avx2: return run_avx2(body, begin, end);
    case Capability::portable: break;
  }
#endif
  body(begin, end);
}

}  // namespace ms_deform_attn::cpu
