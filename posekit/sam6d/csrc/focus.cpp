// CPU kernel of `focus`: raise channels to the third power, keeping each vector's length.

#include "vector.h"

namespace {

using namespace sam6d;

SAM6D_CLONES void focus_rows(const float* x, const float* scale, int64_t channels, int64_t begin, int64_t end,
                             float* out) {
  for (int64_t row = begin; row < end; ++row) {
    const float* from = x + row * channels;
    float* to = out + row * channels;
    V length{}, sharp_length{};
    for (int64_t c = 0; c < channels; c += kLanes) {
      V y, s;
      load(y, from + c), load(s, scale + c);
      larger(y, V{});
      y = (y + 1e-6f) / s;
      const V sharp = y * y * y;
      length += y * y;
      sharp_length += sharp * sharp;
      store(to + c, sharp);
    }
    const float factor = std::sqrt(sum(length)) / std::sqrt(sum(sharp_length));
    for (int64_t c = 0; c < channels; c += kLanes) {
      V y;
      load(y, to + c);
      store(to + c, y * factor);
    }
  }
}

at::Tensor focus(const at::Tensor& x, const at::Tensor& scale) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) % kLanes == 0, "x must be (B, N, 16 n)");
  const int64_t rows = x.size(0) * x.size(1), channels = x.size(2);
  check(x, at::kFloat, x.sizes(), "x");
  check(scale, at::kFloat, {channels}, "scale");
  const at::Tensor from = x.contiguous(), by = scale.contiguous();
  at::Tensor out = at::empty(x.sizes(), from.options());
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    focus_rows(from.const_data_ptr<float>(), by.const_data_ptr<float>(), channels, begin, end, to);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sam6d, CPU, m) { m.impl("focus", &focus); }
