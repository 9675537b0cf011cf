// CPU kernel of `relative_attention`: self-attention with each pair's structure, in one pass over the structure.

#include "vector.h"

namespace {

using namespace sam6d;

constexpr int64_t kHeads = 4, kChannels = 256, kParts = kChannels / kLanes, kPartsOfHead = kParts / kHeads;
constexpr int64_t kTogether = 4;  // pairs at a time

struct Row {
  const float *q, *folded;        // (C), (heads, C)
  const float *k, *v;             // (N, C)
  const int16_t* structure;       // (N, C)
  int64_t count;
};

template <int64_t count>
SAM6D_INLINE void score(const Row& row, int64_t first, float* scores) {
  V found[kHeads][count] = {};
  for (int64_t c = 0; c < kParts; ++c) {
    V pair[count], of_head;
    for (int64_t j = 0; j < count; ++j) load(pair[j], row.structure + (first + j) * kChannels + c * kLanes);
#pragma GCC unroll 4
    for (int64_t h = 0; h < kHeads; ++h) {
      load(of_head, row.folded + h * kChannels + c * kLanes);
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) found[h][j] += of_head * pair[j];
    }
  }
#pragma GCC unroll 4
  for (int64_t h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int64_t c = h * kPartsOfHead; c < (h + 1) * kPartsOfHead; ++c) {
      V q, key;
      load(q, row.q + c * kLanes);
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) {
        load(key, row.k + (first + j) * kChannels + c * kLanes);
        found[h][j] += q * key;
      }
    }
  for (int64_t h = 0; h < kHeads; ++h)
    for (int64_t j = 0; j < count; ++j) scores[h * row.count + first + j] = sum(found[h][j]);
}

SAM6D_CLONES void attend(const Row& row, float* scores, float* out) {
  int64_t first = 0;
  for (; first + kTogether <= row.count; first += kTogether) score<kTogether>(row, first, scores);
  for (; first < row.count; ++first) score<1>(row, first, scores);
  const float per_root = 1.0f / std::sqrt(static_cast<float>(kChannels / kHeads));
  for (int64_t h = 0; h < kHeads; ++h) {
    float* of_head = scores + h * row.count;
    float most = of_head[0], total = 0;
    for (int64_t j = 1; j < row.count; ++j) most = of_head[j] > most ? of_head[j] : most;
    for (int64_t j = 0; j < row.count; j += kLanes) {
      alignas(64) float lane[kLanes];
      const int64_t count = row.count - j < kLanes ? row.count - j : kLanes;
      for (int64_t i = 0; i < kLanes; ++i) lane[i] = i < count ? (of_head[j + i] - most) * per_root : 0;
      V x;
      load(x, lane);
      exponential(x);
      for (int64_t i = 0; i < count; ++i) total += of_head[j + i] = x[i];
    }
    for (int64_t j = 0; j < row.count; ++j) of_head[j] /= total;
  }
  V seen[kParts] = {};
  for (int64_t j = 0; j < row.count; ++j)
#pragma GCC unroll 16
    for (int64_t c = 0; c < kParts; ++c) {
      V value;
      load(value, row.v + j * kChannels + c * kLanes);
      seen[c] += value * scores[c / kPartsOfHead * row.count + j];
    }
  for (int64_t c = 0; c < kParts; ++c) store(out + c * kLanes, seen[c]);
}

at::Tensor relative_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& folded,
                              const at::Tensor& structure) {
  TORCH_CHECK(q.dim() == 3 && q.size(2) == kChannels, "q must be (B, N, 256)");
  const int64_t B = q.size(0), N = q.size(1);
  check(q, at::kFloat, {B, N, kChannels}, "q");
  check(k, at::kFloat, {B, N, kChannels}, "k");
  check(v, at::kFloat, {B, N, kChannels}, "v");
  check(folded, at::kFloat, {B, N, kHeads, kChannels}, "folded");
  check(structure, at::kShort, {B, N, N, kChannels}, "structure");
  const at::Tensor queries = q.contiguous(), keys = k.contiguous(), values = v.contiguous();
  const at::Tensor of_pairs = folded.contiguous(), pairs = structure.contiguous();
  at::Tensor out = at::empty({B, N, kChannels}, queries.options());
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, B * N, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(kHeads * N);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t of_batch = i / N * N * kChannels;
      const Row row{queries.const_data_ptr<float>() + i * kChannels,
                    of_pairs.const_data_ptr<float>() + i * kHeads * kChannels,
                    keys.const_data_ptr<float>() + of_batch,
                    values.const_data_ptr<float>() + of_batch,
                    pairs.const_data_ptr<int16_t>() + i * N * kChannels,
                    N};
      attend(row, scores.data(), to + i * kChannels);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("relative_attention", &relative_attention); }
