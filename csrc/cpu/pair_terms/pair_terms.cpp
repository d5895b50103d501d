// pair_terms on the CPU: the two operators. The code of the blocks is in forward.h and backward.h, which are compiled
// once for each instruction set.
#include "cpu/pair_terms/pair_terms.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa/kernels.h"

namespace classfair {

namespace {

// Throws where a label in use is no class: it is of an index of other classes.
template <class A>
PairInputs<A> make_inputs(const Tensor& weight, const OptionalTensor& cov, const Tensor& label,
                          const Tensor& num_slots) {
  check_numel(cov, weight.numel(), "cov");
  const PairInputs<A> in{static_cast<const A*>(weight.data_ptr()),
                         optional_data<A>(cov),
                         static_cast<const int64_t*>(label.data_ptr()),
                         *static_cast<const int64_t*>(num_slots.data_ptr()),
                         weight.size(0),
                         weight.size(1)};
  STD_TORCH_CHECK(in.used <= label.numel(), "pair_terms: expected num_slots of at most M");
  for (int64_t m = 0; m < in.used; ++m)
    if (in.label[m] < 0 || in.label[m] >= in.C)
      throw std::out_of_range("pair_terms: expected label in [0, " + std::to_string(in.C) + "), got " +
                              std::to_string(in.label[m]) + " at row " + std::to_string(m));
  return in;
}

void pack(Tensor* weight, OptionalTensor* cov, Tensor* label) {
  *weight = packed(*weight);
  *cov = packed(*cov);
  *label = packed(*label);
}

std::tuple<Tensor, Tensor> pair_terms_fwd_cpu(Tensor weight, OptionalTensor cov, Tensor label, Tensor num_slots,
                                              bool normalize, bool want_square) {
  STD_TORCH_CHECK(!normalize || want_square, "pair_terms: a normalized forward returns its squares");
  pack(&weight, &cov, &label);
  const int64_t M = label.size(0), C = weight.size(0);
  Tensor variance = zeros<2>(weight, {cov ? M : 0, cov ? C : 0}, weight.scalar_type());
  Tensor square = zeros<2>(weight, {want_square ? M : 0, want_square ? C : 0}, weight.scalar_type());
  dispatch_accumulate(weight, [&](auto tag) {
    using A = decltype(tag);
    const PairForward<A> f{make_inputs<A>(weight, cov, label, num_slots), data<A>(variance), data<A>(square)};
    if (!f.variance && !f.square) return;
    const auto& code = std::get<PairKernels<A>>(kernels());
    const int64_t class_blocks = ceil_div(C, kForwardClasses);
    parallel_for(0, ceil_div(f.in.used, kForwardRows) * class_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        code.forward_block(f, block / class_blocks, block % class_blocks);
    });
    if (!normalize || !cov) return;
    parallel_for(0, f.in.used, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) code.normalize_row(f, row);
    });
  });
  return {variance, square};
}

std::tuple<Tensor, Tensor> pair_terms_bwd_cpu(OptionalTensor grad_variance, OptionalTensor grad_square, Tensor weight,
                                              OptionalTensor cov, Tensor label, Tensor num_slots, Tensor variance,
                                              Tensor square, bool normalize, bool want_cov) {
  pack(&weight, &cov, &label);
  const int64_t M = label.size(0), C = weight.size(0), D = weight.size(1);
  for (OptionalTensor* t : {&grad_variance, &grad_square}) {
    check_numel(*t, M * C, "gradients");
    *t = packed(*t);
  }
  Tensor grad_weight = zeros<2>(weight, {C, D}, weight.scalar_type());
  Tensor grad_cov =
      want_cov ? zeros<2>(weight, {C, D}, weight.scalar_type()) : zeros<1>(weight, {0}, weight.scalar_type());
  dispatch_accumulate(weight, [&](auto tag) {
    using A = decltype(tag);
    PairBackward<A> b{};
    b.in = make_inputs<A>(weight, cov, label, num_slots);
    b.grad_variance = optional_data<A>(grad_variance);
    b.grad_square = optional_data<A>(grad_square);
    b.grad_weight = data<A>(grad_weight);
    b.grad_cov = data<A>(grad_cov);
    if ((!b.grad_variance && !b.grad_square) || !b.grad_weight) return;
    const auto& code = std::get<PairKernels<A>>(kernels());
    std::vector<A> threshold;
    if (normalize && b.grad_variance) {
      check_numel(variance, M * C, "variance");
      check_numel(square, M * C, "square");
      b.ratio = data<A>(variance);
      b.square = data<A>(square);
      threshold.resize(b.in.used);
      parallel_for(0, b.in.used, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) threshold[row] = code.threshold(b.square + row * C, C);
      });
      b.threshold = threshold.data();
    }
    // A thread owns features, so that it owns all gradients of its panels.
    parallel_for(0, ceil_div(D, code.panel_features), 1,
                 [&](int64_t begin, int64_t end) { code.backward_panels(b, begin, end); });
  });
  return {grad_weight, grad_cov};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("pair_terms_fwd", TORCH_BOX(&pair_terms_fwd_cpu));
  m.impl("pair_terms_bwd", TORCH_BOX(&pair_terms_bwd_cpu));
}

}  // namespace classfair
