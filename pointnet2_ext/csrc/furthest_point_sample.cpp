// CPU kernel of furthest-point sampling. The definition, ties included, is pointnet2_ext/reference.py.
//
// A cloud is cut into blocks. Each block stores its bounding box, its furthest point, and that point's distance to the
// points picked so far. A new pick changes nothing in a block whose box is at least that far from the pick.
// Differences, squares and sums round monotonically. So the distance to the box, computed with the operations of the
// reference in their order, is never above the computed distance to a point in it: skipping a block changes no bit.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "clones.h"

namespace {

constexpr int64_t kChunk = 64;                 // points; a block is a multiple of this
constexpr int64_t kSmallBlock = 256;           // points of a block where the cloud is sorted
constexpr int64_t kLargeBlock = 16384;         // points of a block where the cloud is not sorted
constexpr int64_t kPointsWorthSorting = 8192;  // with fewer points, or fewer picks, sorting costs more than it saves
constexpr int64_t kPicksWorthSorting = 64;
constexpr int64_t kWorthAThread = 2 * kLargeBlock;  // points that pay for a thread: some 10 microseconds against 3
constexpr int kCellBits = 5;                        // bits of each axis of the grid by which a cloud is sorted

template <typename scalar_t>
struct Point {
  scalar_t x, y, z;
};

// The points of a cloud, by place: block after block, `size` places each, the last block padded.
template <typename scalar_t>
struct Blocks {
  int64_t size, count;                     // places of a block; number of blocks
  std::vector<scalar_t> x, y, z, nearest;  // by place: a point, and its squared distance to the nearest picked one
  std::vector<int32_t> index;              // by place: index of the point in the cloud; ascending within a block
  std::vector<scalar_t> low_x, low_y, low_z, high_x, high_y, high_z;  // by block: its box
  std::vector<scalar_t> longest;                                      // by block: its greatest `nearest`
  std::vector<int32_t> furthest;                                      // by block: index of the first point that has it

