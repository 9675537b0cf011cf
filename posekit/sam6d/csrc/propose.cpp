// CPU kernel of `propose`: the rigid motion of three points onto three others, in closed form.

#include "vector.h"

namespace {

using namespace sam6d;

constexpr float kNowhere = 1e6f;

struct Point {
  float x, y, z;
  Point operator-(const Point& o) const { return {x - o.x, y - o.y, z - o.z}; }
  Point operator+(const Point& o) const { return {x + o.x, y + o.y, z + o.z}; }
  Point operator*(float s) const { return {x * s, y * s, z * s}; }
};

float dot(const Point& a, const Point& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
Point cross(const Point& a, const Point& b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
float length(const Point& a) { return std::sqrt(dot(a, a)); }

// The frame of three points: two axes in their plane, and one across, on the side from which they turn to the left. Two
// triangles in such frames turn the same way, so only a rotation within the plane remains to be found.
struct Plane {
  Point u, v, n;
  bool line;  // the points lie on a line, or are all one
};

Plane plane_of(const Point* p) {
  const Point sides[3] = {p[1] - p[0], p[2] - p[1], p[0] - p[2]};
  int longest = 0;
  for (int i = 1; i < 3; ++i)
    if (dot(sides[i], sides[i]) > dot(sides[longest], sides[longest])) longest = i;
  const float reach = length(sides[longest]);
  const Point u = reach > 0 ? sides[longest] * (1 / reach) : Point{1, 0, 0};
  Point n = cross(u, sides[(longest + 1) % 3]);
  const bool line = !(length(n) > 1e-6f * reach);
  if (line) {  // any plane through the line
    const Point least = std::fabs(u.x) < 0.6f ? Point{1, 0, 0} : Point{0, 1, 0};
    n = cross(u, least);
  }
  n = n * (1 / length(n));
  return {u, cross(n, u), n, line};
}

// Return the motion of `from` onto `to` with the least squared distance. The middles carry the weights of the original,
// which sum to a little less than one.
void align(const Point* from, const Point* to, float* R, float* t, float& residual) {
  const float weight = 1.0f / (3.0f + 1e-5f);
  const Point from_middle = (from[0] + from[1] + from[2]) * weight, to_middle = (to[0] + to[1] + to[2]) * weight;
  const Plane a = plane_of(from), b = plane_of(to);
  float uu = 0, uv = 0, vu = 0, vv = 0;
  for (int i = 0; i < 3; ++i) {
    const Point f = from[i] - from_middle, g = to[i] - to_middle;
    const float fu = dot(f, a.u), fv = dot(f, a.v), gu = dot(g, b.u), gv = dot(g, b.v);
    uu += gu * fu, uv += gu * fv, vu += gv * fu, vv += gv * fv;
  }
  const float c = uu + vv, s = vu - uv, size = std::sqrt(c * c + s * s);
  const float cosine = size > 0 ? c / size : 1, sine = size > 0 ? s / size : 0;
  const Point to_u = b.u * cosine + b.v * sine, to_v = b.v * cosine - b.u * sine;
  const auto put = [&](int row, float ux, float vx, float nx) {
    R[3 * row] = ux * a.u.x + vx * a.v.x + nx * a.n.x;
    R[3 * row + 1] = ux * a.u.y + vx * a.v.y + nx * a.n.y;
    R[3 * row + 2] = ux * a.u.z + vx * a.v.z + nx * a.n.z;
  };
  put(0, to_u.x, to_v.x, b.n.x), put(1, to_u.y, to_v.y, b.n.y), put(2, to_u.z, to_v.z, b.n.z);
  const auto turned = [&](const Point& p) {
    return Point{R[0] * p.x + R[1] * p.y + R[2] * p.z, R[3] * p.x + R[4] * p.y + R[5] * p.z,
                 R[6] * p.x + R[7] * p.y + R[8] * p.z};
  };
  const Point shift = to_middle - turned(from_middle);
  t[0] = shift.x, t[1] = shift.y, t[2] = shift.z;
  residual = 0;
  for (int i = 0; i < 3; ++i) residual += length(to[i] - (turned(from[i]) + shift)) / 3;
  // Points on one line leave the rotation about it undetermined. They fit well and so keep their place among the best,
  // as in the original. There their rotation is chance and never won; here their t is out of reach.
  if (a.line || b.line) t[0] = t[1] = t[2] = kNowhere;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> propose(const at::Tensor& pairs, const at::Tensor& scene,
                                                       const at::Tensor& model) {
  TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) % 3 == 0, "pairs must be (B, 3 H)");
  TORCH_CHECK(scene.dim() == 3 && model.dim() == 3, "scene and model must be (B, N, 3)");
  const int64_t B = pairs.size(0), H = pairs.size(1) / 3, N = scene.size(1), M = model.size(1);
  check(pairs, at::kLong, {B, 3 * H}, "pairs");
  check(scene, at::kFloat, {B, N, 3}, "scene");
  check(model, at::kFloat, {B, M, 3}, "model");
  const at::Tensor chosen = pairs.contiguous(), seen = scene.contiguous(), known = model.contiguous();
  TORCH_CHECK(chosen.numel() == 0 || (chosen.min().item<int64_t>() >= 0 && chosen.max().item<int64_t>() < N * M),
              "pairs must lie within N x M");
  at::Tensor R = at::empty({B, H, 3, 3}, seen.options()), t = at::empty({B, H, 3}, seen.options());
  at::Tensor residual = at::empty({B, H}, seen.options());
  float *to_R = R.mutable_data_ptr<float>(), *to_t = t.mutable_data_ptr<float>();
  float* to_residual = residual.mutable_data_ptr<float>();
  at::parallel_for(0, B * H, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* of_scene = seen.const_data_ptr<float>() + i / H * N * 3;
      const float* of_model = known.const_data_ptr<float>() + i / H * M * 3;
      const int64_t* pair = chosen.const_data_ptr<int64_t>() + 3 * i;
      Point from[3], to[3];
      for (int k = 0; k < 3; ++k) {
        const float *p = of_scene + pair[k] / M * 3, *q = of_model + pair[k] % M * 3;
        to[k] = {p[0], p[1], p[2]}, from[k] = {q[0], q[1], q[2]};
      }
      align(from, to, to_R + 9 * i, to_t + 3 * i, to_residual[i]);
    }
  });
  return {R, t, residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("propose", &propose); }
