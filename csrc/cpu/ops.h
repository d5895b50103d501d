// What the operators of softmax_loss and of the group penalties offer to the one that computes both.
#pragma once

#include <cstdint>
#include <tuple>

#include "softmax_loss_arguments.h"

namespace classfair {

// loss, lse, lse_raw, prediction, mass, hit, joint, counts, total_weight
using SoftmaxLossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
SoftmaxLossResult softmax_loss(const SoftmaxLossArguments& a);

// Upstream gradients: of the rows' losses, as data in the accumulate dtype (null: zero), and of the other outputs;
// those of the statistics count statistics_scale times.
struct SoftmaxLossUpstream {
  const void* loss;
  int64_t loss_stride;
  const OptionalTensor &lse, &mass, &hit, &joint;
  double statistics_scale;
};

// What the backward pass needs besides, and whether gradients other than that of the logits are wanted.
struct SoftmaxLossSaved {
  const Tensor &lse, &lse_raw;
  bool want_offset, want_margin, want_pair;
};

// Gradients of logits, offset, margin and pair.
using SoftmaxLossGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
SoftmaxLossGradients softmax_loss_backward(const SoftmaxLossUpstream& up, const SoftmaxLossArguments& a,
                                           const SoftmaxLossSaved& saved);

// Samples of every group and class.
struct CountTable {
  const int64_t* data;  // (G, C)
  int64_t G, C;
};

// Parts of the value, which are to be summed, and the gradient of the rows.
std::tuple<Tensor, Tensor> dependence(const Tensor& rows, const CountTable& count, const OptionalTensor& cell,
                                      const OptionalTensor& num_cells, bool mutual_information, bool weighted);

// The value and the gradients of mass and hit.
std::tuple<Tensor, Tensor, Tensor> iou_penalty(const Tensor& mass, const Tensor& hit, const CountTable& count,
                                               bool paired, bool skip);

}  // namespace classfair
