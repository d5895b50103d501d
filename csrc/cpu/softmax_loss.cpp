// softmax_loss on the CPU: the two ops, their checks and their fixed-order reductions. The row code is in
// softmax_loss_{columns,forward,backward,narrow}.h, compiled once per instruction set.
#include "cpu/softmax_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace classfair {

namespace {

using torch::stable::empty_like;
using torch::stable::parallel_for;

template <class T>
Rows<T> rows_view(const Tensor& t) {
  if (t.dim() == 2) return {static_cast<T*>(t.data_ptr()), 1, t.stride(0), t.stride(1), 0};
  return {static_cast<T*>(t.data_ptr()), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

template <std::size_t kDims>
Tensor zeros(const Tensor& like, const std::array<int64_t, kDims>& sizes, ScalarType dtype) {
  Tensor t = allocate(like, sizes, dtype);
  std::memset(t.data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

int64_t row_count(const Tensor& logits) { return logits.size(0) * (logits.dim() == 3 ? logits.size(2) : 1); }

template <class T>
RowKernels<T> row_kernels(bool narrow) {
#if defined(__x86_64__)
  if (selected_isa() == Isa::kAvx512) return avx512::row_kernels<T>(narrow);
  if (selected_isa() == Isa::kAvx2) return avx2::row_kernels<T>(narrow);
#endif
  return baseline::row_kernels<T>(narrow);
}

using Arguments = SoftmaxLossArguments;

template <class T>
Inputs<T> make_inputs(const Arguments& a) {
  using A = acc_t<T>;
  Inputs<T> in{};
  const auto view = rows_view<T>(a.logits);
  in.logits = {view.data, view.L, view.stride_n, view.stride_c, view.stride_l};
  in.rows = row_count(a.logits);
  in.C = a.logits.size(1);
  in.G = a.num_groups;
  in.cells = a.cell.has_value() ? a.num_cells : 0;
  in.target = optional_data<int64_t>(a.target);
  in.target_b = optional_data<int64_t>(a.target_b);
  in.mix = optional_data<A>(a.mix);
  if (a.soft_target.has_value()) {
    optional_data<A>(a.soft_target);
    const auto soft = rows_view<A>(*a.soft_target);
    in.soft = {soft.data, soft.L, soft.stride_n, soft.stride_c, soft.stride_l};
  }
  in.offset = optional_data<A>(a.offset);
  in.margin = optional_data<A>(a.margin);
  in.weight = optional_data<A>(a.weight);
  in.pair = optional_data<A>(a.pair);
  in.pair_rows = a.pair.has_value() ? a.pair->size(0) : 0;
  in.slot = optional_data<int64_t>(a.slot);
  in.group = optional_data<int64_t>(a.group);
  in.cell = optional_data<int64_t>(a.cell);
  in.ignore_index = a.ignore_index;
  in.smoothing = static_cast<A>(a.label_smoothing);
  in.gamma = static_cast<A>(a.gamma);
  in.stats = a.stats;
  // Rows are visited by group where the sums of all groups would not stay in the cache. That is random access, which is
  // bearable where a row fills cache lines of its own.
  in.by_group = in.stats && in.group && in.G > 1 && in.G * in.C > kCachedSums && in.C >= 256 && in.logits.contiguous();
  in.narrow = in.C <= kNarrow && in.target && !in.target_b && !in.mix && !in.soft.data && !in.perturbed() &&
              in.smoothing == A(0) && in.gamma == A(0);
  // Small enough to balance, large enough that the partial sums of chunks stay a small part of the traffic.
  in.chunk_rows = in.narrow ? 256 : in.stats ? std::clamp<int64_t>(in.rows / 16, 32, 128) : 32;
  if (in.stats && in.narrow) in.chunk_rows = std::max(in.chunk_rows, 8 * std::max(in.G, in.cells));
  // By group, a chunk's partial sums are a row or two.
  if (in.stats && !in.narrow && !in.by_group) in.chunk_rows = std::max(in.chunk_rows, 16 * in.G);
  in.chunk_rows = std::max<int64_t>(in.chunk_rows, in.rows / 256);
  return in;
}

template <class T>
acc_t<T> weight_sum(const Inputs<T>& in) {
  using A = acc_t<T>;
  return in.weight ? std::accumulate(in.weight, in.weight + in.C, A(0)) : A(in.C);
}

template <class T>
[[noreturn]] void throw_bad_row(const Inputs<T>& in, int64_t i) {
  const auto is_bad = [&](const int64_t* labels) {
    return labels && classify_label(labels[i], in.C, in.ignore_index) == LabelKind::kInvalid;
  };
  std::string expected =
      "label in [0, " + std::to_string(in.C) + ") or ignore_index " + std::to_string(in.ignore_index);
  int64_t got = 0;
  if (is_bad(in.target)) {
    got = in.target[i];
  } else if (is_bad(in.target_b)) {
    got = in.target_b[i];
  } else {
    expected = "group in [0, " + std::to_string(in.G) + ") or -1";
    got = in.group[i];
  }
  // Becomes IndexError. Thrown outside of parallel_for, or it would not arrive as one.
  throw std::out_of_range("softmax_loss: expected " + expected + ", got " + std::to_string(got) + " at row " +
                          std::to_string(i));
}

// Stable order of the rows by key, those with a key outside of [0, num_keys) last; start[k] is where key k begins.
template <class Key>
std::vector<int64_t> sort_rows(int64_t rows, int64_t num_keys, std::vector<int64_t>* start, Key&& key_of) {
  std::vector<int64_t> begin(num_keys + 2, 0), order(rows), key(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t k = key_of(i);
    key[i] = k < 0 || k > num_keys ? num_keys : k;
    ++begin[key[i] + 1];
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  *start = begin;
  for (int64_t i = 0; i < rows; ++i) order[begin[key[i]]++] = i;
  return order;
}

// out[j] = sum over rows, in their order, of partial[row, j], for columns [begin, end).
template <class A>
void sum_rows(const A* partial, int64_t rows, int64_t size, int64_t begin, int64_t end, A* out) {
  std::fill(out + begin, out + end, A(0));
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t j = begin; j < end; ++j) out[j] += partial[k * size + j];
}

// All columns.
template <class A>
void sum_chunks(const A* partial, int64_t chunks, int64_t size, A* out) {
  parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) { sum_rows(partial, chunks, size, begin, end, out); });
}

// How the (G, C) statistics are summed. Either they are one unit, of which every chunk has its own. Or, where rows are
// visited by group, each group is a unit: a chunk then meets few units, and both ascend, so that chunk + unit numbers
// the partial sums, and there are chunks + G of them instead of chunks * G.
struct Units {
  int64_t count, size;         // and numbers in each
  std::vector<int64_t> start;  // where the rows of each begin, and the last one's end
  std::vector<int64_t> order;  // (rows,) by group, those without one last; empty: natural

  template <class T>
  explicit Units(const Inputs<T>& in) : count(1), size(in.G * in.C), start{0, in.rows} {
    if (!in.by_group) return;
    count = in.G;
    size = in.C;
    order = sort_rows(in.rows, in.G, &start, [&](int64_t i) { return in.group[i]; });
  }
};

// One unit of mass, columns [begin, end).
template <class T>
void sum_unit(const Forward<T>& f, const Units& units, int64_t unit, int64_t begin, int64_t end, acc_t<T>* mass) {
  const int64_t first = units.start[unit], end_row = units.start[unit + 1], chunk = first / f.in.chunk_rows;
  const int64_t chunks = first < end_row ? (end_row - 1) / f.in.chunk_rows - chunk + 1 : 0;
  sum_rows(f.partial_mass + (chunk + unit) * units.size, chunks, units.size, begin, end, mass);
}

// One unit of hit and of the integer counts: a few numbers a sample, summed in row order; hit in double, because in
// float a class of more than 2^24 samples would stop growing.
template <class T>
void count_unit(const Forward<T>& f, const Units& units, int64_t unit, acc_t<T>* hit, int64_t* counts) {
  const Inputs<T>& in = f.in;
  const int64_t cells = in.G * in.C, size = units.size;
  const bool grouped = !in.by_group && in.group;
  int64_t *count = counts, *correct = count + cells, *predicted = correct + cells;
  for (int64_t* table : {count, correct, predicted}) std::fill(table, table + size, 0);
  double* sum = scratch<double>(size);
  std::fill(sum, sum + size, 0.0);
  for (int64_t position = units.start[unit]; position < units.start[unit + 1]; ++position) {
    const int64_t i = in.visited(position);
    const RowStatistics<acc_t<T>>& s = f.row_statistics[i];
    if (!s.counted()) continue;
    const int64_t base = grouped ? in.group[i] * in.C : 0;
    ++count[base + s.label];
    ++predicted[base + f.prediction[i]];
    correct[base + s.label] += f.prediction[i] == s.label;
    if (s.a >= 0) sum[base + s.a] += s.hit_a;
    if (s.b >= 0) sum[base + s.b] += s.hit_b;
  }
  std::transform(sum, sum + size, hit, [](double v) { return static_cast<acc_t<T>>(v); });
}

template <class T>
void sum_statistics(const Forward<T>& f, const Units& units, acc_t<T>* mass, acc_t<T>* hit, int64_t* counts) {
  constexpr int64_t kColumns = 4096;
  const int64_t tasks = ceil_div(units.size, kColumns) + 1;  // of a unit: blocks of mass, and the rest
  parallel_for(0, tasks * units.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / tasks, block = task % tasks, first = block * kColumns, offset = unit * units.size;
      if (block + 1 == tasks)
        count_unit(f, units, unit, hit + offset, counts + offset);
      else
        sum_unit(f, units, unit, first, std::min(first + kColumns, units.size), mass + offset);
    }
  });
}

// Where rows are narrow, each chunk has sums of its own of everything.
template <class T>
void sum_narrow(const Forward<T>& f, acc_t<T>* mass, acc_t<T>* hit, acc_t<T>* joint, int64_t* counts) {
  const Inputs<T>& in = f.in;
  const int64_t cells = in.G * in.C, chunks = in.chunks();
  std::vector<double> sums(f.sums_size());
  sum_chunks(f.partial_mass, chunks, cells, mass);
  sum_chunks(f.chunk_sums, chunks, f.sums_size(), sums.data());
  sum_chunks(f.chunk_counts, chunks, 3 * cells, counts);
  const auto round = [](double v) { return static_cast<acc_t<T>>(v); };
  std::transform(sums.begin(), sums.begin() + cells, hit, round);
  std::transform(sums.begin() + cells, sums.end(), joint, round);
}

template <class T>
SoftmaxLossResult forward(const Arguments& a) {
  using A = acc_t<T>;
  Forward<T> f{};
  f.in = make_inputs<T>(a);
  const Inputs<T>& in = f.in;
  const int64_t rows = in.rows, GC = in.G * in.C;
  const bool stats = in.stats != 0, joint = stats && a.cell.has_value(), by_cell = joint && !in.narrow;
  constexpr ScalarType acc = scalar_type_of<A>();
  Tensor loss = allocate<1>(a.logits, {rows}, acc);
  Tensor lse = allocate<1>(a.logits, {rows}, ScalarType::Double);
  Tensor lse_raw = allocate<1>(a.logits, {stats && in.perturbed() ? rows : 0}, ScalarType::Double);
  Tensor prediction = allocate<1>(a.logits, {stats ? rows : 0}, ScalarType::Long);
  Tensor mass = allocate<2>(a.logits, {stats ? in.G : 0, stats ? in.C : 0}, acc);
  Tensor hit = allocate<2>(a.logits, {stats ? in.G : 0, stats ? in.C : 0}, acc);
  Tensor joint_rows = allocate<2>(a.logits, {joint ? in.cells : 0, joint ? in.C : 0}, acc);
  Tensor counts = allocate<1>(a.logits, {stats ? 3 * GC + 2 : 0}, ScalarType::Long);
  Tensor total_weight = allocate<0>(a.logits, {}, acc);

  const Units units(in);
  if (in.by_group) f.in.order = units.order.data();
  f.unit_size = units.size;
  // Not zeroed: the chunks do that.
  const std::unique_ptr<A[]> partial(new A[stats ? (in.chunks() + units.count) * units.size : 0]);
  const std::unique_ptr<RowStatistics<A>[]> row_statistics(new RowStatistics<A>[stats ? rows : 0]);
  std::vector<double> chunk_weight(in.chunks());
  std::vector<int64_t> chunk_bad(in.chunks()), chunk_nonfinite(in.chunks());
  f.loss = data<A>(loss);
  f.lse = data<double>(lse);
  f.lse_raw = data<double>(lse_raw);
  f.prediction = data<int64_t>(prediction);
  f.partial_mass = stats ? partial.get() : nullptr;
  f.row_statistics = row_statistics.get();
  const bool own_sums = stats && in.narrow;
  const std::unique_ptr<double[]> chunk_sums(new double[own_sums ? in.chunks() * f.sums_size() : 0]);
  const std::unique_ptr<int64_t[]> chunk_counts(new int64_t[own_sums ? in.chunks() * 3 * GC : 0]);
  f.chunk_sums = chunk_sums.get();
  f.chunk_counts = chunk_counts.get();
  f.chunk_weight = chunk_weight.data();
  f.chunk_bad = chunk_bad.data();
  f.chunk_nonfinite = chunk_nonfinite.data();
  f.joint = by_cell ? data<A>(joint_rows) : nullptr;
  std::vector<int64_t> cell_start, cell_order;
  if (by_cell) cell_order = sort_rows(rows, in.cells, &cell_start, [&](int64_t i) { return resolve(in, i).cell; });
  f.cell_order = cell_order.data();
  f.cell_start = cell_start.data();

  const A weights = weight_sum(in);
  const RowKernels<T> kernels = row_kernels<T>(in.narrow);
  parallel_for(0, in.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) kernels.forward_chunk(f, chunk, weights);
  });
  const int64_t bad = chunk_bad.empty() ? rows : *std::min_element(chunk_bad.begin(), chunk_bad.end());
  if (bad < rows) throw_bad_row(in, bad);
  *static_cast<A*>(total_weight.data_ptr()) =
      static_cast<A>(std::accumulate(chunk_weight.begin(), chunk_weight.end(), 0.0));
  if (stats) {
    if (in.narrow)
      sum_narrow(f, data<A>(mass), data<A>(hit), data<A>(joint_rows), data<int64_t>(counts));
    else
      sum_statistics(f, units, data<A>(mass), data<A>(hit), data<int64_t>(counts));
    int64_t* const bad_rows = data<int64_t>(counts) + 3 * GC;  // invalid, which throws, and nonfinite
    bad_rows[0] = 0;
    bad_rows[1] = std::accumulate(chunk_nonfinite.begin(), chunk_nonfinite.end(), int64_t(0));
  }
  parallel_for(0, by_cell ? in.cells : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) kernels.joint_cell(f, cell);
  });
  return {loss, lse, lse_raw, prediction, mass, hit, joint_rows, counts, total_weight};
}

