// CPU kernel of `normal_equations`: equations that draw observed points to the surface of each pose.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "field.h"

namespace {

using namespace posekit;

constexpr int64_t kUnknowns = 6;

struct Limits {
  float spacing_m;  // between neighbouring samples
  float rim_m2;     // squared distance along the surface past which a point is beyond its rim
  float reach_m;    // half the distance at which a point stops pulling
  float radius_m;   // of the object: scales rotations
};

// trust: (N,) or null. hessian: (6, 6), gradient: (6,).
POSEKIT_CLONES void assemble(const Field& field, const Cloud& cloud, const float* trust, const float* R, const float* t,
                             const Limits& limits, float* hessian, float* gradient) {
  alignas(64) float jacobian[kUnknowns][kBlock], weighted[kUnknowns][kBlock], weight[kBlock], residual[kBlock];
  alignas(64) float trusted[kBlock];
  alignas(64) float hessian_sums[kUnknowns][kUnknowns][kLanes] = {}, gradient_sums[kUnknowns][kLanes] = {};
  const float per_radius = 1.0f / limits.radius_m, per_reach = 1.0f / (4.0f * limits.reach_m * limits.reach_m);
  Match match;
  for (int64_t begin = 0; begin < cloud.count; begin += kBlock) {
    const int64_t here = std::min(kBlock, cloud.count - begin);
    for (int64_t i = 0; i < kBlock; ++i) trusted[i] = i >= here ? 0.0f : trust ? trust[begin + i] : 1.0f;
    look_up(field, cloud, begin, R, t, match);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float x = match.away[0][i], y = match.away[1][i], z = match.away[2][i];
      const float off = x * match.normal[0][i] + y * match.normal[1][i] + z * match.normal[2][i];
      const float squared = x * x + y * y + z * z, distance = std::sqrt(squared);
      const bool beyond = squared - off * off > limits.rim_m2;
      const float robust = larger(1.0f - squared * per_reach, 0.0f);
      weight[i] = robust * robust * (beyond ? 0.5f : larger(match.facing[i], 0.1f)) * trusted[i];
      const bool counts = weight[i] > 0;  // points without weight may hold anything, even NaN
      const float back = 1.0f / larger(distance, 1e-9f);
      const float nx = beyond ? x * back : match.normal[0][i];
      const float ny = beyond ? y * back : match.normal[1][i];
      const float nz = beyond ? z * back : match.normal[2][i];
      const float px = match.x[0][i], py = match.x[1][i], pz = match.x[2][i];
      weight[i] = counts ? weight[i] : 0.0f;
      residual[i] = counts ? (beyond ? distance - limits.spacing_m : off) : 0.0f;
      jacobian[0][i] = counts ? (py * nz - pz * ny) * per_radius : 0.0f;
      jacobian[1][i] = counts ? (pz * nx - px * nz) * per_radius : 0.0f;
      jacobian[2][i] = counts ? (px * ny - py * nx) * per_radius : 0.0f;
      jacobian[3][i] = counts ? nx : 0.0f;
      jacobian[4][i] = counts ? ny : 0.0f;
      jacobian[5][i] = counts ? nz : 0.0f;
    }
    for (int64_t row = 0; row < kUnknowns; ++row) {
      for (int64_t i = 0; i < kBlock; ++i) weighted[row][i] = jacobian[row][i] * weight[i];
      for (int64_t column = row; column < kUnknowns; ++column)
        add_products(weighted[row], jacobian[column], hessian_sums[row][column]);
      add_products(weighted[row], residual, gradient_sums[row]);
    }
  }
  for (int64_t row = 0; row < kUnknowns; ++row) {
    for (int64_t column = row; column < kUnknowns; ++column)
      hessian[row * kUnknowns + column] = hessian[column * kUnknowns + row] = total(hessian_sums[row][column]);
    gradient[row] = total(gradient_sums[row]);
  }
}

std::tuple<at::Tensor, at::Tensor> normal_equations(
    const at::Tensor& points, const at::Tensor& normals, const at::Tensor& R, const at::Tensor& t,
    const std::optional<at::Tensor>& trust, const at::Tensor& reach_m, const at::Tensor& spacing_m,
    const at::Tensor& rim_m2, const at::Tensor& radius_m, int64_t samples, const at::Tensor& surface,
    const at::Tensor& oriented, const at::Tensor& first_sample, const at::Tensor& nearest, const at::Tensor& first_cell,
    const at::Tensor& origin_m, const at::Tensor& cell_m, const at::Tensor& last_cell, const at::Tensor& stride) {
  const int64_t B = t.size(0), H = t.size(1), N = points.size(1);
  check(points, at::kFloat, {B, N, 3}, "points");
  check(normals, at::kFloat, {B, N, 3}, "normals");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(reach_m, at::kFloat, {B}, "reach_m");
  check(spacing_m, at::kFloat, {B}, "spacing_m");
  check(rim_m2, at::kFloat, {B}, "rim_m2");
  check(radius_m, at::kFloat, {B}, "radius_m");
  if (trust) check(*trust, at::kFloat, {B, H, N}, "trust");
  TORCH_CHECK(N > 0, "points must hold at least 1 point, got 0");
  const Tables tables(B, samples, surface, oriented, first_sample, nearest, first_cell, origin_m, cell_m, last_cell,
                      stride);
  const at::Tensor seen = points.contiguous(), facing = normals.contiguous();
  const at::Tensor rotation = R.contiguous(), shift = t.contiguous();
  const at::Tensor reach = reach_m.contiguous(), spacing = spacing_m.contiguous();
  const at::Tensor rim = rim_m2.contiguous(), radius = radius_m.contiguous();
  // A prefix of longer rows, or one row for all, is read in place.
  const at::Tensor trusted = !trust ? at::Tensor() : trust->stride(2) == 1 ? *trust : trust->contiguous();
  at::Tensor hessian = at::empty({B, H, kUnknowns, kUnknowns}, seen.options());
  at::Tensor gradient = at::empty({B, H, kUnknowns, 1}, seen.options());
  for (int64_t b = 0; b < B; ++b) {
    const Field field = tables.of(b);
    const Cloud cloud(seen.const_data_ptr<float>() + b * N * 3, facing.const_data_ptr<float>() + b * N * 3, N);
    const Limits limits{spacing.const_data_ptr<float>()[b], rim.const_data_ptr<float>()[b],
                        reach.const_data_ptr<float>()[b], radius.const_data_ptr<float>()[b]};
    for (int64_t h = 0; h < H; ++h) {
      const int64_t pose = b * H + h;
      const float* row =
          trust ? trusted.const_data_ptr<float>() + b * trusted.stride(0) + h * trusted.stride(1) : nullptr;
      assemble(field, cloud, row, rotation.const_data_ptr<float>() + pose * 9, shift.const_data_ptr<float>() + pose * 3,
               limits, hessian.mutable_data_ptr<float>() + pose * kUnknowns * kUnknowns,
               gradient.mutable_data_ptr<float>() + pose * kUnknowns);
    }
  }
  return {hessian, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "normal_equations(Tensor points, Tensor normals, Tensor R, Tensor t, Tensor? trust, Tensor reach_m, "
      "Tensor spacing_m, Tensor rim_m2, Tensor radius_m, int samples, Tensor surface, Tensor oriented, "
      "Tensor first_sample, Tensor nearest, Tensor first_cell, Tensor origin_m, Tensor cell_m, Tensor last_cell, "
      "Tensor stride) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("normal_equations", &normal_equations); }
