// In the place of glibc's header of this name, which since 2.32 lets libstdc++ count references
// without atomics while there is one thread. manylinux_2_28 has no such variable; there the answer
// is always no.
#pragma once

constexpr char __libc_single_threaded = 0;
