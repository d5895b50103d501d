// softmax_loss forward, device code: a row, and a row's softmax for the column sums.
#pragma once

#include "cuda/softmax_loss.cuh"

namespace classfair {

// One row for the column sums: p = exp((z - high) - low).
template <class A>
struct alignas(sizeof(A) == 4 ? 16 : 8) RowSoftmax {
  A high, low;
  int64_t counted;  // 0 or 1; no padding that a wide load would read unwritten
};

// What rows add to the total weight and to the sum of the losses.
struct Totals {
  double weight, loss;
};

template <class T>
struct Forward {
  using A = acc_t<T>;
  Inputs<T> in;
  int width;
  int64_t units;           // blocks of work
  A* loss;                 // (rows,)
  double *lse, *lse_raw;   // (rows,); lse_raw null where it would equal lse
  Totals* unit_totals;     // (units,)
  int64_t* prediction;     // (rows,), and all below: null without statistics
  RowSoftmax<A>* softmax;  // (rows,)
  int64_t* hit_key;        // (rows,), or (2 * rows,) with target_b: group * C + label, G * C where it has none
  A* hit_value;            // likewise
  int64_t* cell_key;       // (rows,) or null; `cells` where it has none
  unsigned long long* counts;

  __device__ int64_t no_key() const { return in.G * in.C; }
};

// Running log-sum-exp of one thread's columns.
template <class A>
struct OnlineSum {
  A top = -kInfinity<A>, sum = 0;

  // Finite where every column so far is -inf, so that no difference is NaN.
  __device__ A reference() const { return top == -kInfinity<A> ? A(0) : top; }
  __device__ void raise(A batch_top) {
    if (!(batch_top > top)) return;
    sum *= std::exp(top - batch_top);
    top = batch_top;
  }
  __device__ void add(const A (&x)[kBatch<A>]) {
    const A from = reference();
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j) sum += std::exp(x[j] - from);
  }
};

template <class A>
__device__ A batch_max(const A (&x)[kBatch<A>]) {
  A m = x[0];
#pragma unroll
  for (int j = 1; j < kBatch<A>; ++j) m = Max{}(m, x[j]);
  return m;
}

// Log-sum-exp of a row, in the two parts that keep it exact.
template <class A>
struct LogSum {
  A max, log;
  bool dead;  // every logit is -inf
  __device__ double total() const { return static_cast<double>(max) + static_cast<double>(log); }
};

template <class A>
__device__ LogSum<A> team_log_sum(const Team& team, const OnlineSum<A>& own) {
  OnlineSum<A> row;
  row.top = team_reduce(team, own.top, Max{});
  row.sum = team_reduce(team, own.sum * std::exp(own.top - row.reference()), Sum{});
  const bool dead = row.top == -kInfinity<A> && row.sum == row.sum;
  return {row.top, dead ? A(0) : std::log(row.sum), dead};
}

template <class A>
struct RowScan {
  LogSum<A> lse, raw;  // of the perturbed and of the given logits
  A linear, weights;   // sum_c w_c (x_c - max) and sum_c w_c, for smoothing
  int prediction;      // first maximum of the given logits, or first NaN, as torch.argmax
};

// The one pass over a row; every thread of the team gets the result.
template <bool kStats, class T, class A = acc_t<T>>
__device__ RowScan<A> scan_row(const Inputs<T>& in, const RowLabels<A>& row, const T* z, const Team& team) {
  const bool perturbed = in.perturbed(), smoothed = in.smoothed();
  const int C = in.columns(), width = team.width;
  const int a = static_cast<int>(row.a);
  const A* pair = in.pair_row(row.slot);
  OnlineSum<A> own, own_raw;
  A linear = 0, weights = 0, best_value = -kInfinity<A>;
  int best = team.lane;  // all -inf: the row's first column
  for (int base = team.lane; base < C; base += kBatch<A> * width) {
    A x[kBatch<A>];
    load_batch(z, in.logits.stride_c, base, width, C, x);
    A top = batch_max(x);
    if (kStats && top > best_value) {
      best_value = top;
#pragma unroll
      for (int j = kBatch<A> - 1; j >= 0; --j)
        if (x[j] == top) best = base + j * width;
    }
    if (perturbed) {
      if (kStats) own_raw.raise(top), own_raw.add(x);
      perturb_batch(in.offset, pair, base, width, C, x);
#pragma unroll
      for (int j = 0; j < kBatch<A>; ++j)
        if (in.margin && base + j * width == a) x[j] -= in.margin[row.a];
      top = batch_max(x);
    }
    const A before = own.reference();
    own.raise(top);
    own.add(x);
    if (!smoothed) continue;
    linear += weights * (before - own.reference());
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j) {
      const int c = base + j * width;
      const A w = c >= C ? A(0) : in.class_weight(c);
      if (c < C) linear += w * (x[j] - own.reference());
      weights += w;
    }
  }
  RowScan<A> scan{};
  scan.lse = team_log_sum(team, own);
  if (smoothed) {
    scan.linear = team_reduce(team, linear + weights * (own.reference() - scan.lse.max), Sum{});
    scan.weights = team_reduce(team, weights, Sum{});
  }
  if (!kStats) return scan;
  scan.raw = perturbed ? team_log_sum(team, own_raw) : scan.lse;
  scan.prediction = team_reduce(team, best_value == scan.raw.max ? best : C, Min{});
  if (is_finite(scan.raw.total())) return scan;
  int first_nan = C;
  for (int c = team.lane; c < C; c += width) {
    const A v = static_cast<A>(z[c * in.logits.stride_c]);
    if (v != v && c < first_nan) first_nan = c;
  }
  first_nan = team_reduce(team, first_nan, Min{});
  if (first_nan < C) scan.prediction = first_nan;
  return scan;
}

