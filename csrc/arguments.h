// What the operators of softmax_loss take and return, named once for the CPU and for GPUs. SoftmaxLossArguments holds
// the tensors and numbers of the schema in classfair/ops/softmax_loss.py; Inputs<T> and Upstream<T> are the same as
// typed pointers, which kernels of either device read.
#pragma once

#include <algorithm>

#include "common.h"
#include "terms.h"

namespace classfair {

// A boxed call: the arguments are taken off the stack in the order of the schema, and the results put in their place.
class BoxedCall {
 public:
  BoxedCall(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs)
      : stack_(stack), num_inputs_(num_inputs), num_outputs_(num_outputs) {}

  template <class... Values>
  void take(Values&... values) {
    STD_TORCH_CHECK(taken_ + sizeof...(values) <= num_inputs_, "classfair: the schema has fewer arguments than C++");
    ((values = torch::stable::detail::to<Values>(stack_[taken_++])), ...);
  }
  template <class... Tensors>
  void give(const Tensors&... results) {
    STD_TORCH_CHECK(taken_ == num_inputs_, "classfair: the schema has more arguments than C++");
    STD_TORCH_CHECK(sizeof...(results) == num_outputs_, "classfair: the schema has other results than C++");
    int64_t i = 0;
    ((stack_[i++] = torch::stable::detail::from(results)), ...);
  }

 private:
  StableIValue* stack_;
  uint64_t num_inputs_, num_outputs_, taken_ = 0;
};

// What both passes take.
struct SoftmaxLossArguments {
  Tensor logits;  // (N, C) or (N, C, L), any strides
  OptionalTensor offset, margin, pair, target, target_b, mix, soft_target, slot, weight, sample_weight, group, cell;
  int64_t num_groups, num_cells, ignore_index;
  double label_smoothing, gamma;
  int64_t stats;
  bool mean;

  void take_tensors(BoxedCall& call) {
    call.take(logits, offset, margin, pair, target, target_b, mix, soft_target, slot, weight, sample_weight, group,
              cell);
    STD_TORCH_CHECK(logits.dim() == 2 || logits.dim() == 3, "classfair: expected logits of two or three dimensions");
    check_classes(offset, "offset");
    check_classes(margin, "margin");
    check_classes(weight, "weight");
    check_rows(target, "target");
    check_rows(target_b, "target_b");
    check_rows(mix, "mix");
    check_rows(slot, "slot");
    check_rows(sample_weight, "sample_weight");
    check_rows(group, "group");
    check_rows(cell, "cell");
    pair = packed(pair);
    STD_TORCH_CHECK(!pair.has_value() || (pair->dim() == 2 && pair->size(1) == classes()),
                    "classfair: expected pair of shape (M, C)");
    check_numel(soft_target, logits.numel(), "soft_target");
    STD_TORCH_CHECK(
        !soft_target.has_value() || (soft_target->dim() == logits.dim() && soft_target->size(1) == classes()),
        "classfair: expected soft_target of the shape of logits");
  }
  void take_scalars(BoxedCall& call) {
    call.take(num_groups, num_cells, ignore_index, label_smoothing, gamma, stats, mean);
    STD_TORCH_CHECK(num_groups >= 1 && num_cells >= 0 && num_groups <= kMaxTable / std::max<int64_t>(classes(), 1),
                    "classfair: expected tables of at most 2^60 numbers");
    STD_TORCH_CHECK(num_cells <= kMaxTable / std::max<int64_t>(classes(), 1), "classfair: too many cells");
  }

