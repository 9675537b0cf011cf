// Shared code of the geometric engine's kernels. The references in posekit/geometric/kernels.py define them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

// Compiled for several instruction sets; the library picks the processor's best one when it is loaded. The flags of
// setup.py forbid fused multiply-add, so all of them give the same bits. Functions called by one must be inlined.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define POSEKIT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define POSEKIT_CLONES
#endif
#define POSEKIT_INLINE inline __attribute__((always_inline))

namespace posekit {

inline void check(const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == sizes, name, " must be ", sizes, ", got ", tensor.sizes());
}

POSEKIT_INLINE float larger(float a, float b) { return a > b ? a : b; }  // b if a is NaN
POSEKIT_INLINE float smaller(float a, float b) { return a < b ? a : b; }

}  // namespace posekit
