// The group penalties: value and gradient of a few rows of sums of probabilities. Vectors of 16 bytes, which every
// processor has: at (8, 1000) those of AVX-512 save 3 to 12 microseconds of 12 to 21, which is not worth a copy of this
// code for each instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"
#include "cpu/ordered_sum.h"

#define CLASSFAIR_ISA baseline
#define CLASSFAIR_VECTOR_BYTES 16
#include "cpu/isa/simd.h"

namespace classfair {
namespace CLASSFAIR_ISA {

namespace {

constexpr int64_t kGrainColumns = 1 << 15;  // of all groups; a second thread for fewer costs more than it saves

// Calls body(c, n) for columns c to c + n; n is a constant for all calls but the last.
template <class A, class Body>
CLASSFAIR_INLINE void each_vector(int64_t C, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) body(c, kLanes<A>);
  if (c < C) body(c, C - c);
}
template <class A>
CLASSFAIR_INLINE Vec<A> take(const A* p, int64_t n) {
  return n == kLanes<A> ? load(p) : load_some(p, n, A(0));
}
template <class A>
CLASSFAIR_INLINE Vec<A> take_counts(const int64_t* p, int64_t n) {
  Vec<A> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<A>(p[i]);
  return v;
}
template <class A>
CLASSFAIR_INLINE void put(A* p, Vec<A> v, int64_t n) {
  n == kLanes<A> ? store(p, v) : store_some(p, v, n);
}

// Samples of every group and class.
struct CountTable {
  const int64_t* data;  // (G, C)
  int64_t G, C;

  explicit CountTable(const Tensor& count)
      : data(static_cast<const int64_t*>(count.data_ptr())), G(count.size(0)), C(count.size(1)) {}
  int64_t of_group(int64_t g) const { return std::accumulate(data + g * C, data + (g + 1) * C, int64_t(0)); }
};

// Rows that are compared with each other, which are neighbours: those of all groups, or those of one label.
struct Segment {
  int64_t first, rows;
};

// Which rows belong together, and how many samples are behind each.
struct Partition {
  std::vector<Segment> segments;
  std::vector<int64_t> samples;  // (M,), 0 in unused rows
  int64_t total;

  Partition(int64_t M, const CountTable& count, const OptionalTensor& cell, const OptionalTensor& num_cells)
      : samples(M, 0), total(std::accumulate(count.data, count.data + count.G * count.C, int64_t(0))) {
    if (!cell.has_value()) {
      segments.push_back({0, M});
      for (int64_t g = 0; g < M; ++g) samples[g] = count.of_group(g);
      return;
    }
    const int64_t *key = data<int64_t>(*cell), used = *data<int64_t>(*num_cells), G = count.G;
    for (int64_t m = 0; m < used; ++m) {
      const int64_t label = key[m] / G;
      samples[m] = count.data[key[m] % G * count.C + label];
      if (m == 0 || label != key[m - 1] / G) segments.push_back({m, 0});
      ++segments.back().rows;
    }
    if (used < M) segments.push_back({used, M - used});  // unused rows have no samples
  }
};

// The rows of one segment that have samples.
template <class A>
struct SegmentRows {
  std::vector<const A*> rows;  // (C,) sums of probabilities
  std::vector<A*> grads;       // (C,)
  std::vector<A> samples;      // behind each row
  A size = 0, weight = 1;      // samples of the segment, and its weight
  int64_t C;

