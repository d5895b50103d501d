// softmax_loss where rows have few classes: a vector holds one class of many rows, not many classes of one row.
// Hard labels on plain logits (see Inputs::narrow). A row that is not in the loss or has no finite log-sum-exp is left
// to the row code, so that only it knows what becomes of one; no statistic counts such a row.
// Included once per instruction set, after softmax_loss_backward.h.

namespace classfair {
namespace CLASSFAIR_ISA {

// Neighbouring rows, one a lane; where fewer are left than there are lanes, the last one again.
template <class T>
struct NarrowTile {
  using A = acc_t<T>;
  using Class = typename VectorOf<A>::Mask;
  static constexpr int64_t kRows = kLanes<A>;

  int64_t begin, count;
  Vec<A> logits[kNarrow], weight;  // weight: of the label
  Class label;                     // 0 where the row is not valid
  Row<A> rows[kRows];

  NarrowTile(const Inputs<T>& in, int64_t begin, int64_t end) : begin(begin), count(std::min(kRows, end - begin)) {
    const T* start[kRows];
    find(in.logits, start);
    for (int64_t c = 0; c < in.C; ++c) logits[c] = gather(start, c * in.logits.stride_c);
    A weights[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      rows[r] = resolve(in, begin + std::min(r, count - 1));
      label[r] = valid(r) ? rows[r].a : 0;
      weights[r] = in.weight ? in.weight[valid(r) ? rows[r].a : 0] : A(1);
    }
    weight = load(weights);
  }
  bool valid(int64_t r) const { return rows[r].kind == LabelKind::kValid; }

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
void narrow_forward_chunk(const Forward<T>& f, int64_t chunk, acc_t<T> weight_sum) {
  using A = acc_t<T>;
  using Tile = NarrowTile<T>;
  const Inputs<T>& in = f.in;
  const int64_t end = begin_chunk(f, chunk), cells = in.G * in.C;
  A* const mass = in.stats ? f.partial_mass + chunk * cells : nullptr;
  double* const hit = in.stats ? f.chunk_sums + chunk * f.sums_size() : nullptr;
  int64_t* const count = in.stats ? f.chunk_counts + chunk * 3 * cells : nullptr;
  if (in.stats) std::fill(hit, hit + f.sums_size(), 0.0), std::fill(count, count + 3 * cells, 0);
  double* const joint = f.in.cell ? hit + cells : nullptr;
  int64_t *const correct = count + cells, *const predicted = correct + cells;
  double weight = 0;
  for (int64_t begin = chunk * in.chunk_rows; begin < end; begin += Tile::kRows) {
    const Tile tile(in, begin, end);
    const Vec<A>* const x = tile.logits;
    Vec<A> largest = splat(-std::numeric_limits<A>::infinity()), chosen = {}, sum = {};
    typename Tile::Class first = {}, column = {};  // first maximum
    for (int64_t c = 0; c < in.C; ++c, column += 1) {
      first = x[c] > largest ? column : first;
      largest = max(largest, x[c]);
      chosen = tile.label == column ? x[c] : chosen;
    }
    A p[kNarrow][Tile::kRows], high[Tile::kRows], low[Tile::kRows], total[Tile::kRows];
    Vec<A> e[kNarrow];
    for (int64_t c = 0; c < in.C; ++c) sum += e[c] = exp(x[c] - largest);
    for (int64_t c = 0; in.stats && c < in.C; ++c) store(p[c], e[c] / sum);
    const Vec<A> log_sum = log(sum);
    store(high, largest), store(low, log_sum), store(total, sum);
    store_some(f.loss + begin, tile.weight * (log_sum - (chosen - largest)), tile.count);
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t i = begin + r;
      const Row<A>& row = tile.rows[r];
      if (!tile.valid(r) || !(total[r] >= A(1))) {  // NaN unless every logit is finite or -inf, and one finite
        forward_rows(f, chunk, i, i + 1, weight_sum);
        continue;
      }
      f.lse[i] = static_cast<double>(high[r]) + static_cast<double>(low[r]);
      weight += tile.weight[r];
      if (!in.stats) continue;
      f.prediction[i] = first[r];
      if (row.group < 0) continue;
      const int64_t base = row.group * in.C, y = base + row.a;
      ++count[y];
      ++predicted[base + first[r]];
      correct[y] += first[r] == row.a;
      hit[y] += p[row.a][r];
      for (int64_t c = 0; c < in.C; ++c) mass[base + c] += p[c][r];
      for (int64_t c = 0; row.cell >= 0 && c < in.C; ++c) joint[row.cell * in.C + c] += p[c][r];
    }
  }
  f.chunk_weight[chunk] += weight;
}

template <class T>
void narrow_backward_chunk(const Backward<T>& b, int64_t chunk, acc_t<T> weight_sum) {
  using A = acc_t<T>;
  using Tile = NarrowTile<T>;
  constexpr A kNone[kNarrow] = {};
  const Inputs<T>& in = b.in;
  const int64_t end = std::min((chunk + 1) * in.chunk_rows, in.rows);
  for (int64_t begin = chunk * in.chunk_rows; begin < end; begin += Tile::kRows) {
    const Tile tile(in, begin, end);
    T* out[Tile::kRows];
    tile.find(b.grad_logits, out);
    A high[Tile::kRows], low[Tile::kRows], loss[Tile::kRows] = {}, lse[Tile::kRows] = {}, hit[Tile::kRows] = {};
    const A *mass[Tile::kRows], *joint[Tile::kRows];  // upstream gradients
    for (int64_t r = 0; r < Tile::kRows; ++r) {
      const int64_t i = begin + std::min(r, tile.count - 1);
      const Row<A>& row = tile.rows[r];
      high[r] = static_cast<A>(b.lse[i]);
      low[r] = static_cast<A>(b.lse[i] - high[r]);
      if (b.grad_loss) loss[r] = b.grad_loss[i * b.grad_loss_stride];
      if (b.grad_lse) lse[r] = static_cast<A>(b.grad_lse[i]);
      const bool counted = tile.valid(r) && row.group >= 0;
      if (b.grad_hit && counted) hit[r] = b.grad_hit[row.group * in.C + row.a];
      mass[r] = b.grad_mass && counted ? b.grad_mass + row.group * in.C : kNone;
      joint[r] = b.grad_joint && counted && row.cell >= 0 ? b.grad_joint + row.cell * in.C : kNone;
    }
    const Vec<A> scale = load(loss) * tile.weight, scale_lse = load(lse);
    Vec<A> p[kNarrow], upstream[kNarrow], others = {}, dot = {};  // others: what p of the label lacks to 1
    typename Tile::Class column = {};
    for (int64_t c = 0; c < in.C; ++c, column += 1) {
      p[c] = exp((tile.logits[c] - load(high)) - load(low));
      others += tile.label == column ? Vec<A>{} : p[c];
      if (!b.statistics()) continue;
      upstream[c] = (tile.label == column ? load(hit) : Vec<A>{}) + Tile::gather(mass, c) + Tile::gather(joint, c);
      dot += p[c] * upstream[c];
    }
    column = typename Tile::Class{};
    for (int64_t c = 0; c < in.C; ++c, column += 1) {
      Vec<A> v = scale * (tile.label == column ? -others : p[c]) + scale_lse * p[c];
      if (b.statistics()) v += p[c] * (upstream[c] - dot);
      T lane[Tile::kRows];
      store(lane, v);
      for (int64_t r = 0; r < tile.count; ++r) out[r][c * b.grad_logits.stride_c] = lane[r];
    }
    for (int64_t r = 0; r < tile.count; ++r)
      if (!tile.valid(r) || !std::isfinite(b.lse[begin + r]))
        backward_rows(b, chunk, begin + r, begin + r + 1, weight_sum);
  }
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
