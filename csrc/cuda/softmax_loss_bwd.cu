// softmax_loss backward: one pass over the rows for the logits, sums over rows for offset, margin and pair.
#include <tuple>

#include "cuda/segments.cuh"
#include "cuda/softmax_loss_bwd.cuh"

namespace classfair {

namespace {

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Upstream {
  const OptionalTensor &loss, &lse, &mass, &hit, &joint;
};

template <class T>
BackwardResult backward(const Upstream& up, const Arguments& a, const Tensor& lse, const Tensor& lse_raw,
                        bool want_offset, bool want_margin, bool want_pair) {
  using A = acc_t<T>;
  const Device device(a.logits);
  Backward<T> b{};
  b.in = make_inputs<T>(a);
  const Inputs<T>& in = b.in;
  const int64_t rows = in.rows, C = in.C;
  constexpr ScalarType acc = scalar_type_of<A>();
  Tensor grad_logits = torch::stable::empty_like(a.logits);
  Tensor grad_offset = allocate<1>(a.logits, {want_offset ? C : 0}, acc);
  Tensor grad_margin = allocate<1>(a.logits, {want_margin ? C : 0}, acc);
  Tensor grad_pair = allocate<2>(a.logits, {want_pair ? in.pair_rows : 0, want_pair ? C : 0}, acc);
  const bool want_sums = want_offset || want_pair;
  OptionalTensor row_gradient, slot_key, margin_key, margin_value;
  if (want_sums) row_gradient = new_structs<RowGradient<A>>(a.logits, rows);
  if (want_pair) slot_key = new_int64(a.logits, rows);
  if (want_margin) margin_key = new_int64(a.logits, rows), margin_value = allocate<1>(a.logits, {rows}, acc);

  b.width = row_width(C);
  b.units = ceil_div(rows, row_threads(b.width) / b.width);
  b.grad_loss = optional_data<A>(up.loss);
  b.grad_loss_stride = up.loss.has_value() ? up.loss->stride(0) : 0;
  b.grad_lse = optional_data<double>(up.lse);
  b.grad_mass = optional_data<A>(up.mass);
  b.grad_hit = optional_data<A>(up.hit);
  b.grad_joint = optional_data<A>(up.joint);
  b.lse = data<double>(lse);
  b.lse_raw = lse_raw.numel() ? data<double>(lse_raw) : b.lse;
  b.grad_logits = rows_view<T>(grad_logits);
  if (want_sums) b.row_gradient = data<RowGradient<A>>(*row_gradient);
  if (want_pair) b.slot_key = data<int64_t>(*slot_key);
  if (want_margin) b.margin_key = data<int64_t>(*margin_key), b.margin_value = data<A>(*margin_value);

  device.launch(softmax_loss_bwd_kernel<T>, b.units, row_threads(b.width), b);
  const GradientColumn<T> column{in, b.row_gradient};
  if (want_offset) sum_columns(device, column, all_items(rows), C, lse, data<A>(grad_offset));
  if (want_pair) {
    const Sorted by_slot = sort_by_key(device, *slot_key, in.pair_rows);
    const Tensor start = segment_starts(device, by_slot.key, in.pair_rows);
    sum_columns(device, column, sorted_items(by_slot, start, in.pair_rows, 1), C, lse, data<A>(grad_pair));
  }
  if (want_margin) {
    const Sorted by_label = sort_by_key(device, *margin_key, C);
    const Tensor start = segment_starts(device, by_label.key, C);
    sum_values<A>(device, b.margin_value, sorted_items(by_label, start, C, 1), data<A>(grad_margin));
  }
  return {grad_logits, grad_offset, grad_margin, grad_pair};
}

BackwardResult softmax_loss_bwd_cuda(OptionalTensor grad_loss, OptionalTensor grad_lse, OptionalTensor grad_mass,
                                     OptionalTensor grad_hit, OptionalTensor grad_joint, Tensor logits,
                                     OptionalTensor offset, OptionalTensor margin, OptionalTensor pair,
                                     OptionalTensor target, OptionalTensor target_b, OptionalTensor mix,
                                     OptionalTensor soft_target, OptionalTensor slot, OptionalTensor weight,
                                     OptionalTensor group, OptionalTensor cell, Tensor lse, Tensor lse_raw,
                                     int64_t num_groups, int64_t num_cells, int64_t num_classes, int64_t class_start,
                                     int64_t ignore_index, double label_smoothing, double gamma, int64_t stats,
                                     bool want_offset, bool want_margin, bool want_pair) {
  STD_TORCH_CHECK(class_start == 0 && num_classes == logits.size(1),
                  "softmax_loss: class shards are not supported yet");
  const Arguments a{logits, offset, margin, pair, target,     target_b,  mix,          soft_target,
                    slot,   weight, group,  cell, num_groups, num_cells, ignore_index, label_smoothing,
                    gamma,  stats};
  const Upstream up{grad_loss, grad_lse, grad_mass, grad_hit, grad_joint};
  return dispatch_floating(logits.scalar_type(), [&](auto tag) {
    return backward<decltype(tag)>(up, a, lse, lse_raw, want_offset, want_margin, want_pair);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("softmax_loss_bwd", TORCH_BOX(&softmax_loss_bwd_cuda)); }

}  // namespace classfair
