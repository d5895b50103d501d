// What the code of every instruction set is given for pair_terms: inputs, outputs, and how work is cut.
#pragma once

#include <cstdint>

#include "common.h"
#include "cpu/memory.h"

namespace classfair {

// |w_c - w_y|^2 counts as 0 up to this share of 1 or, where larger, of its mean over c.
constexpr double kPairThreshold = 1e-12;

// Blocks of a forward: kForwardClasses x kForwardFeatures floats (256 KB) stay in L2 while the rows of a block pass.
constexpr int64_t kForwardRows = 64, kForwardClasses = 128, kForwardFeatures = 512;
// Blocks of a backward: the coefficients of kBackwardRows x kBackwardClasses pairs (512 KB) stay near while features
// pass, a few at a time, in panels of rows and of kPanelClasses classes (8 KB) that stay in L1.
constexpr int64_t kBackwardRows = 128, kBackwardClasses = 512, kPanelClasses = 128;

template <class A>
struct PairInputs {
  const A* weight;       // (C, D)
  const A* cov;          // (C, D) or null
  const int64_t* label;  // (M,)
  int64_t used, C, D;    // slots in use, classes, features
};

template <class A>
struct PairForward {
  PairInputs<A> in;
  A *variance, *square;  // (M, C) or null, zero at the start
};

template <class A>
struct PairBackward {
  PairInputs<A> in;
  const A *grad_variance, *grad_square;  // (M, C) or null
  const A *ratio, *square;               // (M, C) outputs of a normalized forward, else null
  const A* threshold;                    // (M,) of square, with them
  A* grad_weight;                        // (C, D), zero at the start
  A* grad_cov;                           // (C, D) or null, zero at the start
};

// The code of one instruction set. Blocks and panels never depend on the number of threads.
template <class A>
struct PairKernels {
  // All features of one block of pairs.
  void (*forward_block)(const PairForward<A>&, int64_t row_block, int64_t class_block);
  // One row of a normalized forward: variance becomes the ratio.
  void (*normalize_row)(const PairForward<A>&, int64_t row);
  // Below or at which the squares of one row count as 0.
  A (*threshold)(const A* square, int64_t C);
  // All pairs of the panels [begin, end), each of panel_features features.
  void (*backward_panels)(const PairBackward<A>&, int64_t begin, int64_t end);
  int64_t panel_features;
};

}  // namespace classfair
