// CPU kernel of `spread`: how far a reading may be off from the depth that a pose shows.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common.h"

namespace {

using namespace posekit;

constexpr int64_t kBlock = 256;  // cells whose normals are gathered at a time

// normal: (3, kBlock), object frame; ray: (kBlock, 3), camera frame, unit.
POSEKIT_CLONES void spread_block(const float* __restrict normal, const float* __restrict ray,
                                 const float* __restrict R, float noise_m, float cell_m, int64_t count,
                                 float* __restrict spread_m) {
  const float *x = normal, *y = normal + kBlock, *z = normal + 2 * kBlock;
  const float noise = noise_m * noise_m;
  for (int64_t i = 0; i < count; ++i) {
    const float along = (R[0] * x[i] + R[1] * y[i] + R[2] * z[i]) * ray[3 * i] +
                        (R[3] * x[i] + R[4] * y[i] + R[5] * z[i]) * ray[3 * i + 1] +
                        (R[6] * x[i] + R[7] * y[i] + R[8] * z[i]) * ray[3 * i + 2];
    const float facing = larger(std::abs(along), 0.15f);
    const float slant = std::sqrt(larger(1.0f - facing * facing, 0.0f)) / facing;
    const float across = 0.6f * cell_m * slant;
    spread_m[i] = std::sqrt(noise + across * across);
  }
}

at::Tensor spread(const at::Tensor& dense, const at::Tensor& R, const at::Tensor& depth_m, const at::Tensor& sample,
                  const at::Tensor& rays, const at::Tensor& noise_m, const at::Tensor& cell_m) {
  TORCH_CHECK(depth_m.dim() == 4, "depth_m must be (B, H, rows, columns)");
  const int64_t B = depth_m.size(0), H = depth_m.size(1), rows = depth_m.size(2), columns = depth_m.size(3);
  check(dense, at::kFloat, {dense.size(0), 6}, "dense");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(depth_m, at::kFloat, {B, H, rows, columns}, "depth_m");
  check(sample, at::kLong, {B, H, rows, columns}, "sample");
  check(rays, at::kFloat, {B, rows, columns, 3}, "rays");
  check(noise_m, at::kFloat, {B}, "noise_m");
  check(cell_m, at::kFloat, {B}, "cell_m");
  const at::Tensor cloud = dense.contiguous(), rotations = R.contiguous(), drawn_m = depth_m.contiguous();
  const at::Tensor samples = sample.contiguous(), towards = rays.contiguous();
  const at::Tensor noise = noise_m.contiguous(), cell = cell_m.contiguous();
  at::Tensor spread_m = at::empty({B, H, rows, columns}, drawn_m.options());
  const float* points = cloud.const_data_ptr<float>();
  const int64_t cells = rows * columns, most = cloud.size(0);
  alignas(64) float normal[3 * kBlock];
  for (int64_t pose = 0; pose < B * H; ++pose) {
    const int64_t b = pose / H;
    const float* depth = drawn_m.const_data_ptr<float>() + pose * cells;
    const int64_t* shown = samples.const_data_ptr<int64_t>() + pose * cells;
    float* out = spread_m.mutable_data_ptr<float>() + pose * cells;
    for (int64_t begin = 0; begin < cells; begin += kBlock) {
      const int64_t here = std::min(kBlock, cells - begin);
      for (int64_t i = 0; i < here; ++i) {
        const int64_t index = shown[begin + i];
        const bool there = std::isfinite(depth[begin + i]);
        TORCH_CHECK(!there || (0 <= index && index < most), "sample must lie within the dense ones");
        for (int64_t axis = 0; axis < 3; ++axis)
          normal[axis * kBlock + i] = there ? points[index * 6 + 3 + axis] : 0.0f;
      }
      spread_block(normal, towards.const_data_ptr<float>() + (b * cells + begin) * 3,
                   rotations.const_data_ptr<float>() + pose * 9, noise.const_data_ptr<float>()[b],
                   cell.const_data_ptr<float>()[b], here, out + begin);
      for (int64_t i = 0; i < here; ++i)
        out[begin + i] = std::isfinite(depth[begin + i]) ? out[begin + i] : noise.const_data_ptr<float>()[b];
    }
  }
  return spread_m;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "spread(Tensor dense, Tensor R, Tensor depth_m, Tensor sample, Tensor rays, Tensor noise_m, Tensor cell_m) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("spread", &spread); }
