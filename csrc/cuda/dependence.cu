// The group penalties on GPUs: value and gradient in one pass over the statistics.
#include <limits>
#include <tuple>

#include "cuda/common.cuh"

namespace classfair {

namespace {

template <class A>
constexpr A kTiny = std::numeric_limits<A>::min();
constexpr int kWide = 512;  // threads of a block that owns thousands of columns; 1024 leave too few registers

template <class A>
struct Dependence {
  const A* rows;                    // (M, C)
  const int64_t* count;             // (G, C)
  const int64_t* by_group;          // (G,) its row sums, null where not needed
  const int64_t *cell, *num_cells;  // (M,), (); null where rows are groups
  int64_t M, G, C;
  bool mutual_information, weighted;
  A *parts, *gradient;  // (M,), (M, C)

  __device__ int64_t used() const { return cell ? *num_cells : M; }
  // Samples behind a row, 0 for an unused one.
  __device__ int64_t samples(int64_t m) const {
    if (!cell) return by_group[m];
    if (m >= *num_cells) return 0;
    const int64_t label = divide(cell[m], G);
    return count[(cell[m] - label * G) * C + label];
  }
};

// The rows [first, last) that share a label, or all groups; an unused row is alone.
template <class A>
struct Segment {
  int64_t first, last;
  A size = 0;      // samples, added in the order of the rows
  int filled = 0;  // rows with samples
  A weight = 1;    // share of all samples

  __device__ Segment(const Dependence<A>& in, int64_t row) : first(row), last(row + 1) {
    const int64_t used = in.used();
    if (!in.cell) {
      first = 0, last = in.G;
    } else if (row < used) {
      const int64_t label = divide(in.cell[row], in.G), least = label * in.G;
      while (first > 0 && in.cell[first - 1] >= least) --first;
      while (last < used && in.cell[last] < least + in.G) ++last;
    }
    for (int64_t m = first; m < last; ++m) {
      const int64_t n = in.samples(m);
      size += static_cast<A>(n);
      filled += n > 0;
    }
    if (in.weighted) {
      int64_t total = 0;
      for (int64_t g = 0; g < in.G; ++g) total += in.by_group[g];
      weight = size / static_cast<A>(total > 0 ? total : 1);
    }
  }
};

// A block owns a row of `count`: writes its sum.
__global__ void __launch_bounds__(kWide)
    group_counts_kernel(const int64_t* count, int64_t G, int64_t C, int64_t* sums) {
  for (int64_t g = blockIdx.x; g < G; g += gridDim.x) {
    int64_t n = 0;
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) n += count[g * C + c];
    n = block_reduce(n, Sum{});
    if (threadIdx.x == 0) sums[g] = n;
  }
}

// Squared differences of one class (Haenel et al. 2022, eq. 3 and 6); writes their gradient.
template <class A>
__device__ A squared_differences(const Dependence<A>& in, const Segment<A>& own, A total, int64_t c) {
  const A mean = total / own.size;
  const auto difference = [&](int64_t m, A n) { return in.rows[m * in.C + c] / n - mean; };
  A value = 0, sum = 0;
  for (int64_t m = own.first; m < own.last; ++m) {
    const int64_t n = in.samples(m);
    if (n == 0) continue;
    const A d = difference(m, static_cast<A>(n));
    value += d * d;
    sum += d;
  }
  for (int64_t m = own.first; m < own.last; ++m) {
    const A n = static_cast<A>(in.samples(m));
    in.gradient[m * in.C + c] = n > A(0) ? own.weight * (2 * difference(m, n) / n - 2 * sum / own.size) : A(0);
  }
  return own.weight * value;
}

// Mutual information of one class and the rows (eq. 4 and 7); writes its gradient. The ratio is one of products, which
// are equal where both are independent.
template <class A>
__device__ A mutual_information(const Dependence<A>& in, const Segment<A>& own, A total, int64_t c) {
  const A tiny = kTiny<A>;
  const A share = own.weight / own.size;
  A value = 0;
  for (int64_t m = own.first; m < own.last; ++m) {
    const A n = static_cast<A>(in.samples(m)), row = in.rows[m * in.C + c];
    A information = 0;
    if (n > A(0) && row > A(0)) {
      const A ratio = (row * own.size) / (total * n);
      information = share * std::log(ratio < tiny ? tiny : ratio);
      value += row * information;
    }
    in.gradient[m * in.C + c] = information;
  }
  return value;
}

// A block owns one of K equal parts of the columns of a segment of K rows, a thread a column at a time.
template <class A>
__global__ void __launch_bounds__(kWide) dependence_kernel(Dependence<A> in) {
  for (int64_t row = blockIdx.x; row < in.M; row += gridDim.x) {
    const Segment<A> own(in, row);
    const int64_t width = divide(in.C + own.last - own.first - 1, own.last - own.first);
    const int64_t begin = (row - own.first) * width, end = begin + width < in.C ? begin + width : in.C;
    A value = 0;
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
      A total = 0;
      for (int64_t m = own.first; m < own.last; ++m) {
        if (own.filled < 2)
          in.gradient[m * in.C + c] = 0;  // nothing to differ from
        else if (in.samples(m) > 0)
          total += in.rows[m * in.C + c];
      }
      if (own.filled < 2) continue;
      value += in.mutual_information ? mutual_information(in, own, total, c) : squared_differences(in, own, total, c);
    }
    value = block_reduce(value, Sum{});
    if (threadIdx.x == 0) in.parts[row] = value;
  }
}

// Depends on sizes alone, as every sum must.
int threads_for(int64_t columns) { return columns > 4 * kThreads ? kWide : kThreads; }

std::tuple<Tensor, Tensor> dependence_cuda(Tensor rows, Tensor count, OptionalTensor cell, OptionalTensor num_cells,
                                           bool mutual_information, bool weighted) {
  const Device device(rows);
  const int64_t M = rows.size(0), G = count.size(0), C = rows.size(1);
  const bool summed = weighted || !cell.has_value();
  Tensor parts = allocate<1>(rows, {M}, rows.scalar_type());
  Tensor gradient = allocate<2>(rows, {M, C}, rows.scalar_type());
  const Tensor by_group = new_int64(count, summed ? G : 0);
  if (summed)
    device.launch(group_counts_kernel, G, threads_for(C), data<int64_t>(count), G, C, data<int64_t>(by_group));
  dispatch_accumulate(rows, [&](auto tag) {
    using A = decltype(tag);
    const Dependence<A> in{data<A>(rows),
                           data<int64_t>(count),
                           data<int64_t>(by_group),
                           optional_data<int64_t>(cell),
                           optional_data<int64_t>(num_cells),
                           M,
                           G,
                           C,
                           mutual_information,
                           weighted,
                           data<A>(parts),
                           data<A>(gradient)};
    device.launch(dependence_kernel<A>, M, threads_for(C), in);
  });
  return {parts, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("dependence", TORCH_BOX(&dependence_cuda)); }

}  // namespace classfair
