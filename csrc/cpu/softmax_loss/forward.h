// The forward pass of softmax_loss: one row, one chunk of rows, one cell of the joint rows.
// Included once for each instruction set, by row_code.h.

namespace classfair {
namespace CLASSFAIR_ISA {

// sum_c t_c (lse - x_c) over dense targets t = w ((1-e) soft + e/C), with 0 * inf = 0. In double, because one number
// after the other is added.
template <class T, class E, class A = acc_t<T>>
A dense_loss(const Inputs<T>& in, const A* soft, const E* x, A m, A log_sum) {
  double loss = 0;
  for (int64_t c = 0; c < in.C; ++c) {
    const A t = smoothed_target(in.class_weight(c), soft[c], in.smoothing, in.smoothing_share);
    if (t != A(0)) loss += t * (log_sum - (static_cast<A>(x[c]) - m));
  }
  return static_cast<A>(loss);
}

// Log-sum-exp of one row, in the two parts that keep it exact.
template <class A>
struct LogSum {
  A max, log;
  bool dead;  // every logit is -inf
  double total() const { return static_cast<double>(max) + static_cast<double>(log); }
};

// e, w, linear and next as in exp_sum; sum, where not null, receives the sum of exponentials.
template <bool kKeep, bool kLinear, class E, class T, class A = acc_t<E>>
LogSum<A> log_sum(const E* x, int64_t C, A max, A* e, const A* w, A* linear, A* sum, const T* next) {
  if (max == -std::numeric_limits<A>::infinity()) {
    bool nan = false;
    for (int64_t c = 0; c < C; ++c) nan |= std::isnan(static_cast<A>(x[c]));
    return {max, nan ? std::numeric_limits<A>::quiet_NaN() : A(0), !nan};
  }
  const A total = exp_sum<kKeep, kLinear>(x, C, max, e, w, linear, next);
  if (sum) *sum = total;
  return {max, std::log(total), false};
}

template <class T, class E, class A = acc_t<T>>
A hard_loss(const Inputs<T>& in, const Row<A>& row, const E* x, const LogSum<A>& lse, A linear, A weight_sum) {
  A loss = 0;
  const auto add = [&](int64_t y, A share) {
    if (y < 0 || share == A(0)) return;
    const A nll = lse.log - (static_cast<A>(x[y]) - lse.max);
    loss += share * (A(1) - in.smoothing) * in.class_weight(y) * focal_weight(nll, in.gamma) * nll;
    if (in.smoothing != A(0)) loss += share * in.smoothing / A(in.C) * (weight_sum * lse.log - linear);
  };
  add(row.a, row.share_a);
  add(row.b, row.share_b);
  return loss;
}

// One row; z is contiguous, and so is the row that comes next. x: a buffer of C for perturbed logits.
template <class T, class A = acc_t<T>>
void forward_row(const Forward<T>& f, int64_t chunk, int64_t i, const Row<A>& row, const T* z, const T* next,
                 const A* soft, GroupSums<A>& mass, A* x) {
  const VisitedInputs<T>& in = f.in;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const bool perturbed = in.perturbed(), smooth = in.smoothed();
  A linear = 0, sum_raw = 1;
  LogSum<A> lse, raw;
  const auto finish = [&](const auto* logits) {
    f.lse[i] = lse.total();
    const A loss = lse.dead ? kInf
                   : soft   ? dense_loss(in, soft, logits, lse.max, lse.log)
                            : hard_loss(in, row, logits, lse, linear, in.weight_sum);
    f.loss[i] = weighted_loss(row.sample_weight, loss);
  };
  A* const none = nullptr;
  A* const e = mass.buffer();  // exponentials of the raw logits
  // The softmax of a row that is alone in its cell is at hand; other cells have a pass.
  A* const own = f.joint && row.cell >= 0 && f.cell_rows(row.cell) == 1 ? f.joint + row.cell * in.C : nullptr;
  if (own) prefetch_for_write(own, in.C);
  const Maximum<A> max = in.stats ? row_argmax(z, in.C) : Maximum<A>{perturbed ? A(0) : row_max(z, in.C), 0};
  if (perturbed) {
    A max_x = perturb(z, in.offset, in.pair_row(row.slot), in.C, x);
    if (in.margin && row.a >= 0) {
      x[row.a] -= in.margin[row.a];
      max_x = row_max(x, in.C);
    }
    lse = smooth ? log_sum<false, true>(x, in.C, max_x, none, in.weight, &linear, none, next)
                 : log_sum<false, false>(x, in.C, max_x, none, in.weight, none, none, next);
    finish(x);
    if (in.stats) raw = log_sum<true, false>(z, in.C, max.value, e, in.weight, none, &sum_raw, z);
    if (f.lse_raw) f.lse_raw[i] = raw.total();
  } else {
    if (in.stats)
      lse = smooth ? log_sum<true, true>(z, in.C, max.value, e, in.weight, &linear, &sum_raw, next)
                   : log_sum<true, false>(z, in.C, max.value, e, in.weight, none, &sum_raw, next);
    else
      lse = smooth ? log_sum<false, true>(z, in.C, max.value, none, in.weight, &linear, none, next)
                   : log_sum<false, false>(z, in.C, max.value, none, in.weight, none, none, next);
    finish(z);
    raw = lse;
  }
  if (!in.stats) return;
  const bool finite = std::isfinite(raw.total());
  f.prediction[i] = prediction(z, in.C, max, finite);
  RowStatistics<A>& s = f.row_statistics[i];
  s = RowStatistics<A>::none();
  if (!finite) ++f.chunk_nonfinite[chunk];
  if (!finite || row.label < 0 || row.group < 0) return;
  const A scale = A(1) / sum_raw;
  const int64_t hit = in.soft.data ? row.label : row.a;
  s.label = static_cast<int32_t>(row.label);
  s.a = static_cast<int32_t>(hit);
  s.b = static_cast<int32_t>(row.b);
  if (hit >= 0) s.hit_a = e[hit] * scale * (in.soft.data ? A(1) : row.share_a);
  if (row.b >= 0) s.hit_b = e[row.b] * scale * row.share_b;
  if (own) {
    for_columns<A>(
        in.C, [&](int64_t c) { store(own + c, load(e + c) * scale); },
        [&](int64_t c, int64_t n) { store_some(own + c, load_some(e + c, n, A(0)) * scale, n); });
  }
  mass.add(scale);
}

// A row that is not in the loss: only its prediction is given.
template <class T, class A = acc_t<T>>
void skip_row(const Forward<T>& f, int64_t i, LabelKind kind, const T* z) {
  f.loss[i] = kind == LabelKind::kIgnored ? A(0) : std::numeric_limits<A>::quiet_NaN();
  f.lse[i] = 0;
  if (f.lse_raw) f.lse_raw[i] = 0;
  if (!f.in.stats) return;
  f.prediction[i] = prediction(z, f.in.C, row_argmax(z, f.in.C), false);
  f.row_statistics[i] = RowStatistics<A>::none();
}

// Rows [first, end) of a chunk.
template <class T>
void forward_rows(const Forward<T>& f, int64_t chunk, int64_t first, int64_t end) {
  using A = acc_t<T>;
  const VisitedInputs<T>& in = f.in;
  constexpr int64_t kBuffers = GroupSums<A>::kPending;
  A* x = scratch<A>((1 + kBuffers + kTile) * in.C);
  A* buffers = x + in.C;
  const TileReader<T> logits{in.logits, in.C, in.logits.contiguous() ? nullptr : scratch_tile<T>(kTile * in.C)};
  const TileReader<A> soft{in.soft, in.C, buffers + kBuffers * in.C};
  A* partial = f.partial_mass ? f.partial_mass + chunk * f.unit_size : nullptr;
  GroupSums<A> mass(partial, in.C, in.by_group, buffers);
  double weight = 0;
  int64_t rows[kTile];
  for (int64_t begin = first; begin < end; begin += kTile) {
    const int64_t count = tile_rows(in, begin, end, rows);
    logits.prepare(rows, count);
    if (in.soft.data) soft.prepare(rows, count);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = rows[r];
      const Row<A> row = resolve_labels<A>(in, i);
      if (in.stats && row.group >= 0 && row.group < in.G) mass.enter(row.group);
      if (row.kind != LabelKind::kValid) {
        if (row.kind == LabelKind::kInvalid) f.chunk_bad[chunk] = std::min(i, f.chunk_bad[chunk]);
        skip_row(f, i, row.kind, logits.row(i, r));
        continue;
      }
      weight += in.soft.data ? row.sample_weight : A(0);
      if (row.a >= 0) weight += row.sample_weight * (row.share_a * in.class_weight(row.a));
      if (row.b >= 0) weight += row.sample_weight * (row.share_b * in.class_weight(row.b));
      const T* const z = logits.row(i, r);
      const bool fetch = in.logits.contiguous() && begin + r + 1 < end;
      const T* const next = fetch ? in.logits.row(in.visited(begin + r + 1)) : z;
      forward_row(f, chunk, i, row, z, next, in.soft.data ? soft.row(i, r) : nullptr, mass, x);
    }
  }
  f.chunk_weight[chunk] += weight;
  mass.finish();
}

// Clears what a chunk sums. Returns where the chunk ends.
template <class T>
int64_t begin_chunk(const Forward<T>& f, int64_t chunk) {
  using A = acc_t<T>;
  f.chunk_bad[chunk] = f.in.rows;
  f.chunk_nonfinite[chunk] = 0;
  f.chunk_weight[chunk] = 0;
  if (f.partial_mass && !f.in.by_group)
    std::fill(f.partial_mass + chunk * f.unit_size, f.partial_mass + (chunk + 1) * f.unit_size, A(0));
  return std::min((chunk + 1) * f.in.chunk_rows, f.in.rows);
}

template <class T>
void forward_chunk(const Forward<T>& f, int64_t chunk) {
  const int64_t end = begin_chunk(f, chunk);
  forward_rows(f, chunk, chunk * f.in.chunk_rows, end);
}

// joint[cell] = sum of p over the rows of a cell; rows of a cell are neighbours in cell_order. Summed in double, as
// hit.
template <class T>
void joint_cell(const Forward<T>& f, int64_t cell) {
  using A = acc_t<T>;
  const VisitedInputs<T>& in = f.in;
  if (f.cell_rows(cell) == 1 && f.row_statistics[f.cell_order[f.cell_start[cell]]].counted()) return;  // done
  A* e = scratch<A>((2 + kTile) * in.C);
  double* sum = scratch<double, 2>(in.C);
  std::fill(sum, sum + in.C, 0.0);
  const TileReader<T> logits{in.logits, in.C, in.logits.contiguous() ? nullptr : scratch_tile<T>(kTile * in.C)};
  for (int64_t position = f.cell_start[cell]; position < f.cell_start[cell + 1]; ++position) {
    const int64_t i = f.cell_order[position];
    if (!f.row_statistics[i].counted()) continue;
    logits.prepare(&i, 1);
    const double lse = f.lse_raw ? f.lse_raw[i] : f.lse[i];
    const A high = static_cast<A>(lse), low = static_cast<A>(lse - high);
    const T* z = logits.row(i, 0);
    for_columns<A>(
        in.C, [&](int64_t c) { store(e + c, exp((load(z + c) - high) - low)); },
        [&](int64_t c, int64_t n) { store_some(e + c, exp((load_some(z + c, n, A(0)) - high) - low), n); });
    for (int64_t c = 0; c < in.C; ++c) sum[c] += e[c];
  }
  std::copy(sum, sum + in.C, f.joint + cell * in.C);
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
