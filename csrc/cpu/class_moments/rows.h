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

// The first row of the slot is the origin: a large common offset then costs no digits.
template <class T, int kVectors, class Load, class Store, class A = acc_t<T>>
CLASSFAIR_INLINE void strip(const Moments<T>& in, const int64_t* rows, int64_t count, Load load_at, Store store_at,
                            Vec<A>* odd) {
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
  for (int v = 0; v < kVectors; ++v) {
    const Vec<A> mean = origin[v] + running.mean[v], variance = max(Vec<A>{}, running.squares[v] * inverse);
    store_at(v, mean, variance);
    *odd += (mean - mean) + (variance - variance);  // 0, or NaN where not finite
  }
}

template <class T, class A = acc_t<T>>
bool slot_columns(const Moments<T>& in, int64_t slot, const int64_t* rows, int64_t count, int64_t begin, int64_t end) {
  constexpr int kWide = 4;
  A *mean = in.mean + slot * in.D, *variance = in.variance ? in.variance + slot * in.D : nullptr;
  Vec<A> odd = {};
  int64_t c = begin;
  const auto load_at = [&](const T* row, int v) { return load(row + c + v * kLanes<A>); };
  const auto store_at = [&](int v, Vec<A> m, Vec<A> s) {
    store(mean + c + v * kLanes<A>, m);
    if (variance) store(variance + c + v * kLanes<A>, s);
  };
  for (; c + kWide * kLanes<A> <= end; c += kWide * kLanes<A>)
    strip<T, kWide>(in, rows, count, load_at, store_at, &odd);
  for (; c + kLanes<A> <= end; c += kLanes<A>) strip<T, 1>(in, rows, count, load_at, store_at, &odd);
  if (c < end)
    strip<T, 1>(
        in, rows, count, [&](const T* row, int) { return load_some(row + c, end - c, A(0)); },
        [&](int, Vec<A> m, Vec<A> s) {
          store_some(mean + c, m, end - c);
          if (variance) store_some(variance + c, s, end - c);
        },
        &odd);
  return sum_lanes<A>(odd) == A(0);
}

template <class T, class A = acc_t<T>>
bool finite_row(const Moments<T>& in, int64_t i) {
  const T* row = in.features + i * in.stride;
  Vec<A> odd = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= in.D; c += kLanes<A>) odd += load(row + c) - load(row + c);
  if (c < in.D) odd += load_some(row + c, in.D - c, A(0)) - load_some(row + c, in.D - c, A(0));
  return sum_lanes<A>(odd) == A(0);
}

// m <- m + w (m_b - m)
template <class A, class V>
CLASSFAIR_INLINE V merged_mean(A w, V batch, V mean) {
  return mean + (batch - mean) * w;
}

// v <- v + w (v_b - v + (1 - w) (m_b - m)^2); what rounding leaves out goes to `error` (Knuth's TwoSum).
template <class A, class V>
CLASSFAIR_INLINE V merged_variance(A w, V batch, V variance, V delta, V* error) {
  const V change = *error + (batch - variance + delta * delta * (A(1) - w)) * w;
  const V sum = variance + change, added = sum - variance;
  *error = (variance - (sum - added)) + (change - added);
  return sum;
}

template <class A>
void merge_columns(const Merge<A>& in, int64_t slot, int64_t label, A w, int64_t begin, int64_t end) {
  const bool spread = in.variance != nullptr, keep = in.state_error != nullptr;
  const int64_t from = slot * in.D, to = label * in.D;
  if (w == A(1)) {  // the first batch of a class, exactly, and without 0 * inf where a square overflows
    const int64_t bytes = (end - begin) * sizeof(A);
    if (bytes == 0) return;
    std::memcpy(in.state_mean + to + begin, in.mean + from + begin, bytes);
    if (spread) std::memcpy(in.state_variance + to + begin, in.variance + from + begin, bytes);
    if (keep) std::memset(in.state_error + to + begin, 0, bytes);
    return;
  }
  const auto merge = [&](int64_t c, auto load_at, auto store_at) {
    const Vec<A> batch = load_at(in.mean + from + c), mean = load_at(in.state_mean + to + c);
    store_at(in.state_mean + to + c, merged_mean(w, batch, mean));
    if (!spread) return;
    Vec<A> error = keep ? load_at(in.state_error + to + c) : Vec<A>{};
    const Vec<A> own = load_at(in.variance + from + c), past = load_at(in.state_variance + to + c);
    store_at(in.state_variance + to + c, merged_variance(w, own, past, batch - mean, &error));
    if (keep) store_at(in.state_error + to + c, error);
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
  *k = {slot_columns<T>, finite_row<T>, merge_columns<acc_t<T>>};
}

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
