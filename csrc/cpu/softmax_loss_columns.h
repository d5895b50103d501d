// Loops over the columns of a row, and the gathering of rows whose classes are not contiguous.
// Included once per instruction set, after simd.h (see there).

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

// sum_c exp(x_c - m). kKeep: also writes the terms to e. kLinear: also sum_c w_c (x_c - m), w = 1 where null.
template <bool kKeep, bool kLinear, class E, class A = acc_t<E>>
A exp_sum(const E* x, int64_t C, A m, A* e, const A* w, A* linear) {
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

template <class A>
struct Maxima {
  A x, z;
};

// x = z + offset + pair, either of which may be null, and both maxima in the same loop.
template <class E, class A = acc_t<E>>
Maxima<A> perturb(const E* z, const A* offset, const A* pair, int64_t C, A* x) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  Vec<A> max_x = splat(kNone), max_z = max_x;
  for_columns<A>(
      C,
      [&](int64_t c) {
        const Vec<A> raw = load(z + c);
        Vec<A> v = raw;
        if (offset) v += load(offset + c);
        if (pair) v += load(pair + c);
        store(x + c, v);
        max_x = max(max_x, v);
        max_z = max(max_z, raw);
      },
      [&](int64_t c, int64_t n) {
        const Vec<A> raw = load_some(z + c, n, kNone);
        Vec<A> v = raw;
        if (offset) v += load_some(offset + c, n, A(0));
        if (pair) v += load_some(pair + c, n, A(0));
        store_some(x + c, v, n);
        max_x = max(max_x, v);
        max_z = max(max_z, raw);
      });
  return {max_lanes<A>(max_x), max_lanes<A>(max_z)};
}

// sum += scale * e
template <class A>
void accumulate(const A* e, A scale, int64_t C, A* sum) {
  for_columns<A>(
      C, [&](int64_t c) { store(sum + c, load(sum + c) + load(e + c) * scale); },
      [&](int64_t c, int64_t n) {
        for (int64_t i = c; i < c + n; ++i) sum[i] += e[i] * scale;
      });
}

// The first maximum, or the first NaN, as torch.argmax.
template <class E, class A = acc_t<E>>
int64_t first_max(const E* x, int64_t C, A m, bool finite) {
  if (!finite)
    for (int64_t c = 0; c < C; ++c)
      if (std::isnan(static_cast<A>(x[c]))) return c;
  constexpr int64_t kBlock = 8 * kLanes<A>;
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, C);
    if (end - begin == kBlock && row_max(x + begin, kBlock) < m) continue;
    for (int64_t c = begin; c < end; ++c)
      if (static_cast<A>(x[c]) == m) return c;
  }
  return 0;
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
CLASSFAIR_INLINE int64_t tile_rows(const Inputs<T>& in, int64_t begin, int64_t end, int64_t* rows) {
  const int64_t count = std::min(kTile, end - begin);
  for (int64_t r = 0; r < count; ++r) rows[r] = in.visited(begin + r);
  return count;
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
