// CPU kernel of `outline_pull`: equations that draw model points seen through by the camera sideways to the mask.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "common.h"
#include "crop.h"

namespace {

using namespace posekit;

struct Maps {
  const float* depth_m;
  const float* nearest_depth_m;
  const bool* mask;
  const float* to_border;  // (pixels, 2)
};

struct Limits {
  float through_m;  // how far behind a point the camera must have seen to have seen through it
  float reach_m;    // a quarter of the distance at which a point stops pulling
  float radius_m;   // of the object: scales rotations
};

// points: (M, 3), object frame.
Equations pull(const Crop& crop, const Maps& maps, const Limits& limits, const float* points, int64_t count,
               const float* R, const float* t) {
  Equations equations;
  const float per_reach = 1.0f / (4.0f * limits.reach_m), per_radius = 1.0f / limits.radius_m;
  for (int64_t m = 0; m < count; ++m) {
    const float* point = points + 3 * m;
    const float x = R[0] * point[0] + R[1] * point[1] + R[2] * point[2] + t[0];
    const float y = R[3] * point[0] + R[4] * point[1] + R[5] * point[2] + t[1];
    const float z = R[6] * point[0] + R[7] * point[1] + R[8] * point[2] + t[2];
    const int64_t pixel = crop.pixel(x, y, z);
    if (pixel < 0 || maps.mask[pixel]) continue;
    if (!(maps.depth_m[pixel] > 0 && maps.nearest_depth_m[pixel] - z > limits.through_m)) continue;
    const float scale = z / crop.K[0];  // metres a pixel at the point's depth
    const float across = maps.to_border[2 * pixel] * scale, down = maps.to_border[2 * pixel + 1] * scale;
    const float distance = std::sqrt(across * across + down * down);
    const float near = larger(1.0f - (distance * per_reach) * (distance * per_reach), 0.0f);
    const float weight = 0.5f * near * near;
    if (!(weight > 0)) continue;
    const float back = 1.0f / larger(distance, 1e-9f);
    const float ux = across * back, uy = down * back;
    const float nx = ux * R[0] + uy * R[3], ny = ux * R[1] + uy * R[4], nz = ux * R[2] + uy * R[5];
    const float px = point[0] + nx * distance, py = point[1] + ny * distance, pz = point[2] + nz * distance;
    const float jacobian[kUnknowns] = {(py * nz - pz * ny) * per_radius, (pz * nx - px * nz) * per_radius,
                                       (px * ny - py * nx) * per_radius, nx, ny, nz};
    equations.add(jacobian, weight, distance);
  }
  return equations;
}

std::tuple<at::Tensor, at::Tensor> outline_pull(
    const at::Tensor& points, const at::Tensor& R, const at::Tensor& t, const at::Tensor& K, const at::Tensor& depth_m,
    const at::Tensor& nearest_depth_m, const at::Tensor& mask, const at::Tensor& to_border,
    const at::Tensor& first_pixel, const at::Tensor& width, const at::Tensor& height, const at::Tensor& through_m,
    const at::Tensor& reach_m, const at::Tensor& radius_m) {
  const int64_t B = t.size(0), H = t.size(1), M = points.size(2), pixels = depth_m.size(0);
  check(points, at::kFloat, {B, H, M, 3}, "points");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(K, at::kFloat, {B, 3, 3}, "K");
  check(depth_m, at::kFloat, {pixels}, "depth_m");
  check(nearest_depth_m, at::kFloat, {pixels}, "nearest_depth_m");
  check(mask, at::kBool, {pixels}, "mask");
  check(to_border, at::kFloat, {pixels, 2}, "to_border");
  check(first_pixel, at::kLong, {B}, "first_pixel");
  check(width, at::kLong, {B}, "width");
  check(height, at::kLong, {B}, "height");
  check(through_m, at::kFloat, {B}, "through_m");
  check(reach_m, at::kFloat, {B}, "reach_m");
  check(radius_m, at::kFloat, {B}, "radius_m");
  const at::Tensor model = points.contiguous(), rotation = R.contiguous(), shift = t.contiguous();
  const at::Tensor camera = K.contiguous(), first = first_pixel.contiguous();
  const at::Tensor depth = depth_m.contiguous(), nearest = nearest_depth_m.contiguous(), inside = mask.contiguous();
  const at::Tensor border = to_border.contiguous(), wide = width.contiguous(), high = height.contiguous();
  const at::Tensor through = through_m.contiguous(), reach = reach_m.contiguous(), radius = radius_m.contiguous();
  at::Tensor hessian = at::empty({B, H, kUnknowns, kUnknowns}, model.options());
  at::Tensor gradient = at::empty({B, H, kUnknowns, 1}, model.options());
  for (int64_t b = 0; b < B; ++b) {
    const Crop crop = crop_of(b, camera, first, wide, high, pixels);
    const int64_t begin = first.const_data_ptr<int64_t>()[b];
    const Maps maps{depth.const_data_ptr<float>() + begin, nearest.const_data_ptr<float>() + begin,
                    inside.const_data_ptr<bool>() + begin, border.const_data_ptr<float>() + 2 * begin};
    const Limits limits{through.const_data_ptr<float>()[b], reach.const_data_ptr<float>()[b],
                        radius.const_data_ptr<float>()[b]};
    for (int64_t pose = b * H; pose < (b + 1) * H; ++pose) {
      pull(crop, maps, limits, model.const_data_ptr<float>() + pose * M * 3, M,
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
      "outline_pull(Tensor points, Tensor R, Tensor t, Tensor K, Tensor depth_m, Tensor nearest_depth_m, Tensor mask, "
      "Tensor to_border, Tensor first_pixel, Tensor width, Tensor height, Tensor through_m, Tensor reach_m, "
      "Tensor radius_m) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("outline_pull", &outline_pull); }
