// CPU kernel of `embed`: embeddings of pairs of points, read from tables and written in 16 bits.

#include "vector.h"

namespace {

using namespace sam6d;

struct Table {
  const float* rows;
  int64_t count, channels;
  float steps;  // rows per unit

  // Return the place between two rows: a pointer to the lower one, and the fraction to the next.
  SAM6D_INLINE const float* find(float x, float& part) const {
    const float place = x * steps;
    int64_t row = static_cast<int64_t>(place);
    row = row < 0 ? 0 : (row > count - 2 ? count - 2 : row);
    part = place - static_cast<float>(row);
    return rows + row * channels;
  }
};

SAM6D_CLONES void embed_pairs(const float* distance, const float* angle, int64_t neighbours, const Table& distances,
                              const Table& angles, int64_t begin, int64_t end, float per_step, int16_t* out) {
  const int64_t channels = distances.channels;
  for (int64_t pair = begin; pair < end; ++pair) {
    float part;
    const float* row = distances.find(distance[pair], part);
    float parts[8];
    const float* rows[8];
    for (int64_t n = 0; n < neighbours; ++n) rows[n] = angles.find(angle[pair * neighbours + n], parts[n]);
    int16_t* to = out + pair * channels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      V most = V{} - std::numeric_limits<float>::infinity(), a, b;
      for (int64_t n = 0; n < neighbours; ++n) {
        load(a, rows[n] + c), load(b, rows[n] + channels + c);
        larger(most, a + (b - a) * parts[n]);
      }
      load(a, row + c), load(b, row + channels + c);
      store(to + c, (most + (a + (b - a) * part)) * per_step);
    }
  }
}

at::Tensor embed(const at::Tensor& distance, const at::Tensor& angle, const at::Tensor& distances,
                 const at::Tensor& angles, double steps, double step) {
  TORCH_CHECK(distance.dim() == 3 && angle.dim() == 4, "distance must be (B, N, N), angle (B, N, N, k)");
  const int64_t B = distance.size(0), N = distance.size(1), k = angle.size(3), C = distances.size(1);
  TORCH_CHECK(1 <= k && k <= 8, "angle must have 1 to 8 neighbours, got ", k);
  TORCH_CHECK(C % kLanes == 0 && distances.size(0) > 1 && angles.size(0) > 1, "tables must be (2 or more, 16 n)");
  check(distance, at::kFloat, {B, N, N}, "distance");
  check(angle, at::kFloat, {B, N, N, k}, "angle");
  check(distances, at::kFloat, {distances.size(0), C}, "distances");
  check(angles, at::kFloat, {angles.size(0), C}, "angles");
  const at::Tensor d = distance.contiguous(), a = angle.contiguous();
  const at::Tensor of_d = distances.contiguous(), of_a = angles.contiguous();
  const Table near{of_d.const_data_ptr<float>(), of_d.size(0), C, static_cast<float>(steps)};
  const Table turned{of_a.const_data_ptr<float>(), of_a.size(0), C, static_cast<float>(steps)};
  at::Tensor out = at::empty({B, N, N, C}, d.options().dtype(at::kShort));
  int16_t* to = out.mutable_data_ptr<int16_t>();
  at::parallel_for(0, B * N * N, 2048, [&](int64_t begin, int64_t end) {
    embed_pairs(d.const_data_ptr<float>(), a.const_data_ptr<float>(), k, near, turned, begin, end,
                static_cast<float>(1 / step), to);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("embed", &embed); }