  Blocks(int64_t n, int64_t size)
      : size(size), count((n + size - 1) / size), x(count * size), y(count * size), z(count * size),
        nearest(count * size, std::numeric_limits<scalar_t>::infinity()), index(count * size), low_x(count),
        low_y(count), low_z(count), high_x(count), high_y(count), high_z(count),
        longest(count, std::numeric_limits<scalar_t>::infinity()), furthest(count) {}
};

// Return the least and the greatest of the values; there must be at least one.
template <typename scalar_t>
POINTNET2_CLONES void bound(const scalar_t* values, int64_t count, scalar_t& low, scalar_t& high) {
  scalar_t least = values[0], most = values[0];
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  low = least, high = most;
}

// block_of: the block of each of the n points; all but the last block are full.
template <typename scalar_t>
Blocks<scalar_t> cut(const scalar_t* points, int64_t n, int64_t size, const std::vector<int32_t>& block_of) {
  Blocks<scalar_t> blocks(n, size);
  std::vector<int32_t> held(blocks.count);
  const auto put = [&](int64_t place, const scalar_t* point) {
    blocks.x[place] = point[0], blocks.y[place] = point[1], blocks.z[place] = point[2];
  };
  for (int64_t i = 0; i < n; ++i) {
    const int64_t place = block_of[i] * size + held[block_of[i]]++;
    put(place, points + 3 * i);
    blocks.index[place] = static_cast<int32_t>(i);
  }
  // Spare places repeat a point of their block, to keep its box, and are never the furthest.
  for (int64_t place = n; place < blocks.count * size; ++place) {
    put(place, points + 3 * blocks.index[(blocks.count - 1) * size]);
    blocks.nearest[place] = -1;
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    bound(&blocks.x[b * size], size, blocks.low_x[b], blocks.high_x[b]);
    bound(&blocks.y[b * size], size, blocks.low_y[b], blocks.high_y[b]);
    bound(&blocks.z[b * size], size, blocks.low_z[b], blocks.high_z[b]);
    blocks.furthest[b] = blocks.index[b * size];  // before the first pick, all points are equally far
  }
  return blocks;
}

// Spread a number of 5 bits to every third bit: 11111 to 1001001001001.
uint32_t spread(uint32_t bits) {
  bits = (bits | bits << 8) & 0x100f;
  bits = (bits | bits << 4) & 0x10c3;
  return (bits | bits << 2) & 0x1249;
}

// Assign a block to each point, in the order of a Morton curve through a grid: points of a block lie close together.
template <typename scalar_t>
std::vector<int32_t> blocks_along_a_curve(const scalar_t* points, int64_t n, int64_t size) {
  scalar_t low[3], high[3], widest = 0;
  for (int axis = 0; axis < 3; ++axis) {
    low[axis] = high[axis] = points[axis];
    for (int64_t i = 1; i < n; ++i) {
      low[axis] = std::min(low[axis], points[3 * i + axis]);
      high[axis] = std::max(high[axis], points[3 * i + axis]);
    }
    widest = std::max(widest, high[axis] - low[axis]);
  }
  constexpr int last = (1 << kCellBits) - 1;
  const scalar_t scale = widest > 0 ? last / widest : 0;
  std::vector<int32_t> cell_of(n), next(1 << (3 * kCellBits));
  for (int64_t i = 0; i < n; ++i) {
    uint32_t cell = 0;
    for (int axis = 0; axis < 3; ++axis) {
      const scalar_t along = (points[3 * i + axis] - low[axis]) * scale;
      // Written so that NaN falls into cell 0.
      cell |= spread(along > 0 ? (along < last ? static_cast<uint32_t>(along) : last) : 0) << axis;
    }
    cell_of[i] = static_cast<int32_t>(cell);
    ++next[cell];
  }
  for (int32_t before = 0; int32_t& place : next) before += std::exchange(place, before);
  for (int32_t& cell : cell_of) cell = next[cell]++ / static_cast<int32_t>(size);
  return cell_of;
}

std::vector<int32_t> blocks_in_order(int64_t n, int64_t size) {
  std::vector<int32_t> block_of(n);
  for (int64_t i = 0; i < n; ++i) block_of[i] = static_cast<int32_t>(i / size);
  return block_of;
}

template <typename scalar_t>
POINTNET2_INLINE scalar_t squared_length(scalar_t x, scalar_t y, scalar_t z) {
  return x * x + y * y + z * z;
}

// Return the distance from a coordinate to an interval; 0 inside it.
template <typename scalar_t>
POINTNET2_INLINE scalar_t gap(scalar_t low, scalar_t high, scalar_t at) {
  const scalar_t below = low - at, above = at - high;
  const scalar_t outside = below > above ? below : above;
  return outside > 0 ? outside : 0;
}

// Return 1 for each block in which `pick` may become the nearest picked point of some points, else 0.
template <typename scalar_t>
POINTNET2_CLONES void mark(const Blocks<scalar_t>& blocks, Point<scalar_t> pick, int32_t* concerned) {
  const scalar_t *low_x = blocks.low_x.data(), *low_y = blocks.low_y.data(), *low_z = blocks.low_z.data();
  const scalar_t *high_x = blocks.high_x.data(), *high_y = blocks.high_y.data(), *high_z = blocks.high_z.data();
  const scalar_t* longest = blocks.longest.data();
  for (int64_t b = 0; b < blocks.count; ++b) {
    const scalar_t distance = squared_length(gap(low_x[b], high_x[b], pick.x), gap(low_y[b], high_y[b], pick.y),
                                             gap(low_z[b], high_z[b], pick.z));
    concerned[b] = distance < longest[b];
  }
}

// Update a block for a new pick: the distances of its points, and its furthest point.
template <typename scalar_t>
POINTNET2_CLONES void update(Blocks<scalar_t>& blocks, int64_t block, Point<scalar_t> pick) {
  const int64_t size = blocks.size, first = block * size;
  const scalar_t *x = blocks.x.data() + first, *y = blocks.y.data() + first, *z = blocks.z.data() + first;
  scalar_t* nearest = blocks.nearest.data() + first;
  scalar_t longest = -1;
#pragma omp simd reduction(max : longest)
  for (int64_t i = 0; i < size; ++i) {
    const scalar_t distance = squared_length(x[i] - pick.x, y[i] - pick.y, z[i] - pick.z);
    nearest[i] = distance < nearest[i] ? distance : nearest[i];
    longest = nearest[i] > longest ? nearest[i] : longest;
  }
  int64_t chunk = 0;
  for (;; chunk += kChunk) {
    int found = 0;
    for (int64_t i = 0; i < kChunk; ++i) found |= nearest[chunk + i] == longest;
    if (found) break;
  }
  while (nearest[chunk] != longest) ++chunk;
  blocks.longest[block] = longest;
  blocks.furthest[block] = blocks.index[first + chunk];
}

// Return the index of the point that is furthest from all picked ones; the lowest of ties.
template <typename scalar_t>
POINTNET2_CLONES int32_t furthest_of_all(const Blocks<scalar_t>& blocks) {
  const scalar_t* longest = blocks.longest.data();
  const int32_t* furthest = blocks.furthest.data();
  scalar_t most = -1;
#pragma omp simd reduction(max : most)
  for (int64_t b = 0; b < blocks.count; ++b) most = longest[b] > most ? longest[b] : most;
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int32_t index = longest[b] == most ? furthest[b] : std::numeric_limits<int32_t>::max();
    lowest = index < lowest ? index : lowest;
  }
  return lowest;
}

