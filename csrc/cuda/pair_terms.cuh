// What the kernels of pair_terms share: inputs, tiles in shared memory, the threshold of a row.
#pragma once

#include "cuda/common.cuh"

namespace classfair {

// |w_c - w_y|^2 counts as 0 up to this share of 1 or, where larger, of its mean over c.
constexpr double kPairThreshold = 1e-12;
constexpr int kSide = 64, kDepth = 16;           // a block owns kSide x kSide outputs and sums kDepth terms at a time
constexpr int kGrid = 16, kOwn = kSide / kGrid;  // of its kGrid x kGrid threads, each owns kOwn x kOwn outputs

template <class A>
struct PairInputs {
  const A *weight, *cov;             // (C, D), cov may be null
  const int64_t *label, *num_slots;  // (M,), ()
  int64_t M, C, D;

  __device__ int64_t used() const { return *num_slots; }
  __device__ int64_t row_tiles() const { return (M + kSide - 1) / kSide; }
};

// One column more, so that neither direction of a tile falls into one bank.
template <class A>
using Tile = A[kDepth][kSide + 1];

// tile[i][j] = value(i, j), neighbouring threads at neighbouring j, or at neighbouring i if `transposed`.
template <bool transposed, class A, class F>
__device__ void fill_tile(Tile<A>& tile, F value) {
  for (int k = threadIdx.x; k < kDepth * kSide; k += kThreads) {
    const int i = transposed ? k % kDepth : k / kSide, j = transposed ? k / kDepth : k % kSide;
    tile[i][j] = value(i, j);
  }
}

// A number of a row of the weight or of the diagonals, 0 outside.
template <class A>
__device__ A slot_value(const PairInputs<A>& in, const A* source, int64_t used, int64_t row, int64_t feature) {
  return row < used && feature < in.D ? source[in.label[row] * in.D + feature] : A(0);
}
template <class A>
__device__ A class_value(const PairInputs<A>& in, int64_t c, int64_t feature) {
  return c < in.C && feature < in.D ? in.weight[c * in.D + feature] : A(0);
}

// Below or at which the squares of one row count as 0; the block adds them up together.
template <class A>
__device__ A row_threshold(const A* square, int64_t C) {
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < C; c += kThreads) sum += square[c];
  const double mean = block_reduce(sum, Sum{}) / C;
  return static_cast<A>(kPairThreshold * (mean > 1.0 ? mean : 1.0));
}

template <class A>
PairInputs<A> pair_inputs(const Tensor& weight, const OptionalTensor& cov, const Tensor& label,
                          const Tensor& num_slots) {
  return {data<A>(weight), optional_data<A>(cov), data<int64_t>(label), data<int64_t>(num_slots),
          label.size(0),   weight.size(0),        weight.size(1)};
}

}  // namespace classfair
