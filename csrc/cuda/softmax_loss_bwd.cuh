// softmax_loss backward, device code: a row, and a row's gradient for the column sums.
#pragma once

#include "cuda/softmax_loss.cuh"

namespace classfair {

// Gradient of one row in its perturbed logits from loss and lse:
// scale * exp(x - lse) - target_scale * spread_target, with the columns of hard labels formed apart.
template <class A>
struct RowGradient {
  A scale = 0, high = 0, low = 0, target_scale = 0;
  int a = -1, b = -1;  // columns formed apart, -1: none
  A value_a = 0, value_b = 0;
  int64_t slot = -1;
  int64_t live = 0;  // 0: the row's gradient is 0; no padding that a wide load would read unwritten
};

// The same from the statistics: scale * p * (upstream_c + extras - dot), p the softmax of the given logits.
template <class A>
struct RowStatisticsGradient {
  bool live = false;
  A high = 0, low = 0, dot = 0, scale = 1;
  const A *mass = nullptr, *joint = nullptr;  // upstream rows, null: zero
  int a = -1, b = -1;
  A extra_a = 0, extra_b = 0;  // of hit

  __device__ A softmax(A z) const { return std::exp((z - high) - low); }
  __device__ A upstream(int c) const { return (joint ? joint[c] : A(0)) + (mass ? mass[c] : A(0)); }
  __device__ A extras(int c) const { return (c == a ? extra_a : A(0)) + (c == b ? extra_b : A(0)); }
};

template <class T>
struct Backward {
  using A = acc_t<T>;
  Inputs<T> in;
  Upstream<T> up;
  int width;
  int64_t units;  // blocks of work
  Rows<T> grad_logits;
  RowGradient<A>* row_gradient;  // (rows,) for offset and pair, or null
  int64_t* slot_key;             // (rows,) or null; pair_rows where a row has no slot
  int64_t* margin_key;           // (rows,) or null; C where a row has no label
  A* margin_value;               // (rows,)
};

// The perturbed part at one column.
template <class T, class A = acc_t<T>>
__device__ A perturbed_column(const Inputs<T>& in, const RowGradient<A>& g, const A* pair, const A* soft, int c, A z) {
  if (c == g.a) return g.value_a;
  if (c == g.b) return g.value_b;
  A x = z;
  if (in.offset) x += in.offset[c];
  if (pair) x += pair[c];
  A v = g.scale * std::exp((x - g.high) - g.low);
  if (soft || in.smoothed()) v -= g.target_scale * in.spread_target(soft, c);
  return v;
}

// Sum over the row of the target that is not a hard label.
template <class T, class A = acc_t<T>>
__device__ A spread_target_sum(const Inputs<T>& in, const A* soft, const Team& team) {
  if (!soft && !in.weight) return in.smoothing;
  A sum = 0;
  for (int c = team.lane; c < in.columns(); c += team.width) sum += in.spread_target(soft, c);
  return team_reduce(team, sum, Sum{});
}

// Everything the column loop needs of the perturbed part.
template <class T, class A = acc_t<T>>
__device__ RowGradient<A> perturbed_gradient(const Backward<T>& b, int64_t i, const RowLabels<A>& row, const T* z,
                                             const A* soft, const Team& team) {
  const Inputs<T>& in = b.in;
  RowGradient<A> g;
  const double lse = b.up.lse[i];
  if (row.kind != LabelKind::kValid || lse == -kInfinity<double>) return g;  // all -inf: loss +inf, gradient 0
  const A upstream = b.up.of_loss(i) * row.sample_weight, upstream_lse = b.up.of_lse(i);
  const A* pair = in.pair_row(row.slot);
  g.live = true;
  g.high = static_cast<A>(lse);
  g.low = static_cast<A>(lse - g.high);
  g.slot = row.slot;
  const auto log_softmax = [&](int64_t y) {
    A x = static_cast<A>(z[y * in.logits.stride_c]);
    if (in.offset) x += in.offset[y];
    if (pair) x += pair[y];
    if (in.margin && y == row.a) x -= in.margin[y];
    return (x - g.high) - g.low;
  };
  // Hard targets: t_y = share (1-e) w_y slope, the slope being the focal term's.
  const auto hard_target = [&](int64_t y, A share) {
    if (y < 0 || share == A(0)) return A(0);
    return share * (A(1) - in.smoothing) * in.class_weight(y) * focal_slope(-log_softmax(y), in.gamma);
  };
  A target_a = hard_target(row.a, row.share_a);
  const A target_b = hard_target(row.b, row.share_b);
  A total = target_a + target_b;  // s = sum_c t_c
  g.target_scale = upstream;
  if (soft) {
    total = spread_target_sum(in, soft, team);
  } else if (in.smoothed()) {
    const A share = row.share_a + row.share_b;
    total += share * spread_target_sum(in, soft, team);
    g.target_scale *= share;
  }
  g.scale = upstream * total + upstream_lse;

  // p - 1 without cancellation.
  const auto special = [&](int64_t y, A target) {
    if (y < 0) return A(0);
    const A log_p = log_softmax(y);
    const A spread = soft || in.smoothed() ? g.target_scale * in.spread_target(soft, y) : A(0);
    const A rest = upstream * (total - target) - spread;  // 0 for a plain hard label
    return upstream * total * std::expm1(log_p) + rest + upstream_lse * std::exp(log_p);
  };
  g.a = static_cast<int>(row.a);
  g.b = row.b == row.a ? -1 : static_cast<int>(row.b);
  if (row.b == row.a) target_a += target_b;
  g.value_a = special(g.a, target_a);
  g.value_b = special(g.b, target_b);
  return g;
}

// Everything the column loop needs of the statistics' part.
template <class T, class A = acc_t<T>>
__device__ RowStatisticsGradient<A> statistics_gradient(const Backward<T>& b, int64_t i, const RowLabels<A>& row,
                                                        const T* z, const Team& team) {
  const Inputs<T>& in = b.in;
  RowStatisticsGradient<A> g;
  const Upstream<T>& up = b.up;
  const double lse = up.lse_raw[i];
  if (!up.statistics() || row.label < 0 || row.group < 0 || !is_finite(lse)) return g;
  g.live = true;
  g.high = static_cast<A>(lse);
  g.low = static_cast<A>(lse - g.high);
  if (up.stats_scale) g.scale = *up.stats_scale;
  if (up.grad_mass) g.mass = up.grad_mass + row.group * in.C;
  if (up.grad_joint && row.cell >= 0) g.joint = up.grad_joint + row.cell * in.C;
  if (g.mass || g.joint) {
    A dot = 0;
    const int C = in.columns();
    for (int base = team.lane; base < C; base += kBatch<A> * team.width) {
      A x[kBatch<A>], upstream[kBatch<A>];
      load_batch(z, in.logits.stride_c, base, team.width, C, x);
#pragma unroll
      for (int j = 0; j < kBatch<A>; ++j) {
        const int c = base + j * team.width;
        upstream[j] = c < C ? g.upstream(c) : A(0);
      }
#pragma unroll
      for (int j = 0; j < kBatch<A>; ++j)
        if (base + j * team.width < C) dot += g.softmax(x[j]) * upstream[j];
    }
    g.dot = team_reduce(team, dot, Sum{});
  }
  if (!up.grad_hit) return g;
  const A* hit = up.grad_hit + row.group * in.C;
  const auto extra = [&](int64_t y, A share, A* value) {
    if (y < 0) return;
    *value = share * hit[y];
    g.dot += g.softmax(static_cast<A>(z[y * in.logits.stride_c])) * *value;
  };
  const bool dense = in.soft.data != nullptr;
  g.a = static_cast<int>(dense ? row.label : row.a);
  g.b = static_cast<int>(row.b);
  extra(g.a, dense ? A(1) : row.share_a, &g.extra_a);
  extra(g.b, row.share_b, &g.extra_b);
  return g;
}

// Writes the gradient of a row, in which `g` and `s` hold all that is not of one column.
template <class T, class A = acc_t<T>>
__device__ void write_gradient(const Inputs<T>& in, const RowGradient<A>& g, const RowStatisticsGradient<A>& s,
                               const T* z, const A* pair, const A* soft, T* out, int64_t out_stride, const Team& team) {
  const int C = in.columns(), width = team.width;
  // The drop-in's row is a multiple of its softmax but for the labels' columns, which are written after it.
  const bool plain = g.live && !s.live && !in.offset && !pair && !soft && !in.smoothed();
  for (int base = team.lane; base < C; base += kBatch<A> * width) {
    A x[kBatch<A>];
    load_batch(z, in.logits.stride_c, base, width, C, x);
    if (plain) {
#pragma unroll
      for (int j = 0; j < kBatch<A>; ++j) x[j] = g.scale * std::exp((x[j] - g.high) - g.low);
    } else {
#pragma unroll
      for (int j = 0; j < kBatch<A>; ++j) {
        const int c = base + j * width;
        if (c >= C) break;
        A v = g.live ? perturbed_column(in, g, pair, soft, c, x[j]) : A(0);
        if (s.live) v += s.scale * s.softmax(x[j]) * (s.upstream(c) + s.extras(c) - s.dot);
        x[j] = v;
      }
    }
    T* to = out + base * out_stride;
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j, to += width * out_stride)
      if (base + j * width < C) *to = static_cast<T>(x[j]);
  }
  if (!plain) return;
  if (g.a >= 0 && (g.a & (width - 1)) == team.lane) out[g.a * out_stride] = static_cast<T>(g.value_a);
  if (g.b >= 0 && (g.b & (width - 1)) == team.lane) out[g.b * out_stride] = static_cast<T>(g.value_b);
}

