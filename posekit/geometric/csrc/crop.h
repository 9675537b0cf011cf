// A crop's pixel maps, and the pixel of a point in the camera frame.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>

#include "common.h"

namespace posekit {

constexpr int64_t kUnknowns = 6;  // of a step: a rotation (times the object's radius) and a shift

struct Crop {
  const float* K;  // (3, 3)
  float width, height;

  // Return the index of the pixel that shows a point; -1 if it is outside the crop or not in front of the camera.
  POSEKIT_INLINE int64_t pixel(float x, float y, float z) const {
    const float depth = larger(z, 1e-6f);
    const float column = std::nearbyint((K[0] * x + K[1] * y) / depth + K[2]);
    const float row = std::nearbyint(K[4] * y / depth + K[5]);
    const bool inside = column >= 0 && column < width && row >= 0 && row < height;
    return inside ? static_cast<int64_t>(row * width + column) : -1;
  }
};

// Sums of weighted products of jacobians: one half of a symmetric matrix.
struct Equations {
  float products[kUnknowns][kUnknowns] = {}, pulls[kUnknowns] = {};

  POSEKIT_INLINE void add(const float* jacobian, float weight, float residual) {
    for (int64_t i = 0; i < kUnknowns; ++i) {
      const float weighted = jacobian[i] * weight;
      for (int64_t j = i; j < kUnknowns; ++j) products[i][j] += weighted * jacobian[j];
      pulls[i] += weighted * residual;
    }
  }

  // hessian: (6, 6), gradient: (6,).
  void write(float* hessian, float* gradient) const {
    for (int64_t i = 0; i < kUnknowns; ++i) {
      for (int64_t j = i; j < kUnknowns; ++j) hessian[i * kUnknowns + j] = hessian[j * kUnknowns + i] = products[i][j];
      gradient[i] = pulls[i];
    }
  }
};

// Return crop b of concatenated maps; they must hold all of it.
inline Crop crop_of(int64_t b, const at::Tensor& K, const at::Tensor& first_pixel, const at::Tensor& width,
                    const at::Tensor& height, int64_t pixels) {
  const int64_t wide = width.const_data_ptr<int64_t>()[b], high = height.const_data_ptr<int64_t>()[b];
  const int64_t first = first_pixel.const_data_ptr<int64_t>()[b];
  TORCH_CHECK(first >= 0 && first + wide * high <= pixels, "the maps end before crop ", b, " does");
  return {K.const_data_ptr<float>() + b * 9, static_cast<float>(wide), static_cast<float>(high)};
}

}  // namespace posekit
