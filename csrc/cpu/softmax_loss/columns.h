// Loops over the columns of a row, and the gathering of rows whose classes are not contiguous.
// Included once for each instruction set, by row_code.h.

namespace classfair {
namespace CLASSFAIR_ISA {

// Calls body(c) for whole vectors of columns and tail(c, count) for the rest.
template <class A, class Body, class Tail>
CLASSFAIR_INLINE void for_columns(int64_t C, Body&& body, Tail&& tail) {
  int64_t c = 0;
#pragma GCC unroll 4
  for (; c + kLanes<A> <= C; c += kLanes<A>) body(c);
  if (c < C) tail(c, C - c);
}

// Fetches a row that is soon to be written; its first 4 KB, after which the processor sees where this leads.
template <class E>
CLASSFAIR_INLINE void prefetch_for_write(const E* x, int64_t C) {
  const char* const begin = reinterpret_cast<const char*>(x);
  const int64_t bytes = std::min<int64_t>(C * sizeof(E), 4096);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(begin + offset, 1);
}

template <class E, class A = acc_t<E>>
CLASSFAIR_INLINE A row_max(const E* x, int64_t C) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  Vec<A> m0 = splat(kNone), m1 = m0, m2 = m0, m3 = m0;
  int64_t c = 0;
  for (; c + 4 * kLanes<A> <= C; c += 4 * kLanes<A>) {
    m0 = max(m0, load(x + c));
    m1 = max(m1, load(x + c + kLanes<A>));
    m2 = max(m2, load(x + c + 2 * kLanes<A>));
    m3 = max(m3, load(x + c + 3 * kLanes<A>));
  }
  for (; c + kLanes<A> <= C; c += kLanes<A>) m0 = max(m0, load(x + c));
  if (c < C) m1 = max(m1, load_some(x + c, C - c, kNone));
  return max_lanes<A>(max(max(m0, m1), max(m2, m3)));
}

// The maximum and the first block of columns in which it is; the block means nothing where there is a NaN.
template <class A>
struct Maximum {
  static constexpr int64_t kWays = 4, kBlock = kWays * kLanes<A>;
  A value;
  int64_t block;
};

template <class E, class A = acc_t<E>>
CLASSFAIR_INLINE Maximum<A> row_argmax(const E* x, int64_t C) {
  using Index = typename VectorOf<A>::Mask;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  constexpr int64_t kBlock = Maximum<A>::kBlock;
  Vec<A> best = splat(kNone);
  Index block = {}, at = {};  // this one, and of the best
  const auto look = [&](Vec<A> v) {
    at = v > best ? block : at;
    best = max(best, v);
    block += 1;
  };
  int64_t c = 0;
  for (; c + kBlock <= C; c += kBlock) {
    const E* y = x + c;
    look(max(max(load(y), load(y + kLanes<A>)), max(load(y + 2 * kLanes<A>), load(y + 3 * kLanes<A>))));
  }
  if (c < C) {
    Vec<A> rest = splat(kNone);
    for (; c + kLanes<A> <= C; c += kLanes<A>) rest = max(rest, load(x + c));
    look(c < C ? max(rest, load_some(x + c, C - c, kNone)) : rest);
  }
  const A value = max_lanes<A>(best);
  const Index first = best == value ? at : block;
  int64_t found = first[0];
  for (int64_t lane = 1; lane < kLanes<A>; ++lane) found = std::min<int64_t>(found, first[lane]);
  return {value, found};
}

// sum_c exp(x_c - m). kKeep: also writes the terms to e. kLinear: also sum_c w_c (x_c - m), w = 1 where null.
// next: a row to fetch meanwhile, since this is all arithmetic and looking for the maximum all memory.
template <bool kKeep, bool kLinear, class E, class T, class A = acc_t<E>>
A exp_sum(const E* x, int64_t C, A m, A* e, const A* w, A* linear, const T* next) {
  Vec<A> sum = {}, lin = {};
  const auto term = [&](Vec<A> v, Vec<A> wv) {
    const Vec<A> d = v - m;
    if (kLinear) lin += wv * d;
    return exp(d);
  };
  const Vec<A> one = splat(A(1));
  for_columns<A>(
      C,
      [&](int64_t c) {
        __builtin_prefetch(next + c);
        const Vec<A> t = term(load(x + c), kLinear && w ? load(w + c) : one);
        if (kKeep) store(e + c, t);
        sum += t;
      },
      [&](int64_t c, int64_t n) {
        const Vec<A> t = exp(load_some(x + c, n, -std::numeric_limits<A>::infinity()) - m);
        if (kKeep) store_some(e + c, t, n);
        sum += t;
        for (int64_t i = c; kLinear && i < c + n; ++i) lin[0] += (w ? w[i] : A(1)) * (static_cast<A>(x[i]) - m);
      });
  if (kLinear) *linear = sum_lanes<A>(lin);
  return sum_lanes<A>(sum);
}

// x = z + offset + pair, either of which may be null. Returns the maximum of x.
template <class E, class A = acc_t<E>>
A perturb(const E* z, const A* offset, const A* pair, int64_t C, A* x) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  Vec<A> largest = splat(kNone);
  for_columns<A>(
      C,
      [&](int64_t c) {
        Vec<A> v = load(z + c);
        if (offset) v += load(offset + c);
        if (pair) v += load(pair + c);
        store(x + c, v);
        largest = max(largest, v);
      },
      [&](int64_t c, int64_t n) {
        Vec<A> v = load_some(z + c, n, kNone);
        if (offset) v += load_some(offset + c, n, A(0));
        if (pair) v += load_some(pair + c, n, A(0));
        store_some(x + c, v, n);
        largest = max(largest, v);
      });
  return max_lanes<A>(largest);
}

