// softmax_loss forward: one pass over the rows, then sums of the statistics over groups, labels and cells.
#include <optional>

#include "cuda/segments.cuh"
#include "cuda/softmax_loss_fwd.cuh"

namespace classfair {

namespace {

// Working memory of the statistics.
template <class A>
struct StatisticsScratch {
  bool joint;
  Tensor softmax, hit_key, hit_value, cell_key;

  template <class T>
  StatisticsScratch(const Tensor& like, bool with_joint, Forward<T>* f)
      : joint(with_joint),
        softmax(new_structs<RowSoftmax<A>>(like, f->in.rows)),
        hit_key(new_int64(like, f->in.rows * (f->in.target_b ? 2 : 1))),
        hit_value(allocate<1>(like, {hit_key.numel()}, scalar_type_of<A>())),
        cell_key(new_int64(like, joint ? f->in.rows : 0)) {
    f->softmax = data<RowSoftmax<A>>(softmax);
    f->hit_key = data<int64_t>(hit_key);
    f->hit_value = data<A>(hit_value);
    f->cell_key = data<int64_t>(cell_key);
  }
};

// mass, hit and joint from what the rows wrote.
template <class T, class A = acc_t<T>>
void sum_statistics(const Device& device, const Forward<T>& f, const StatisticsScratch<A>& scratch, A* mass, A* hit,
                    A* joint) {
  const Inputs<T>& in = f.in;
  const SoftmaxColumn<T> softmax{in.logits, in.rows, f.softmax};
  const Sorted by_label = sort_by_key(device, scratch.hit_key, in.G * in.C);
  const Tensor start = segment_starts(device, by_label.key, in.G * in.C);
  sum_values<A>(device, f.hit_value, sorted_items(by_label, start, in.G * in.C, 1), hit);
  // One group: rows in their own order, which strided memory prefers.
  const Segments groups = in.G == 1 ? all_items(in.rows) : sorted_items(by_label, start, in.G, in.C);
  sum_columns(device, softmax, groups, in.C, start, mass);
  if (!scratch.joint) return;
  const Sorted by_cell = sort_by_key(device, scratch.cell_key, in.cells);
  const Tensor cell_start = segment_starts(device, by_cell.key, in.cells);
  sum_columns(device, softmax, sorted_items(by_cell, cell_start, in.cells, 1), in.C, start, joint);
}

template <class T>
void forward(const SoftmaxLossArguments& a, const SoftmaxLossOutputs& out) {
  using A = acc_t<T>;
  const Device device(a.logits);
  Forward<T> f{};
  f.in = make_inputs<T>(a);
  f.width = row_width(f.in.C);
  f.units = row_blocks(f.in.rows, f.width);
  const Tensor unit_totals = new_structs<Totals>(a.logits, f.units);
  std::optional<StatisticsScratch<A>> scratch;
  if (a.stats) scratch.emplace(a.logits, a.joint(), &f);
  f.loss = data<A>(out.loss);
  f.lse = data<double>(out.lse);
  f.lse_raw = data<double>(out.lse_raw);
  f.unit_totals = data<Totals>(unit_totals);
  f.prediction = data<int64_t>(out.prediction);
  f.counts = data<unsigned long long>(out.counts);

  device.zero(out.counts);
  device.launch(a.stats ? softmax_loss_fwd_kernel<T, true> : softmax_loss_fwd_kernel<T, false>, f.units,
                row_threads(f.width), f);
  device.launch(totals_kernel<A>, 1, kThreads, static_cast<const Totals*>(f.unit_totals), f.units, a.mean,
                a.label_smoothing != 0, data<A>(out.total_weight), data<A>(out.reduced));
  if (a.stats) sum_statistics(device, f, *scratch, data<A>(out.mass), data<A>(out.hit), data<A>(out.joint));
}

void softmax_loss_fwd_cuda(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  BoxedCall call(stack, num_inputs, num_outputs);
  const SoftmaxLossForwardArguments a(call);
  const SoftmaxLossOutputs out(a);
  dispatch_floating(a.logits.scalar_type(), [&](auto tag) { forward<decltype(tag)>(a, out); });
  out.give(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("softmax_loss_fwd", &softmax_loss_fwd_cuda); }

}  // namespace classfair
