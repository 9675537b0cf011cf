// CPU kernel of `moved`: solve normal equations, and move poses by the step.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common.h"
#include "crop.h"
#include "solve.h"

namespace {

using namespace posekit;

// Return the damped step of normal equations, 0 where it is NaN.
void step_of(const float* hessian, const float* gradient, double (&step)[kUnknowns]) {
  double matrix[kUnknowns][kUnknowns], sum = 0;
  for (int64_t i = 0; i < kUnknowns; ++i) {
    for (int64_t j = 0; j < kUnknowns; ++j) matrix[i][j] = hessian[i * kUnknowns + j];
    sum += matrix[i][i];
    step[i] = gradient[i];
  }
  for (int64_t i = 0; i < kUnknowns; ++i) matrix[i][i] += 1e-3 * (sum / kUnknowns) + 1e-6;
  solve(matrix, step);
  for (double& entry : step)
    if (!std::isfinite(entry)) entry = 0;
}

// Return the rotation about a vector by its length (Rodrigues).
void rotation(const double (&v)[3], double (&R)[3][3]) {
  const double square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2], angle = std::sqrt(square);
  const double a = angle < 1e-6 ? 1 - square / 6 : std::sin(angle) / angle;
  const double half = std::sin(angle / 2);
  const double b = angle < 1e-6 ? 0.5 - square / 24 : 2 * half * half / square;
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) R[i][j] = b * v[i] * v[j] + (i == j ? 1 - b * square : 0);
  R[0][1] -= a * v[2], R[1][0] += a * v[2];
  R[0][2] += a * v[1], R[2][0] -= a * v[1];
  R[1][2] -= a * v[0], R[2][1] += a * v[0];
}

std::tuple<at::Tensor, at::Tensor> moved(const at::Tensor& hessian, const at::Tensor& gradient, const at::Tensor& R,
                                         const at::Tensor& t, const at::Tensor& radius_m, double most_turn,
                                         double most_shift, bool in_camera) {
  const int64_t B = t.size(0), H = t.size(1);
  check(hessian, at::kFloat, {B, H, kUnknowns, kUnknowns}, "hessian");
  check(gradient, at::kFloat, {B, H, kUnknowns, 1}, "gradient");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(radius_m, at::kFloat, {B}, "radius_m");
  const at::Tensor matrices = hessian.contiguous(), pulls = gradient.contiguous();
  const at::Tensor rotations = R.contiguous(), shifts = t.contiguous(), radii = radius_m.contiguous();
  at::Tensor R_moved = at::empty({B, H, 3, 3}, rotations.options()), t_moved = at::empty({B, H, 3}, shifts.options());
  for (int64_t pose = 0; pose < B * H; ++pose) {
    const double radius = radii.const_data_ptr<float>()[pose / H];
    double step[kUnknowns], turn[3], shift[3], turned[3][3];
    step_of(matrices.const_data_ptr<float>() + pose * kUnknowns * kUnknowns,
            pulls.const_data_ptr<float>() + pose * kUnknowns, step);
    for (int64_t i = 0; i < 3; ++i) {
      turn[i] = std::clamp(step[i] / radius, -most_turn, most_turn);
      shift[i] = std::clamp(step[3 + i], -most_shift * radius, most_shift * radius);
    }
    rotation(turn, turned);
    const float* before = rotations.const_data_ptr<float>() + pose * 9;
    const float* place = shifts.const_data_ptr<float>() + pose * 3;
    float* after = R_moved.mutable_data_ptr<float>() + pose * 9;
    float* to = t_moved.mutable_data_ptr<float>() + pose * 3;
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < 3; ++k)
          sum += in_camera ? turned[i][k] * before[3 * k + j] : before[3 * i + k] * turned[k][j];
        after[3 * i + j] = static_cast<float>(sum);
      }
      double along = shift[i];
      if (!in_camera) along = after[3 * i] * shift[0] + after[3 * i + 1] * shift[1] + after[3 * i + 2] * shift[2];
      to[i] = static_cast<float>(place[i] + along);
    }
  }
  return {R_moved, t_moved};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "moved(Tensor hessian, Tensor gradient, Tensor R, Tensor t, Tensor radius_m, float most_turn, float most_shift, "
      "bool in_camera) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("moved", &moved); }