// sum_c t_c (lse - x_c) over dense targets, with 0 * inf = 0.
template <class T, class A = acc_t<T>>
__device__ A dense_loss(const Inputs<T>& in, int64_t i, const T* z, const LogSum<A>& lse, const Team& team) {
  const A* soft = in.soft.row(i);
  const int C = in.columns();
  A loss = 0;
  for (int base = team.lane; base < C; base += kBatch<A> * team.width) {
    A x[kBatch<A>], t[kBatch<A>];
    load_batch(z, in.logits.stride_c, base, team.width, C, x);
    perturb_batch<A>(in.offset, nullptr, base, team.width, C, x);
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j) {
      const int c = base + j * team.width;
      t[j] = c < C ? in.spread_target(soft, c) : A(0);
    }
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j)
      if (t[j] != A(0)) loss += t[j] * (lse.log - (x[j] - lse.max));
  }
  return team_reduce(team, loss, Sum{});
}

// One hard label's part of the loss.
template <class T, class A = acc_t<T>>
__device__ A label_loss(const Inputs<T>& in, const RowLabels<A>& row, int64_t y, A share, const T* z,
                        const RowScan<A>& scan) {
  if (y < 0 || share == A(0)) return A(0);
  const A* pair = in.pair_row(row.slot);
  A x = static_cast<A>(z[y * in.logits.stride_c]);
  if (in.offset) x += in.offset[y];
  if (pair) x += pair[y];
  if (in.margin && y == row.a) x -= in.margin[y];
  const A nll = scan.lse.log - (x - scan.lse.max);
  const A w = in.class_weight(y);
  A loss = share * (A(1) - in.smoothing) * w * focal_weight(nll, in.gamma) * nll;
  if (in.smoothed()) loss += share * in.smoothing_share * (scan.weights * scan.lse.log - scan.linear);
  return loss;
}

// What one thread writes for the statistics of its row.
template <class T, class A = acc_t<T>>
__device__ void write_statistics(const Forward<T>& f, int64_t i, const RowLabels<A>& row, const T* z,
                                 const RowScan<A>& scan) {
  const Inputs<T>& in = f.in;
  const bool valid = row.kind == LabelKind::kValid, finite = is_finite(scan.raw.total());
  const bool counted = valid && finite && row.label >= 0 && row.group >= 0;
  const double lse = scan.raw.total();
  const A high = static_cast<A>(lse), low = static_cast<A>(lse - high);
  f.prediction[i] = scan.prediction;
  if (f.lse_raw) f.lse_raw[i] = valid ? lse : 0.0;
  f.softmax[i] = {high, low, counted};
  const auto probability = [&](int64_t y) {
    return std::exp((static_cast<A>(z[y * in.logits.stride_c]) - high) - low);
  };
  const int64_t base = row.group * in.C, cells = in.G * in.C;
  // Every counted row has one item under its group, so that sorting the items by key also sorts the rows by group.
  const bool dense = in.soft.data != nullptr;
  const int64_t label = !dense && row.a >= 0 ? row.a : row.label;
  const A share = dense ? A(1) : row.a >= 0 ? row.share_a : A(0);
  f.hit_key[i] = counted ? base + label : f.no_key();
  f.hit_value[i] = counted && share != A(0) ? share * probability(label) : A(0);
  if (in.target_b) {
    const bool second = counted && row.b >= 0;
    f.hit_key[in.rows + i] = second ? base + row.b : f.no_key();
    f.hit_value[in.rows + i] = second ? row.share_b * probability(row.b) : A(0);
  }
  if (f.cell_key) f.cell_key[i] = counted && row.cell >= 0 ? row.cell : in.cells;
  if (row.kind == LabelKind::kInvalid) atomicAdd(f.counts + 3 * cells, 1ull);
  if (valid && !finite) atomicAdd(f.counts + 3 * cells + 1, 1ull);
  if (!counted) return;
  atomicAdd(f.counts + base + row.label, 1ull);
  if (scan.prediction == row.label) atomicAdd(f.counts + cells + base + row.label, 1ull);
  atomicAdd(f.counts + 2 * cells + base + scan.prediction, 1ull);
}