  std::size_t count() const { return rows.size(); }
  CLASSFAIR_INLINE Vec<A> total(int64_t c, int64_t n) const {
    Vec<A> sum = {};
    for (const A* row : rows) sum += take(row + c, n);
    return sum;
  }
};

// Sum of squared differences between the rows' means and the segment's (Haenel et al. 2022, eq. 3 and 6).
template <class A>
A squared_differences(const SegmentRows<A>& s) {
  Vec<A> value = {};
  const A share = A(2) / s.size;
  each_vector<A>(s.C, [&](int64_t c, int64_t n) {
    const Vec<A> mean = s.total(c, n) / s.size;
    Vec<A> sum = {};
    for (std::size_t k = 0; k < s.count(); ++k) {
      const Vec<A> d = take(s.rows[k] + c, n) / s.samples[k] - mean;
      value += d * d;
      sum += d;
      put(s.grads[k] + c, d, n);
    }
    for (std::size_t k = 0; k < s.count(); ++k)
      put(s.grads[k] + c, s.weight * (take(s.grads[k] + c, n) * (A(2) / s.samples[k]) - share * sum), n);
  });
  return s.weight * sum_lanes<A>(value);
}

// Mutual information of class and row (eq. 4 and 7). The ratio is one of products, which are equal where both are
// independent: a perfect classifier gives exactly 0.
template <class A>
A mutual_information(const SegmentRows<A>& s) {
  const Vec<A> zero = {}, one = splat(A(1)), tiny = splat(std::numeric_limits<A>::min());
  Vec<A> value = {};
  const A share = s.weight / s.size;
  each_vector<A>(s.C, [&](int64_t c, int64_t n) {
    const Vec<A> total = s.total(c, n);
    for (std::size_t k = 0; k < s.count(); ++k) {
      const Vec<A> row = take(s.rows[k] + c, n);
      const Vec<A> ratio = row > zero ? (row * s.size) / (total * s.samples[k]) : one;
      const Vec<A> information = log(max(tiny, ratio));
      value += row * information;
      put(s.grads[k] + c, information * share, n);
    }
  });
  return share * sum_lanes<A>(value);
}

// Fills the gradients of a segment's rows (M, C), and returns its part of the value.
template <class A>
A segment_penalty(const Partition& part, const Segment& segment, int64_t C, const A* rows, A* grads, bool mutual,
                  bool weighted) {
  SegmentRows<A> s;
  int64_t size = 0;
  for (int64_t m = segment.first; m < segment.first + segment.rows; ++m) {
    if (part.samples[m] == 0) continue;
    s.rows.push_back(rows + m * C);
    s.grads.push_back(grads + m * C);
    s.samples.push_back(static_cast<A>(part.samples[m]));
    size += part.samples[m];
  }
  const bool alone = s.count() < 2;  // such a row has nothing to differ from: its penalty is exactly 0
  for (int64_t m = segment.first; m < segment.first + segment.rows; ++m)
    if (alone || part.samples[m] == 0) std::fill_n(grads + m * C, C, A(0));
  if (alone) return A(0);
  s.C = C;
  s.size = static_cast<A>(size);
  if (weighted) s.weight = s.size / static_cast<A>(std::max<int64_t>(part.total, 1));
  return mutual ? mutual_information(s) : squared_differences(s);
}

std::tuple<Tensor, Tensor> dependence_cpu(Tensor rows, Tensor count, OptionalTensor cell, OptionalTensor num_cells,
                                          bool mutual, bool weighted) {
  const int64_t M = rows.size(0), C = rows.size(1);
  Tensor value = allocate<0>(rows, {}, rows.scalar_type());
  Tensor grad_rows = allocate<2>(rows, {M, C}, rows.scalar_type());
  const Partition part(M, CountTable(count), cell, num_cells);
  dispatch_accumulate(rows, [&](auto tag) {
    using A = decltype(tag);
    std::vector<A> parts(M, A(0));
    parallel_for(0, static_cast<int64_t>(part.segments.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        parts[part.segments[s].first] =
            segment_penalty(part, part.segments[s], C, data<A>(rows), data<A>(grad_rows), mutual, weighted);
    });
    *static_cast<A*>(value.data_ptr()) = static_cast<A>(ordered_sum(parts.data(), M));
  });
  return {value, grad_rows};
}

// Intersection over union of one group, or of all: for each class I/U and 1/U, of which its derivatives are made, both
// 0 where the class does not count.
template <class A>
struct Overlap {
  A *ratio, *inverse;      // (C,)
  A sum = 0, classes = 0;  // of the ratios, and number of the classes that count
  A slope = 0;             // derivative of the penalty in the sum
  bool there = true;       // has samples