  int64_t rows() const { return logits.size(0) * (logits.dim() == 3 ? logits.size(2) : 1); }
  int64_t classes() const { return logits.size(1); }
  bool perturbed() const { return offset.has_value() || margin.has_value() || pair.has_value(); }
  bool joint() const { return stats != 0 && cell.has_value(); }
  ScalarType accumulate_type() const {
    return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

 private:
  static constexpr int64_t kMaxTable = int64_t{1} << 60;  // so that no size of a table overflows

  void check_rows(OptionalTensor& tensor, const char* name) const {
    if (!tensor.has_value()) return;
    check_numel(tensor, rows(), name);
    tensor = packed(tensor);
  }
  void check_classes(OptionalTensor& tensor, const char* name) const {
    if (!tensor.has_value()) return;
    check_numel(tensor, classes(), name);
    tensor = packed(tensor);
  }
};

struct SoftmaxLossForwardArguments : SoftmaxLossArguments {
  explicit SoftmaxLossForwardArguments(BoxedCall& call) {
    take_tensors(call);
    take_scalars(call);
  }
};

struct SoftmaxLossBackwardArguments : SoftmaxLossArguments {
  OptionalTensor grad_loss, grad_lse, grad_mass, grad_hit, grad_joint, stats_scale;
  Tensor lse, lse_raw, total_weight;
  bool want_offset, want_margin, want_pair;

  explicit SoftmaxLossBackwardArguments(BoxedCall& call) {
    call.take(grad_loss, grad_lse, grad_mass, grad_hit, grad_joint, stats_scale);
    take_tensors(call);
    call.take(lse, lse_raw, total_weight);
    take_scalars(call);
    call.take(want_offset, want_margin, want_pair);
    check_upstream();
  }

 private:
  void check_upstream() {
    const int64_t sums = num_groups * classes(), rows = this->rows();
    STD_TORCH_CHECK(
        !grad_loss.has_value() || grad_loss->dim() == 0 || (grad_loss->dim() == 1 && grad_loss->size(0) == rows),
        "classfair: expected grad_loss of shape () or (R,)");
    check_numel(grad_lse, rows, "grad_lse");
    check_numel(grad_mass, sums, "grad_mass");
    check_numel(grad_hit, sums, "grad_hit");
    check_numel(grad_joint, num_cells * classes(), "grad_joint");
    check_numel(stats_scale, 1, "stats_scale");
    check_numel(lse, rows, "lse");
    check_numel(total_weight, 1, "total_weight");
    STD_TORCH_CHECK(lse_raw.numel() == 0 || lse_raw.numel() == rows, "classfair: expected lse_raw of R elements");
    for (OptionalTensor* t : {&grad_lse, &grad_mass, &grad_hit, &grad_joint}) *t = packed(*t);
    lse = packed(lse);
    lse_raw = packed(lse_raw);
  }
};

// Results of the forward pass, allocated and not filled; what was not asked for has size 0.
struct SoftmaxLossOutputs {
  Tensor loss, lse, lse_raw;     // (R,)
  Tensor prediction;             // (R,)
  Tensor mass, hit;              // (G, C)
  Tensor joint;                  // (cells, C)
  Tensor counts;                 // (3 G C + 2,): count, correct and predicted, (G, C) each; invalid and nonfinite
  Tensor total_weight, reduced;  // (); reduced is the sum of the losses, or their mean

  explicit SoftmaxLossOutputs(const SoftmaxLossArguments& a)
      : SoftmaxLossOutputs(a, a.rows(), a.stats ? a.num_groups : 0, a.stats ? a.classes() : 0, a.accumulate_type()) {}

  void give(BoxedCall& call) const {
    call.give(loss, lse, lse_raw, prediction, mass, hit, joint, counts, total_weight, reduced);
  }

 private:
  // G and C are 0 where statistics are not asked for.
  SoftmaxLossOutputs(const SoftmaxLossArguments& a, int64_t R, int64_t G, int64_t C, ScalarType acc)
      : loss(allocate<1>(a.logits, {R}, acc)),
        lse(allocate<1>(a.logits, {R}, ScalarType::Double)),
        lse_raw(allocate<1>(a.logits, {a.stats && a.perturbed() ? R : 0}, ScalarType::Double)),
        prediction(allocate<1>(a.logits, {a.stats ? R : 0}, ScalarType::Long)),
        mass(allocate<2>(a.logits, {G, C}, acc)),
        hit(allocate<2>(a.logits, {G, C}, acc)),
        joint(allocate<2>(a.logits, {a.joint() ? a.num_cells : 0, a.joint() ? C : 0}, acc)),
        counts(allocate<1>(a.logits, {a.stats ? 3 * G * C + 2 : 0}, ScalarType::Long)),
        total_weight(allocate<0>(a.logits, {}, acc)),
        reduced(allocate<0>(a.logits, {}, acc)) {}
};

// Results of the backward pass, likewise.
struct SoftmaxLossGradients {
  Tensor logits, offset, margin, pair;

