// The row code of class_moments. Included once for each instruction set, by row_code.h.

namespace classfair {
namespace CLASSFAIR_ISA {

// Mean, as a distance to the origin, and sum of squares about it of the rows so far, for kVectors vectors of columns.
template <class A, int kVectors>
struct Running {
  int64_t count = 0;
  Vec<A> mean[kVectors] = {}, squares[kVectors] = {};

  // Chan, Golub and LeVeque 1979, eq. 2.1.
  CLASSFAIR_INLINE void merge(int64_t n, const Vec<A>* other_mean, const Vec<A>* other_squares) {
    if (count == 0) {
      for (int v = 0; v < kVectors; ++v) mean[v] = other_mean[v], squares[v] = other_squares[v];
      count = n;
      return;
    }
    const int64_t total = count + n;
    const A share = static_cast<A>(static_cast<double>(n) / static_cast<double>(total));
    const A between = static_cast<A>(count) * share;
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> delta = other_mean[v] - mean[v];
      mean[v] += delta * share;
      squares[v] += other_squares[v] + delta * delta * between;
    }
    count = total;
  }
};

// One block of rows, as distances to `origin`: their mean, then squares about it, corrected by what that mean is off
// (Chan, Golub and LeVeque 1983, eq. 1.7).
template <class T, int kVectors, class Load, class A = acc_t<T>>
CLASSFAIR_INLINE void add_block(const T* const* row, int64_t n, Load load_at, const Vec<A>* origin,
                                Running<A, kVectors>* running) {
  const A inverse = A(1) / static_cast<A>(n);
  Vec<A> mean[kVectors] = {}, off[kVectors] = {}, squares[kVectors] = {};
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < kVectors; ++v) mean[v] += load_at(row[r], v) - origin[v];
  for (int v = 0; v < kVectors; ++v) mean[v] *= inverse;
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> d = (load_at(row[r], v) - origin[v]) - mean[v];
      off[v] += d;
      squares[v] += d * d;
    }
  for (int v = 0; v < kVectors; ++v) {
    mean[v] += off[v] * inverse;
    squares[v] = squares[v] - off[v] * off[v] * inverse;
  }
  running->merge(n, mean, squares);
}

// Whether all lanes are; a NaN is not.
template <class A>
CLASSFAIR_INLINE bool all_below(Vec<A> v, A limit) {
  return lane_bits<A>(v <= splat(limit)) == (1u << kLanes<A>)-1;
}

// A feature that is too large is more than half of its size away from 0 or from the mean. So it shows in the mean or in
// the squares, half of which are left for rounding errors.
template <class A>
constexpr A kSmall = kLargestFeature<A> / 4;

// False where a row may have a feature that is too large. The first row of the slot is the origin: a large common
// offset then costs no digits.
template <class T, int kVectors, class Load, class Store, class A = acc_t<T>>
CLASSFAIR_INLINE bool strip(const Moments<T>& in, const int64_t* rows, int64_t count, Load load_at, Store store_at) {
  Running<A, kVectors> running;
  const T* row[kMomentRows];
  Vec<A> origin[kVectors];
  for (int v = 0; v < kVectors; ++v) origin[v] = load_at(in.features + rows[0] * in.stride, v);
  for (int64_t first = 0; first < count; first += kMomentRows) {
    const int64_t n = std::min(kMomentRows, count - first);
    for (int64_t r = 0; r < n; ++r) row[r] = in.features + rows[first + r] * in.stride;
    add_block<T, kVectors>(row, n, load_at, origin, &running);
  }
  const A inverse = A(1) / static_cast<A>(count);
  bool small = true;
  for (int v = 0; v < kVectors; ++v) {
    const Vec<A> mean = origin[v] + running.mean[v], squares = max(Vec<A>{}, running.squares[v]);
    store_at(v, mean, squares * inverse);
    small &= all_below(max(mean, -mean), kSmall<A>) && all_below(squares, kSmall<A> * kSmall<A>);
  }
  return small;
}

