// pair_terms forward by direct differences, which do not cancel where rows are close (Wang et al. 2019, eq. 6).
#include <tuple>

#include "cuda/pair_terms.cuh"

namespace classfair {

namespace {

template <class A>
struct Forward {
  PairInputs<A> in;
  A *variance, *square;  // (M, C) or null
};

// A block owns kSide slots x kSide classes and runs through the features. Unused slots: zeros.
template <bool kVariance, bool kSquare, class A>
__global__ void __launch_bounds__(kThreads) pair_terms_fwd_kernel(Forward<A> f) {
  __shared__ Tile<A> own, cov, other;
  const PairInputs<A>& in = f.in;
  const int64_t used = in.used(), class_tiles = (in.C + kSide - 1) / kSide;
  const int tx = threadIdx.x % kGrid, ty = threadIdx.x / kGrid;
  for (int64_t tile = blockIdx.x; tile < in.row_tiles() * class_tiles; tile += gridDim.x) {
    const int64_t first_row = tile / class_tiles * kSide, first_class = tile % class_tiles * kSide;
    A form[kOwn][kOwn] = {}, distance[kOwn][kOwn] = {};
    for (int64_t first = 0; first < in.D && first_row < used; first += kDepth) {
      __syncthreads();
      fill_tile<true>(own, [&](int k, int r) { return slot_value(in, in.weight, used, first_row + r, first + k); });
      fill_tile<true>(other, [&](int k, int c) { return class_value(in, first_class + c, first + k); });
      if (kVariance)
        fill_tile<true>(cov, [&](int k, int r) { return slot_value(in, in.cov, used, first_row + r, first + k); });
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const A difference = other[k][tx + j * kGrid] - own[k][ty + i * kGrid];
            const A product = difference * difference;
            if (kVariance) form[i][j] += product * cov[k][ty + i * kGrid];
            if (kSquare) distance[i][j] += product;
          }
    }
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j) {
        const int64_t row = first_row + ty + i * kGrid, c = first_class + tx + j * kGrid;
        if (row >= in.M || c >= in.C) continue;
        // An unused slot in a tile with used ones was read as zeros, which are far from the class.
        if (kVariance) f.variance[row * in.C + c] = row < used ? form[i][j] : A(0);
        if (kSquare) f.square[row * in.C + c] = row < used ? distance[i][j] : A(0);
      }
  }
}

// A block owns a row: variance becomes its ratio to square. A Rayleigh quotient lies between the extremes of the
// diagonal; rounding may leave them by an ulp.
template <class A>
__global__ void __launch_bounds__(kThreads) normalize_kernel(Forward<A> f) {
  const PairInputs<A>& in = f.in;
  for (int64_t row = blockIdx.x; row < in.used(); row += gridDim.x) {
    const A* square = f.square + row * in.C;
    A* variance = f.variance + row * in.C;
    const A* cov = in.cov + in.label[row] * in.D;
    A high = cov[0], negative_low = -cov[0];
    for (int64_t k = threadIdx.x; k < in.D; k += kThreads) {
      high = Max{}(high, cov[k]);
      negative_low = Max{}(negative_low, -cov[k]);
    }
    high = block_reduce(high, Max{});
    const A low = -block_reduce(negative_low, Max{}), zero = row_threshold(square, in.C);
    for (int64_t c = threadIdx.x; c < in.C; c += kThreads) {
      const A ratio = variance[c] / square[c];
      const A inside = ratio < low ? low : ratio > high ? high : ratio;
      variance[c] = square[c] <= zero ? A(0) : inside;  // NaN passes
    }
  }
}

std::tuple<Tensor, Tensor> pair_terms_fwd_cuda(Tensor weight, OptionalTensor cov, Tensor label, Tensor num_slots,
                                               bool normalize, bool want_square) {
  STD_TORCH_CHECK(!normalize || want_square, "pair_terms: a normalized forward returns its squares");
  const Device device(weight);
  const int64_t M = label.size(0), C = weight.size(0);
  const ScalarType dtype = weight.scalar_type();
  Tensor variance = allocate<2>(weight, {cov ? M : 0, cov ? C : 0}, dtype);
  Tensor square = allocate<2>(weight, {want_square ? M : 0, want_square ? C : 0}, dtype);
  dispatch_accumulate(weight, [&](auto tag) {
    using A = decltype(tag);
    const Forward<A> f{pair_inputs<A>(weight, cov, label, num_slots), data<A>(variance), data<A>(square)};
    if (!f.variance && !f.square) return;
    auto* kernel = f.variance && f.square ? pair_terms_fwd_kernel<true, true, A>
                   : f.variance           ? pair_terms_fwd_kernel<true, false, A>
                                          : pair_terms_fwd_kernel<false, true, A>;
    device.launch(kernel, ceil_div(M, kSide) * ceil_div(C, kSide), kThreads, f);
    if (normalize && cov && f.in.D > 0) device.launch(normalize_kernel<A>, M, kThreads, f);
  });
  return {variance, square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("pair_terms_fwd", TORCH_BOX(&pair_terms_fwd_cuda)); }

}  // namespace classfair
