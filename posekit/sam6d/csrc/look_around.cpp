// CPU kernel of `look_around`: a small network for each neighbour of each point, and the largest of each channel.

#include "vector.h"

namespace {

using namespace sam6d;

constexpr int64_t kFirst = 32, kSecond = 64, kThird = 128;
constexpr int64_t kTogether = 4;             // neighbours at a time
constexpr int64_t kWide = 4;                 // vectors of outputs at a time
constexpr int64_t kOutputs = kWide * kLanes;  // 64

struct Layers {
  const float *second, *second_bias;  // (32, 64), (64)
  const float *third, *third_bias;    // (64, 128), (128)
};

// Compute 64 outputs for a few neighbours: in (neighbours, inputs), weight (inputs, stride), with ReLU.
SAM6D_INLINE void layer(const float* in, int64_t inputs, const float* weight, int64_t stride, const float* bias,
                        V (&out)[kTogether][kWide]) {
  for (int64_t w = 0; w < kWide; ++w) {
    load(out[0][w], bias + w * kLanes);
    for (int64_t n = 1; n < kTogether; ++n) out[n][w] = out[0][w];
  }
  for (int64_t i = 0; i < inputs; ++i) {
    V of[kWide];
    for (int64_t w = 0; w < kWide; ++w) load(of[w], weight + i * stride + w * kLanes);
    for (int64_t n = 0; n < kTogether; ++n)
      for (int64_t w = 0; w < kWide; ++w) out[n][w] += of[w] * in[n * inputs + i];
  }
  for (int64_t n = 0; n < kTogether; ++n)
    for (int64_t w = 0; w < kWide; ++w) larger(out[n][w], V{});
}

// index: the neighbours in ascending order; spare slots repeat the first.
SAM6D_CLONES void look_around_one(const float* there, const float* here, const int64_t* index, int64_t slots,
                                  const Layers& layers, float* out) {
  int64_t count = 1;
  while (count < slots && index[count] != index[0]) ++count;
  V most[kThird / kLanes] = {};
  alignas(64) float first[kTogether * kFirst], second[kTogether * kSecond];
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    for (int64_t n = 0; n < kTogether; ++n) {
      const float* of = there + index[begin + n < count ? begin + n : 0] * kFirst;
      for (int64_t c = 0; c < kFirst; c += kLanes) {
        V a, b;
        load(a, of + c), load(b, here + c);
        a -= b;
        larger(a, V{});
        store(first + n * kFirst + c, a);
      }
    }
    V found[kTogether][kWide];
    layer(first, kFirst, layers.second, kSecond, layers.second_bias, found);
    for (int64_t n = 0; n < kTogether; ++n)
      for (int64_t w = 0; w < kWide; ++w) store(second + n * kSecond + w * kLanes, found[n][w]);
    for (int64_t half = 0; half < kThird / kOutputs; ++half) {
      layer(second, kSecond, layers.third + half * kOutputs, kThird, layers.third_bias + half * kOutputs, found);
      for (int64_t n = 0; n < kTogether; ++n)
        for (int64_t w = 0; w < kWide; ++w) larger(most[half * kWide + w], found[n][w]);
    }
  }
  for (int64_t c = 0; c < kThird / kLanes; ++c) store(out + c * kLanes, most[c]);
}

at::Tensor look_around(const at::Tensor& there, const at::Tensor& here, const at::Tensor& index,
                       at::TensorList layers) {
  TORCH_CHECK(there.dim() == 3 && index.dim() == 3 && layers.size() == 4, "there and index must be 3-d, layers four");
  const int64_t B = there.size(0), N = there.size(1), slots = index.size(2);
  check(there, at::kFloat, {B, N, kFirst}, "there");
  check(here, at::kFloat, {B, N, kFirst}, "here");
  check(index, at::kLong, {B, N, slots}, "index");
  check(layers[0], at::kFloat, {kFirst, kSecond}, "layers[0]");
  check(layers[1], at::kFloat, {kSecond}, "layers[1]");
  check(layers[2], at::kFloat, {kSecond, kThird}, "layers[2]");
  check(layers[3], at::kFloat, {kThird}, "layers[3]");
  for (const at::Tensor& layer : layers) TORCH_CHECK(layer.is_contiguous(), "layers must be contiguous");
  TORCH_CHECK(slots > 0, "index must have at least one slot");
  const Layers weights{layers[0].const_data_ptr<float>(), layers[1].const_data_ptr<float>(),
                       layers[2].const_data_ptr<float>(), layers[3].const_data_ptr<float>()};
  const at::Tensor of_there = there.contiguous(), of_here = here.contiguous(), neighbours = index.contiguous();
  TORCH_CHECK(neighbours.numel() == 0 || (neighbours.min().item<int64_t>() >= 0 && neighbours.max().item<int64_t>() < N),
              "index must lie within the points");
  at::Tensor out = at::empty({B, N, kThird}, of_there.options());
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, B * N, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      look_around_one(of_there.const_data_ptr<float>() + i / N * N * kFirst, of_here.const_data_ptr<float>() + i * kFirst,
                      neighbours.const_data_ptr<int64_t>() + i * slots, slots, weights, to + i * kThird);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("look_around", &look_around); }
