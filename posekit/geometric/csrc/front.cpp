// CPU kernel of `front`: the frontmost sample in each cell of a picture.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "common.h"

namespace {

using posekit::larger;
using posekit::smaller;

constexpr int64_t kBlock = 256;      // points moved before they are drawn
constexpr int64_t kIndexBits = 20;   // low bits of a key that hold the sample; the depth is above them
constexpr int64_t kFar = int64_t{1} << 62;
constexpr float kPerMetre = 1e5f;    // depths are counted in steps of 10 micrometres
constexpr float kMostSteps = 2e9f;   // 20 km: fits an int32

struct Camera {
  float fx, skew, cx, fy, cy, cell_px;
  int64_t rows, columns;
};

// Return cell and depth of a block of points. Cells are in a picture with a rim of one cell; points outside get cell 0,
// a corner of the rim.
POSEKIT_INLINE void place(const float* __restrict x, const float* __restrict y, const float* __restrict z,
                          const float* __restrict R, const float* __restrict t, const Camera& camera,
                          int32_t* __restrict cell, int32_t* __restrict steps) {
  const float columns = static_cast<float>(camera.columns), rows = static_cast<float>(camera.rows);
  const int32_t pitch = static_cast<int32_t>(camera.columns) + 2;
  for (int64_t i = 0; i < kBlock; ++i) {
    const float x_cam = R[0] * x[i] + R[1] * y[i] + R[2] * z[i] + t[0];
    const float y_cam = R[3] * x[i] + R[4] * y[i] + R[5] * z[i] + t[1];
    const float z_cam = R[6] * x[i] + R[7] * y[i] + R[8] * z[i] + t[2];
    const float ahead = larger(z_cam, 1e-6f);
    const float u = (camera.fx * x_cam + camera.skew * y_cam) / ahead + camera.cx;
    const float v = camera.fy * y_cam / ahead + camera.cy;
    const float column = (u + 0.5f) / camera.cell_px, row = (v + 0.5f) / camera.cell_px;
    const bool inside = (z_cam > 0) & (column >= 0) & (column < columns) & (row >= 0) & (row < rows);
    const int32_t at = (static_cast<int32_t>(inside ? row : 0.0f) + 1) * pitch +
                       static_cast<int32_t>(inside ? column : 0.0f) + 1;
    cell[i] = inside ? at : 0;
    steps[i] = static_cast<int32_t>(smaller(larger(z_cam, 0.0f) * kPerMetre, kMostSteps));
  }
}

// Draw `count` points (padded to whole blocks) into `keys`, (rows + 2) x (columns + 2).
POSEKIT_CLONES void draw(const float* points, int64_t count, int64_t padded, const float* R, const float* t,
                         const Camera& camera, int64_t* keys) {
  alignas(64) int32_t cell[kBlock], steps[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const float* x = points + begin;
    place(x, x + padded, x + 2 * padded, R, t, camera, cell, steps);
    const int64_t here = std::min(kBlock, count - begin);
    for (int64_t i = 0; i < here; ++i) {
      const int64_t key = (static_cast<int64_t>(steps[i]) << kIndexBits) + begin + i;
      const int64_t before = keys[cell[i]];
      keys[cell[i]] = key < before ? key : before;
    }
  }
}

// Read depths and samples from the keys. Where three of four neighbours are in front of a cell by more than `step`,
// take theirs.
POSEKIT_CLONES void mend(const int64_t* keys, int64_t step, int64_t first, const Camera& camera, float* depth_m,
                         int64_t* sample) {
  const int64_t pitch = camera.columns + 2;
  for (int64_t row = 0; row < camera.rows; ++row) {
    const int64_t* here = keys + (row + 1) * pitch + 1;
    float* __restrict depth_here = depth_m + row * camera.columns;
    int64_t* __restrict sample_here = sample + row * camera.columns;
    for (int64_t i = 0; i < camera.columns; ++i) {
      const int64_t left = here[i - 1], right = here[i + 1], up = here[i - pitch], down = here[i + pitch];
      const int64_t low = std::max(std::min(left, right), std::min(up, down));
      const int64_t high = std::min(std::max(left, right), std::max(up, down));
      const int64_t third = std::max(low, high);
      const int64_t key = here[i] > third + step ? third : here[i];
      const bool drawn = key < kFar;
      // The depth in steps fits an int32.
      const float depth = static_cast<float>(static_cast<int32_t>(key >> kIndexBits)) * 1e-5f;
      depth_here[i] = drawn ? depth : std::numeric_limits<float>::infinity();
      sample_here[i] = (drawn ? key & ((int64_t{1} << kIndexBits) - 1) : 0) + first;
    }
  }
}

std::tuple<at::Tensor, at::Tensor> front(const at::Tensor& points, const at::Tensor& first, int64_t count,
                                         const at::Tensor& R, const at::Tensor& t, const at::Tensor& K,
                                         const at::Tensor& cell_px, const at::Tensor& cell_m, int64_t rows,
                                         int64_t columns) {
  const int64_t B = t.size(0), H = t.size(1);
  posekit::check(points, at::kFloat, {points.size(0), 6}, "points");
  posekit::check(first, at::kLong, {B}, "first");
  posekit::check(R, at::kFloat, {B, H, 3, 3}, "R");
  posekit::check(t, at::kFloat, {B, H, 3}, "t");
  posekit::check(K, at::kFloat, {B, 3, 3}, "K");
  posekit::check(cell_px, at::kFloat, {B}, "cell_px");
  posekit::check(cell_m, at::kFloat, {B}, "cell_m");
  TORCH_CHECK(0 < count && count <= int64_t{1} << kIndexBits, "count must be in 1..2^20, got ", count);
  TORCH_CHECK(0 < rows && rows < 1 << 14 && 0 < columns && columns < 1 << 14, "rows and columns must be in 1..16383");
  const at::Tensor cloud = points.contiguous(), rotation = R.contiguous(), shift = t.contiguous();
  const at::Tensor intrinsics = K.contiguous(), begins = first.contiguous();
  const at::Tensor width_px = cell_px.contiguous(), width_m = cell_m.contiguous();
  at::Tensor depth_m = at::empty({B, H, rows, columns}, cloud.options());
  at::Tensor sample = at::empty({B, H, rows, columns}, cloud.options().dtype(at::kLong));

  const int64_t padded = (count + kBlock - 1) / kBlock * kBlock, cells = rows * columns;
  std::vector<float> planar(3 * padded);
  std::vector<int64_t> keys((rows + 2) * (columns + 2));
  for (int64_t b = 0; b < B; ++b) {
    const int64_t begin = begins.const_data_ptr<int64_t>()[b];
    TORCH_CHECK(0 <= begin && begin + count <= cloud.size(0), "first and count must lie within the points");
    const float* rows_in = cloud.const_data_ptr<float>() + begin * 6;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t axis = 0; axis < 3; ++axis) planar[axis * padded + i] = rows_in[i * 6 + axis];
    const float* k = intrinsics.const_data_ptr<float>() + b * 9;
    const Camera camera{k[0], k[1], k[2], k[4], k[5], width_px.const_data_ptr<float>()[b], rows, columns};
    const int64_t step = static_cast<int64_t>(3e5f * width_m.const_data_ptr<float>()[b]) << kIndexBits;
    for (int64_t h = b * H; h < (b + 1) * H; ++h) {
      std::fill(keys.begin(), keys.end(), kFar);
      draw(planar.data(), count, padded, rotation.const_data_ptr<float>() + h * 9,
           shift.const_data_ptr<float>() + h * 3, camera, keys.data());
      mend(keys.data(), step, begin, camera, depth_m.mutable_data_ptr<float>() + h * cells,
           sample.mutable_data_ptr<int64_t>() + h * cells);
    }
  }
  return {depth_m, sample};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "front(Tensor points, Tensor first, int count, Tensor R, Tensor t, Tensor K, Tensor cell_px, Tensor cell_m, "
      "int rows, int columns) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("front", &front); }
