// Backward of pair_terms by direct differences: for the squared distance and the form of every pair,
//   d/dw_c = 2 (G_form v_y + G_square) (w_c - w_y) = -d/dw_y,  d/dv_y = G_form (w_c - w_y)^2.
// Included once per instruction set, after simd.h (see there).

namespace classfair {
namespace CLASSFAIR_ISA {

constexpr int64_t kPairRows = 4;  // rows whose sums are in registers together
template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;  // features of a panel; two vectors fill a cache line on AVX2

// Features [first, first + count) of the rows at `offset`, as rows of a panel, filled up with zeros. All rows at once,
// so that their cache misses overlap.
template <class A>
void gather_panel(const A* source, const int64_t* offset, int64_t rows, int64_t first, int64_t count, A* panel) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < kPanel<A>; k += kLanes<A>) {
      const A* from = source + offset[r] + first + k;
      store(panel + r * kPanel<A> + k,
            k + kLanes<A> <= count ? load(from) : load_some(from, std::max<int64_t>(count - k, 0), A(0)));
    }
}

// The way back: target += scale * panel.
template <class A>
void scatter_panel(const A* panel, A scale, const int64_t* offset, int64_t rows, int64_t first, int64_t count,
                   A* target) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < count; k += kLanes<A>) {
      A* to = target + offset[r] + first + k;
      const Vec<A> v = load(panel + r * kPanel<A> + k) * scale;
      if (k + kLanes<A> <= count)
        store(to, load(to) + v);
      else
        store_some(to, load_some(to, count - k, A(0)) + v, count - k);
    }
}

// Coefficients of one block of pairs, doubled, (row tile, class, [form of kPairRows rows, square of them]); rows that
// fill up the last tile have 0.
template <class A>
void pack_coefficients(const PairBackward<A>& b, int64_t first_row, int64_t rows, int64_t first_class, int64_t classes,
                       A* packed) {
  std::fill_n(packed, (rows + kPairRows - 1) / kPairRows * classes * 2 * kPairRows, A(0));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r, at = row * b.in.C + first_class;
    A* to = packed + r / kPairRows * classes * 2 * kPairRows + r % kPairRows;
    for (int64_t c = 0; c < classes; ++c, to += 2 * kPairRows) {
      if (first_class + c == b.in.label[row]) continue;  // exactly no gradient, whatever comes from above
      A form = b.grad_variance ? b.grad_variance[at + c] : A(0), square = b.grad_square ? b.grad_square[at + c] : A(0);
      if (b.ratio) {
        const A distance = b.square[at + c];
        form = distance <= b.threshold[row] ? A(0) : form / distance;
        square -= form * b.ratio[at + c];
      }
      to[0] = 2 * form;
      to[kPairRows] = 2 * square;
    }
  }
}

// One vector of features of kPairRows rows against the classes of a panel: adds to the classes' gradients, to the rows'
// and, before their factor 1/2, to the diagonals'. All in panels.
template <bool kForm, bool kSquare, bool kCov, class A>
void backward_tile(const A* coefficients, int64_t classes, const A* other, A* class_sum, const A* own_panel,
                   const A* cov_panel, A* row_panel, A* cov_sum_panel) {
  using V = Vec<A>;
  V own[kPairRows], cov[kPairRows] = {}, row_sum[kPairRows] = {}, cov_sum[kPairRows] = {};
  for (int64_t i = 0; i < kPairRows; ++i) {
    own[i] = load(own_panel + i * kPanel<A>);
    if (kForm) cov[i] = load(cov_panel + i * kPanel<A>);
  }
  for (int64_t c = 0; c < classes; ++c, coefficients += 2 * kPairRows) {
    const V x = load(other + c * kPanel<A>);
    V sum = load(class_sum + c * kPanel<A>);
    for (int64_t i = 0; i < kPairRows; ++i) {
      const V difference = x - own[i];
      if (kForm && kSquare) {
        const V slope = coefficients[i] * cov[i] + coefficients[kPairRows + i];
        sum = slope * difference + sum;
        row_sum[i] = slope * difference + row_sum[i];
        if (kCov) cov_sum[i] = coefficients[i] * (difference * difference) + cov_sum[i];
      } else if (kForm) {
        const V share = coefficients[i] * difference;  // the rows' factor v follows at the end
        sum = share * cov[i] + sum;
        row_sum[i] = row_sum[i] + share;
        if (kCov) cov_sum[i] = share * difference + cov_sum[i];
      } else {
        sum = coefficients[kPairRows + i] * difference + sum;
        row_sum[i] = coefficients[kPairRows + i] * difference + row_sum[i];
      }
    }
    store(class_sum + c * kPanel<A>, sum);
  }
  for (int64_t i = 0; i < kPairRows; ++i) {
    A *row_at = row_panel + i * kPanel<A>, *cov_at = cov_sum_panel + i * kPanel<A>;
    store(row_at, load(row_at) + (kForm && !kSquare ? row_sum[i] * cov[i] : row_sum[i]));
    if (kCov) store(cov_at, load(cov_at) + cov_sum[i]);
  }
}

