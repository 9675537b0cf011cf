// CPU kernel of `distinct`: the best of many poses, none close to a better one.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <vector>

#include "common.h"

namespace {

using namespace posekit;

using Pose = std::array<float, 12>;  // R and t

bool alike(const Pose& a, const Pose& b, float trace_near, float distance_m) {
  if (!(std::abs(a[9] - b[9]) < distance_m && std::abs(a[10] - b[10]) < distance_m &&
        std::abs(a[11] - b[11]) < distance_m))
    return false;
  float trace = 0;
  for (int64_t i = 0; i < 9; ++i) trace += a[i] * b[i];
  return trace > trace_near;
}

at::Tensor distinct(const at::Tensor& R, const at::Tensor& t, const at::Tensor& order, int64_t count, double trace_near,
                    const at::Tensor& distance_m) {
  const int64_t B = t.size(0), H = t.size(1);
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(order, at::kLong, {B, H}, "order");
  check(distance_m, at::kFloat, {B}, "distance_m");
  TORCH_CHECK(0 < H && 0 < count, "there must be poses, and some must be wanted");
  const at::Tensor rotations = R.contiguous(), shifts = t.contiguous(), best_first = order.contiguous();
  const at::Tensor distances = distance_m.contiguous();
  at::Tensor kept = at::empty({B, count}, best_first.options());
  std::vector<Pose> found;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* ranked = best_first.const_data_ptr<int64_t>() + b * H;
    int64_t* chosen = kept.mutable_data_ptr<int64_t>() + b * count;
    found.clear();
    for (int64_t rank = 0; rank < H && static_cast<int64_t>(found.size()) < count; ++rank) {
      TORCH_CHECK(0 <= ranked[rank] && ranked[rank] < H, "order must lie within the poses");
      const float* turn = rotations.const_data_ptr<float>() + (b * H + ranked[rank]) * 9;
      const float* place = shifts.const_data_ptr<float>() + (b * H + ranked[rank]) * 3;
      Pose pose;
      for (int64_t i = 0; i < 12; ++i) pose[i] = i < 9 ? turn[i] : place[i - 9];
      bool apart = true;
      for (const Pose& better : found) {
        apart = !alike(pose, better, static_cast<float>(trace_near), distances.const_data_ptr<float>()[b]);
        if (!apart) break;
      }
      if (!apart) continue;
      chosen[found.size()] = ranked[rank];
      found.push_back(pose);
    }
    for (int64_t slot = static_cast<int64_t>(found.size()); slot < count; ++slot) chosen[slot] = ranked[0];
  }
  return kept;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def("distinct(Tensor R, Tensor t, Tensor order, int count, float trace_near, Tensor distance_m) -> Tensor");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("distinct", &distinct); }
