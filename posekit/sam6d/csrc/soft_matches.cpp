// CPU kernel of `soft_matches`: both softmaxes of a matrix of logits, and the match of each scene point.
//
// The matrix has millions of entries and is read three times: computing its exponentials anew is cheaper than storing
// them.

#include "vector.h"

namespace {

using namespace sam6d;

struct Matrix {
  const float* logits;  // (rows, columns), background first in both
  int64_t rows, columns;
  float most;  // of all entries

  // Return e^(logit - most) of sixteen entries, 0 beyond the last column.
  SAM6D_INLINE void entries(int64_t row, int64_t column, V& e) const {
    const float* from = logits + row * columns + column;
    const int64_t count = columns - column;
    if (count >= kLanes) {
      load(e, from);
    } else {
      alignas(64) float lane[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) lane[i] = i < count ? from[i] : -1e30f;
      load(e, lane);
    }
    e -= most;
    exponential(e);
    if (count < kLanes)
      for (int64_t i = count; i < kLanes; ++i) e[i] = 0;
  }
};

SAM6D_CLONES float most_of(const float* values, int64_t count) {
  V found = V{} - std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    V v;
    load(v, values + i);
    larger(found, v);
  }
  float most = largest(found);
  for (; i < count; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

SAM6D_CLONES void add_up(const Matrix& m, float* of_rows, float* of_columns) {
  for (int64_t r = 0; r < m.rows; ++r) {
    V total{};
    for (int64_t c = 0; c < m.columns; c += kLanes) {
      V e, so_far;
      m.entries(r, c, e);
      total += e;
      load(so_far, of_columns + c);
      store(of_columns + c, so_far + e);
    }
    of_rows[r] = sum(total);
  }
}

// Mark columns whose likeliest partner is not the background. All entries of a column have the same divisor, which is
// left out.
SAM6D_CLONES void match_columns(const Matrix& m, const float* of_rows, float* background, float* best) {
  for (int64_t r = 0; r < m.rows; ++r) {
    const float per_row = 1.0f / of_rows[r];
    float* into = r == 0 ? background : best;
    for (int64_t c = 0; c < m.columns; c += kLanes) {
      V e, so_far;
      m.entries(r, c, e);
      load(so_far, into + c);
      larger(so_far, e * e * per_row);
      store(into + c, so_far);
    }
  }
}

struct Model {
  const float *x, *y, *z, *matched;  // by column; 0 for the background
  const float* per_column;           // 1 / sum
};

// Match one scene point: out = (x, y, z, weight, matched).
SAM6D_CLONES void match_row(const Matrix& m, int64_t row, float of_row, const Model& model, float* out) {
  V x{}, y{}, z{}, weight{}, best{}, e, by, value;
  float background = 0;
  for (int64_t c = 0; c < m.columns; c += kLanes) {
    m.entries(row, c, e);
    load(by, model.per_column + c);
    V product = e * e * by;
    if (c == 0) {
      background = product[0];
      product[0] = 0;
    }
    larger(best, product);
    load(value, model.matched + c);
    product *= value;
    weight += product;
    load(value, model.x + c), x += product * value;
    load(value, model.y + c), y += product * value;
    load(value, model.z + c), z += product * value;
  }
  const bool matched = largest(best) > background;
  const float per_row = matched ? 1.0f / of_row : 0.0f;
  const float share = sum(weight) * per_row, per_share = per_row / (share + 1e-6f);
  out[0] = sum(x) * per_share, out[1] = sum(y) * per_share, out[2] = sum(z) * per_share;
  out[3] = share, out[4] = matched;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> soft_matches(const at::Tensor& logits, const at::Tensor& model) {
  TORCH_CHECK(logits.dim() == 3 && model.dim() == 3, "logits and model must be 3-d");
  const int64_t B = logits.size(0), N = logits.size(1) - 1, M = logits.size(2) - 1;
  TORCH_CHECK(N > 0 && M > 0, "logits must be (B, 1 + N, 1 + M)");
  check(logits, at::kFloat, {B, N + 1, M + 1}, "logits");
  check(model, at::kFloat, {B, M, 3}, "model");
  const at::Tensor matrix = logits.contiguous(), known = model.contiguous();
  at::Tensor points = at::empty({B, N, 3}, matrix.options()), weight = at::empty({B, N}, matrix.options());
  at::Tensor matched = at::empty({B, N}, matrix.options());
  const int64_t padded = (M + kLanes) / kLanes * kLanes;
  float *to_points = points.mutable_data_ptr<float>(), *to_weight = weight.mutable_data_ptr<float>();
  float* to_matched = matched.mutable_data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const float* of_batch = matrix.const_data_ptr<float>() + b * (N + 1) * (M + 1);
      const Matrix m{of_batch, N + 1, M + 1, most_of(of_batch, (N + 1) * (M + 1))};
      std::vector<float> rows(N + 1), columns(padded), background(padded), best(padded), axes(4 * padded);
      add_up(m, rows.data(), columns.data());
      match_columns(m, rows.data(), background.data(), best.data());
      for (int64_t c = 0; c < padded; ++c) columns[c] = columns[c] > 0 ? 1.0f / columns[c] : 0.0f;
      for (int64_t j = 0; j < M; ++j) {
        for (int axis = 0; axis < 3; ++axis) axes[axis * padded + j + 1] = known.const_data_ptr<float>()[(b * M + j) * 3 + axis];
        axes[3 * padded + j + 1] = best[j + 1] > background[j + 1];
      }
      const Model of_model{&axes[0], &axes[padded], &axes[2 * padded], &axes[3 * padded], columns.data()};
      for (int64_t i = 0; i < N; ++i) {
        float out[5];
        match_row(m, i + 1, rows[i + 1], of_model, out);
        for (int axis = 0; axis < 3; ++axis) to_points[(b * N + i) * 3 + axis] = out[axis];
        to_weight[b * N + i] = out[3], to_matched[b * N + i] = out[4];
      }
    }
  });
  return {points, weight, matched};
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("soft_matches", &soft_matches); }