template <typename scalar_t>
Blocks<scalar_t> cut_as_it_pays(const scalar_t* points, int64_t n, int64_t count) {
  if (n >= kPointsWorthSorting && count >= kPicksWorthSorting)
    return cut(points, n, kSmallBlock, blocks_along_a_curve(points, n, kSmallBlock));
  const int64_t size = std::min(kLargeBlock, (n + kChunk - 1) / kChunk * kChunk);
  return cut(points, n, size, blocks_in_order(n, size));
}

template <typename scalar_t>
void sample_one(const scalar_t* points, int64_t n, int64_t count, int64_t* picked) {
  Blocks<scalar_t> blocks = cut_as_it_pays(points, n, count);
  std::vector<int32_t> concerned(blocks.count), those(blocks.count);
  for (int64_t step = 1; step < count; ++step) {
    const scalar_t* last = points + 3 * picked[step - 1];
    const Point<scalar_t> pick{last[0], last[1], last[2]};
    mark(blocks, pick, concerned.data());
    int64_t many = 0;
    for (int64_t b = 0; b < blocks.count; ++b) {
      those[many] = static_cast<int32_t>(b);
      many += concerned[b];
    }
    // Only the first picks touch enough of a sorted cloud. Later, waiting for one more thread would cost more than the
    // thread saves.
    at::parallel_for(0, many, kWorthAThread / blocks.size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) update(blocks, those[i], pick);
    });
    picked[step] = furthest_of_all(blocks);
  }
}

at::Tensor furthest_point_sample_cpu(const at::Tensor& points, int64_t count) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 3, "points must be (B, N, 3)");
  TORCH_CHECK(1 <= count && count <= points.size(1), "count must be between 1 and the number of points");
  TORCH_CHECK(points.size(1) <= std::numeric_limits<int32_t>::max(), "points must be fewer than 2^31");
  const at::Tensor cloud = points.contiguous();
  const int64_t n = cloud.size(1);
  at::Tensor picked = at::zeros({cloud.size(0), count}, cloud.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(cloud.scalar_type(), "furthest_point_sample", [&] {
    const scalar_t* first = cloud.const_data_ptr<scalar_t>();
    int64_t* out = picked.mutable_data_ptr<int64_t>();
    at::parallel_for(0, cloud.size(0), kWorthAThread / (n * count) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) sample_one(first + b * n * 3, n, count, out + b * count);
    });
  });
  return picked;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointnet2_ext, CPU, m) { m.impl("furthest_point_sample", &furthest_point_sample_cpu); }
