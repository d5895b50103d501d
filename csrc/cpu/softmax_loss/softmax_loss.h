// What the row code of every instruction set is given: inputs, outputs and the meaning of one row.
#pragma once

#include <cstdint>
#include <limits>

#include "arguments.h"
#include "cpu/memory.h"

namespace classfair {

constexpr int64_t kTile = 16;             // rows gathered together when classes are not contiguous
constexpr int64_t kNarrow = 16;           // classes up to which a vector holds many rows
constexpr int64_t kCachedSums = 1 << 14;  // (G, C) sums up to which a chunk's are in the cache all the time

// Inputs, and in which order and in what pieces their rows are visited.
template <class T>
struct VisitedInputs : Inputs<T> {
  bool by_group;         // the forward pass visits rows by group
  bool narrow;           // narrow.h serves these rows
  const int64_t* order;  // rows in the order in which they are visited; null: natural
  int64_t chunk_rows;    // rows of a chunk; never depends on the number of threads
  acc_t<T> weight_sum;   // of the class weights, or C without any

  int64_t chunks() const { return ceil_div(this->rows, chunk_rows); }
  int64_t visited(int64_t position) const { return order ? order[position] : position; }
};

template <class A>
using Row = RowLabels<A>;

// What one row adds to the statistics, but for its softmax.
template <class A>
struct RowStatistics {
  int32_t label;  // -1: the row does not count
  int32_t a, b;   // classes that are hit; -1: none
  A hit_a, hit_b;

  bool counted() const { return label >= 0; }
  static RowStatistics none() { return {-1, -1, -1, A(0), A(0)}; }
};

template <class T>
struct Forward {
  using A = acc_t<T>;
  VisitedInputs<T> in;
  A* loss;                   // (rows,)
  double *lse, *lse_raw;     // (rows,); lse_raw null where it would equal lse
  int64_t* prediction;       // (rows,) or null
  double* chunk_weight;      // (chunks,)
  int64_t* chunk_bad;        // (chunks,) first row with a bad label or group, or `rows`
  int64_t* chunk_nonfinite;  // (chunks,) rows without a finite log-sum-exp
  A* partial_mass;           // (chunks + units, unit_size) or null; row chunk + u: of unit u
  int64_t unit_size;         // of the (G, C) sums: C where rows are visited by group, else G * C

  // Of rows that are not narrow.
  RowStatistics<A>* row_statistics;  // (rows,) or null
  A* joint;                          // (cells, C) or null
  const int64_t* cell_order;         // (rows,) sorted by cell
  const int64_t* cell_start;         // (cells + 1,) into cell_order

  // Of narrow rows. (Those that are left to the row code write row_statistics too, which nobody reads.)
  double* chunk_sums;     // (chunks, sums_size()): hit, then the joint rows
  int64_t* chunk_counts;  // (chunks, 3 * G * C), as the counts

  int64_t sums_size() const { return (in.G + in.cells) * in.C; }
  int64_t cell_rows(int64_t cell) const { return cell_start[cell + 1] - cell_start[cell]; }
};

template <class T>
struct Backward : Upstream<T> {
  using A = acc_t<T>;
  VisitedInputs<T> in;
  Rows<T> grad_logits;
  A* partial_offset;    // (chunks, C) or null
  A* grad_pair;         // (pair_rows, C) or null; in.order then sorts rows by slot
  A* carry;             // (chunks, C): rows of a slot that began in an earlier chunk
  int64_t* carry_slot;  // (chunks,) or -1
  A* row_margin;        // (rows,) gradient of the perturbed target logit, or null
};

// The row code of one instruction set.
template <class T>
struct RowKernels {
  void (*forward_chunk)(const Forward<T>&, int64_t chunk);
  void (*joint_cell)(const Forward<T>&, int64_t cell);  // not for narrow rows
  void (*backward_chunk)(const Backward<T>&, int64_t chunk);
  void (*narrow_forward_chunk)(const Forward<T>&, int64_t chunk);
  void (*narrow_backward_chunk)(const Backward<T>&, int64_t chunk);
};

}  // namespace classfair
