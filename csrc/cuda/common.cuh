// Teams of threads and their fixed-order reductions.
#pragma once

#include <cmath>

#include "common.h"
#include "cuda/device.cuh"

namespace classfair {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, where nothing else is said

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__device__ inline bool is_finite(double v) { return v - v == 0.0; }

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// Of two numbers the larger; of a number and a NaN the number.
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

struct Min {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};

// Threads that work on one row: a power of two of them, an aligned part of a warp or the whole block. Teams of one warp
// may take different branches; a team that is the block may not.
struct Team {
  int width, lane;
  unsigned mask;  // the team's lanes, or all of them

  __device__ explicit Team(int size) : width(size), lane(threadIdx.x & (size - 1)), mask(~0u) {
    if (size < kWarp) mask = ((1u << size) - 1) << (threadIdx.x & (kWarp - 1) & ~(size - 1));
  }
};

// Reductions, known to all threads that take part; their order depends on the number of threads alone. A mask that the
// compiler knows is all lanes costs one instruction a step; any other is looked up in each.
template <class V, class Op>
__device__ V warp_reduce(V v, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

template <class V, class Op>
__device__ V block_reduce(V v, Op op) {
  v = warp_reduce(v, op);
  __shared__ V warps[kWarp];
  __syncthreads();  // an earlier reduction may still be read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = warps[0];
  for (int w = 1; w < blockDim.x / kWarp; ++w) v = op(v, warps[w]);
  return v;
}

template <class V, class Op>
__device__ V team_reduce(const Team& team, V v, Op op) {
  if (team.width > kWarp) return block_reduce(v, op);
  if (team.width == kWarp) return warp_reduce(v, op);
  for (int offset = team.width / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(team.mask, v, offset));
  return v;
}

// Sum of `v` over the threads before this one, and over the block; for blocks of kThreads.
__device__ inline int64_t block_exclusive_sum(int64_t v, int64_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t inclusive = v;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t below = __shfl_up_sync(~0u, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  __shared__ int64_t warps[kThreads / kWarp];
  __syncthreads();  // an earlier scan may still be read
  if (lane == kWarp - 1) warps[warp] = inclusive;
  __syncthreads();
  int64_t before = 0;
  *total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += warps[w];
    *total += warps[w];
  }
  return before + inclusive - v;
}

// The first position at which sorted[position] >= key.
__device__ inline int64_t lower_bound(const int64_t* sorted, int64_t size, int64_t key) {
  int64_t begin = 0;
  while (size > 0) {
    const int64_t half = size / 2;
    const bool right = sorted[begin + half] < key;
    begin = right ? begin + half + 1 : begin;
    size = right ? size - half - 1 : half;
  }
  return begin;
}

inline Tensor new_int64(const Tensor& like, int64_t size) { return allocate<1>(like, {size}, ScalarType::Long); }

// Scratch for `size` values of a plain struct.
template <class V>
Tensor new_structs(const Tensor& like, int64_t size) {
  return allocate<1>(like, {size * static_cast<int64_t>(sizeof(V))}, ScalarType::Byte);
}

}  // namespace classfair
