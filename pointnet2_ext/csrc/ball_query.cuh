// CUDA kernel of ball query, without torch. The definition, empty cases included, is pointnet2_ext/reference.py.
//
// Compiled with -fmad=false: same bits as the reference, so that a point at the radius falls to the same side.
#pragma once

#include <cstdint>

namespace pointnet2_ext {

constexpr int kLanes = 32;
constexpr int kQueryThreads = 128;  // threads of a block: four centers at a time

// Each warp answers one center, 32 points at a time. Any number of blocks may be launched.
// points: (B, n, 3); centers: (B, m, 3), rows = B * m; limit: the squared radius; out: (B, m, count), filled here.
template <typename scalar_t>
__global__ void __launch_bounds__(kQueryThreads)
    query(const scalar_t* points, const scalar_t* centers, int64_t n, int64_t m, int64_t rows, scalar_t limit,
          int64_t count, int64_t* out) {
  const int lane = threadIdx.x % kLanes;
  constexpr int at_a_time = kQueryThreads / kLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * at_a_time;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * at_a_time + threadIdx.x / kLanes; row < rows; row += stride) {
    const scalar_t* cloud = points + row / m * n * 3;
    const scalar_t cx = centers[3 * row], cy = centers[3 * row + 1], cz = centers[3 * row + 2];
    int64_t* slots = out + row * count;
    int64_t found = 0, first = 0;
    for (int64_t begin = 0; begin < n && found < count; begin += kLanes) {
      const int64_t i = begin + lane;
      bool hit = false;
      if (i < n) {
        const scalar_t dx = cloud[3 * i] - cx, dy = cloud[3 * i + 1] - cy, dz = cloud[3 * i + 2] - cz;
        hit = dx * dx + dy * dy + dz * dz < limit;
      }
      // The lanes of a warp agree on everything except `hit`, so all of them come here.
      const unsigned hits = __ballot_sync(0xffffffffu, hit);
      if (hits == 0) continue;
      if (found == 0) first = begin + __ffs(static_cast<int>(hits)) - 1;
      const int64_t slot = found + __popc(hits & ((1u << lane) - 1));
      if (hit && slot < count) slots[slot] = i;
      found += __popc(hits);
    }
    for (int64_t slot = found + lane; slot < count; slot += kLanes) slots[slot] = first;
  }
}

}  // namespace pointnet2_ext
