// Macros that make one source serve every processor.
#pragma once

#include <cstdint>

// POINTNET2_CLONES before a function compiles it for several instruction sets; the library picks the processor's best
// one when it is loaded. The flags of setup.py forbid fused multiply-add, so all of them give the same bits. Functions
// called by such a function must be POINTNET2_INLINE. On other processors the compiler's flags decide: NEON, for
// example, needs none.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define POINTNET2_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define POINTNET2_CLONES
#endif
#define POINTNET2_INLINE inline __attribute__((always_inline))
