// softmax_loss on the CPU: the two operators, and how their rows are cut into chunks. The code of a chunk is in
// columns.h, forward.h, backward.h and narrow.h, which are compiled once for each instruction set.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/ordered_sum.h"
#include "cpu/softmax_loss/softmax_loss.h"
#include "cpu/softmax_loss/sums.h"

namespace classfair {

namespace {

template <class T>
VisitedInputs<T> plan(const SoftmaxLossArguments& a) {
  using A = acc_t<T>;
  VisitedInputs<T> in{make_inputs<T>(a)};
  // Rows are visited by group where the sums of all groups would not stay in the cache. That is random access, which is
  // bearable where a row fills cache lines of its own.
  in.by_group = in.stats && in.group && in.G > 1 && in.G * in.C > kCachedSums && in.C >= 256 && in.logits.contiguous();
  in.narrow = in.C <= kNarrow && in.target && !in.target_b && !in.mix && !in.soft.data && !in.perturbed() &&
              in.smoothing == A(0) && in.gamma == A(0);
  // Chunks are small enough that threads share the work evenly, and large enough that the sums which each has of its
  // own cost little. Measured on two AVX-512 cores, forward, in microseconds: without statistics (1024, 1000) takes 251
  // in chunks of 8 rows, 247 of 32 and 246 of 128; with them (256, 1000) takes 108, 101 and 98, and on two threads 129,
  // 83 and 74. Narrow rows (4096, 2) take 57 in chunks of 32 and 55 of 256, on two threads 73 and 60, and 77 of 1024.
  in.chunk_rows = in.narrow ? 256 : in.stats ? std::clamp<int64_t>(in.rows / 16, 32, 128) : 32;
  // A chunk's own sums are G rows, or one for each cell: (4096, 300) with 40 groups takes 760 in chunks of 128 rows,
  // 722 of 256, 685 of 640 and 703 of 1280. Where rows are visited by group, they are a row or two.
  if (in.stats && in.narrow) in.chunk_rows = std::max(in.chunk_rows, 8 * std::max(in.G, in.cells));
  if (in.stats && !in.narrow && !in.by_group) in.chunk_rows = std::max(in.chunk_rows, 16 * in.G);
  // At most about 256 chunks, whose sums are added in the end.
  in.chunk_rows = std::max<int64_t>(in.chunk_rows, in.rows / 256);
  in.weight_sum = in.weight ? std::accumulate(in.weight, in.weight + in.C, A(0)) : A(in.C);
  return in;
}

template <class Work>
void each_chunk(int64_t chunks, Work&& work) {
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) work(chunk);
  });
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

// What the chunks of a forward pass write besides the outputs. The large ones are not zeroed: the chunks do that.
template <class T>
struct ChunkResults {
  using A = acc_t<T>;
  std::vector<double> weight;
  std::vector<int64_t> bad, nonfinite;
  std::unique_ptr<A[]> mass;
  std::unique_ptr<RowStatistics<A>[]> rows;
  std::unique_ptr<double[]> sums;
  std::unique_ptr<int64_t[]> counts;

  ChunkResults(const Units& units, Forward<T>* f)
      : weight(f->in.chunks()), bad(f->in.chunks()), nonfinite(f->in.chunks()) {
    const VisitedInputs<T>& in = f->in;
    f->chunk_weight = weight.data();
    f->chunk_bad = bad.data();
    f->chunk_nonfinite = nonfinite.data();
    if (!in.stats) return;
    mass.reset(new A[(in.chunks() + units.count) * units.size]);
    rows.reset(new RowStatistics<A>[in.rows]);
    f->partial_mass = mass.get();
    f->unit_size = units.size;
    f->row_statistics = rows.get();
    if (!in.narrow) return;
    sums.reset(new double[in.chunks() * f->sums_size()]);
    counts.reset(new int64_t[in.chunks() * 3 * in.G * in.C]);
    f->chunk_sums = sums.get();
    f->chunk_counts = counts.get();
  }
};