// All of one row; what it returns is of use in the team's first thread.
template <bool kStats, class T, class A = acc_t<T>>
__device__ Totals forward_row(const Forward<T>& f, int64_t i, const Team& team) {
  const Inputs<T>& in = f.in;
  const RowLabels<A> row = resolve_labels<A>(in, i);
  const bool valid = row.kind == LabelKind::kValid, dense = in.soft.data != nullptr;
  const T* z = in.logits.row(i);
  RowScan<A> scan{};
  A loss = 0;
  if (valid || kStats) scan = scan_row<kStats>(in, row, z, team);
  if (valid && dense) loss = dense_loss(in, i, z, scan.lse, team);
  if (team.lane != 0) return {};
  double weight = 0.0;
  if (valid) {
    loss += label_loss(in, row, row.a, row.share_a, z, scan);
    loss += label_loss(in, row, row.b, row.share_b, z, scan);
    if (scan.lse.dead) loss = kInfinity<A>;
    weight = dense ? 1.0 : 0.0;
    if (row.a >= 0) weight += row.share_a * in.class_weight(row.a);
    if (row.b >= 0) weight += row.share_b * in.class_weight(row.b);
    loss = weighted_loss(row.sample_weight, loss);
    weight *= row.sample_weight;
  } else if (row.kind == LabelKind::kInvalid) {
    loss = kNaN<A>;
  }
  f.loss[i] = loss;
  f.lse[i] = valid ? scan.lse.total() : 0.0;
  if (kStats) write_statistics(f, i, row, z, scan);
  return {weight, loss};
}

// A team owns a row: it reads the row once (dense targets: twice) and writes its loss, log-sum-exp and what the
// statistics need. A block writes the totals of its rows.
template <class T, bool kStats>
__global__ void __launch_bounds__(kMaxWidth, kMinBlocks) softmax_loss_fwd_kernel(Forward<T> f) {
  __shared__ double weights[kSmallBlock], losses[kSmallBlock];
  const Team team(f.width);
  const int teams = blockDim.x / f.width, own = threadIdx.x / f.width;
  for (int64_t unit = blockIdx.x; unit < f.units; unit += gridDim.x) {
    const int64_t i = unit * teams + own;
    const Totals row = i < f.in.rows ? forward_row<kStats>(f, i, team) : Totals{};
    if (team.lane == 0) weights[own] = row.weight, losses[own] = row.loss;
    __syncthreads();
    if (threadIdx.x == 0) {
      Totals sum{};
      for (int t = 0; t < teams; ++t) sum.weight += weights[t], sum.loss += losses[t];
      f.unit_totals[unit] = sum;
    }
    __syncthreads();
  }
}

// One block adds up the totals of all units.
template <class A>
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const Totals* unit, int64_t units, bool divided, bool smoothed, A* total_weight, A* reduced) {
  Totals sum{};
  for (int64_t k = threadIdx.x; k < units; k += kThreads) sum.weight += unit[k].weight, sum.loss += unit[k].loss;
  sum.weight = block_reduce(sum.weight, Sum{});
  sum.loss = block_reduce(sum.loss, Sum{});
  if (threadIdx.x != 0) return;
  const A weight = static_cast<A>(sum.weight), loss = static_cast<A>(sum.loss);
  *total_weight = weight;
  *reduced = divided ? mean(loss, weight, smoothed) : loss;
}

// p of one row (or of an item of its second label: 0) at one column.
template <class T>
struct SoftmaxColumn {
  using A = acc_t<T>;
  Rows<const T> logits;
  int64_t rows;
  const RowSoftmax<A>* softmax;

  struct Row {
    RowSoftmax<A> softmax;
    const T* z;
  };

  __device__ Row row(int64_t item) const {
    const int64_t i = item < rows ? item : rows - 1;
    Row row{softmax[i], logits.row(i)};
    row.softmax.counted &= item < rows;
    return row;
  }
  __device__ A column(const Row& row, int c) const {
    const A p = std::exp((static_cast<A>(row.z[c * logits.stride_c]) - row.softmax.high) - row.softmax.low);
    return row.softmax.counted ? p : A(0);
  }
};

}  // namespace classfair
