// CUDA kernel of furthest-point sampling. The definition, ties included, is pointnet2_ext/reference.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "furthest_point_sample.cuh"

namespace {

using namespace pointnet2_ext;

constexpr int64_t kPart = 4 * kThreads;  // points of a large cloud that are worth a block of their own
constexpr int64_t kMostParts = 256;      // blocks of a cloud: more than the largest GPU runs at a time

template <typename scalar_t>
void sample_large_clouds(const scalar_t* points, int64_t batch, int64_t n, int64_t count, int64_t* picked,
                         const at::Tensor& like, cudaStream_t stream) {
  // One launch per step, so that no block waits for another: some 3 microseconds each.
  const int64_t parts = std::clamp<int64_t>((n + kPart - 1) / kPart, 1, kMostParts);
  at::Tensor nearest = at::full({batch, n}, std::numeric_limits<double>::infinity(), like.options());
  const int64_t bytes = batch * parts * static_cast<int64_t>(sizeof(Candidate<scalar_t>));
  at::Tensor found = at::empty({2, bytes}, like.options().dtype(at::kByte));
  auto* before = static_cast<Candidate<scalar_t>*>(found.select(0, 0).mutable_data_ptr());
  auto* after = static_cast<Candidate<scalar_t>*>(found.select(0, 1).mutable_data_ptr());
  for (int64_t step = 1; step <= count; ++step) {
    sample_step<scalar_t><<<static_cast<unsigned>(batch * parts), kThreads, 0, stream>>>(
        points, nearest.mutable_data_ptr<scalar_t>(), before, after, static_cast<int>(n), static_cast<int>(parts), step,
        count, picked);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    std::swap(before, after);
  }
}

at::Tensor furthest_point_sample_cuda(const at::Tensor& points, int64_t count) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 3, "points must be (B, N, 3)");
  TORCH_CHECK(1 <= count && count <= points.size(1), "count must be between 1 and the number of points");
  TORCH_CHECK(points.size(1) <= std::numeric_limits<int>::max(), "points must be fewer than 2^31");
  TORCH_CHECK(points.size(0) * kMostParts <= std::numeric_limits<int>::max(), "clouds must be fewer than 2^23");
  const c10::cuda::CUDAGuard guard(points.device());
  const at::Tensor cloud = points.contiguous();
  const int64_t batch = cloud.size(0), n = cloud.size(1);
  at::Tensor picked = at::empty({batch, count}, cloud.options().dtype(at::kLong));
  if (batch == 0) return picked;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(cloud.scalar_type(), "furthest_point_sample", [&] {
    const scalar_t* first = cloud.const_data_ptr<scalar_t>();
    int64_t* out = picked.mutable_data_ptr<int64_t>();
    if (n <= 4 * kThreads) {
      sample_cloud<4><<<static_cast<unsigned>(batch), kThreads, 0, stream>>>(first, static_cast<int>(n), count, out);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    } else if (n <= 8 * kThreads) {
      sample_cloud<8><<<static_cast<unsigned>(batch), kThreads, 0, stream>>>(first, static_cast<int>(n), count, out);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    } else {
      sample_large_clouds(first, batch, n, count, out, cloud, stream);
    }
  });
  return picked;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointnet2_ext, CUDA, m) { m.impl("furthest_point_sample", &furthest_point_sample_cuda); }
