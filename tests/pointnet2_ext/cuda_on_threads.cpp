// The CUDA kernels of pointnet2_ext, compiled for the CPU: a thread of a GPU is a thread here, a block of them runs at a
// time. This shows whether indices, ties, barriers and shuffles are right; how fast they are, and what a compiler for
// GPUs makes of them, it does not show.

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

namespace {

struct Index {
  unsigned x;
};
thread_local Index threadIdx, blockIdx;
Index gridDim;
std::unique_ptr<std::barrier<>> of_block;
std::vector<std::unique_ptr<std::barrier<>>> of_warp;
uint64_t shown[1024];  // by thread, what it shows to the others of its warp

void __syncthreads() { of_block->arrive_and_wait(); }
int __popc(unsigned bits) { return std::popcount(bits); }
int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }

template <typename T, typename Read>
auto among_the_warp(T mine, Read read) {
  std::barrier<>& warp = *of_warp[threadIdx.x / 32];
  std::memcpy(&shown[threadIdx.x], &mine, sizeof mine);
  warp.arrive_and_wait();
  const auto answer = read(shown + threadIdx.x / 32 * 32);
  warp.arrive_and_wait();
  return answer;
}

template <typename T>
T __shfl_xor_sync(unsigned, T mine, int offset) {
  return among_the_warp(mine, [&](const uint64_t* all) {
    T other;
    std::memcpy(&other, all + (threadIdx.x % 32 ^ offset), sizeof other);
    return other;
  });
}

unsigned __ballot_sync(unsigned, bool mine) {
  return among_the_warp(static_cast<uint64_t>(mine), [](const uint64_t* all) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
    return bits;
  });
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
  gridDim = {blocks};
  of_block = std::make_unique<std::barrier<>>(threads);
  of_warp.clear();
  for (unsigned warp = 0; warp < threads / 32; ++warp) of_warp.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread)
    running.emplace_back([&, thread] {
      threadIdx = {thread};
      for (unsigned block = 0; block < blocks; ++block) {
        blockIdx = {block};
        kernel();
        of_block->arrive_and_wait();
      }
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace

#include "ball_query.cuh"
#include "furthest_point_sample.cuh"

using namespace pointnet2_ext;

extern "C" {

void sample_in_registers(const float* points, int64_t batch, int64_t n, int64_t count, int64_t* picked) {
  launch(batch, kThreads, [&] { sample_cloud<4>(points, n, count, picked); });
}

void sample_in_steps(const float* points, int64_t batch, int64_t n, int64_t count, int64_t parts, int64_t* picked) {
  std::vector<float> nearest(batch * n, INFINITY);
  std::vector<Candidate<float>> before(batch * parts), after(batch * parts);
  for (int64_t step = 1; step <= count; ++step) {
    launch(batch * parts, kThreads, [&] {
      sample_step(points, nearest.data(), before.data(), after.data(), n, parts, step, count, picked);
    });
    std::swap(before, after);
  }
}

void query_balls(const float* points, const float* centers, int64_t batch, int64_t n, int64_t m, float limit,
                 int64_t count, int64_t blocks, int64_t* out) {
  launch(blocks, kQueryThreads, [&] { query(points, centers, n, m, batch * m, limit, count, out); });
}
}