  A mean() const { return sum / std::max(classes, A(1)); }
  void add_slope(A of_mean) { slope += of_mean / std::max(classes, A(1)); }
};

// skip: classes without a true sample do not count.
template <class A>
void fill_overlap(const A* mass, const A* hit, const int64_t* count, int64_t C, bool skip, Overlap<A>* o) {
  const Vec<A> zero = {}, one = splat(A(1)), none = splat(std::numeric_limits<A>::infinity());
  Vec<A> sum = {}, classes = {};
  each_vector<A>(C, [&](int64_t c, int64_t n) {
    const Vec<A> h = take(hit + c, n), samples = take_counts<A>(count + c, n), whole = take(mass + c, n) + samples - h;
    const Vec<A> some = whole > zero ? whole : none, counted = skip ? (samples > zero ? some : none) : some;
    const Vec<A> ratio = h / counted;
    sum += ratio;
    classes += samples > zero ? one : zero;
    put(o->ratio + c, ratio, n);
    put(o->inverse + c, one / counted, n);
  });
  const A with_samples = sum_lanes<A>(classes);
  o->sum = sum_lanes<A>(sum);
  o->there = with_samples > A(0);
  o->classes = skip ? with_samples : static_cast<A>(C);
}

// The sum of squared differences of mean overlaps, between each group and all (the last of `overlaps`) or between any
// two groups; and its derivatives.
template <class A>
A mean_differences(bool paired, std::vector<Overlap<A>>* overlaps) {
  const std::size_t G = overlaps->size() - 1;
  A value = 0;
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t k = paired ? g + 1 : G; k < (paired ? G : G + 1); ++k) {
      Overlap<A>&own = (*overlaps)[g], &other = (*overlaps)[k];
      if (!own.there || (paired && !other.there)) continue;
      const A difference = own.mean() - other.mean();
      value += difference * difference;
      own.add_slope(2 * difference);
      other.add_slope(-2 * difference);
    }
  }
  return value;
}

// What an overlap holds becomes the gradients of mass and hit, to which those of `all` are added where it is given.
// d(I/U): U holds -I, so that a hit counts twice.
template <class A>
void fill_gradients(const Overlap<A>& o, const Overlap<A>* all, int64_t C) {
  each_vector<A>(C, [&](int64_t c, int64_t n) {
    const Vec<A> slope = o.slope * take(o.inverse + c, n), of_union = slope * take(o.ratio + c, n);
    const Vec<A> none = {};
    put(o.ratio + c, (all ? take(all->ratio + c, n) : none) - of_union, n);
    put(o.inverse + c, (all ? take(all->inverse + c, n) : none) + (slope + of_union), n);
  });
}

std::tuple<Tensor, Tensor, Tensor> iou_penalty_cpu(Tensor mass, Tensor hit, Tensor count, bool paired, bool skip) {
  const int64_t G = count.size(0), C = count.size(1), *counts = data<int64_t>(count);
  Tensor value = allocate<0>(mass, {}, mass.scalar_type());
  Tensor grad_mass = allocate<2>(mass, {G, C}, mass.scalar_type());
  Tensor grad_hit = allocate<2>(mass, {G, C}, mass.scalar_type());
  dispatch_accumulate(mass, [&](auto tag) {
    using A = decltype(tag);
    const A *masses = data<A>(mass), *hits = data<A>(hit);
    A *grad_masses = data<A>(grad_mass), *grad_hits = data<A>(grad_hit);
    std::vector<Overlap<A>> overlaps(G + 1);
    const auto each_group = [&](auto&& work) {
      parallel_for(0, G, std::max<int64_t>(1, kGrainColumns / std::max<int64_t>(C, 1)), [&](int64_t from, int64_t to) {
        for (int64_t g = from; g < to; ++g) work(g, g * C);
      });
    };
    each_group([&](int64_t g, int64_t at) {
      overlaps[g] = {grad_masses + at, grad_hits + at};
      fill_overlap(masses + at, hits + at, counts + at, C, skip, &overlaps[g]);
    });
    std::vector<A> memory(4 * C);
    std::vector<int64_t> all_count(C);
    A *all_mass = memory.data(), *all_hit = all_mass + C;
    for (int64_t i = 0; i < G * C; i += C)
      for (int64_t c = 0; c < C; ++c) {
        all_mass[c] += masses[i + c];
        all_hit[c] += hits[i + c];
        all_count[c] += counts[i + c];
      }
    overlaps[G] = {all_hit + C, all_hit + 2 * C};
    fill_overlap<A>(all_mass, all_hit, all_count.data(), C, skip, &overlaps[G]);
    *static_cast<A*>(value.data_ptr()) = mean_differences(paired, &overlaps);
    fill_gradients<A>(overlaps[G], nullptr, C);
    each_group([&](int64_t g, int64_t) { fill_gradients(overlaps[g], &overlaps[G], C); });
  });
  return {value, grad_mass, grad_hit};
}

}  // namespace
}  // namespace CLASSFAIR_ISA

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("dependence", TORCH_BOX(&CLASSFAIR_ISA::dependence_cpu));
  m.impl("iou_penalty", TORCH_BOX(&CLASSFAIR_ISA::iou_penalty_cpu));
}

}  // namespace classfair
