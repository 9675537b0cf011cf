// CPU kernel of ball query. The definition, empty cases included, is pointnet2_ext/reference.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "clones.h"

namespace {

// Points compared with a center at a time; in the end all points are. A grid would compare fewer, but must sort its
// hits by index: at 2048 points it saved nothing.
constexpr int64_t kPage = 128;
constexpr int64_t kComparisons = 1 << 18;  // comparisons that are worth a thread of their own

static_assert(std::endian::native == std::endian::little, "the first of eight bytes is a word's lowest");

// x, y, z: n coordinates each, n a multiple of kPage. out: count indices, initially 0; left 0 without a hit.
template <typename scalar_t>
POINTNET2_CLONES void query_one(const scalar_t* x, const scalar_t* y, const scalar_t* z, int64_t n,
                                const scalar_t* center, scalar_t limit, int64_t count, int64_t* out) {
  const scalar_t cx = center[0], cy = center[1], cz = center[2];
  uint8_t hit[kPage];
  int64_t found = 0;
  for (int64_t page = 0; page < n && found < count; page += kPage) {
    for (int64_t i = 0; i < kPage; ++i) {
      const scalar_t dx = x[page + i] - cx, dy = y[page + i] - cy, dz = z[page + i] - cz;
      hit[i] = dx * dx + dy * dy + dz * dz < limit;
    }
    for (int64_t i = 0; i < kPage; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, hit + i, 8);
      for (; eight != 0 && found < count; eight &= eight - 1) out[found++] = page + i + std::countr_zero(eight) / 8;
    }
  }
  if (found > 0) std::fill(out + found, out + count, out[0]);
}

at::Tensor ball_query_cpu(const at::Tensor& points, const at::Tensor& centers, double radius, int64_t count) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 3, "points must be (B, N, 3)");
  TORCH_CHECK(centers.dim() == 3 && centers.size(2) == 3, "centers must be (B, M, 3)");
  TORCH_CHECK(points.size(0) == centers.size(0), "points and centers must have the same batch");
  TORCH_CHECK(points.scalar_type() == centers.scalar_type(), "points and centers must have the same dtype");
  TORCH_CHECK(count >= 1, "count must be at least 1");
  const int64_t batch = points.size(0), n = points.size(1), m = centers.size(1);
  const int64_t padded = (n + kPage - 1) / kPage * kPage;
  // By axis, and padded with points that hit nothing.
  at::Tensor cloud = at::full({batch, 3, padded}, std::numeric_limits<double>::quiet_NaN(), points.options());
  cloud.narrow(2, 0, n).copy_(points.transpose(1, 2));
  const at::Tensor middles = centers.contiguous();
  at::Tensor indices = at::zeros({batch, m, count}, points.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(cloud.scalar_type(), "ball_query", [&] {
    const scalar_t r = static_cast<scalar_t>(radius);
    const scalar_t* first = cloud.const_data_ptr<scalar_t>();
    const scalar_t* middle = middles.const_data_ptr<scalar_t>();
    int64_t* out = indices.mutable_data_ptr<int64_t>();
    at::parallel_for(0, batch * m, kComparisons / (padded + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* x = first + row / m * 3 * padded;
        query_one(x, x + padded, x + 2 * padded, padded, middle + row * 3, r * r, count, out + row * count);
      }
    });
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointnet2_ext, CPU, m) { m.impl("ball_query", &ball_query_cpu); }