// A team owns a row: it reads the row once (with statistics or dense targets: twice) and writes the row's gradient, and
// what the sums over rows need.
template <class T>
__global__ void __launch_bounds__(kMaxWidth, kMinBlocks) softmax_loss_bwd_kernel(Backward<T> b) {
  using A = acc_t<T>;
  const Inputs<T>& in = b.in;
  const Team team(b.width);
  const int teams = blockDim.x / b.width;
  for (int64_t unit = blockIdx.x; unit < b.units; unit += gridDim.x) {
    const int64_t i = unit * teams + threadIdx.x / b.width;
    if (i >= in.rows) continue;
    const RowLabels<A> row = resolve_labels<A>(in, i);
    const T* z = in.logits.row(i);
    const A* soft = in.soft.data ? in.soft.row(i) : nullptr;
    const A* pair = in.pair_row(row.slot);
    const RowGradient<A> g = perturbed_gradient(b, i, row, z, soft, team);
    RowStatisticsGradient<A> s;
    if (g.live) s = statistics_gradient(b, i, row, z, team);
    if (team.lane == 0) {
      if (b.row_gradient) b.row_gradient[i] = g;
      if (b.slot_key) b.slot_key[i] = g.live && g.slot >= 0 ? g.slot : in.pair_rows;
      if (b.margin_key) b.margin_key[i] = g.live && g.a >= 0 ? g.a : in.C;
      if (b.margin_key) b.margin_value[i] = -g.value_a;
    }
    write_gradient(in, g, s, z, pair, soft, b.grad_logits.row(i), b.grad_logits.stride_c, team);
  }
}

// The perturbed part of one row's gradient at one column, for the sums over rows.
template <class T>
struct GradientColumn {
  using A = acc_t<T>;
  Inputs<T> in;
  const RowGradient<A>* row_gradient;

  struct Row {
    RowGradient<A> gradient;
    const T* z;
    const A* soft;
  };

  __device__ Row row(int64_t i) const {
    return {row_gradient[i], in.logits.row(i), in.soft.data ? in.soft.row(i) : nullptr};
  }
  __device__ A column(const Row& row, int c) const {
    const A z = static_cast<A>(row.z[c * in.logits.stride_c]);
    const A v = perturbed_column(in, row.gradient, in.pair_row(row.gradient.slot), row.soft, c, z);
    return row.gradient.live ? v : A(0);
  }
};

}  // namespace classfair