template <class T>
void forward(const SoftmaxLossArguments& a, const SoftmaxLossOutputs& out) {
  using A = acc_t<T>;
  const auto& code = std::get<RowKernels<T>>(kernels());
  Forward<T> f{plan<T>(a)};
  const VisitedInputs<T>& in = f.in;
  const Units units(in);
  if (in.by_group) f.in.order = units.order.data();
  f.loss = data<A>(out.loss);
  f.lse = data<double>(out.lse);
  f.lse_raw = data<double>(out.lse_raw);
  f.prediction = data<int64_t>(out.prediction);
  const ChunkResults<T> chunks(units, &f);
  const bool by_cell = a.joint() && !in.narrow;
  std::vector<int64_t> cell_start, cell_order;
  if (by_cell) {
    cell_order = sort_rows(in.rows, in.cells, &cell_start, [&](int64_t i) { return resolve_labels<A>(in, i).cell; });
    f.joint = data<A>(out.joint);
    f.cell_order = cell_order.data();
    f.cell_start = cell_start.data();
  }

  const auto forward_chunk = in.narrow ? code.narrow_forward_chunk : code.forward_chunk;
  each_chunk(in.chunks(), [&](int64_t chunk) { forward_chunk(f, chunk); });
  const int64_t bad = in.rows ? *std::min_element(chunks.bad.begin(), chunks.bad.end()) : 0;
  if (bad < in.rows) throw_bad_row(in, bad);
  const A weight = static_cast<A>(std::accumulate(chunks.weight.begin(), chunks.weight.end(), 0.0));
  const A sum = static_cast<A>(ordered_sum(f.loss, in.rows));
  *data<A>(out.total_weight) = weight;
  *data<A>(out.reduced) = a.mean ? mean(sum, weight, in.smoothing != A(0)) : sum;
  if (!in.stats) return;
  A *const mass = data<A>(out.mass), *const hit = data<A>(out.hit);
  int64_t* const counts = data<int64_t>(out.counts);
  if (in.narrow)
    sum_narrow(f, mass, hit, data<A>(out.joint), counts);
  else
    sum_statistics(f, units, mass, hit, counts);
  int64_t* const bad_rows = counts + 3 * in.G * in.C;  // invalid, which is an error here, and nonfinite
  bad_rows[0] = 0;
  bad_rows[1] = std::accumulate(chunks.nonfinite.begin(), chunks.nonfinite.end(), int64_t(0));
  if (by_cell) each_chunk(in.cells, [&](int64_t cell) { code.joint_cell(f, cell); });
}

template <class T>
void backward(const SoftmaxLossBackwardArguments& a, const SoftmaxLossGradients& out) {
  using A = acc_t<T>;
  const auto& code = std::get<RowKernels<T>>(kernels());
  Backward<T> b{make_upstream<T>(a), plan<T>(a)};
  const VisitedInputs<T>& in = b.in;
  b.grad_logits = make_rows<T>(out.logits);
  fill_zeros(out.margin);
  fill_zeros(out.pair);
  std::vector<int64_t> start, order, carry_slot(in.chunks(), -1);
  std::vector<A> partial(a.want_offset ? in.chunks() * in.C : 0), carry(a.want_pair ? in.chunks() * in.C : 0);
  std::vector<A> row_margin(a.want_margin ? in.rows : 0);
  if (a.want_offset) b.partial_offset = partial.data();
  if (a.want_margin) b.row_margin = row_margin.data();
  if (a.want_pair) {
    order = sort_rows(in.rows, in.pair_rows, &start, [&](int64_t i) { return resolve_labels<A>(in, i).slot; });
    b.in.order = order.data();
    b.grad_pair = data<A>(out.pair);
    b.carry = carry.data();
    b.carry_slot = carry_slot.data();
  }

  const auto backward_chunk = in.narrow ? code.narrow_backward_chunk : code.backward_chunk;
  each_chunk(in.chunks(), [&](int64_t chunk) { backward_chunk(b, chunk); });
  if (a.want_offset) sum_chunks(partial.data(), in.chunks(), in.C, data<A>(out.offset));
  for (int64_t k = 0; a.want_pair && k < in.chunks(); ++k)
    for (int64_t c = 0; carry_slot[k] >= 0 && c < in.C; ++c)
      b.grad_pair[carry_slot[k] * in.C + c] += carry[k * in.C + c];
  for (int64_t i = 0; a.want_margin && i < in.rows; ++i) {
    const auto row = resolve_labels<A>(in, i);
    if (row.kind == LabelKind::kValid && row.a >= 0) data<A>(out.margin)[row.a] -= row_margin[i];
  }
}

void softmax_loss_fwd_cpu(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  BoxedCall call(stack, num_inputs, num_outputs);
  const SoftmaxLossForwardArguments a(call);
  const SoftmaxLossOutputs out(a);
  dispatch_floating(a.logits.scalar_type(), [&](auto tag) { forward<decltype(tag)>(a, out); });
  out.give(call);
}

void softmax_loss_bwd_cpu(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  BoxedCall call(stack, num_inputs, num_outputs);
  const SoftmaxLossBackwardArguments a(call);
  const SoftmaxLossGradients out(a);
  dispatch_floating(a.logits.scalar_type(), [&](auto tag) { backward<decltype(tag)>(a, out); });
  out.give(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("softmax_loss_fwd", &softmax_loss_fwd_cpu);
  m.impl("softmax_loss_bwd", &softmax_loss_bwd_cpu);
}

}  // namespace classfair