// sum += scale[0] rows[0] + ... + scale[K - 1] rows[K - 1]
template <int K, class A>
void accumulate(A* const* rows, const A* scale, int64_t C, A* __restrict sum) {
  const A* row[K];
  Vec<A> factor[K];
  for (int k = 0; k < K; ++k) row[k] = rows[k], factor[k] = splat(scale[k]);
  for_columns<A>(
      C,
      [&](int64_t c) {
        Vec<A> v = load(sum + c);
        for (int k = 0; k < K; ++k) v += load(row[k] + c) * factor[k];
        store(sum + c, v);
      },
      [&](int64_t c, int64_t n) {
        Vec<A> v = load_some(sum + c, n, A(0));
        for (int k = 0; k < K; ++k) v += load_some(row[k] + c, n, A(0)) * factor[k];
        store_some(sum + c, v, n);
      });
}

// Sums rows by group. Rows of one group that follow each other are summed a few at a time: their sum is read and
// written once.
template <class A>
class GroupSums {
 public:
  static constexpr int kPending = 3;

  // sums: that of group g begins at g * C. clear: at the first row of each, once rows come ordered by group.
  GroupSums(A* sums, int64_t C, bool clear, A* buffers) : sums_(sums), C_(C), clear_(clear) {
    for (int k = 0; k < kPending; ++k) rows_[k] = buffers + k * C;
  }
  A* buffer() const { return rows_[pending_]; }
  // The rows that follow are of this group.
  void enter(int64_t group) {
    if (group == group_) return;
    finish();
    group_ = group;
    if (clear_) std::fill(sums_ + group * C_, sums_ + (group + 1) * C_, A(0));
  }
  // Adds scale times what buffer() holds.
  void add(A scale) {
    scale_[pending_++] = scale;
    if (pending_ == kPending) finish();
  }
  void finish() {
    if (pending_ == 0) return;
    A* sum = sums_ + group_ * C_;
    if (pending_ == 1) accumulate<1>(rows_, scale_, C_, sum);
    if (pending_ == 2) accumulate<2>(rows_, scale_, C_, sum);
    if (pending_ == 3) accumulate<3>(rows_, scale_, C_, sum);
    pending_ = 0;
  }

 private:
  A* sums_;
  int64_t C_, group_ = -1;
  bool clear_;
  A *rows_[kPending], scale_[kPending];
  int pending_ = 0;
};

// As torch.argmax: the first maximum, or the first NaN.
template <class E, class A = acc_t<E>>
int64_t prediction(const E* x, int64_t C, const Maximum<A>& max, bool finite) {
  for (int64_t c = 0; !finite && c < C; ++c)
    if (std::isnan(static_cast<A>(x[c]))) return c;
  int64_t c = max.block * Maximum<A>::kBlock;
  if (c + Maximum<A>::kBlock <= C) {
    uint64_t found = 0;
    for (int64_t k = 0; k < Maximum<A>::kWays; ++k)
      found |= uint64_t{lane_bits<A>(load(x + c + k * kLanes<A>) == max.value)} << k * kLanes<A>;
    if (found) return c + __builtin_ctzll(found);
  }
  while (c < C && static_cast<A>(x[c]) != max.value) ++c;
  return c;
}

// Gathers (rows, C) from strided memory, a tile of neighbouring rows at a time.
template <class E>
struct TileReader {
  const Rows<const E>& source;
  int64_t C;
  E* tile;

  void prepare(const int64_t* rows, int64_t count) const {
    if (source.contiguous()) return;
    const E* base[kTile];
    for (int64_t r = 0; r < count; ++r) base[r] = source.row(rows[r]);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t r = 0; r < count; ++r) tile[r * C + c] = base[r][c * source.stride_c];
  }
  const E* row(int64_t i, int64_t r) const { return source.contiguous() ? source.row(i) : tile + r * C; }
};

template <class T>
CLASSFAIR_INLINE int64_t tile_rows(const VisitedInputs<T>& in, int64_t begin, int64_t end, int64_t* rows) {
  const int64_t count = std::min(kTile, end - begin);
  for (int64_t r = 0; r < count; ++r) rows[r] = in.visited(begin + r);
  return count;
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
