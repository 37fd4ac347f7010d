// Compiles the file MSDA_KERNEL once per instruction set, each in a namespace of its own.
//
// Flags on the command line cannot do this: build.toml has none per machine. Nor can a target
// attribute on a function that the kernel is inlined into: by then the compiler has cut the
// kernel's vectors into the small ones of the command line's target.
//
// No include guard: each .cpp file includes this file for its kernel.
#include "deformable_detr/cpu/capability.h"

// GCC would call memcpy and memset for the few numbers of a row of points or of a pixel, which
// costs the backward of decoders 6 to 10% (float32, AVX-512). A pragma and not a flag of
// build.toml: clang, which compiles for Macs, does not know the flag.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

namespace ms_deform_attn::cpu::portable {
#define MSDA_VECTOR_BYTES 16
#define MSDA_F16C 0
#include MSDA_KERNEL
#undef MSDA_VECTOR_BYTES
#undef MSDA_F16C
}  // namespace ms_deform_attn::cpu::portable

#if MSDA_X86_LEVELS

#define MSDA_F16C 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace ms_deform_attn::cpu::avx2 {
#define MSDA_VECTOR_BYTES 32
#include MSDA_KERNEL
#undef MSDA_VECTOR_BYTES
}  // namespace ms_deform_attn::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace ms_deform_attn::cpu::avx512 {
#define MSDA_VECTOR_BYTES 64
#include MSDA_KERNEL
#undef MSDA_VECTOR_BYTES
}  // namespace ms_deform_attn::cpu::avx512
#pragma GCC pop_options

#undef MSDA_F16C

#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
