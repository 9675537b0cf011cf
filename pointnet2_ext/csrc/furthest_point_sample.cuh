// CUDA kernels of furthest-point sampling, without torch. The definition, ties included, is pointnet2_ext/reference.py.
//
// Compiled with -fmad=false: same bits as the reference, so that near-ties fall the same way.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

namespace pointnet2_ext {

constexpr int kWarp = 32;
constexpr int kThreads = 512;  // threads of a block: half of the maximum, so that a thread may use 128 registers
constexpr int kWarps = kThreads / kWarp;
static_assert(kWarps <= kWarp, "one warp looks at what all warps found");

// A candidate for the furthest point, and its squared distance to the nearest picked point. The distance is never NaN:
// NaN is not less than the infinity that distances start with.
template <typename scalar_t>
struct Candidate {
  scalar_t distance;
  int index;
};

template <typename scalar_t>
__device__ Candidate<scalar_t> nobody() {
  return {scalar_t(-1), INT_MAX};
}

// Return the further of two; of ties the lower index.
template <typename scalar_t>
__device__ Candidate<scalar_t> further(Candidate<scalar_t> a, Candidate<scalar_t> b) {
  const bool second = b.distance > a.distance || (b.distance == a.distance && b.index < a.index);
  return second ? b : a;
}

// Call it from all lanes of the warp; all get the same result.
template <typename scalar_t>
__device__ Candidate<scalar_t> furthest_of_warp(Candidate<scalar_t> mine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Candidate<scalar_t> other{__shfl_xor_sync(0xffffffffu, mine.distance, offset),
                                    __shfl_xor_sync(0xffffffffu, mine.index, offset)};
    mine = further(mine, other);
  }
  return mine;
}

// Call it from all threads of the block; all get the same result. found: shared memory, one place per warp. It is read
// after the barrier inside, while other threads may already be in the next call. So the next call needs another
// `found`. The call after that may reuse this one, because its callers have all passed the barrier of the next call.
template <typename scalar_t>
__device__ Candidate<scalar_t> furthest_of_block(Candidate<scalar_t> mine, Candidate<scalar_t>* found) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  mine = furthest_of_warp(mine);
  if (lane == 0) found[warp] = mine;
  __syncthreads();
  return furthest_of_warp(lane < kWarps ? found[lane] : nobody<scalar_t>());
}

template <typename scalar_t>
__device__ scalar_t squared_distance(scalar_t x, scalar_t y, scalar_t z, const scalar_t* to) {
  const scalar_t dx = x - to[0], dy = y - to[1], dz = z - to[2];
  return dx * dx + dy * dy + dz * dz;
}

// One block samples one cloud, each thread with kEach points in its registers: kThreads * kEach points at most.
// points: (clouds, n, 3); picked: (clouds, count); launch as many blocks as clouds.
template <int kEach, typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sample_cloud(const scalar_t* points, int n, int64_t count, int64_t* picked) {
  __shared__ Candidate<scalar_t> found[2][kWarps];
  points += static_cast<int64_t>(blockIdx.x) * n * 3;
  picked += static_cast<int64_t>(blockIdx.x) * count;
  scalar_t x[kEach], y[kEach], z[kEach], nearest[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = k * kThreads + threadIdx.x;
    const scalar_t* point = points + 3 * (i < n ? i : 0);
    x[k] = point[0], y[k] = point[1], z[k] = point[2];
    nearest[k] = i < n ? scalar_t(INFINITY) : scalar_t(-1);  // below 0: never the furthest
  }
  int last = 0;
  if (threadIdx.x == 0) picked[0] = last;
  for (int64_t step = 1; step < count; ++step) {
    Candidate<scalar_t> mine = nobody<scalar_t>();
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const scalar_t distance = squared_distance(x[k], y[k], z[k], points + 3 * last);
      nearest[k] = distance < nearest[k] ? distance : nearest[k];
      // Strictly greater: the indices of a thread ascend, so the lowest stays.
      if (nearest[k] > mine.distance) mine = {nearest[k], k * kThreads + static_cast<int>(threadIdx.x)};
    }
    last = furthest_of_block(mine, found[step % 2]).index;
    if (threadIdx.x == 0) picked[step] = last;
  }
}

// One step of sampling clouds of any size, with `parts` blocks a cloud. Launch it for the steps 1 to count, one after
// the other, on one stream. A launch combines the parts' results of the launch before into pick step - 1, and looks for
// the point that is furthest once this one is picked.
// points: (clouds, n, 3); nearest: (clouds, n), infinity at first; before, after: (clouds, parts), one launch's `after`
// being the next one's `before`; picked: (clouds, count); launch clouds times parts blocks.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sample_step(const scalar_t* points, scalar_t* nearest, const Candidate<scalar_t>* before,
                Candidate<scalar_t>* after, int n, int parts, int64_t step, int64_t count, int64_t* picked) {
  __shared__ Candidate<scalar_t> found[2][kWarps];
  const int64_t cloud = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  points += cloud * n * 3;
  nearest += cloud * n;
  int last = 0;  // the first pick
  if (step > 1) {
    Candidate<scalar_t> furthest = nobody<scalar_t>();
    for (int i = threadIdx.x; i < parts; i += kThreads) furthest = further(furthest, before[cloud * parts + i]);
    last = furthest_of_block(furthest, found[0]).index;
  }
  if (part == 0 && threadIdx.x == 0) picked[cloud * count + step - 1] = last;
  if (step == count) return;  // the last launch has nothing to look for
  const scalar_t* pick = points + 3 * static_cast<int64_t>(last);
  Candidate<scalar_t> mine = nobody<scalar_t>();
  const int64_t stride = static_cast<int64_t>(parts) * kThreads;
  for (int64_t i = static_cast<int64_t>(part) * kThreads + threadIdx.x; i < n; i += stride) {
    const scalar_t distance = squared_distance(points[3 * i], points[3 * i + 1], points[3 * i + 2], pick);
    const scalar_t shorter = distance < nearest[i] ? distance : nearest[i];
    nearest[i] = shorter;
    if (shorter > mine.distance) mine = {shorter, static_cast<int>(i)};
  }
  mine = furthest_of_block(mine, found[1]);
  if (threadIdx.x == 0) after[cloud * parts + part] = mine;
}

}  // namespace pointnet2_ext
