// Sums of the statistics over chunks, groups and labels, all in an order that does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/softmax_loss/softmax_loss.h"

namespace classfair {
namespace {

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
  explicit Units(const VisitedInputs<T>& in) : count(1), size(in.G * in.C), start{0, in.rows} {
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
  const VisitedInputs<T>& in = f.in;
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
  const VisitedInputs<T>& in = f.in;
  const int64_t cells = in.G * in.C, chunks = in.chunks();
  std::vector<double> sums(f.sums_size());
  sum_chunks(f.partial_mass, chunks, cells, mass);
  sum_chunks(f.chunk_sums, chunks, f.sums_size(), sums.data());
  sum_chunks(f.chunk_counts, chunks, 3 * cells, counts);
  const auto round = [](double v) { return static_cast<acc_t<T>>(v); };
  std::transform(sums.begin(), sums.begin() + cells, hit, round);
  std::transform(sums.begin() + cells, sums.end(), joint, round);
}

}  // namespace
}  // namespace classfair
