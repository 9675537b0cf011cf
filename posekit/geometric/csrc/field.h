// Find the nearest surface of observed points, a block at a time, for one pose of one object.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace posekit {

constexpr int64_t kBlock = 64;  // points looked up together
constexpr int64_t kLanes = 8;  // partial sums: their order does not depend on the instruction set
constexpr int64_t kRow = 7;     // floats of a sample: position, normal, thickness

// The tables of one object.
struct Field {
  const float* surface;  // its samples
  int32_t last_sample;
  const int32_t* nearest;  // its cells
  float origin_m[3], cells_per_metre, last_cell[3];
  int32_t stride[3];
  bool oriented;
};

// The tables of all objects of a batch, as the op receives them.
struct Tables {
  at::Tensor surface, oriented, first_sample, nearest, first_cell, origin_m, cell_m, last_cell, stride;
  int64_t samples;

  Tables(int64_t B, int64_t samples, const at::Tensor& surface, const at::Tensor& oriented,
         const at::Tensor& first_sample, const at::Tensor& nearest, const at::Tensor& first_cell,
         const at::Tensor& origin_m, const at::Tensor& cell_m, const at::Tensor& last_cell, const at::Tensor& stride)
      : surface(surface.contiguous()),
        oriented(oriented.contiguous()),
        first_sample(first_sample.contiguous()),
        nearest(nearest.contiguous()),
        first_cell(first_cell.contiguous()),
        origin_m(origin_m.contiguous()),
        cell_m(cell_m.contiguous()),
        last_cell(last_cell.contiguous()),
        stride(stride.contiguous()),
        samples(samples) {
    check(surface, at::kFloat, {surface.size(0), kRow}, "surface");
    check(oriented, at::kBool, {B}, "oriented");
    check(first_sample, at::kLong, {B}, "first_sample");
    check(nearest, at::kInt, {nearest.size(0)}, "nearest");
    check(first_cell, at::kInt, {B, 1}, "first_cell");
    check(origin_m, at::kFloat, {B, 1, 3}, "origin_m");
    check(cell_m, at::kFloat, {B}, "cell_m");
    check(last_cell, at::kInt, {B, 1, 3}, "last_cell");
    check(stride, at::kInt, {B, 1, 3}, "stride");
  }

  Field of(int64_t b) const {
    const int64_t first = first_sample.const_data_ptr<int64_t>()[b];
    int64_t cell = first_cell.const_data_ptr<int32_t>()[b];
    TORCH_CHECK(samples > 0 && first >= 0 && first + samples <= surface.size(0), "samples must lie on the surface");
    Field field{};
    field.surface = surface.const_data_ptr<float>() + first * kRow;
    field.last_sample = static_cast<int32_t>(samples - 1);
    field.nearest = nearest.const_data_ptr<int32_t>() + cell;
    field.cells_per_metre = 1.0f / cell_m.const_data_ptr<float>()[b];
    field.oriented = oriented.const_data_ptr<bool>()[b];
    TORCH_CHECK(cell >= 0, "cells must lie in the table");
    for (int64_t axis = 0; axis < 3; ++axis) {
      const int32_t last = last_cell.const_data_ptr<int32_t>()[b * 3 + axis];
      field.origin_m[axis] = origin_m.const_data_ptr<float>()[b * 3 + axis];
      field.last_cell[axis] = static_cast<float>(last);
      field.stride[axis] = stride.const_data_ptr<int32_t>()[b * 3 + axis];
      TORCH_CHECK(last >= 0 && field.stride[axis] >= 0, "a grid must have cells");
      cell += static_cast<int64_t>(last) * field.stride[axis];
    }
    TORCH_CHECK(cell < nearest.size(0), "cells must lie in the table");
    return field;
  }
};

// N oriented points (N, 3) in the camera frame, by coordinate; the last block is padded with the last point.
struct Cloud {
  int64_t count, padded;
  std::vector<float> planar;

  Cloud(const float* points, const float* normals, int64_t N)
      : count(N), padded((N + kBlock - 1) / kBlock * kBlock), planar(6 * padded) {
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t axis = 0; axis < 3; ++axis) {
        planar[axis * padded + i] = points[std::min(i, N - 1) * 3 + axis];
        planar[(axis + 3) * padded + i] = normals[std::min(i, N - 1) * 3 + axis];
      }
  }
};

// A block of points in the frame of the object, and the nearest surface.
struct Match {
  alignas(64) float x[3][kBlock];
  alignas(64) float away[3][kBlock];    // from the surface to the point
  alignas(64) float normal[3][kBlock];  // of the surface, on the point's side of a wall
  alignas(64) float facing[kBlock];     // 0..1
};

POSEKIT_INLINE void look_up(const Field& field, const Cloud& cloud, int64_t begin, const float* R, const float* t,
                            Match& match) {
  alignas(64) int32_t cell[kBlock];
  alignas(64) float turned[3][kBlock], row[kRow][kBlock];
  const float* p[6];
  for (int64_t k = 0; k < 6; ++k) p[k] = cloud.planar.data() + k * cloud.padded + begin;
  for (int64_t i = 0; i < kBlock; ++i) cell[i] = 0;
  for (int64_t axis = 0; axis < 3; ++axis) {
    const float a = R[axis], b = R[3 + axis], c = R[6 + axis];
    for (int64_t i = 0; i < kBlock; ++i) {
      const float x = a * (p[0][i] - t[0]) + b * (p[1][i] - t[1]) + c * (p[2][i] - t[2]);
      const float at = smaller(larger((x - field.origin_m[axis]) * field.cells_per_metre, 0.0f), field.last_cell[axis]);
      cell[i] += static_cast<int32_t>(at) * field.stride[axis];
      match.x[axis][i] = x;
      turned[axis][i] = a * p[3][i] + b * p[4][i] + c * p[5][i];
    }
  }
  for (int64_t i = 0; i < kBlock; ++i) cell[i] = std::clamp(field.nearest[cell[i]], 0, field.last_sample);
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t k = 0; k < kRow; ++k) row[k][i] = field.surface[cell[i] * kRow + k];
  for (int64_t i = 0; i < kBlock; ++i) {
    const float facing = turned[0][i] * row[3][i] + turned[1][i] * row[4][i] + turned[2][i] * row[5][i];
    const bool other = (facing < 0) & (row[6][i] > 0);  // the point belongs to the other side of a thin wall
    const float sign = other ? -1.0f : 1.0f, through = other ? row[6][i] : 0.0f;
    for (int64_t axis = 0; axis < 3; ++axis) {
      match.away[axis][i] = match.x[axis][i] - (row[axis][i] - through * row[3 + axis][i]);
      match.normal[axis][i] = sign * row[3 + axis][i];
    }
    const float size = facing < 0 ? -facing : facing;
    match.facing[i] = (field.oriented & !other) ? larger(facing, 0.0f) : size;
  }
}

// Add a block of numbers to sums that are kept lane by lane.
POSEKIT_INLINE void add(const float* __restrict values, float* __restrict sums) {
  for (int64_t i = 0; i < kBlock; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += values[i + lane];
}

POSEKIT_INLINE void add_products(const float* __restrict a, const float* __restrict b, float* __restrict sums) {
  for (int64_t i = 0; i < kBlock; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
}

POSEKIT_INLINE float total(const float* sums) {
  float parts[kLanes];
  std::copy(sums, sums + kLanes, parts);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  return parts[0];
}

}  // namespace posekit
