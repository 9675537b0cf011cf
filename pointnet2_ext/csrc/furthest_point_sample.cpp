// CPU kernel of furthest-point sampling. The definition, ties included, is pointnet2_ext/reference.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <vector>

namespace {

template <typename scalar_t>
void sample_one(const scalar_t* points, int64_t n, int64_t count, int64_t* picked) {
  std::vector<scalar_t> nearest(n, std::numeric_limits<scalar_t>::infinity());  // squared, to the picked points
  int64_t last = 0;
  for (int64_t step = 1; step < count; ++step) {
    const scalar_t lx = points[3 * last], ly = points[3 * last + 1], lz = points[3 * last + 2];
    int64_t furthest = 0;
    scalar_t longest = -1;
    for (int64_t i = 0; i < n; ++i) {
      const scalar_t dx = points[3 * i] - lx, dy = points[3 * i + 1] - ly, dz = points[3 * i + 2] - lz;
      const scalar_t d2 = dx * dx + dy * dy + dz * dz;
      if (d2 < nearest[i]) nearest[i] = d2;
      if (nearest[i] > longest) {  // strictly: the lowest index wins a tie
        longest = nearest[i];
        furthest = i;
      }
    }
    picked[step] = last = furthest;
  }
}

at::Tensor furthest_point_sample_cpu(const at::Tensor& points, int64_t count) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 3, "points must be (B, N, 3)");
  TORCH_CHECK(1 <= count && count <= points.size(1), "count must be between 1 and the number of points");
  const at::Tensor cloud = points.contiguous();
  const int64_t n = cloud.size(1);
  at::Tensor picked = at::zeros({cloud.size(0), count}, cloud.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(cloud.scalar_type(), "furthest_point_sample", [&] {
    const scalar_t* first = cloud.const_data_ptr<scalar_t>();
    int64_t* out = picked.mutable_data_ptr<int64_t>();
    at::parallel_for(0, cloud.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) sample_one(first + b * n * 3, n, count, out + b * count);
    });
  });
  return picked;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointnet2_ext, CPU, m) { m.impl("furthest_point_sample", &furthest_point_sample_cpu); }
