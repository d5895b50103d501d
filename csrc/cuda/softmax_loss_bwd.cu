// softmax_loss backward: one pass over the rows for the logits, sums over rows for offset, margin and pair.
#include "cuda/segments.cuh"
#include "cuda/softmax_loss_bwd.cuh"

namespace classfair {

namespace {

template <class T>
void backward(const SoftmaxLossBackwardArguments& a, const SoftmaxLossGradients& out) {
  using A = acc_t<T>;
  const Device device(a.logits);
  Backward<T> b{};
  b.in = make_inputs<T>(a);
  b.up = make_upstream<T>(a);
  b.width = row_width(b.in.C);
  b.units = row_blocks(b.in.rows, b.width);
  b.grad_logits = make_rows<T>(out.logits);
  const Inputs<T>& in = b.in;
  const int64_t rows = in.rows, C = in.C;
  const bool want_sums = a.want_offset || a.want_pair;
  OptionalTensor row_gradient, slot_key, margin_key, margin_value;
  if (want_sums) row_gradient = new_structs<RowGradient<A>>(a.logits, rows);
  if (a.want_pair) slot_key = new_int64(a.logits, rows);
  if (a.want_margin) margin_key = new_int64(a.logits, rows);
  if (a.want_margin) margin_value = allocate<1>(a.logits, {rows}, scalar_type_of<A>());
  if (want_sums) b.row_gradient = data<RowGradient<A>>(*row_gradient);
  if (a.want_pair) b.slot_key = data<int64_t>(*slot_key);
  if (a.want_margin) b.margin_key = data<int64_t>(*margin_key), b.margin_value = data<A>(*margin_value);

  device.launch(softmax_loss_bwd_kernel<T>, b.units, row_threads(b.width), b);
  const GradientColumn<T> column{in, b.row_gradient};
  if (a.want_offset) sum_columns(device, column, all_items(rows), C, a.lse, data<A>(out.offset));
  if (a.want_pair) {
    const Sorted by_slot = sort_by_key(device, *slot_key, in.pair_rows);
    const Tensor start = segment_starts(device, by_slot.key, in.pair_rows);
    sum_columns(device, column, sorted_items(by_slot, start, in.pair_rows, 1), C, a.lse, data<A>(out.pair));
  }
  if (a.want_margin) {
    const Sorted by_label = sort_by_key(device, *margin_key, C);
    const Tensor start = segment_starts(device, by_label.key, C);
    sum_values<A>(device, b.margin_value, sorted_items(by_label, start, C, 1), data<A>(out.margin));
  }
}

void softmax_loss_bwd_cuda(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  BoxedCall call(stack, num_inputs, num_outputs);
  const SoftmaxLossBackwardArguments a(call);
  const SoftmaxLossGradients out(a);
  dispatch_floating(a.logits.scalar_type(), [&](auto tag) { backward<decltype(tag)>(a, out); });
  out.give(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("softmax_loss_bwd", &softmax_loss_bwd_cuda); }

}  // namespace classfair
