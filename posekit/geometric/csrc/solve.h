// Small systems of linear equations.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "common.h"

namespace posekit {

// Solve matrix * x = right by Gauss with pivots. Both are overwritten; `right` becomes x. A singular matrix gives NaN
// or infinity.
template <int64_t N>
POSEKIT_INLINE void solve(double (&matrix)[N][N], double (&right)[N]) {
  for (int64_t i = 0; i < N; ++i) {
    int64_t pivot = i;
    for (int64_t row = i + 1; row < N; ++row)
      if (std::abs(matrix[row][i]) > std::abs(matrix[pivot][i])) pivot = row;
    if (pivot != i) {
      for (int64_t column = i; column < N; ++column) std::swap(matrix[i][column], matrix[pivot][column]);
      std::swap(right[i], right[pivot]);
    }
    const double back = 1.0 / matrix[i][i];
    for (int64_t row = i + 1; row < N; ++row) {
      const double share = matrix[row][i] * back;
      for (int64_t column = i + 1; column < N; ++column) matrix[row][column] -= share * matrix[i][column];
      right[row] -= share * right[i];
    }
  }
  for (int64_t i = N - 1; i >= 0; --i) {
    for (int64_t column = i + 1; column < N; ++column) right[i] -= matrix[i][column] * right[column];
    right[i] /= matrix[i][i];
  }
}

}  // namespace posekit
