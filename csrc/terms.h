// Mathematics of one sample, shared by CPU and CUDA.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace classfair {

// What to do with a row whose label is this one.
enum class LabelKind { kValid, kIgnored, kInvalid };

// Compared at full 64-bit width: 2^32 + 3 is not class 3.
C10_HOST_DEVICE inline LabelKind classify_label(int64_t label, int64_t num_classes, int64_t ignore_index) {
  if (label == ignore_index) return LabelKind::kIgnored;
  return label >= 0 && label < num_classes ? LabelKind::kValid : LabelKind::kInvalid;
}

// Focal weight (1 - p)^gamma at negative log-likelihood nll (Lin et al. 2017, eq. 4), 1 - p without cancellation.
template <class A>
C10_HOST_DEVICE A focal_weight(A nll, A gamma) {
  return gamma == A(0) ? A(1) : std::pow(-std::expm1(-nll), gamma);
}

// d/dnll of focal_weight(nll) * nll: (1-p)^gamma + gamma p nll (1-p)^(gamma-1), written so that it is finite at p = 1.
template <class A>
C10_HOST_DEVICE A focal_slope(A nll, A gamma) {
  if (gamma == A(0)) return A(1);
  const A miss = -std::expm1(-nll);
  if (!(miss > A(0))) return miss == A(0) ? A(0) : miss;  // NaN passes
  const A hit = std::exp(-nll);
  const A ratio = hit > A(0) ? hit * nll / miss : A(0);
  return std::pow(miss, gamma) * (A(1) + gamma * ratio);
}

// Probability target of one class: weighted, smoothed. smoothing_share is smoothing / C.
template <class A>
C10_HOST_DEVICE A smoothed_target(A weight, A probability, A smoothing, A smoothing_share) {
  return weight * ((A(1) - smoothing) * probability + smoothing_share);
}

// The loss of a row times its weight. Weight 0 leaves the row out, also where its loss is infinite.
template <class A>
C10_HOST_DEVICE A weighted_loss(A sample_weight, A loss) {
  return sample_weight == A(0) ? A(0) : sample_weight * loss;
}

// The mean of weighted losses. Of weight 0 it is 0 / 0 with smoothing too, as torch, whose hard part is that.
template <class A>
C10_HOST_DEVICE A mean(A sum, A total_weight, bool smoothed) {
  return sum / (smoothed && total_weight == A(0) ? A(NAN) : total_weight);
}

// One row's labels, resolved.
template <class A>
struct RowLabels {
  LabelKind kind = LabelKind::kValid;
  A sample_weight = 1;     // of the loss, its gradient and its part of the denominator
  int64_t a = -1, b = -1;  // hard labels, -1: none
  A share_a = 0, share_b = 0;
  int64_t label = -1, group = 0, cell = -1;  // of the statistics; a label or group of -1 keeps the row out
  int64_t slot = -1;                         // of `pair`
};

// In: the pointers target, target_b, mix, sample_weight, group, cell, pair, slot (null where absent) and soft.data; the
// sizes C, G, cells and pair_rows; ignore_index.
template <class A, class In>
C10_HOST_DEVICE RowLabels<A> resolve_labels(const In& in, int64_t i) {
  RowLabels<A> row;
  const bool dense = in.soft.data != nullptr;
  if (in.target != nullptr) {
    const A share = in.mix ? in.mix[i] : A(1);
    const LabelKind kind_a = classify_label(in.target[i], in.C, in.ignore_index);
    const LabelKind kind_b = in.target_b ? classify_label(in.target_b[i], in.C, in.ignore_index) : LabelKind::kIgnored;
    if (kind_a == LabelKind::kValid) row.a = in.target[i], row.share_a = share;
    if (kind_b == LabelKind::kValid) row.b = in.target_b[i], row.share_b = A(1) - share;
    row.label = in.target_b && share < A(0.5) ? row.b : row.a;
    if (kind_a == LabelKind::kIgnored && kind_b == LabelKind::kIgnored && !dense) row.kind = LabelKind::kIgnored;
    if (kind_a == LabelKind::kInvalid || kind_b == LabelKind::kInvalid) row.kind = LabelKind::kInvalid;
    if (dense) row.a = -1, row.share_a = A(0);  // the label serves the statistics only
  }
  if (in.group != nullptr) {
    row.group = in.group[i];
    if ((row.group < -1 || row.group >= in.G) && row.kind != LabelKind::kIgnored) row.kind = LabelKind::kInvalid;
  }
  if (row.kind == LabelKind::kValid) {
    if (in.sample_weight != nullptr) row.sample_weight = in.sample_weight[i];
    if (in.cell != nullptr && in.cell[i] < in.cells) row.cell = in.cell[i];
    if (in.pair != nullptr) row.slot = in.slot ? in.slot[i] : row.a;
    if (row.slot < 0 || row.slot >= in.pair_rows) row.slot = -1;
  }
  // A label without a share has no part in anything: 0 times an infinity would be NaN.
  if (row.share_a == A(0)) row.a = -1;
  if (row.share_b == A(0)) row.b = -1;
  return row;
}

}  // namespace classfair
