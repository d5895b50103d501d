// Moments of the rows of a slot, piece by piece in a fixed order, and their merge into running state.
#pragma once

#include "cuda/common.cuh"

namespace classfair {

// Features of larger size make their row one that is not finite: squares of up to 10^7 such rows add up without an
// overflow, and leave room for what is multiplied with a variance.
template <class A>
constexpr A kLargestFeature = sizeof(A) == 4 ? A(1e15) : A(1e150);

// Features sorted by slot; 2^chunk_shift sorted positions are one thread's per column.
template <class T>
struct MomentsInput {
  const T* features;                    // (N, D), rows `stride` apart
  const int64_t *slot, *order, *start;  // (N,), (N,), (M + 1,)
  const uint8_t* finite;                // (N,) whether a row enters
  int64_t stride, D, rows, slots;
  int chunk_shift;

  int64_t chunks() const { return ceil_div(rows, int64_t{1} << chunk_shift); }
};

// Of slots or of chunks: count (K,), mean and sum of squares about it (K, D).
template <class A>
struct Pieces {
  int64_t* count;
  A *mean, *squares;
};

template <class A>
struct Moment {
  int64_t count = 0;
  A mean = 0, squares = 0;

  // Chan, Golub and LeVeque 1979, eq. 2.1.
  __device__ void merge(const Moment& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const int64_t total = count + other.count;
    const A share = static_cast<A>(static_cast<double>(other.count) / static_cast<double>(total));
    const A delta = other.mean - mean;
    mean += delta * share;
    squares += other.squares + delta * delta * (static_cast<A>(count) * share);
    count = total;
  }
};

// A warp owns a row: writes whether all of its features are finite and not too large. An integer atomic counts the rows
// that have a slot and are not.
template <class T, class A = acc_t<T>>
__global__ void __launch_bounds__(kThreads) finite_kernel(MomentsInput<T> in, uint8_t* finite, int64_t* nonfinite) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = global_thread() / kWarp; row < in.rows; row += grid_threads() / kWarp) {
    const T* x = in.features + row * in.stride;
    int odd = 0;
    for (int64_t c = lane; c < in.D; c += kWarp)
      odd += !(std::abs(static_cast<A>(x[c])) <= kLargestFeature<A>);  // a NaN is not below anything
    odd = warp_reduce(odd, Sum{});
    if (lane != 0) continue;
    finite[row] = odd == 0;
    if (odd > 0 && in.slot[row] >= 0) atomicAdd(reinterpret_cast<unsigned long long*>(nonfinite), 1ull);
  }
}

// What a column of a slot is measured from: its first row, so that a large common offset costs no digits.
template <class T, class A = acc_t<T>>
__device__ A slot_origin(const MomentsInput<T>& in, int64_t slot, int64_t c) {
  const int64_t row = in.order[in.start[slot]];
  return in.finite[row] ? static_cast<A>(in.features[row * in.stride + c]) : A(0);
}

// One column of the rows at positions [begin, end), which are of one slot, as distances to `origin`; read twice, the
// second time from cache.
template <class T, class A = acc_t<T>>
__device__ Moment<A> column_moment(const MomentsInput<T>& in, int64_t begin, int64_t end, int64_t c, A origin) {
  Moment<A> moment;
  A total = 0;
#pragma unroll 4
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = in.order[p];
    if (!in.finite[row]) continue;
    ++moment.count;
    total += static_cast<A>(in.features[row * in.stride + c]) - origin;
  }
  if (moment.count == 0) return moment;
  const A inverse = A(1) / static_cast<A>(moment.count), center = total * inverse;
  A off = 0;
#pragma unroll 4
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = in.order[p];
    if (!in.finite[row]) continue;
    const A d = (static_cast<A>(in.features[row * in.stride + c]) - origin) - center;
    off += d;
    moment.squares += d * d;
  }
  // Corrected by what the mean is off (Chan, Golub and LeVeque 1983, eq. 1.7).
  moment.mean = center + off * inverse;
  moment.squares -= off * off * inverse;
  return moment;
}

// A thread owns a column of a chunk of sorted positions: writes the moments of each slot in it. Those of a slot that
// began in an earlier chunk go to this chunk's carry.
template <class T, class A = acc_t<T>>
__global__ void __launch_bounds__(kThreads)
    moment_chunks_kernel(MomentsInput<T> in, int64_t chunks, Pieces<A> out, Pieces<A> carry) {
  const int64_t placed = in.start[in.slots];
  for (int64_t index = global_thread(); index < chunks * in.D; index += grid_threads()) {
    const int64_t chunk = divide(index, in.D), c = index - chunk * in.D;
    const int64_t begin = chunk << in.chunk_shift, after = begin + (int64_t{1} << in.chunk_shift);
    const int64_t end = after < placed ? after : placed;
    for (int64_t p = begin; p < end;) {
      const int64_t s = in.slot[in.order[p]], slot_end = in.start[s + 1], run_end = slot_end < end ? slot_end : end;
      const Moment<A> moment = column_moment(in, p, run_end, c, slot_origin(in, s, c));
      const bool carried = in.start[s] < begin;
      const Pieces<A>& to = carried ? carry : out;
      const int64_t at = carried ? chunk : s;
      to.mean[at * in.D + c] = moment.mean;
      to.squares[at * in.D + c] = moment.squares;
      if (c == 0) to.count[at] = moment.count;
      p = run_end;
    }
  }
}

