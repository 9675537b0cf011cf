// CPU kernel of `colour_cost`: colours of drawn poses, each under the light that explains it best.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "common.h"
#include "solve.h"

namespace {

using namespace posekit;

constexpr int64_t kLanes = 16;  // partial sums side by side: the same bits on every processor
constexpr int64_t kBasis = 4;   // of light: ambient, and from three sides
constexpr int64_t kSums = 14;  // products of the weighted basis with itself (10) and with the gain (4)
constexpr double kRidge[kBasis] = {1e-3, 0.05, 0.05, 0.05};


// The cells of a pose that count, in arrays padded to whole lanes.
struct Cells {
  std::vector<int64_t> place;
  std::vector<float> x, y, z;   // normal, camera frame
  std::vector<float> strength;  // of the albedo
  std::vector<float> gain;      // brightness of the cell, as a multiple of its albedo
  std::vector<float> weight, ratio, hue;
  int64_t count = 0, padded = 0;

  explicit Cells(int64_t most) : place(most) {
    for (auto* values : {&x, &y, &z, &strength, &gain, &weight, &ratio, &hue}) values->resize(most + kLanes);
  }

  // The padding of the last lanes has weight 0.
  void pad() {
    padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = count; i < padded; ++i) {
      for (auto* values : {&x, &y, &z, &strength, &weight, &hue}) (*values)[i] = 0;
      gain[i] = 1;
    }
  }
};

POSEKIT_CLONES void add_up(const float* __restrict weight, const float* __restrict x, const float* __restrict y,
                           const float* __restrict z, const float* __restrict gain, int64_t padded,
                           float* __restrict sums) {
  alignas(64) float lanes[kSums][kLanes] = {};
  for (int64_t begin = 0; begin < padded; begin += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = begin + lane;
      const float w = weight[i], wx = w * x[i], wy = w * y[i], wz = w * z[i];
      lanes[0][lane] += w;
      lanes[1][lane] += wx;
      lanes[2][lane] += wy;
      lanes[3][lane] += wz;
      lanes[4][lane] += wx * x[i];
      lanes[5][lane] += wx * y[i];
      lanes[6][lane] += wx * z[i];
      lanes[7][lane] += wy * y[i];
      lanes[8][lane] += wy * z[i];
      lanes[9][lane] += wz * z[i];
      lanes[10][lane] += w * gain[i];
      lanes[11][lane] += wx * gain[i];
      lanes[12][lane] += wy * gain[i];
      lanes[13][lane] += wz * gain[i];
    }
  }
  for (int64_t k = 0; k < kSums; ++k) {
    sums[k] = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[k] += lanes[k][lane];
  }
}

// Fit the light that explains the weighted cells best.
void fit(const float* sums, float (&light)[kBasis]) {
  const double scale = larger(sums[0], 1e-3f);
  const int64_t at[kBasis][kBasis] = {{0, 1, 2, 3}, {1, 4, 5, 6}, {2, 5, 7, 8}, {3, 6, 8, 9}};
  double matrix[kBasis][kBasis], right[kBasis];
  for (int64_t i = 0; i < kBasis; ++i) {
    for (int64_t j = 0; j < kBasis; ++j) matrix[i][j] = sums[at[i][j]] / scale + (i == j ? kRidge[i] : 0);
    right[i] = sums[10 + i] / scale;
  }
  solve(matrix, right);
  for (int64_t i = 0; i < kBasis; ++i) light[i] = static_cast<float>(right[i]);
}

// Compare the brightness of cells with the fitted light; outliers get weight 0 from then on.
POSEKIT_CLONES void shade(const float* __restrict x, const float* __restrict y, const float* __restrict z,
                          const float* __restrict gain, const float* __restrict strength,
                          const float (&light)[kBasis], float least, float most, int64_t padded,
                          float* __restrict ratio, float* __restrict weight) {
  for (int64_t i = 0; i < padded; ++i) {
    const float shade = larger(light[0] + light[1] * x[i] + light[2] * y[i] + light[3] * z[i], 0.05f);
    ratio[i] = larger(gain[i], 0.02f) / shade;
    weight[i] = (ratio[i] > least) & (ratio[i] < most) ? strength[i] : 0.0f;
  }
}

