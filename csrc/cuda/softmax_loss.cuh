// What the forward and the backward of softmax_loss share: team sizes and reading a row.
#pragma once

#include "arguments.h"
#include "cuda/common.cuh"

namespace classfair {

// Consecutive threads take consecutive columns, a batch of them before the first is used: any stride, alignment and odd
// C are one and the same path, and which thread sums which column never depends on the layout.
template <class A>
constexpr int kBatch = 32 / sizeof(A);

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// The row's columns c = base, base + width, ...; -inf past the end.
template <class T, class A = acc_t<T>>
__device__ void load_batch(const T* z, int64_t stride, int base, int width, int C, A (&out)[kBatch<A>]) {
  const T* from = z + base * stride;
  const int64_t step = width * stride;
  if (base + (kBatch<A> - 1) * width < C) {
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j, from += step) out[j] = static_cast<A>(*from);
  } else {
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j, from += step)
      out[j] = base + j * width < C ? static_cast<A>(*from) : -kInfinity<A>;
  }
}

// x = z + offset + pair, columns past the end untouched; either may be null.
template <class A>
__device__ void perturb_batch(const A* offset, const A* pair, int base, int width, int C, A (&x)[kBatch<A>]) {
#pragma unroll
  for (int j = 0; j < kBatch<A>; ++j) {
    const int c = base + j * width;
    if (offset && c < C) x[j] += offset[c];
    if (pair && c < C) x[j] += pair[c];
  }
}

// Threads of a row, by C alone: up to kThreadColumns columns each, then up to kMaxWidth threads, which loop.
constexpr int kThreadColumns = 8, kMaxWidth = 256, kSmallBlock = 128;
// Blocks of kMaxWidth that fit a multiprocessor: 128 registers a thread. Not asked for a number, ptxas spills for a
// third.
constexpr int kMinBlocks = 2;

inline int row_width(int64_t C) {
  int width = 1;
  while (width < kMaxWidth && static_cast<int64_t>(width) * kThreadColumns < C) width *= 2;
  return width;
}

// A team wider than a warp is a block of its own.
inline int row_threads(int width) { return width > kWarp ? width : kSmallBlock; }
inline int64_t row_blocks(int64_t rows, int width) { return ceil_div(rows, row_threads(width) / width); }

}  // namespace classfair