template <class T>
SoftmaxLossGradients backward(const SoftmaxLossUpstream& up, const Arguments& a, const SoftmaxLossSaved& saved) {
  using A = acc_t<T>;
  Backward<T> b{};
  b.in = make_inputs<T>(a);
  const Inputs<T>& in = b.in;
  constexpr ScalarType acc = scalar_type_of<A>();
  const auto& [lse, lse_raw, want_offset, want_margin, want_pair] = saved;
  Tensor grad_logits = empty_like(a.logits);
  Tensor grad_offset = allocate<1>(a.logits, {want_offset ? in.C : 0}, acc);
  Tensor grad_margin = zeros<1>(a.logits, {want_margin ? in.C : 0}, acc);
  Tensor grad_pair = zeros<2>(a.logits, {want_pair ? in.pair_rows : 0, want_pair ? in.C : 0}, acc);

  b.grad_loss = static_cast<const A*>(up.loss);
  b.grad_loss_stride = up.loss_stride;
  b.grad_lse = optional_data<double>(up.lse);
  b.grad_mass = optional_data<A>(up.mass);
  b.grad_hit = optional_data<A>(up.hit);
  b.grad_joint = optional_data<A>(up.joint);
  b.statistics_scale = static_cast<A>(up.statistics_scale);
  b.lse = data<double>(lse);
  b.lse_raw = lse_raw.numel() ? data<double>(lse_raw) : b.lse;
  b.grad_logits = rows_view<T>(grad_logits);

  std::vector<int64_t> start, order, carry_slot(in.chunks(), -1);
  if (want_pair) {
    order = sort_rows(in.rows, in.pair_rows, &start, [&](int64_t i) { return resolve(in, i).slot; });
    b.in.order = order.data();
  }
  std::vector<A> partial(want_offset ? in.chunks() * in.C : 0);
  std::vector<A> carry(want_pair ? in.chunks() * in.C : 0);
  std::vector<A> row_margin(want_margin ? in.rows : 0);
  b.partial_offset = want_offset ? partial.data() : nullptr;
  b.grad_pair = want_pair ? static_cast<A*>(grad_pair.data_ptr()) : nullptr;
  b.carry = carry.data();
  b.carry_slot = carry_slot.data();
  b.row_margin = want_margin ? row_margin.data() : nullptr;

  const A weights = weight_sum(in);
  const RowKernels<T> kernels = row_kernels<T>(in.narrow);
  parallel_for(0, in.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) kernels.backward_chunk(b, chunk, weights);
  });
  if (want_offset) sum_chunks(partial.data(), in.chunks(), in.C, data<A>(grad_offset));
  for (int64_t k = 0; want_pair && k < in.chunks(); ++k)
    for (int64_t c = 0; carry_slot[k] >= 0 && c < in.C; ++c)
      b.grad_pair[carry_slot[k] * in.C + c] += carry[k * in.C + c];
  for (int64_t i = 0; want_margin && i < in.rows; ++i) {
    const auto row = resolve(in, i);
    if (row.kind == LabelKind::kValid && row.a >= 0) data<A>(grad_margin)[row.a] -= row_margin[i];
  }
  return {grad_logits, grad_offset, grad_margin, grad_pair};
}

