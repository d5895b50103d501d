// What the forward and the backward of softmax_loss share: inputs, team sizes and reading a row.
#pragma once

#include "cuda/common.cuh"
#include "softmax_loss_arguments.h"
#include "terms.h"

namespace classfair {

// A (rows, C) view of (N, C) or (N, C, L) memory: row i = n * L + l.
template <class T>
struct Rows {
  T* data;
  int64_t L, stride_n, stride_c, stride_l;

  __device__ T* row(int64_t i) const {
    if (L == 1) return data + i * stride_n;
    const int64_t n = divide(i, L);
    return data + n * stride_n + (i - n * L) * stride_l;
  }
};

template <class T>
struct Inputs {
  using A = acc_t<T>;
  Rows<const T> logits;
  int64_t rows, C, G, cells;
  const int64_t* target;              // (rows,) or null
  const int64_t* target_b;            // (rows,) or null
  const A* mix;                       // (rows,) share of `target`, or null
  Rows<const A> soft;                 // probabilities; data null where absent
  const A *offset, *margin, *weight;  // (C,) or null
  const A* pair;                      // (pair_rows, C) or null
  const int64_t* slot;                // (rows,) row of `pair`, null: the label
  int64_t pair_rows;
  const int64_t *group, *cell;  // (rows,) or null
  int64_t ignore_index;
  A smoothing, smoothing_share, gamma;  // smoothing_share = smoothing / C
  int64_t stats;

  // Columns are counted in 32 bits, which saves registers; offsets are not.
  __device__ int columns() const { return static_cast<int>(C); }
  C10_HOST_DEVICE bool perturbed() const { return offset != nullptr || margin != nullptr || pair != nullptr; }
  __device__ bool smoothed() const { return smoothing != A(0) && soft.data == nullptr; }
  __device__ const A* pair_row(int64_t row_slot) const { return row_slot >= 0 ? pair + row_slot * C : nullptr; }
  // The part of the target that is not a hard label: dense probabilities, or smoothing's share.
  __device__ A spread_target(const A* soft_row, int c) const {
    const A w = weight ? weight[c] : A(1);
    return soft_row ? smoothed_target(w, soft_row[c * soft.stride_c], smoothing, smoothing_share) : w * smoothing_share;
  }
};

// Consecutive threads take consecutive columns, a batch of them before the first is used: any stride, alignment and odd
// C are one and the same path, and which thread sums which column never depends on the layout.
template <class A>
constexpr int kBatch = 32 / sizeof(A);

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// The row's columns c = base, base + width, ...; -inf past the end.
template <class T, class A = acc_t<T>>
__device__ void load_batch(const T* z, int64_t stride, int base, int width, int C, A (&out)[kBatch<A>]) {
  const T* from = z + base * stride;
  const int64_t step = width * stride;
  if (base + (kBatch<A> - 1) * width < C) {
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j, from += step) out[j] = static_cast<A>(*from);
  } else {
#pragma unroll
    for (int j = 0; j < kBatch<A>; ++j, from += step)
      out[j] = base + j * width < C ? static_cast<A>(*from) : -kInfinity<A>;
  }
}

// x = z + offset + pair, columns past the end untouched; either may be null.
template <class A>
__device__ void perturb_batch(const A* offset, const A* pair, int base, int width, int C, A (&x)[kBatch<A>]) {
#pragma unroll
  for (int j = 0; j < kBatch<A>; ++j) {
    const int c = base + j * width;
    if (offset && c < C) x[j] += offset[c];
    if (pair && c < C) x[j] += pair[c];
  }
}

// Threads of a row, by C alone: up to kThreadColumns columns each, then up to kMaxWidth threads, which loop.
constexpr int kThreadColumns = 8, kMaxWidth = 256, kSmallBlock = 128;
// Blocks of kMaxWidth that fit a multiprocessor: 128 registers a thread. Not asked for a number, ptxas spills for a
// third.
constexpr int kMinBlocks = 2;

inline int row_width(int64_t C) {
  int width = 1;
  while (width < kMaxWidth && static_cast<int64_t>(width) * kThreadColumns < C) width *= 2;
  return width;
}

// A team wider than a warp is a block of its own.
inline int row_threads(int width) { return width > kWarp ? width : kSmallBlock; }

using Arguments = SoftmaxLossArguments;

template <class T>
Rows<T> rows_view(const Tensor& t) {
  if (t.dim() == 2) return {static_cast<T*>(t.data_ptr()), 1, t.stride(0), t.stride(1), 0};
  return {static_cast<T*>(t.data_ptr()), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
Inputs<T> make_inputs(const Arguments& a) {
  using A = acc_t<T>;
  Inputs<T> in{};
  const auto view = rows_view<T>(a.logits);
  in.logits = {view.data, view.L, view.stride_n, view.stride_c, view.stride_l};
  in.rows = a.logits.size(0) * view.L;
  in.C = a.logits.size(1);
  STD_TORCH_CHECK(in.C <= int64_t{1} << 30, "softmax_loss: more than 2^30 classes");
  in.G = a.num_groups;
  in.cells = a.num_cells;
  in.target = optional_data<int64_t>(a.target);
  in.target_b = optional_data<int64_t>(a.target_b);
  in.mix = optional_data<A>(a.mix);
  if (optional_data<A>(a.soft_target)) {
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
  in.smoothing_share = in.smoothing / static_cast<A>(in.C);
  in.gamma = static_cast<A>(a.gamma);
  in.stats = a.stats;
  return in;
}

}  // namespace classfair