template <bool kForm, bool kSquare, bool kCov, class A>
void backward_pairs(const PairBackward<A>& b, int64_t begin, int64_t end) {
  static_assert(kBackwardRows % kPairRows == 0);
  const PairInputs<A>& in = b.in;
  constexpr int64_t kCoefficients = 2 * kBackwardRows * kBackwardClasses;
  constexpr int64_t kRowPanel = kBackwardRows * kPanel<A>, kClassPanel = kPanelClasses * kPanel<A>;
  A* coefficients = scratch<A>(kCoefficients + 4 * kRowPanel + 2 * kClassPanel);
  A *own = coefficients + kCoefficients, *cov = own + kRowPanel, *row_sum = cov + kRowPanel;
  A *cov_sum = row_sum + kRowPanel, *other = cov_sum + kRowPanel, *class_sum = other + kClassPanel;
  int64_t row_offset[kBackwardRows], class_offset[kBackwardClasses];
  for (int64_t first_row = 0; first_row < in.used; first_row += kBackwardRows)
    for (int64_t first_class = 0; first_class < in.C; first_class += kBackwardClasses) {
      const int64_t rows = std::min(kBackwardRows, in.used - first_row);
      const int64_t classes = std::min(kBackwardClasses, in.C - first_class);
      const int64_t full = (rows + kPairRows - 1) / kPairRows * kPairRows;  // with copies of the last row
      for (int64_t r = 0; r < full; ++r) row_offset[r] = in.label[first_row + std::min(r, rows - 1)] * in.D;
      for (int64_t c = 0; c < classes; ++c) class_offset[c] = (first_class + c) * in.D;
      pack_coefficients(b, first_row, rows, first_class, classes, coefficients);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kPanel<A>, count = std::min(kPanel<A>, in.D - first);
        gather_panel(in.weight, row_offset, full, first, count, own);
        if (kForm) gather_panel(in.cov, row_offset, full, first, count, cov);
        std::fill_n(row_sum, 2 * kRowPanel, A(0));
        for (int64_t c = 0; c < classes; c += kPanelClasses) {
          const int64_t some = std::min(kPanelClasses, classes - c);
          gather_panel(in.weight, class_offset + c, some, first, count, other);
          std::fill_n(class_sum, kClassPanel, A(0));
          for (int64_t r = 0; r < rows; r += kPairRows)
            for (int64_t k = 0; k < count; k += kLanes<A>) {
              const int64_t at = r * kPanel<A> + k;
              backward_tile<kForm, kSquare, kCov>(coefficients + (r * classes + c * kPairRows) * 2, some, other + k,
                                                  class_sum + k, own + at, cov + at, row_sum + at, cov_sum + at);
            }
          scatter_panel(class_sum, A(1), class_offset + c, some, first, count, b.grad_weight);
        }
        scatter_panel(row_sum, A(-1), row_offset, rows, first, count, b.grad_weight);
        if (kCov) scatter_panel(cov_sum, A(0.5), row_offset, rows, first, count, b.grad_cov);
      }
    }
}

template <class A>
void backward_panels(const PairBackward<A>& b, int64_t begin, int64_t end) {
  const bool form = b.grad_variance != nullptr, square = b.grad_square != nullptr || b.ratio != nullptr;
  if (form && square)
    b.grad_cov ? backward_pairs<true, true, true>(b, begin, end) : backward_pairs<true, true, false>(b, begin, end);
  else if (form)
    b.grad_cov ? backward_pairs<true, false, true>(b, begin, end) : backward_pairs<true, false, false>(b, begin, end);
  else
    backward_pairs<false, true, false>(b, begin, end);
}

template <class A>
void set_kernels(PairKernels<A>* k) {
  *k = {forward_block<A>, normalize_row<A>, threshold<A>, backward_panels<A>, kPanel<A>};
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