  explicit SoftmaxLossGradients(const SoftmaxLossBackwardArguments& a)
      : logits(torch::stable::empty_like(a.logits)),
        offset(allocate<1>(a.logits, {a.want_offset ? a.classes() : 0}, a.accumulate_type())),
        margin(allocate<1>(a.logits, {a.want_margin ? a.classes() : 0}, a.accumulate_type())),
        pair(allocate<2>(a.logits, {a.want_pair ? a.pair->size(0) : 0, a.want_pair ? a.classes() : 0},
                         a.accumulate_type())) {}

  void give(BoxedCall& call) const { call.give(logits, offset, margin, pair); }
};

// A (rows, C) view of (N, C) or (N, C, L) memory: row i = n * L + l.
template <class T>
struct Rows {
  T* data;
  int64_t L, stride_n, stride_c, stride_l;

  C10_HOST_DEVICE T* row(int64_t i) const {
    if (L == 1) return data + i * stride_n;
    const int64_t n = divide(i, L);
    return data + n * stride_n + (i - n * L) * stride_l;
  }
  C10_HOST_DEVICE bool contiguous() const { return stride_c == 1; }
};

template <class T>
Rows<T> make_rows(const Tensor& t) {
  T* const data = static_cast<T*>(t.data_ptr());
  if (t.dim() == 2) return {data, 1, t.stride(0), t.stride(1), 0};
  return {data, t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
struct Inputs {
  using A = acc_t<T>;
  Rows<const T> logits;
  int64_t rows, C, G, cells;
  const int64_t* target;              // (rows,) or null
  const int64_t* target_b;            // (rows,) or null
  const A* mix;                       // (rows,) share of `target`, or null
  Rows<const A> soft;                 // probabilities; data is null where absent
  const A *offset, *margin, *weight;  // (C,) or null
  const A* pair;                      // (pair_rows, C) or null
  const int64_t* slot;                // (rows,) row of `pair`; null: the label
  int64_t pair_rows;
  const A* sample_weight;       // (rows,) or null
  const int64_t *group, *cell;  // (rows,) or null
  int64_t ignore_index;
  A smoothing, smoothing_share, gamma;  // smoothing_share = smoothing / C
  int64_t stats;

  C10_HOST_DEVICE bool perturbed() const { return offset != nullptr || margin != nullptr || pair != nullptr; }
  C10_HOST_DEVICE bool smoothed() const { return smoothing != A(0) && soft.data == nullptr; }
  C10_HOST_DEVICE const A* pair_row(int64_t row_slot) const { return row_slot >= 0 ? pair + row_slot * C : nullptr; }
  C10_HOST_DEVICE A class_weight(int64_t c) const { return weight ? weight[c] : A(1); }
  // The part of the target that is not a hard label: dense probabilities, or smoothing's share.
  C10_HOST_DEVICE A spread_target(const A* soft_row, int64_t c) const {
    return soft_row ? smoothed_target(class_weight(c), soft_row[c * soft.stride_c], smoothing, smoothing_share)
                    : class_weight(c) * smoothing_share;
  }
  // What kernels of a GPU count columns in: 32 bits save registers. Offsets into memory stay 64 bits wide.
  C10_HOST_DEVICE int columns() const { return static_cast<int>(C); }
};

template <class T>
Inputs<T> make_inputs(const SoftmaxLossArguments& a) {
  using A = acc_t<T>;
  Inputs<T> in{};
  in.logits = make_rows<const T>(a.logits);
  in.rows = a.rows();
  in.C = a.classes();
  STD_TORCH_CHECK(in.C <= int64_t{1} << 30, "softmax_loss: more than 2^30 classes");
  in.G = a.num_groups;
  in.cells = a.cell.has_value() ? a.num_cells : 0;
  in.target = optional_data<int64_t>(a.target);
  in.target_b = optional_data<int64_t>(a.target_b);
  in.mix = optional_data<A>(a.mix);
  if (optional_data<A>(a.soft_target)) in.soft = make_rows<const A>(*a.soft_target);
  in.offset = optional_data<A>(a.offset);
  in.margin = optional_data<A>(a.margin);
  in.weight = optional_data<A>(a.weight);
  in.pair = optional_data<A>(a.pair);
  in.slot = optional_data<int64_t>(a.slot);
  in.pair_rows = a.pair.has_value() ? a.pair->size(0) : 0;
  // A table without rows has no memory, but perturbs as any other. Nobody reads behind this pointer.
  if (a.pair.has_value() && in.pair_rows == 0) in.pair = reinterpret_cast<const A*>(alignof(A));
  in.sample_weight = optional_data<A>(a.sample_weight);
  in.group = optional_data<int64_t>(a.group);
  in.cell = optional_data<int64_t>(a.cell);
  in.ignore_index = a.ignore_index;
  in.smoothing = static_cast<A>(a.label_smoothing);
  in.smoothing_share = in.smoothing / static_cast<A>(in.C);
  in.gamma = static_cast<A>(a.gamma);
  in.stats = a.stats;
  return in;
}

// What the backward pass reads besides: gradients of the outputs, and what the forward pass saved.
template <class T>
struct Upstream {
  using A = acc_t<T>;
  const A* grad_loss;        // (rows,) or () or null: zero
  int64_t grad_loss_stride;  // 0 where one number serves all rows
  const A* total_weight;     // () that this number is divided by, or null
  bool smoothed;
  const double* grad_lse;                      // (rows,) or null
  const A *grad_mass, *grad_hit, *grad_joint;  // (G, C), (G, C), (cells, C) or null
  const A* stats_scale;                        // () by which these three are multiplied; null: 1
  const double *lse, *lse_raw;                 // (rows,); lse_raw is lse where nothing perturbs the logits

  C10_HOST_DEVICE bool statistics() const {
    return grad_mass != nullptr || grad_hit != nullptr || grad_joint != nullptr;
  }
  C10_HOST_DEVICE A of_loss(int64_t i) const {
    const A grad = grad_loss ? grad_loss[i * grad_loss_stride] : A(0);
    return grad_loss && total_weight ? mean(grad, *total_weight, smoothed) : grad;
  }
  C10_HOST_DEVICE A of_statistics() const { return stats_scale ? *stats_scale : A(1); }
  C10_HOST_DEVICE A of_lse(int64_t i) const { return grad_lse ? static_cast<A>(grad_lse[i]) : A(0); }
};

template <class T>
Upstream<T> make_upstream(const SoftmaxLossBackwardArguments& a) {
  using A = acc_t<T>;
  Upstream<T> up{};
  up.grad_loss = optional_data<A>(a.grad_loss);
  up.grad_loss_stride = up.grad_loss && a.grad_loss->dim() == 1 ? a.grad_loss->stride(0) : 0;
  if (a.mean) up.total_weight = data<A>(a.total_weight);
  up.smoothed = a.label_smoothing != 0;
  up.grad_lse = optional_data<double>(a.grad_lse);
  up.grad_mass = optional_data<A>(a.grad_mass);
  up.grad_hit = optional_data<A>(a.grad_hit);
  up.grad_joint = optional_data<A>(a.grad_joint);
  up.stats_scale = optional_data<A>(a.stats_scale);
  up.lse = data<double>(a.lse);
  up.lse_raw = a.lse_raw.numel() ? data<double>(a.lse_raw) : up.lse;
  return up;
}

}  // namespace classfair
