// CPU kernel of `depth_pull`: equations that draw visible model points along their rays to the depth that was read.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "common.h"
#include "crop.h"

namespace {

using namespace posekit;

// surface: (M, 6) points and normals, object frame; visible: (M,).
Equations pull(const Crop& crop, const float* depth_m, const bool* mask, float reach_m, float radius_m,
               const float* surface, const bool* visible, int64_t count, const float* R, const float* t) {
  Equations equations;
  const float per_reach = 1.0f / reach_m, per_radius = 1.0f / radius_m;
  for (int64_t m = 0; m < count; ++m) {
    if (!visible[m]) continue;
    const float* p = surface + 6 * m;
    const float* n = p + 3;
    const float ax = R[0] * p[0] + R[1] * p[1] + R[2] * p[2];  // from the object's origin, camera frame
    const float ay = R[3] * p[0] + R[4] * p[1] + R[5] * p[2];
    const float az = R[6] * p[0] + R[7] * p[1] + R[8] * p[2];
    const float x = ax + t[0], y = ay + t[1], z = az + t[2];
    const int64_t pixel = crop.pixel(x, y, z);
    if (pixel < 0 || !mask[pixel] || !(depth_m[pixel] > 0)) continue;
    const float nx = R[0] * n[0] + R[1] * n[1] + R[2] * n[2];
    const float ny = R[3] * n[0] + R[4] * n[1] + R[5] * n[2];
    const float nz = R[6] * n[0] + R[7] * n[1] + R[8] * n[2];
    const float per_depth = 1.0f / larger(z, 1e-6f);
    const float facing = (x * nx + y * ny + z * nz) * per_depth;  // normal times the ray whose z is 1
    const float off = (depth_m[pixel] - z) * facing;
    const float near = larger(1.0f - (off * per_reach) * (off * per_reach), 0.0f);
    const float weight = std::abs(facing) * near * near;
    if (!(weight > 0)) continue;
    const float jacobian[kUnknowns] = {(ay * nz - az * ny) * per_radius, (az * nx - ax * nz) * per_radius,
                                       (ax * ny - ay * nx) * per_radius, nx, ny, nz};
    equations.add(jacobian, weight, off);
  }
  return equations;
}

std::tuple<at::Tensor, at::Tensor> depth_pull(const at::Tensor& surface, const at::Tensor& visible, const at::Tensor& R,
                                              const at::Tensor& t, const at::Tensor& K, const at::Tensor& depth_m,
                                              const at::Tensor& mask, const at::Tensor& first_pixel,
                                              const at::Tensor& width, const at::Tensor& height,
                                              const at::Tensor& reach_m, const at::Tensor& radius_m) {
  const int64_t B = t.size(0), H = t.size(1), M = surface.size(2), pixels = depth_m.size(0);
  check(surface, at::kFloat, {B, H, M, 6}, "surface");
  check(visible, at::kBool, {B, H, M}, "visible");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(K, at::kFloat, {B, 3, 3}, "K");
  check(depth_m, at::kFloat, {pixels}, "depth_m");
  check(mask, at::kBool, {pixels}, "mask");
  check(first_pixel, at::kLong, {B}, "first_pixel");
  check(width, at::kLong, {B}, "width");
  check(height, at::kLong, {B}, "height");
  check(reach_m, at::kFloat, {B}, "reach_m");
  check(radius_m, at::kFloat, {B}, "radius_m");
  const at::Tensor model = surface.contiguous(), shown = visible.contiguous();
  const at::Tensor rotation = R.contiguous(), shift = t.contiguous(), camera = K.contiguous();
  const at::Tensor depth = depth_m.contiguous(), inside = mask.contiguous(), first = first_pixel.contiguous();
  const at::Tensor wide = width.contiguous(), high = height.contiguous();
  const at::Tensor reach = reach_m.contiguous(), radius = radius_m.contiguous();
  at::Tensor hessian = at::empty({B, H, kUnknowns, kUnknowns}, model.options());
  at::Tensor gradient = at::empty({B, H, kUnknowns, 1}, model.options());
  for (int64_t b = 0; b < B; ++b) {
    const Crop crop = crop_of(b, camera, first, wide, high, pixels);
    const int64_t begin = first.const_data_ptr<int64_t>()[b];
    for (int64_t pose = b * H; pose < (b + 1) * H; ++pose) {
      pull(crop, depth.const_data_ptr<float>() + begin, inside.const_data_ptr<bool>() + begin,
           reach.const_data_ptr<float>()[b], radius.const_data_ptr<float>()[b],
           model.const_data_ptr<float>() + pose * M * 6, shown.const_data_ptr<bool>() + pose * M, M,
           rotation.const_data_ptr<float>() + pose * 9, shift.const_data_ptr<float>() + pose * 3)
          .write(hessian.mutable_data_ptr<float>() + pose * kUnknowns * kUnknowns,
                 gradient.mutable_data_ptr<float>() + pose * kUnknowns);
    }
  }
  return {hessian, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "depth_pull(Tensor surface, Tensor visible, Tensor R, Tensor t, Tensor K, Tensor depth_m, Tensor mask, "
      "Tensor first_pixel, Tensor width, Tensor height, Tensor reach_m, Tensor radius_m) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("depth_pull", &depth_pull); }
