// softmax_loss where rows have few classes: a vector holds one class of many rows, not many classes of one row.
// It serves hard labels on plain logits (VisitedInputs::narrow). A row with a bad label or group or without a finite
// log-sum-exp is left to the row code, so that only it knows what becomes of one; no statistic counts such a row.
// Included once for each instruction set, by row_code.h.

namespace classfair {
namespace CLASSFAIR_ISA {

// Sum of term(c) over the classes, in pairs: as accurate as the row code's sum of several vectors and of their lanes.
template <class A, class Term>
CLASSFAIR_INLINE Vec<A> sum_classes(int64_t C, Term&& term) {
  Vec<A> sum[kNarrow];
  for (int64_t c = 0; c < C; ++c) sum[c] = term(c);
  for (int64_t step = 1; step < C; step *= 2)
    for (int64_t c = 0; c + step < C; c += 2 * step) sum[c] += sum[c + step];
  return sum[0];
}

// Neighbouring rows, one a lane; where fewer are left than there are lanes, the last one again.
template <class T>
struct NarrowTile {
  using A = acc_t<T>;
  using Class = typename VectorOf<A>::Mask;
  using Label = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;  // an element of Class
  static constexpr int64_t kRows = kLanes<A>;

  int64_t begin, count;
  Vec<A> logits[kNarrow];
  LabelKind kind[kRows];
  Label valid[kRows];                 // -1: in the loss, 0: ignored or an error
  Label label[kRows];                 // 0 where not valid
  A weight[kRows];                    // of the label times that of the sample; 0 where not valid
  int64_t group[kRows], cell[kRows];  // -1: in no statistic, in no joint row