template <class T, class A = acc_t<T>>
bool slot_columns(const Moments<T>& in, int64_t slot, const int64_t* rows, int64_t count, int64_t begin, int64_t end) {
  constexpr int kWide = 4;
  A *mean = in.mean + slot * in.D, *variance = in.variance ? in.variance + slot * in.D : nullptr;
  bool small = true;
  int64_t c = begin;
  const auto load_at = [&](const T* row, int v) { return load(row + c + v * kLanes<A>); };
  const auto store_at = [&](int v, Vec<A> m, Vec<A> s) {
    store(mean + c + v * kLanes<A>, m);
    if (variance) store(variance + c + v * kLanes<A>, s);
  };
  for (; c + kWide * kLanes<A> <= end; c += kWide * kLanes<A>)
    small &= strip<T, kWide>(in, rows, count, load_at, store_at);
  for (; c + kLanes<A> <= end; c += kLanes<A>) small &= strip<T, 1>(in, rows, count, load_at, store_at);
  if (c < end)
    small &= strip<T, 1>(
        in, rows, count, [&](const T* row, int) { return load_some(row + c, end - c, A(0)); },
        [&](int, Vec<A> m, Vec<A> s) {
          store_some(mean + c, m, end - c);
          if (variance) store_some(variance + c, s, end - c);
        });
  return small;
}

template <class T, class A = acc_t<T>>
bool usable_row(const Moments<T>& in, int64_t i) {
  const T* row = in.features + i * in.stride;
  bool usable = true;
  const auto look = [&](Vec<A> x) { usable &= all_below(max(x, -x), kLargestFeature<A>); };
  int64_t c = 0;
  for (; c + kLanes<A> <= in.D; c += kLanes<A>) look(load(row + c));
  if (c < in.D) look(load_some(row + c, in.D - c, A(0)));
  return usable;
}

// value + change + *error; what rounding leaves out of it goes to *error (Knuth's TwoSum).
template <class V>
CLASSFAIR_INLINE V add_exactly(V value, V change, V* error) {
  change += *error;
  const V sum = value + change, added = sum - value;
  *error = (value - (sum - added)) + (change - added);
  return sum;
}

template <class A>
void merge_columns(const Merge<A>& in, int64_t slot, int64_t label, A w, int64_t begin, int64_t end) {
  const bool spread = in.variance != nullptr;
  const int64_t from = slot * in.D, to = label * in.D;
  if (w == A(1)) {  // the first batch of a class, exactly, and without 0 * inf where a square overflows
    const int64_t bytes = (end - begin) * sizeof(A);
    if (bytes == 0) return;
    std::memcpy(in.state_mean + to + begin, in.mean + from + begin, bytes);
    if (spread) std::memcpy(in.state_variance + to + begin, in.variance + from + begin, bytes);
    for (A* error : {in.state_mean_error, in.state_variance_error})
      if (error) std::memset(error + to + begin, 0, bytes);
    return;
  }
  // m <- m + w (m_b - m);  v <- v + w (v_b - v + (1 - w) (m_b - m)^2)
  const auto merge = [&](int64_t c, auto load_at, auto store_at) {
    const auto add = [&](A* state, A* errors, Vec<A> value, Vec<A> error, Vec<A> change) {
      store_at(state + to + c, add_exactly(value, change, &error));
      if (errors) store_at(errors + to + c, error);
    };
    const auto error_at = [&](const A* errors) { return errors ? load_at(errors + to + c) : Vec<A>{}; };
    const Vec<A> mean = load_at(in.state_mean + to + c), mean_error = error_at(in.state_mean_error);
    const Vec<A> delta = (load_at(in.mean + from + c) - mean) - mean_error;
    add(in.state_mean, in.state_mean_error, mean, mean_error, delta * w);
    if (!spread) return;
    const Vec<A> own = load_at(in.variance + from + c), past = load_at(in.state_variance + to + c);
    const Vec<A> change = (own - past + delta * delta * (A(1) - w)) * w;
    add(in.state_variance, in.state_variance_error, past, error_at(in.state_variance_error), change);
  };
  int64_t c = begin;
  for (; c + kLanes<A> <= end; c += kLanes<A>)
    merge(c, [](const A* p) { return load(p); }, [](A* p, Vec<A> v) { store(p, v); });
  if (c < end)
    merge(
        c, [&](const A* p) { return load_some(p, end - c, A(0)); }, [&](A* p, Vec<A> v) { store_some(p, v, end - c); });
}

template <class T>
void set_kernels(MomentKernels<T>* k) {
  *k = {slot_columns<T>, usable_row<T>, merge_columns<acc_t<T>>};
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
