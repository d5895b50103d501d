// Forward of pair_terms by direct differences, which do not cancel where rows are close (Wang et al. 2019, eq. 6).
// Included once per instruction set, after simd.h (see there).

namespace classfair {
namespace CLASSFAIR_ISA {

// Pairs whose sums are in registers together, eight vectors of them: enough to hide the latency of an addition.
constexpr int64_t kTileClasses = 2;
template <bool kBoth>
constexpr int64_t kTileRows = kBoth ? 2 : 4;

// Features [first, first + count) of a row, filled up with zeros to whole vectors. Rows are copied together because
// rows a power of two apart would fall into the same few cache sets.
template <class A>
void pack_row(const A* row, int64_t first, int64_t count, int64_t padded, A* packed) {
  std::copy_n(row + first, count, packed);
  std::fill(packed + count, packed + padded, A(0));
}

// Sums over `count` features for a tile of pairs, row by row: of v d d, then of d d, those of the two that are asked
// for. Together they are eight.
template <bool kVariance, bool kSquare, class A>
CLASSFAIR_INLINE void forward_tile(const A* own, const A* cov, const A* other, int64_t count, A* sums) {
  using V = Vec<A>;
  constexpr int64_t kRows = kTileRows < kVariance && kSquare >, kPairs = kRows * kTileClasses;
  V sum[8] = {};
  V* const distance = sum + (kVariance ? kPairs : 0);
  for (int64_t k = 0; k < count; k += kLanes<A>) {
    V x[kTileClasses];
    for (int64_t j = 0; j < kTileClasses; ++j) x[j] = load(other + j * kForwardFeatures + k);
    for (int64_t i = 0; i < kRows; ++i) {
      const V w = load(own + i * kForwardFeatures + k), v = kVariance ? load(cov + i * kForwardFeatures + k) : w;
      for (int64_t j = 0; j < kTileClasses; ++j) {
        const V difference = x[j] - w, product = difference * difference;
        if (kVariance) sum[i * kTileClasses + j] = product * v + sum[i * kTileClasses + j];
        if (kSquare) distance[i * kTileClasses + j] = distance[i * kTileClasses + j] + product;
      }
    }
  }
  sum_lanes(sum, sums);
}

// One block of pairs. Every pair goes through the same operations in the same order, whatever its place in a tile:
// tiles at the edge are filled up with rows that are not written.
template <bool kVariance, bool kSquare, class A>
void forward_pairs(const PairForward<A>& f, int64_t row_block, int64_t class_block) {
  constexpr int64_t kRows = kTileRows < kVariance && kSquare >, kPairs = kRows * kTileClasses;
  const PairInputs<A>& in = f.in;
  const int64_t first_row = row_block * kForwardRows, rows = std::min(kForwardRows, in.used - first_row);
  const int64_t first_class = class_block * kForwardClasses, classes = std::min(kForwardClasses, in.C - first_class);
  A* packed = scratch<A>((kForwardClasses + 2 * kRows) * kForwardFeatures);
  A *own = packed + kForwardClasses * kForwardFeatures, *cov = own + kRows * kForwardFeatures;
  for (int64_t first = 0; first < in.D; first += kForwardFeatures) {
    const int64_t count = std::min(kForwardFeatures, in.D - first);
    const int64_t padded = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    for (int64_t c = 0; c < kForwardClasses && c < classes + kTileClasses - 1; ++c)
      pack_row(in.weight + (first_class + std::min(c, classes - 1)) * in.D, first, count, padded,
               packed + c * kForwardFeatures);
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t offset = in.label[first_row + std::min(r + i, rows - 1)] * in.D;
        pack_row(in.weight + offset, first, count, padded, own + i * kForwardFeatures);
        if (kVariance) pack_row(in.cov + offset, first, count, padded, cov + i * kForwardFeatures);
      }
      for (int64_t c = 0; c < classes; c += kTileClasses) {
        A sums[8];
        forward_tile<kVariance, kSquare>(own, cov, packed + c * kForwardFeatures, padded, sums);
        for (int64_t i = 0; i < std::min(kRows, rows - r); ++i)
          for (int64_t j = 0; j < std::min(kTileClasses, classes - c); ++j) {
            const int64_t at = (first_row + r + i) * in.C + first_class + c + j, pair = i * kTileClasses + j;
            if (kVariance) f.variance[at] += sums[pair];
            if (kSquare) f.square[at] += sums[pair + (kVariance ? kPairs : 0)];
          }
      }
    }
  }
}

template <class A>
void forward_block(const PairForward<A>& f, int64_t row_block, int64_t class_block) {
  if (f.variance && f.square)
    forward_pairs<true, true>(f, row_block, class_block);
  else if (f.variance)
    forward_pairs<true, false>(f, row_block, class_block);
  else
    forward_pairs<false, true>(f, row_block, class_block);
}

template <class A>
A threshold(const A* square, int64_t C) {
  double sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += square[c];
  return static_cast<A>(kPairThreshold * std::max(1.0, sum / C));
}

// A Rayleigh quotient lies between the extremes of the diagonal; rounding may leave them by an ulp.
template <class A>
void normalize_row(const PairForward<A>& f, int64_t row) {
  const PairInputs<A>& in = f.in;
  const A* square = f.square + row * in.C;
  A* variance = f.variance + row * in.C;
  const A* cov = in.cov + in.label[row] * in.D;
  const A zero = threshold(square, in.C);
  const A low = in.D ? *std::min_element(cov, cov + in.D) : A(0);
  const A high = in.D ? *std::max_element(cov, cov + in.D) : A(0);
  for (int64_t c = 0; c < in.C; ++c) {
    const A ratio = variance[c] / square[c];
    const A inside = ratio < low ? low : ratio > high ? high : ratio;
    variance[c] = square[c] <= zero ? A(0) : inside;  // NaN passes
  }
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
