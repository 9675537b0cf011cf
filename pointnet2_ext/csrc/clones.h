// What makes one source serve every processor.
#pragma once

#include <cstdint>

// POINTNET2_CLONES before a function: compiled for several instruction sets, of which the processor's best is chosen
// when the library is loaded. The flags of setup.py forbid fused multiply-add, so all of them give the same bits. What
// such a function calls must be POINTNET2_INLINE. Elsewhere the compiler's flags decide: NEON, for example, needs none.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define POINTNET2_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define POINTNET2_CLONES
#endif
#define POINTNET2_INLINE inline __attribute__((always_inline))
