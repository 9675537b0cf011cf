// CPU kernel of `surface_distance`: the distance of placed points from the nearest point of the model.

#include "vector.h"

#include <algorithm>

namespace {

using namespace sam6d;

constexpr int64_t kTogether = 4;  // points at a time

// A surface, by coordinate, padded with points that are never the nearest.
struct Surface {
  std::vector<float> x, y, z;
  int64_t count;

  explicit Surface(const float* points, int64_t n) : count((n + kLanes - 1) / kLanes * kLanes) {
    for (auto* axis : {&x, &y, &z}) axis->assign(count, 1e18f);
    for (int64_t i = 0; i < n; ++i) x[i] = points[3 * i], y[i] = points[3 * i + 1], z[i] = points[3 * i + 2];
  }
};

SAM6D_CLONES void nearest(const Surface& surface, const float (&points)[kTogether][3], float* found) {
  V least[kTogether];
  for (int64_t p = 0; p < kTogether; ++p) least[p] = V{} + std::numeric_limits<float>::infinity();
  for (int64_t s = 0; s < surface.count; s += kLanes) {
    V x, y, z;
    load(x, &surface.x[s]), load(y, &surface.y[s]), load(z, &surface.z[s]);
    for (int64_t p = 0; p < kTogether; ++p) {
      const V dx = x - points[p][0], dy = y - points[p][1], dz = z - points[p][2];
      smaller(least[p], dx * dx + dy * dy + dz * dz);
    }
  }
  for (int64_t p = 0; p < kTogether; ++p) found[p] = std::sqrt(smallest(least[p]));
}

// One pose: scene (N, 3); wanted: flags of the points to compute; out (N), 0 for the others.
void distances(const Surface& surface, const float* scene, const float* R, const float* t,
               const std::vector<int64_t>& wanted, int64_t count, float* out) {
  std::fill(out, out + count, 0.0f);
  for (size_t first = 0; first < wanted.size(); first += kTogether) {
    float placed[kTogether][3], found[kTogether];
    for (size_t p = 0; p < kTogether; ++p) {
      const float* from = scene + 3 * wanted[first + p < wanted.size() ? first + p : first];
      const float x = from[0] - t[0], y = from[1] - t[1], z = from[2] - t[2];
      for (int axis = 0; axis < 3; ++axis) placed[p][axis] = x * R[axis] + y * R[3 + axis] + z * R[6 + axis];
    }
    nearest(surface, placed, found);
    for (size_t p = 0; p < kTogether && first + p < wanted.size(); ++p) out[wanted[first + p]] = found[p];
  }
}

at::Tensor surface_distance(const at::Tensor& scene, const at::Tensor& R, const at::Tensor& t,
                            const at::Tensor& surface, const at::Tensor& wanted) {
  TORCH_CHECK(scene.dim() == 3 && t.dim() == 3 && surface.dim() == 3, "scene, t and surface must be 3-d");
  const int64_t B = scene.size(0), N = scene.size(1), H = t.size(1), S = surface.size(1);
  check(scene, at::kFloat, {B, N, 3}, "scene");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(t, at::kFloat, {B, H, 3}, "t");
  check(surface, at::kFloat, {B, S, 3}, "surface");
  check(wanted, at::kFloat, {B, N}, "wanted");
  TORCH_CHECK(S > 0, "surface must hold at least 1 point");
  const at::Tensor points = scene.contiguous(), turns = R.contiguous(), shifts = t.contiguous();
  const at::Tensor of_model = surface.contiguous(), asked = wanted.contiguous();
  at::Tensor out = at::empty({B, H, N}, points.options());
  float* to = out.mutable_data_ptr<float>();
  for (int64_t b = 0; b < B; ++b) {
    const Surface known(of_model.const_data_ptr<float>() + b * S * 3, S);
    std::vector<int64_t> which;
    for (int64_t i = 0; i < N; ++i)
      if (asked.const_data_ptr<float>()[b * N + i] > 0) which.push_back(i);
    at::parallel_for(0, H, 8, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        distances(known, points.const_data_ptr<float>() + b * N * 3, turns.const_data_ptr<float>() + (b * H + h) * 9,
                  shifts.const_data_ptr<float>() + (b * H + h) * 3, which, N, to + (b * H + h) * N);
    });
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("surface_distance", &surface_distance); }
