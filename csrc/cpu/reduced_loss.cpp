// softmax_loss, its reduction and a group penalty of its statistics as one operator, forward and backward: on the CPU
// each of the ten small operators in between costs many times its arithmetic.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

#include "cpu/ops.h"

namespace classfair {

namespace {

// As classfair/ops/reduced_loss.py numbers them.
enum Term : int64_t { kNone, kSquaredDifferences, kMutualInformation, kIou };

// What "mean" divides by. NaN for 0 with smoothing, as torch, whose hard part is then 0 / 0.
template <class A>
A denominator(bool mean, const Tensor& total_weight, double label_smoothing) {
  const A weight = *data<A>(total_weight);
  if (!mean) return A(1);
  return weight == A(0) && label_smoothing != 0 ? std::numeric_limits<A>::quiet_NaN() : weight;
}

// Summed in double, because a batch may have more rows than a float counts; in lanes, which do not wait for each other.
template <class A>
double sum(const Tensor& values) {
  constexpr int64_t kLanes = 8;
  const A* v = data<A>(values);
  const int64_t size = values.numel(), whole = size - size % kLanes;
  double lane[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lane[k] += v[i + k];
  for (int64_t i = whole; i < size; ++i) lane[i - whole] += v[i];
  return std::accumulate(lane, lane + kLanes, 0.0);
}

// (loss, lse, lse_raw, prediction, mass, hit, joint, counts, total_weight) and the gradients of the penalty: of the
// rows that it depends on, and of hit.
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result reduced_loss_fwd_cpu(Tensor logits, OptionalTensor offset, OptionalTensor margin, OptionalTensor pair,
                            OptionalTensor target, OptionalTensor target_b, OptionalTensor mix,
                            OptionalTensor soft_target, OptionalTensor slot, OptionalTensor weight,
                            OptionalTensor group, OptionalTensor cell, int64_t num_groups, int64_t num_cells,
                            int64_t num_classes, int64_t class_start, int64_t ignore_index, double label_smoothing,
                            double gamma, int64_t stats, bool mean, int64_t term, double term_weight, bool weighted,
                            OptionalTensor term_cell, OptionalTensor term_num_cells) {
  STD_TORCH_CHECK(class_start == 0 && num_classes == logits.size(1),
                  "reduced_loss: class shards are not supported yet");
  const SoftmaxLossArguments a{logits, offset, margin, pair, target,     target_b,  mix,          soft_target,
                               slot,   weight, group,  cell, num_groups, num_cells, ignore_index, label_smoothing,
                               gamma,  stats};
  auto [loss, lse, lse_raw, prediction, mass, hit, joint, counts, total_weight] = softmax_loss(a);
  Tensor grad_rows = allocate<1>(logits, {0}, loss.scalar_type()), grad_hit = grad_rows;
  const CountTable count{data<int64_t>(counts), num_groups, logits.size(1)};
  Tensor parts = loss;
  if (term == kIou)
    std::tie(parts, grad_rows, grad_hit) = iou_penalty(mass, hit, count, false, true);
  else if (term != kNone)
    std::tie(parts, grad_rows) =
        dependence(term_cell ? joint : mass, count, term_cell, term_num_cells, term == kMutualInformation, weighted);
  Tensor total = allocate<0>(logits, {}, loss.scalar_type());
  dispatch_accumulate(loss, [&](auto tag) {
    using A = decltype(tag);
    A value = static_cast<A>(sum<A>(loss)) / denominator<A>(mean, total_weight, label_smoothing);
    if (term != kNone) value += static_cast<A>(term_weight) * static_cast<A>(sum<A>(parts));
    *data<A>(total) = value;
  });
  return {total, lse, lse_raw, prediction, mass, hit, joint, counts, total_weight, grad_rows, grad_hit};
}

// term_weight: absent where the gradients of the statistics are not those of the term alone, and count as they are.
SoftmaxLossGradients reduced_loss_bwd_cpu(
    Tensor upstream, Tensor logits, OptionalTensor offset, OptionalTensor margin, OptionalTensor pair,
    OptionalTensor target, OptionalTensor target_b, OptionalTensor mix, OptionalTensor soft_target, OptionalTensor slot,
    OptionalTensor weight, OptionalTensor group, OptionalTensor cell, Tensor lse, Tensor lse_raw, Tensor total_weight,
    OptionalTensor grad_mass, OptionalTensor grad_hit, OptionalTensor grad_joint, int64_t num_groups, int64_t num_cells,
    int64_t num_classes, int64_t class_start, int64_t ignore_index, double label_smoothing, double gamma, int64_t stats,
    bool mean, std::optional<double> term_weight, bool want_offset, bool want_margin, bool want_pair) {
  STD_TORCH_CHECK(class_start == 0 && num_classes == logits.size(1),
                  "reduced_loss: class shards are not supported yet");
  const SoftmaxLossArguments a{logits, offset, margin, pair, target,     target_b,  mix,          soft_target,
                               slot,   weight, group,  cell, num_groups, num_cells, ignore_index, label_smoothing,
                               gamma,  stats};
  return dispatch_accumulate(total_weight, [&](auto tag) {
    using A = decltype(tag);
    const A scale = *data<A>(upstream);
    const A of_rows = scale / denominator<A>(mean, total_weight, label_smoothing);
    const OptionalTensor of_lse;
    const double of_statistics = term_weight ? static_cast<double>(scale) * *term_weight : 1.0;
    return softmax_loss_backward({&of_rows, 0, of_lse, grad_mass, grad_hit, grad_joint, of_statistics}, a,
                                 {lse, lse_raw, want_offset, want_margin, want_pair});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("reduced_loss_fwd", TORCH_BOX(&reduced_loss_fwd_cpu));
  m.impl("reduced_loss_bwd", TORCH_BOX(&reduced_loss_bwd_cpu));
}

}  // namespace classfair
