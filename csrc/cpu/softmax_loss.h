// What the row code of every instruction set is given: inputs, outputs and the meaning of one row.
#pragma once

#include <cstdint>
#include <limits>

#include "common.h"
#include "cpu/scratch.h"
#include "terms.h"

namespace classfair {

constexpr int64_t kTile = 16;             // rows gathered together when classes are not contiguous
constexpr int64_t kNarrow = 16;           // classes up to which a vector holds many rows
constexpr int64_t kCachedSums = 1 << 14;  // (G, C) sums up to which a chunk's are in the cache all the time

// A (rows, C) view of (N, C) or (N, C, L) memory: row i = n * L + l.
template <class T>
struct Rows {
  T* data;
  int64_t L, stride_n, stride_c, stride_l;

  T* row(int64_t i) const { return data + (i / L) * stride_n + (i % L) * stride_l; }
  bool contiguous() const { return stride_c == 1; }
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
  A smoothing, gamma;
  int64_t stats;
  bool by_group;         // the forward pass visits rows by group
  bool narrow;           // softmax_loss_narrow.h serves these rows
  const int64_t* order;  // rows in the order in which they are visited, null: natural
  int64_t chunk_rows;    // rows per chunk; never depends on the number of threads

  bool perturbed() const { return offset != nullptr || margin != nullptr || pair != nullptr; }
  int64_t chunks() const { return ceil_div(rows, chunk_rows); }
  int64_t visited(int64_t position) const { return order ? order[position] : position; }
};

template <class A>
using Row = RowLabels<A>;

template <class T>
Row<acc_t<T>> resolve(const Inputs<T>& in, int64_t i) {
  Row<acc_t<T>> row = resolve_labels<acc_t<T>>(in, i);
  if (row.cell >= in.cells) row.cell = -1;
  return row;
}

template <class A>
struct RowStatistics {
  int32_t label;  // -1: the row does not count
  int32_t a, b;   // classes that are hit, -1: none
  A hit_a, hit_b;

  bool counted() const { return label >= 0; }
  static RowStatistics none() { return {-1, -1, -1, A(0), A(0)}; }
};

template <class T>
struct Forward {
  using A = acc_t<T>;
  Inputs<T> in;
  A* loss;                           // (rows,)
  double *lse, *lse_raw;             // (rows,); lse_raw null where it would equal lse
  int64_t* prediction;               // (rows,) or null
  A* partial_mass;                   // (chunks + units, unit_size) or null; row chunk + u: of unit u
  int64_t unit_size;                 // of the (G, C) sums: C where rows are visited by group, else G * C
  RowStatistics<A>* row_statistics;  // (rows,) or null
  int64_t* chunk_nonfinite;          // (chunks,) rows without a finite log-sum-exp
  double* chunk_weight;              // (chunks,)
  int64_t* chunk_bad;                // (chunks,) first row with a bad label or group, or `rows`
  A* joint;                          // (cells, C) or null
  const int64_t* cell_order;         // (rows,) sorted by cell
  const int64_t* cell_start;         // (cells + 1,) into cell_order

  // Where rows are narrow; instead of what follows mass above, but that the row code may write row_statistics.
  double* chunk_sums;     // (chunks, sums_size()): hit, then the joint rows
  int64_t* chunk_counts;  // (chunks, 3 * G * C), as the counts

  int64_t sums_size() const { return (in.G + in.cells) * in.C; }
  int64_t cell_rows(int64_t cell) const { return cell_start[cell + 1] - cell_start[cell]; }
};

template <class T>
struct Backward {
  using A = acc_t<T>;
  Inputs<T> in;
  const A* grad_loss;  // null: zero
  int64_t grad_loss_stride;
  const double* grad_lse;                      // (rows,) or null
  const A *grad_mass, *grad_hit, *grad_joint;  // (G, C), (G, C), (cells, C) or null
  A statistics_scale;                          // of these three
  const double *lse, *lse_raw;                 // (rows,)
  Rows<T> grad_logits;
  A* partial_offset;    // (chunks, C) or null
  A* grad_pair;         // (pair_rows, C) or null; in.order then sorts rows by slot
  A* carry;             // (chunks, C): rows of a slot that began in an earlier chunk
  int64_t* carry_slot;  // (chunks,) or -1
  A* row_margin;        // (rows,) gradient of the perturbed target logit, or null

  bool statistics() const { return grad_mass != nullptr || grad_hit != nullptr || grad_joint != nullptr; }
};

// The row code of one instruction set.
template <class T>
struct RowKernels {
  void (*forward_chunk)(const Forward<T>&, int64_t chunk, acc_t<T> weight_sum);
  void (*joint_cell)(const Forward<T>&, int64_t cell);  // null where rows are narrow
  void (*backward_chunk)(const Backward<T>&, int64_t chunk, acc_t<T> weight_sum);
};
namespace baseline {
template <class T>
RowKernels<T> row_kernels(bool narrow);
}
namespace avx2 {
template <class T>
RowKernels<T> row_kernels(bool narrow);
}
namespace avx512 {
template <class T>
RowKernels<T> row_kernels(bool narrow);
}

}  // namespace classfair
