// The code of the group penalties for the instruction set in force; see softmax_loss_rows.h.
#include "cpu/simd.h"

namespace classfair {
namespace CLASSFAIR_ISA {

// Calls body(c, n) for columns c to c + n; n is a constant for all but the last.
template <class A, class Body>
CLASSFAIR_INLINE void each_vector(int64_t begin, int64_t end, Body&& body) {
  int64_t c = begin;
  for (; c + kLanes<A> <= end; c += kLanes<A>) body(c, kLanes<A>);
  if (c < end) body(c, end - c);
}
template <class A>
CLASSFAIR_INLINE Vec<A> take(const A* p, int64_t n) {
  return n == kLanes<A> ? load(p) : load_some(p, n, A(0));
}
template <class A>
CLASSFAIR_INLINE void put(A* p, Vec<A> v, int64_t n) {
  n == kLanes<A> ? store(p, v) : store_some(p, v, n);
}
template <class A>
CLASSFAIR_INLINE Vec<A> take_counts(const int64_t* p, int64_t n) {
  Vec<A> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<A>(p[i]);
  return v;
}

// Sum of squared differences between the rows' means and the segment's (Haenel et al. 2022, eq. 3 and 6).
template <class A>
A squared_differences(const DependenceBlock<A>& b) {
  Vec<A> value = {};
  const A share = A(2) / b.size;
  each_vector<A>(b.begin, b.end, [&](int64_t c, int64_t n) {
    Vec<A> total = {}, sum = {};
    for (int64_t k = 0; k < b.K; ++k) total += take(b.rows[k] + c, n);
    const Vec<A> mean = total / b.size;
    for (int64_t k = 0; k < b.K; ++k) {
      const Vec<A> d = take(b.rows[k] + c, n) / b.samples[k] - mean;
      value += d * d;
      sum += d;
      put(b.grads[k] + c, d, n);
    }
    for (int64_t k = 0; k < b.K; ++k)
      put(b.grads[k] + c, b.weight * (take(b.grads[k] + c, n) * (A(2) / b.samples[k]) - share * sum), n);
  });
  return b.weight * sum_lanes<A>(value);
}

// Mutual information of class and row (eq. 4 and 7). The ratio is one of products, which are equal where both are
// independent: a perfect classifier gives exactly 0.
template <class A>
A mutual_information(const DependenceBlock<A>& b) {
  constexpr A kTiny = std::numeric_limits<A>::min();
  const Vec<A> zero = {}, one = splat(A(1));
  Vec<A> value = zero;
  const A share = b.weight / b.size;
  each_vector<A>(b.begin, b.end, [&](int64_t c, int64_t n) {
    Vec<A> total = zero;
    for (int64_t k = 0; k < b.K; ++k) total += take(b.rows[k] + c, n);
    for (int64_t k = 0; k < b.K; ++k) {
      const Vec<A> row = take(b.rows[k] + c, n);
      const auto positive = row > zero;
      const Vec<A> ratio = positive ? (row * b.size) / (total * b.samples[k]) : one;
      const Vec<A> information = log(max(splat(kTiny), ratio));
      value += row * information;
      put(b.grads[k] + c, information * share, n);
    }
  });
  return share * sum_lanes<A>(value);
}

// A union that stands for "not counted": intersection over it, and every derivative, is 0.
template <class A>
CLASSFAIR_INLINE Vec<A> counted_union(Vec<A> mass, Vec<A> hit, Vec<A> count, bool skip) {
  const Vec<A> zero = {}, none = splat(std::numeric_limits<A>::infinity()), all = mass + count - hit;
  const Vec<A> there = all > zero ? all : none;
  return skip ? (count > zero ? there : none) : there;
}

// Intersection, union and samples of one group, or of all (g = G).
template <class A>
struct Cells {
  Vec<A> mass, hit, count;
};
template <class A>
CLASSFAIR_INLINE Cells<A> cells(const IouInputs<A>& in, int64_t g, int64_t c, int64_t n) {
  if (g < in.G) {
    const int64_t at = g * in.C + c;
    return {take(in.mass + at, n), take(in.hit + at, n), take_counts<A>(in.count + at, n)};
  }
  Cells<A> all{};
  for (int64_t k = 0; k < in.G; ++k) {
    const Cells<A> own = cells(in, k, c, n);
    all = {all.mass + own.mass, all.hit + own.hit, all.count + own.count};
  }
  return all;
}

template <class A>
void iou_sums(const IouInputs<A>& in, int64_t begin, int64_t end, const IouSums<A>& sums) {
  const Vec<A> zero = {}, one = splat(A(1));
  for (int64_t g = 0; g <= in.G; ++g) {
    Vec<A> iou = zero, classes = zero;
    each_vector<A>(begin, end, [&](int64_t c, int64_t n) {
      const Cells<A> x = cells(in, g, c, n);
      iou += x.hit / counted_union<A>(x.mass, x.hit, x.count, in.skip);
      classes += x.count > zero ? one : zero;
    });
    sums.iou[g] = sum_lanes<A>(iou);
    sums.classes[g] = in.skip ? sum_lanes<A>(classes) : A(end - begin);
  }
}

template <class A>
void iou_gradients(const IouInputs<A>& in, int64_t begin, int64_t end, const A* slope) {
  each_vector<A>(begin, end, [&](int64_t c, int64_t n) {
    // d(I/U): U holds -I, so that a hit counts twice.
    const auto derivatives = [&](const Cells<A>& x, A scale, Vec<A>* by_union, Vec<A>* by_hit) {
      const Vec<A> inverse = A(1) / counted_union<A>(x.mass, x.hit, x.count, in.skip);
      *by_union = -scale * x.hit * inverse * inverse;
      *by_hit = scale * inverse - *by_union;
    };
    Vec<A> all_union, all_hit, by_union, by_hit;
    derivatives(cells(in, in.G, c, n), slope[in.G], &all_union, &all_hit);
    for (int64_t g = 0; g < in.G; ++g) {
      derivatives(cells(in, g, c, n), slope[g], &by_union, &by_hit);
      put(in.grad_mass + g * in.C + c, by_union + all_union, n);
      put(in.grad_hit + g * in.C + c, by_hit + all_hit, n);
    }
  });
}

template <class A>
PenaltyKernels<A> penalty_kernels() {
  return {squared_differences<A>, mutual_information<A>, iou_sums<A>, iou_gradients<A>};
}
template PenaltyKernels<double> penalty_kernels();
template PenaltyKernels<float> penalty_kernels();

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
