// CPU kernel of `explain`: how many observed points each pose accounts for.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "field.h"

namespace {

using namespace posekit;

struct Limits {
  float slack_m;       // along the surface, between a point and its nearest sample
  float reach_m;       // a point farther away explains nothing
};

POSEKIT_CLONES float judge(const Field& field, const Cloud& cloud, const float* R, const float* t,
                           const Limits& limits) {
  alignas(64) float near[kBlock], sums[kLanes] = {};
  const float per_reach = 1.0f / (limits.reach_m * limits.reach_m);
  Match match;
  for (int64_t begin = 0; begin < cloud.count; begin += kBlock) {
    look_up(field, cloud, begin, R, t, match);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float x = match.away[0][i], y = match.away[1][i], z = match.away[2][i];
      const float off = x * match.normal[0][i] + y * match.normal[1][i] + z * match.normal[2][i];
      const float along = std::sqrt(larger(x * x + y * y + z * z - off * off, 0.0f));
      const float past = larger(along - limits.slack_m, 0.0f);
      const float squared = off * off + past * past;
      near[i] = larger(1.0f - squared * per_reach, 0.0f) * smaller(match.facing[i] * 1.25f, 1.0f);
    }
    for (int64_t i = cloud.count - begin; i < kBlock; ++i) near[i] = 0.0f;
    add(near, sums);
  }
  return total(sums) / static_cast<float>(cloud.count);
}

at::Tensor explain(const at::Tensor& points, const at::Tensor& normals, const at::Tensor& R, const at::Tensor& t,
                   const at::Tensor& tolerance_m, const at::Tensor& slack_m, int64_t samples,
                   const at::Tensor& surface, const at::Tensor& oriented, const at::Tensor& first_sample,
                   const at::Tensor& nearest, const at::Tensor& first_cell, const at::Tensor& origin_m,
                   const at::Tensor& cell_m, const at::Tensor& last_cell, const at::Tensor& stride) {
  const int64_t B = t.size(0), H = t.size(1), N = points.size(1);
  check(points, at::kFloat, {B, N, 3}, "points");
  check(normals, at::kFloat, {B, N, 3}, "normals");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(tolerance_m, at::kFloat, {B}, "tolerance_m");
  check(slack_m, at::kFloat, {B}, "slack_m");
  TORCH_CHECK(N > 0, "points must hold at least 1 point, got 0");
  const Tables tables(B, samples, surface, oriented, first_sample, nearest, first_cell, origin_m, cell_m, last_cell,
                      stride);
  const at::Tensor seen = points.contiguous(), facing = normals.contiguous();
  const at::Tensor rotation = R.contiguous(), shift = t.contiguous();
  const at::Tensor tolerance = tolerance_m.contiguous(), slack = slack_m.contiguous();
  at::Tensor explained = at::empty({B, H}, seen.options());
  for (int64_t b = 0; b < B; ++b) {
    const Field field = tables.of(b);
    const Cloud cloud(seen.const_data_ptr<float>() + b * N * 3, facing.const_data_ptr<float>() + b * N * 3, N);
    const float tolerated = tolerance.const_data_ptr<float>()[b];
    const Limits limits{slack.const_data_ptr<float>()[b], 2.5f * tolerated};
    for (int64_t h = b * H; h < (b + 1) * H; ++h)
      explained.mutable_data_ptr<float>()[h] =
          judge(field, cloud, rotation.const_data_ptr<float>() + h * 9, shift.const_data_ptr<float>() + h * 3, limits);
  }
  return explained;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "explain(Tensor points, Tensor normals, Tensor R, Tensor t, Tensor tolerance_m, Tensor slack_m, int samples, "
      "Tensor surface, Tensor oriented, Tensor first_sample, Tensor nearest, Tensor first_cell, Tensor origin_m, "
      "Tensor cell_m, Tensor last_cell, Tensor stride) -> Tensor");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("explain", &explain); }
