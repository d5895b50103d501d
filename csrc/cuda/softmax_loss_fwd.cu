// softmax_loss forward: one pass over the rows, then sums of the statistics over groups, labels and cells.
#include <optional>
#include <tuple>

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

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
ForwardResult forward(const Arguments& a) {
  using A = acc_t<T>;
  const Device device(a.logits);
  Forward<T> f{};
  f.in = make_inputs<T>(a);
  const Inputs<T>& in = f.in;
  const int64_t rows = in.rows, G = in.stats ? in.G : 0, C = in.stats ? in.C : 0;
  const bool stats = in.stats != 0, joint = stats && a.cell.has_value();
  constexpr ScalarType acc = scalar_type_of<A>();
  Tensor loss = allocate<1>(a.logits, {rows}, acc);
  Tensor lse = allocate<1>(a.logits, {rows}, ScalarType::Double);
  Tensor lse_raw = allocate<1>(a.logits, {stats && in.perturbed() ? rows : 0}, ScalarType::Double);
  Tensor prediction = new_int64(a.logits, stats ? rows : 0);
  Tensor mass = allocate<2>(a.logits, {G, C}, acc), hit = allocate<2>(a.logits, {G, C}, acc);
  Tensor joint_rows = allocate<2>(a.logits, {joint ? in.cells : 0, joint ? C : 0}, acc);
  Tensor counts = new_int64(a.logits, stats ? 3 * G * C + 2 : 0);
  Tensor total_weight = allocate<0>(a.logits, {}, acc);

  f.width = row_width(in.C);
  f.units = ceil_div(rows, row_threads(f.width) / f.width);
  const Tensor unit_weight = allocate<1>(a.logits, {f.units}, ScalarType::Double);
  std::optional<StatisticsScratch<A>> scratch;
  if (stats) scratch.emplace(a.logits, joint, &f);
  f.loss = data<A>(loss);
  f.lse = data<double>(lse);
  f.lse_raw = data<double>(lse_raw);
  f.unit_weight = data<double>(unit_weight);
  f.prediction = data<int64_t>(prediction);
  f.counts = data<unsigned long long>(counts);

  device.zero(counts);
  device.launch(stats ? softmax_loss_fwd_kernel<T, true> : softmax_loss_fwd_kernel<T, false>, f.units,
                row_threads(f.width), f);
  device.launch(total_weight_kernel<A>, 1, kThreads, static_cast<const double*>(f.unit_weight), f.units,
                data<A>(total_weight));
  if (stats) sum_statistics(device, f, *scratch, data<A>(mass), data<A>(hit), data<A>(joint_rows));
  return {loss, lse, lse_raw, prediction, mass, hit, joint_rows, counts, total_weight};
}

ForwardResult softmax_loss_fwd_cuda(Tensor logits, OptionalTensor offset, OptionalTensor margin, OptionalTensor pair,
                                    OptionalTensor target, OptionalTensor target_b, OptionalTensor mix,
                                    OptionalTensor soft_target, OptionalTensor slot, OptionalTensor weight,
                                    OptionalTensor group, OptionalTensor cell, OptionalTensor lse_in,
                                    OptionalTensor lse_raw_in, int64_t num_groups, int64_t num_cells,
                                    int64_t num_classes, int64_t class_start, int64_t ignore_index,
                                    double label_smoothing, double gamma, int64_t stats) {
  STD_TORCH_CHECK(!lse_in && !lse_raw_in && class_start == 0 && num_classes == logits.size(1),
                  "softmax_loss: class shards are not supported yet");
  const Arguments a{logits, offset, margin, pair, target,     target_b,  mix,          soft_target,
                    slot,   weight, group,  cell, num_groups, num_cells, ignore_index, label_smoothing,
                    gamma,  stats};
  return dispatch_floating(logits.scalar_type(), [&](auto tag) { return forward<decltype(tag)>(a); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("softmax_loss_fwd", TORCH_BOX(&softmax_loss_fwd_cuda)); }

}  // namespace classfair
