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

}  // namespace classfair