  CLASSFAIR_INLINE NarrowTile(const VisitedInputs<T>& in, int64_t begin, int64_t end)
      : begin(begin), count(std::min(kRows, end - begin)) {
    const T* start[kRows];
    find(in.logits, start);
    for (int64_t c = 0; c < in.C; ++c) logits[c] = gather(start, c * in.logits.stride_c);
    for (int64_t r = 0; r < kRows; ++r) {  // as resolve_labels(), of which this needs little
      const int64_t i = row(r), y = in.target[i], g = in.group ? in.group[i] : 0, k = in.cell ? in.cell[i] : -1;
      kind[r] = classify_label(y, in.C, in.ignore_index);
      if (kind[r] == LabelKind::kValid && (g < -1 || g >= in.G)) kind[r] = LabelKind::kInvalid;
      valid[r] = kind[r] == LabelKind::kValid ? -1 : 0;
      label[r] = valid[r] ? static_cast<Label>(y) : 0;
      weight[r] = !valid[r] ? A(0) : in.class_weight(label[r]);
      group[r] = valid[r] ? g : -1;
      cell[r] = group[r] >= 0 && k < in.cells ? k : -1;
    }
    for (int64_t r = 0; in.sample_weight && r < kRows; ++r)
      if (valid[r]) weight[r] *= in.sample_weight[row(r)];
  }
  CLASSFAIR_INLINE int64_t row(int64_t r) const { return begin + std::min(r, count - 1); }
  CLASSFAIR_INLINE static Class column(int64_t c) { return static_cast<Label>(c) - Class{}; }
  CLASSFAIR_INLINE static Class lanes(const Label* values) {
    Class v;
    std::memcpy(&v, values, sizeof(v));
    return v;
  }
  // Where the rows begin.
  template <class E>
  CLASSFAIR_INLINE void find(const Rows<E>& view, E** start) const {
    int64_t n = begin / view.L, l = begin % view.L;
    for (int64_t r = 0; r < kRows; ++r) {
      start[r] = view.data + n * view.stride_n + l * view.stride_l;
      if (r + 1 < count && ++l == view.L) l = 0, ++n;
    }
  }
  template <class E>
  CLASSFAIR_INLINE static Vec<A> gather(const E* const* start, int64_t offset) {
    E lane[kRows];
    for (int64_t r = 0; r < kRows; ++r) lane[r] = start[r][offset];
    return load(lane);
  }
};

template <class T>
void narrow_forward_chunk(const Forward<T>& f, int64_t chunk) {
  using A = acc_t<T>;
  using Tile = NarrowTile<T>;
  constexpr int64_t kRows = Tile::kRows;
  const VisitedInputs<T>& in = f.in;
  const int64_t end = begin_chunk(f, chunk), cells = in.G * in.C;
  A* const mass = in.stats ? f.partial_mass + chunk * cells : nullptr;
  double* const hit = in.stats ? f.chunk_sums + chunk * f.sums_size() : nullptr;
  int64_t* const count = in.stats ? f.chunk_counts + chunk * 3 * cells : nullptr;
  if (in.stats) std::fill(hit, hit + f.sums_size(), 0.0), std::fill(count, count + 3 * cells, 0);
  double* const joint = hit + cells;
  int64_t *const correct = count + cells, *const predicted = correct + cells;
  double weight = 0;
  for (int64_t begin = chunk * in.chunk_rows; begin < end; begin += kRows) {
    const Tile tile(in, begin, end);
    const Vec<A>* const x = tile.logits;
    const typename Tile::Class label = Tile::lanes(tile.label), valid = Tile::lanes(tile.valid);
    Vec<A> largest = splat(-std::numeric_limits<A>::infinity()), chosen = {};
    typename Tile::Class first = {};  // maximum
    for (int64_t c = 0; c < in.C; ++c) {
      const typename Tile::Class column = Tile::column(c);
      first = x[c] > largest ? column : first;
      largest = max(largest, x[c]);
      chosen = label == column ? x[c] : chosen;
    }
    Vec<A> e[kNarrow];
    const Vec<A> total = sum_classes<A>(in.C, [&](int64_t c) { return e[c] = exp(x[c] - largest); });
    const Vec<A> log_total = log(total);
    const Vec<A> zero = {}, loss = load(tile.weight) * (log_total - (chosen - largest));
    store_some(f.loss + begin, valid ? loss : zero, tile.count);
    for (int64_t i = begin; in.sample_weight && i < begin + tile.count; ++i)
      if (in.sample_weight[i] == A(0)) f.loss[i] = A(0);  // as weighted_loss()
    A sum[kRows], high[kRows], low[kRows];
    store(sum, total), store(high, valid ? largest : zero), store(low, valid ? log_total : zero);
    double lse[kRows];
    for (int64_t r = 0; r < kRows; ++r) lse[r] = static_cast<double>(high[r]) + static_cast<double>(low[r]);
    std::copy(lse, lse + tile.count, f.lse + begin);
    // The sum is NaN, unless there is a finite logit and no other but -inf.
    const auto good = [&](int64_t r) { return tile.kind[r] != LabelKind::kInvalid && sum[r] >= A(1); };
    for (int64_t r = 0; r < tile.count; ++r) {
      if (good(r))
        weight += tile.weight[r];
      else
        forward_rows(f, chunk, begin + r, begin + r + 1);
    }
    if (!in.stats) continue;
    A p[kNarrow][kRows];
    typename Tile::Label prediction[kRows];
    std::memcpy(prediction, &first, sizeof(first));
    for (int64_t c = 0; c < in.C; ++c) store(p[c], e[c] / total);
    for (int64_t r = 0; r < tile.count; ++r) {
      if (!good(r)) continue;
      f.prediction[begin + r] = prediction[r];
      if (tile.group[r] < 0) continue;
      const int64_t base = tile.group[r] * in.C, y = base + tile.label[r];
      ++count[y];
      ++predicted[base + prediction[r]];
      correct[y] += prediction[r] == tile.label[r];
      hit[y] += p[tile.label[r]][r];
      for (int64_t c = 0; c < in.C; ++c) mass[base + c] += p[c][r];
      for (int64_t c = 0; tile.cell[r] >= 0 && c < in.C; ++c) joint[tile.cell[r] * in.C + c] += p[c][r];
    }
  }
  f.chunk_weight[chunk] += weight;
}

template <class T>
void narrow_backward_chunk(const Backward<T>& b, int64_t chunk) {
  using A = acc_t<T>;
  using Tile = NarrowTile<T>;
  constexpr int64_t kRows = Tile::kRows;
  constexpr A kNone[kNarrow] = {};
  const VisitedInputs<T>& in = b.in;
  const int64_t end = std::min((chunk + 1) * in.chunk_rows, in.rows);
  for (int64_t begin = chunk * in.chunk_rows; begin < end; begin += kRows) {
    const Tile tile(in, begin, end);
    const typename Tile::Class label = Tile::lanes(tile.label), valid = Tile::lanes(tile.valid);
    double lse[kRows];
    A high[kRows], low[kRows], grad_loss[kRows], grad_lse[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t i = tile.row(r);
      lse[r] = b.lse[i];
      grad_loss[r] = b.of_loss(i);
      grad_lse[r] = b.of_lse(i);
    }
    for (int64_t r = 0; r < kRows; ++r) high[r] = static_cast<A>(lse[r]), low[r] = static_cast<A>(lse[r] - high[r]);
    const Vec<A> scale = load(grad_loss) * load(tile.weight), scale_lse = load(grad_lse);
    const Vec<A> high_v = load(high), low_v = load(low);
    Vec<A> p[kNarrow], upstream[kNarrow], dot = {};
    const Vec<A> others = sum_classes<A>(in.C, [&](int64_t c) {  // what p of the label lacks to 1
      p[c] = exp((tile.logits[c] - high_v) - low_v);
      return label == Tile::column(c) ? Vec<A>{} : p[c];
    });
    if (b.statistics()) {
      const A stats_scale = b.of_statistics();
      A hit[kRows];
      const A *mass[kRows], *joint[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t base = tile.group[r] * in.C;
        hit[r] = b.grad_hit && base >= 0 ? b.grad_hit[base + tile.label[r]] : A(0);
        mass[r] = b.grad_mass && base >= 0 ? b.grad_mass + base : kNone;
        joint[r] = b.grad_joint && tile.cell[r] >= 0 ? b.grad_joint + tile.cell[r] * in.C : kNone;
      }
      dot = sum_classes<A>(in.C, [&](int64_t c) {
        upstream[c] = label == Tile::column(c) ? load(hit) : Vec<A>{};
        if (b.grad_mass) upstream[c] += Tile::gather(mass, c);
        if (b.grad_joint) upstream[c] += Tile::gather(joint, c);
        upstream[c] *= stats_scale;
        return p[c] * upstream[c];
      });
    }
    T* out[kRows];
    tile.find(b.grad_logits, out);
    for (int64_t c = 0; c < in.C; ++c) {
      // p - 1 of the label: of two ways to form it, the one that loses no digits.
      const Vec<A> less_one = p[c] < A(0.5) ? p[c] - A(1) : -others;
      Vec<A> v = scale * (label == Tile::column(c) ? less_one : p[c]) + scale_lse * p[c];
      if (b.statistics()) v += p[c] * (upstream[c] - dot);
      T lane[kRows];
      store(lane, valid ? v : Vec<A>{});
      for (int64_t r = 0; r < tile.count; ++r) out[r][c * b.grad_logits.stride_c] = lane[r];
    }
    for (int64_t r = 0; r < tile.count; ++r)
      if (tile.valid[r] && !std::isfinite(lse[r])) backward_rows(b, chunk, begin + r, begin + r + 1);
  }
}

template <class T>
void set_kernels(RowKernels<T>* k) {
  *k = {forward_chunk<T>, joint_cell<T>, backward_chunk<T>, narrow_forward_chunk<T>, narrow_backward_chunk<T>};
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