at::Tensor colour_cost(const at::Tensor& dense, const at::Tensor& colours, const at::Tensor& grey, const at::Tensor& R,
                       const at::Tensor& sample, const at::Tensor& seen, const at::Tensor& rays, const at::Tensor& use,
                       double colour_spread, double brightness_spread, double wrong_colour, double wrong_brightness) {
  TORCH_CHECK(use.dim() == 4, "use must be (B, H, rows, columns)");
  const int64_t B = use.size(0), H = use.size(1), rows = use.size(2), columns = use.size(3), D = dense.size(0);
  check(dense, at::kFloat, {D, 6}, "dense");
  check(colours, at::kByte, {D, 3}, "colours");
  check(grey, at::kBool, {B}, "grey");
  check(R, at::kFloat, {B, H, 3, 3}, "R");
  check(sample, at::kLong, {B, H, rows, columns}, "sample");
  check(seen, at::kFloat, {B, rows, columns, 3}, "seen");
  check(rays, at::kFloat, {B, rows, columns, 3}, "rays");
  check(use, at::kBool, {B, H, rows, columns}, "use");
  const at::Tensor cloud = dense.contiguous(), painted = colours.contiguous(), rotations = R.contiguous();
  const at::Tensor samples = sample.contiguous(), picture = seen.contiguous(), towards = rays.contiguous();
  const at::Tensor counted = use.contiguous(), colourless = grey.contiguous();
  at::Tensor cost = at::zeros({B, H, rows, columns}, picture.options());
  const float least = std::exp(-3 * static_cast<float>(brightness_spread)), most = 1 / least;
  const float hue_scale = static_cast<float>(colour_spread * colour_spread);
  const float per_spread = static_cast<float>(1 / brightness_spread);
  const float worst_hue = static_cast<float>(wrong_colour), worst_shade = static_cast<float>(wrong_brightness);
  const int64_t all = rows * columns;
  Cells cells(all);
  for (int64_t pose = 0; pose < B * H; ++pose) {
    const int64_t b = pose / H;
    const bool* wanted = counted.const_data_ptr<bool>() + pose * all;
    const int64_t* shown = samples.const_data_ptr<int64_t>() + pose * all;
    const float* r = rotations.const_data_ptr<float>() + pose * 9;
    const bool plain = colourless.const_data_ptr<bool>()[b];
    cells.count = 0;
    for (int64_t cell = 0; cell < all; ++cell) {
      if (!wanted[cell]) continue;
      const int64_t index = shown[cell], i = cells.count++;
      TORCH_CHECK(0 <= index && index < D, "sample must lie within the dense ones");
      const float* n = cloud.const_data_ptr<float>() + index * 6 + 3;
      const uint8_t* paint = painted.const_data_ptr<uint8_t>() + index * 3;
      const float* pixel = picture.const_data_ptr<float>() + (b * all + cell) * 3;
      const float* ray = towards.const_data_ptr<float>() + (b * all + cell) * 3;
      const float x = r[0] * n[0] + r[1] * n[1] + r[2] * n[2];
      const float y = r[3] * n[0] + r[4] * n[1] + r[5] * n[2];
      const float z = r[6] * n[0] + r[7] * n[1] + r[8] * n[2];
      const float side = x * ray[0] + y * ray[1] + z * ray[2] > 0 ? -1.0f : 1.0f;  // towards the camera
      float red = paint[0] / 255.0f, green = paint[1] / 255.0f, blue = paint[2] / 255.0f;
      if (plain) red = green = blue = (red + green + blue) / 3.0f;
      const float strength = larger(red * red + green * green + blue * blue, 1e-3f);
      const float gain = (red * pixel[0] + green * pixel[1] + blue * pixel[2]) / strength;
      const float off_red = pixel[0] - gain * red, off_green = pixel[1] - gain * green;
      const float off_blue = pixel[2] - gain * blue;
      const float off = off_red * off_red + off_green * off_green + off_blue * off_blue;
      const float bright = pixel[0] * pixel[0] + pixel[1] * pixel[1] + pixel[2] * pixel[2];
      cells.place[i] = cell;
      cells.x[i] = side * x, cells.y[i] = side * y, cells.z[i] = side * z;
      cells.strength[i] = cells.weight[i] = strength;
      cells.gain[i] = gain;
      cells.hue[i] = smaller(off / (hue_scale * (0.4f + bright)) / 2.0f, worst_hue);
    }
    if (cells.count == 0) continue;
    cells.pad();
    for (int64_t round = 0; round < 2; ++round) {
      float sums[kSums], light[kBasis];
      const float *x = cells.x.data(), *y = cells.y.data(), *z = cells.z.data(), *gain = cells.gain.data();
      add_up(cells.weight.data(), x, y, z, gain, cells.padded, sums);
      fit(sums, light);
      shade(x, y, z, gain, cells.strength.data(), light, least, most, cells.padded, cells.ratio.data(),
            cells.weight.data());
    }
    float* out = cost.mutable_data_ptr<float>() + pose * all;
    for (int64_t i = 0; i < cells.count; ++i) {
      const float off = std::log(cells.ratio[i]) * per_spread;
      out[cells.place[i]] =
          cells.hue[i] + smaller(off * off / 2.0f, worst_shade) * smaller(cells.strength[i] * 4.0f, 1.0f);
    }
  }
  return cost;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posekit, m) {
  m.def(
      "colour_cost(Tensor dense, Tensor colours, Tensor grey, Tensor R, Tensor sample, Tensor seen, Tensor rays, "
      "Tensor use, float colour_spread, float brightness_spread, float wrong_colour, float wrong_brightness) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(posekit, CPU, m) { m.impl("colour_cost", &colour_cost); }