SoftmaxLossResult softmax_loss_fwd_cpu(Tensor logits, OptionalTensor offset, OptionalTensor margin, OptionalTensor pair,
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
  return softmax_loss(a);
}

SoftmaxLossGradients softmax_loss_bwd_cpu(
    OptionalTensor grad_loss, OptionalTensor grad_lse, OptionalTensor grad_mass, OptionalTensor grad_hit,
    OptionalTensor grad_joint, Tensor logits, OptionalTensor offset, OptionalTensor margin, OptionalTensor pair,
    OptionalTensor target, OptionalTensor target_b, OptionalTensor mix, OptionalTensor soft_target, OptionalTensor slot,
    OptionalTensor weight, OptionalTensor group, OptionalTensor cell, Tensor lse, Tensor lse_raw, int64_t num_groups,
    int64_t num_cells, int64_t num_classes, int64_t class_start, int64_t ignore_index, double label_smoothing,
    double gamma, int64_t stats, bool want_offset, bool want_margin, bool want_pair) {
  STD_TORCH_CHECK(class_start == 0 && num_classes == logits.size(1),
                  "softmax_loss: class shards are not supported yet");
  const Arguments a{logits, offset, margin, pair, target,     target_b,  mix,          soft_target,
                    slot,   weight, group,  cell, num_groups, num_cells, ignore_index, label_smoothing,
                    gamma,  stats};
  const void* loss = nullptr;
  dispatch_floating(logits.scalar_type(), [&](auto tag) { loss = optional_data<acc_t<decltype(tag)>>(grad_loss); });
  const int64_t stride = grad_loss.has_value() ? grad_loss->stride(0) : 0;
  return softmax_loss_backward({loss, stride, grad_lse, grad_mass, grad_hit, grad_joint, 1.0}, a,
                               {lse, lse_raw, want_offset, want_margin, want_pair});
}

}  // namespace

SoftmaxLossResult softmax_loss(const SoftmaxLossArguments& a) {
  return dispatch_floating(a.logits.scalar_type(), [&](auto tag) { return forward<decltype(tag)>(a); });
}

SoftmaxLossGradients softmax_loss_backward(const SoftmaxLossUpstream& up, const SoftmaxLossArguments& a,
                                           const SoftmaxLossSaved& saved) {
  return dispatch_floating(a.logits.scalar_type(), [&](auto tag) { return backward<decltype(tag)>(up, a, saved); });
}

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("softmax_loss_fwd", TORCH_BOX(&softmax_loss_fwd_cpu));
  m.impl("softmax_loss_bwd", TORCH_BOX(&softmax_loss_bwd_cpu));
}

}  // namespace classfair
