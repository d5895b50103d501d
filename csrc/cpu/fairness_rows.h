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

// Row by row, because what comes from another core then comes in long streams. A cell is read once: what its
// derivatives are made of is left where they will be.
template <class A>
void iou_sums(const IouInputs<A>& in, int64_t begin, int64_t end, const IouSums<A>& sums) {
  const Vec<A> zero = {}, one = splat(A(1));
  A *all_mass = in.all, *all_hit = all_mass + in.C, *all_count = all_hit + in.C;
  for (int64_t g = 0; g <= in.G; ++g) {
    Vec<A> iou = zero, classes = zero;
    // I/U and, of its derivatives, I/U^2 and 1/U.
    const auto cell = [&](Vec<A> mass, Vec<A> hit, Vec<A> count, A* squared, A* inverse, int64_t n) {
      const Vec<A> whole = counted_union<A>(mass, hit, count, in.skip), ratio = hit / whole;
      iou += ratio;
      classes += count > zero ? one : zero;
      put(squared, ratio / whole, n);
      put(inverse, one / whole, n);
    };
    each_vector<A>(begin, end, [&](int64_t c, int64_t n) {
      if (g == in.G) {
        cell(take(all_mass + c, n), take(all_hit + c, n), take(all_count + c, n), all_mass + c, all_hit + c, n);
        return;
      }
      const int64_t at = g * in.C + c;
      const Vec<A> mass = take(in.mass + at, n), hit = take(in.hit + at, n), count = take_counts<A>(in.count + at, n);
      put(all_mass + c, take(all_mass + c, n) + mass, n);
      put(all_hit + c, take(all_hit + c, n) + hit, n);
      put(all_count + c, take(all_count + c, n) + count, n);
      cell(mass, hit, count, in.grad_mass + at, in.grad_hit + at, n);
    });
    sums.iou[g] = sum_lanes<A>(iou);
    sums.classes[g] = in.skip ? sum_lanes<A>(classes) : A(end - begin);
  }
}

template <class A>
void iou_gradients(const IouInputs<A>& in, int64_t begin, int64_t end, const A* slope) {
  // d(I/U): U holds -I, so that a hit counts twice.
  const auto scale = [&](A* squared, A* inverse, A by, const A* more_mass, const A* more_hit) {
    each_vector<A>(begin, end, [&](int64_t c, int64_t n) {
      const Vec<A> of_union = -by * take(squared + c, n), of_hit = by * take(inverse + c, n) - of_union;
      put(squared + c, more_mass ? of_union + take(more_mass + c, n) : of_union, n);
      put(inverse + c, more_hit ? of_hit + take(more_hit + c, n) : of_hit, n);
    });
  };
  A *all_mass = in.all, *all_hit = all_mass + in.C;
  scale(all_mass, all_hit, slope[in.G], nullptr, nullptr);
  for (int64_t g = 0; g < in.G; ++g)
    scale(in.grad_mass + g * in.C, in.grad_hit + g * in.C, slope[g], all_mass, all_hit);
}

template <class A>
PenaltyKernels<A> penalty_kernels() {
  return {squared_differences<A>, mutual_information<A>, iou_sums<A>, iou_gradients<A>};
}
template PenaltyKernels<double> penalty_kernels();
template PenaltyKernels<float> penalty_kernels();

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
