// CPU kernel of ball query. The definition, empty cases included, is pointnet2_ext/reference.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

namespace {

template <typename scalar_t>
void query_one(const scalar_t* points, int64_t n, const scalar_t* center, scalar_t limit, int64_t count, int64_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < count; ++i) {
    const scalar_t dx = points[3 * i] - center[0], dy = points[3 * i + 1] - center[1], dz = points[3 * i + 2] - center[2];
    if (dx * dx + dy * dy + dz * dz < limit) out[found++] = i;
  }
  if (found > 0) std::fill(out + found, out + count, out[0]);  // without a hit: the zeros that are there
}

at::Tensor ball_query_cpu(const at::Tensor& points, const at::Tensor& centers, double radius, int64_t count) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 3, "points must be (B, N, 3)");
  TORCH_CHECK(centers.dim() == 3 && centers.size(2) == 3, "centers must be (B, M, 3)");
  TORCH_CHECK(points.size(0) == centers.size(0), "points and centers must have the same batch");
  TORCH_CHECK(points.scalar_type() == centers.scalar_type(), "points and centers must have the same dtype");
  TORCH_CHECK(count >= 1, "count must be at least 1");
  const at::Tensor cloud = points.contiguous();
  const at::Tensor middles = centers.contiguous();
  const int64_t n = cloud.size(1), m = middles.size(1);
  at::Tensor indices = at::zeros({middles.size(0), m, count}, cloud.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(cloud.scalar_type(), "ball_query", [&] {
    const scalar_t r = static_cast<scalar_t>(radius);
    const scalar_t* first = cloud.const_data_ptr<scalar_t>();
    const scalar_t* middle = middles.const_data_ptr<scalar_t>();
    int64_t* out = indices.mutable_data_ptr<int64_t>();
    at::parallel_for(0, middles.size(0) * m, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        query_one(first + row / m * n * 3, n, middle + row * 3, r * r, count, out + row * count);
    });
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointnet2_ext, CPU, m) { m.impl("ball_query", &ball_query_cpu); }
