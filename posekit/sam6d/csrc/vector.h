// Shared code of this folder's kernels: sixteen floats at a time, on any processor.
//
// Sums may be fused and reordered here: a kernel agrees with its reference up to float32 rounding. It processes one row
// after the other, and rows share nothing, so that threads change no bit.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#pragma GCC optimize("fp-contract=fast")

// One name, compiled for several processors; the library picks the right one when it is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAM6D_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SAM6D_CLONES
#endif
#define SAM6D_INLINE inline __attribute__((always_inline))

namespace sam6d {

constexpr int64_t kLanes = 16;
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef int16_t S __attribute__((vector_size(32)));

SAM6D_INLINE void load(V& v, const float* from) { std::memcpy(&v, from, sizeof v); }
SAM6D_INLINE void store(float* to, const V& v) { std::memcpy(to, &v, sizeof v); }
SAM6D_INLINE void load(V& v, const int16_t* from) {
  S s;
  std::memcpy(&s, from, sizeof s);
  v = __builtin_convertvector(s, V);
}
SAM6D_INLINE void store(int16_t* to, const V& v) {  // rounded, and clamped to 16 bits
  const V half = v < 0 ? V{} - 0.5f : V{} + 0.5f;
  V rounded = v + half;
  rounded = rounded > 32767.0f ? V{} + 32767.0f : rounded;
  rounded = rounded < -32767.0f ? V{} - 32767.0f : rounded;
  const S s = __builtin_convertvector(__builtin_convertvector(rounded, I), S);
  std::memcpy(to, &s, sizeof s);
}
SAM6D_INLINE void larger(V& a, const V& b) { a = a > b ? a : b; }
SAM6D_INLINE void smaller(V& a, const V& b) { a = a < b ? a : b; }

SAM6D_INLINE float sum(const V& v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half both = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &both, sizeof both);
  const Quarter last = quarters[0] + quarters[1];
  return (last[0] + last[1]) + (last[2] + last[3]);
}

SAM6D_INLINE float largest(const V& v) {
  float found = v[0];
  for (int64_t i = 1; i < kLanes; ++i) found = v[i] > found ? v[i] : found;
  return found;
}

SAM6D_INLINE float smallest(const V& v) {
  float found = v[0];
  for (int64_t i = 1; i < kLanes; ++i) found = v[i] < found ? v[i] : found;
  return found;
}

// Return e^x up to float32 rounding, for x up to 0; nearly 0 below -87.
SAM6D_INLINE void exponential(V& x) {
  const V least = V{} - 87.0f;
  larger(x, least);
  const V turns = x * 1.44269504088896341f - 0.5f;
  const I whole = __builtin_convertvector(turns, I);  // truncation rounds to nearest here, since x <= 0
  const V n = __builtin_convertvector(whole, V);
  const V rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  const I power = (whole + 127) << 23;
  V scale;
  std::memcpy(&scale, &power, sizeof scale);
  x = p * scale;
}

inline void check(const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == sizes, name, " must be ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU");
}

}  // namespace sam6d
