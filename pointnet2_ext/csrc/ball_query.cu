// CUDA kernel of ball query. The definition, empty cases included, is pointnet2_ext/reference.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "ball_query.cuh"

namespace {

using namespace pointnet2_ext;

constexpr int64_t kMostBlocks = 1 << 20;  // with more centers, blocks take turns

at::Tensor ball_query_cuda(const at::Tensor& points, const at::Tensor& centers, double radius, int64_t count) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 3, "points must be (B, N, 3)");
  TORCH_CHECK(centers.dim() == 3 && centers.size(2) == 3, "centers must be (B, M, 3)");
  TORCH_CHECK(points.size(0) == centers.size(0), "points and centers must have the same batch");
  TORCH_CHECK(points.scalar_type() == centers.scalar_type(), "points and centers must have the same dtype");
  TORCH_CHECK(points.device() == centers.device(), "points and centers must be on the same device");
  TORCH_CHECK(count >= 1, "count must be at least 1");
  const c10::cuda::CUDAGuard guard(points.device());
  const at::Tensor cloud = points.contiguous();
  const at::Tensor middles = centers.contiguous();
  const int64_t n = cloud.size(1), m = middles.size(1), rows = middles.size(0) * m;
  at::Tensor indices = at::empty({middles.size(0), m, count}, cloud.options().dtype(at::kLong));
  if (rows == 0) return indices;
  constexpr int64_t at_a_time = kQueryThreads / kLanes;
  const auto blocks = static_cast<unsigned>(std::min((rows + at_a_time - 1) / at_a_time, kMostBlocks));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(cloud.scalar_type(), "ball_query", [&] {
    const scalar_t r = static_cast<scalar_t>(radius);
    query<scalar_t><<<blocks, kQueryThreads, 0, stream>>>(cloud.const_data_ptr<scalar_t>(),
                                                          middles.const_data_ptr<scalar_t>(), n, m, rows, r * r, count,
                                                          indices.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointnet2_ext, CUDA, m) { m.impl("ball_query", &ball_query_cuda); }