// A thread owns a column of a slot: merges what moment_chunks_kernel wrote for the slot with the carries of its later
// chunks, in their order, and divides by the count. variance may be null.
template <class T, class A = acc_t<T>>
__global__ void __launch_bounds__(kThreads)
    moment_carries_kernel(MomentsInput<T> in, Pieces<A> first, Pieces<A> carry, int64_t* count, A* mean, A* variance) {
  for (int64_t index = global_thread(); index < in.slots * in.D; index += grid_threads()) {
    const int64_t s = divide(index, in.D), c = index - s * in.D;
    const int64_t begin = in.start[s], end = in.start[s + 1];
    Moment<A> moment;
    if (begin < end) {
      moment = {first.count[s], first.mean[index], first.squares[index]};
      const int64_t last = (end - 1) >> in.chunk_shift;
      for (int64_t chunk = (begin >> in.chunk_shift) + 1; chunk <= last; ++chunk)
        moment.merge({carry.count[chunk], carry.mean[chunk * in.D + c], carry.squares[chunk * in.D + c]});
    }
    const A squares = moment.squares < A(0) ? A(0) : moment.squares;  // NaN passes
    mean[index] = moment.count > 0 ? slot_origin(in, s, c) + moment.mean : A(0);
    if (variance) variance[index] = moment.count > 0 ? squares / static_cast<A>(moment.count) : A(0);
    if (c == 0) count[s] = moment.count;
  }
}

template <class A>
struct Merge {
  const int64_t *count, *key;                  // (M,) of a batch
  const A *mean, *variance;                    // (M, D); variance null where absent
  int64_t* state_count;                        // (C,)
  A *state_mean, *state_variance;              // (C, D)
  A *state_mean_error, *state_variance_error;  // (C, D), what rounding has left out of them, or null
  int64_t slots, D;
  bool exponential;
  double momentum;

  // Share of a batch of n_b rows in the moments of a class that has seen n.
  __device__ A share(int64_t n, int64_t n_b) const {
    if (exponential) return static_cast<A>(n > 0 ? momentum : 1.0);
    return static_cast<A>(static_cast<double>(n_b) / static_cast<double>(n + n_b));
  }
};

// *value + change + *error; what rounding leaves out of it goes to *error, which may be null (Knuth's TwoSum).
template <class A>
__device__ void add_exactly(A* value, A change, A* error) {
  const A old = *value;
  if (error) change += *error;
  const A sum = old + change, added = sum - old;
  *value = sum;
  if (error) *error = (old - (sum - added)) + (change - added);
}

// m <- m + w (m_b - m);  v <- v + w (v_b - v + (1 - w) (m_b - m)^2). A first batch is taken exactly.
template <class A>
__device__ void merge_value(const Merge<A>& in, A w, int64_t from, int64_t to) {
  A* const mean_error = in.state_mean_error ? in.state_mean_error + to : nullptr;
  A* const variance_error = in.state_variance_error ? in.state_variance_error + to : nullptr;
  const A batch = in.mean[from];
  if (w == A(1)) {
    in.state_mean[to] = batch;
    if (in.variance) in.state_variance[to] = in.variance[from];
    if (mean_error) *mean_error = A(0);
    if (variance_error) *variance_error = A(0);
    return;
  }
  const A delta = (batch - in.state_mean[to]) - (mean_error ? *mean_error : A(0));
  add_exactly(in.state_mean + to, delta * w, mean_error);
  if (!in.variance) return;
  const A between = delta * delta * (A(1) - w);
  add_exactly(in.state_variance + to, (in.variance[from] - in.state_variance[to] + between) * w, variance_error);
}

// A block owns a row of the batch and the state of its class.
template <class A>
__global__ void __launch_bounds__(kThreads) merge_kernel(Merge<A> in) {
  for (int64_t s = blockIdx.x; s < in.slots; s += gridDim.x) {
    const int64_t n_b = in.count[s];
    if (n_b == 0) continue;
    const int64_t label = in.key[s], n = in.state_count[label];
    __syncthreads();  // all have read the count
    const A w = in.share(n, n_b);
    for (int64_t c = threadIdx.x; c < in.D; c += kThreads) merge_value(in, w, s * in.D + c, label * in.D + c);
    if (threadIdx.x == 0) in.state_count[label] = n + n_b;
  }
}

}  // namespace classfair
