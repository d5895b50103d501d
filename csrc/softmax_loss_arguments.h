// What the operators of softmax_loss are called with, on the CPU and on GPUs.
#pragma once

#include "common.h"

namespace classfair {

// The scalars and tensors that both passes of softmax_loss take.
struct SoftmaxLossArguments {
  const Tensor& logits;
  const OptionalTensor &offset, &margin, &pair, &target, &target_b, &mix, &soft_target, &slot, &weight, &group, &cell;
  int64_t num_groups, num_cells, ignore_index;
  double label_smoothing, gamma;
  int64_t stats;
};

}  // namespace classfair
