// What the code of every instruction set is given for the group penalties: inputs, outputs, and how work is cut.
#pragma once

#include <cstdint>
#include <limits>

#include "common.h"
#include "cpu/scratch.h"

namespace classfair {

constexpr int64_t kPenaltyColumns = 2048;  // of a block; no sum depends on the number of threads

// Rows of one segment that have samples, and columns [begin, end) of them.
template <class A>
struct DependenceBlock {
  const A* const* rows;  // (K,) rows of sums of probabilities
  A* const* grads;       // (K,)
  const A* samples;      // (K,) behind each row
  int64_t K;
  A size;    // samples of the segment
  A weight;  // of the segment
  int64_t begin, end;
};

template <class A>
struct IouInputs {
  const A *mass, *hit;   // (G, C)
  const int64_t* count;  // (G, C)
  int64_t G, C;
  bool skip;                // classes without a true sample
  A *grad_mass, *grad_hit;  // (G, C)
  A* all;                   // (3, C) of zeros, for the sums over groups
};

// Of each group, then of all: (G + 1,) sums of IoU over classes and numbers of these classes.
template <class A>
struct IouSums {
  A *iou, *classes;
};

template <class A>
struct PenaltyKernels {
  // The block's part of the value; writes its gradient.
  A (*squared_differences)(const DependenceBlock<A>&);
  A (*mutual_information)(const DependenceBlock<A>&);
  // Sums over columns [begin, end); begins their gradients.
  void (*iou_sums)(const IouInputs<A>&, int64_t begin, int64_t end, const IouSums<A>&);
  // Ends the gradients of columns [begin, end), from those of the sums of IoU (G + 1,).
  void (*iou_gradients)(const IouInputs<A>&, int64_t begin, int64_t end, const A* slope);
};
namespace baseline {
template <class A>
PenaltyKernels<A> penalty_kernels();
}
namespace avx2 {
template <class A>
PenaltyKernels<A> penalty_kernels();
}
namespace avx512 {
template <class A>
PenaltyKernels<A> penalty_kernels();
}

}  // namespace classfair
