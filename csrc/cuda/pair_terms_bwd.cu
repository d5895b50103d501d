// pair_terms backward by direct differences: for the squared distance and the form of every pair,
//   d/dw_c = 2 (G_form v_y + G_square) (w_c - w_y) = -d/dw_y,  d/dv_y = G_form (w_c - w_y)^2.
#include <tuple>

#include "cuda/pair_terms.cuh"

namespace classfair {

namespace {

template <class A>
struct Backward {
  PairInputs<A> in;
  const A *grad_variance, *grad_square;  // (M, C) or null
  const A *ratio, *square;               // (M, C) outputs of a normalized forward, else null
  A* threshold;                          // (M,) of square, with them
  A *grad_weight, *grad_cov;             // (C, D), grad_cov may be null

  // The doubled gradients of one pair's form and squared distance; exactly 0 at the own class.
  __device__ void coefficients(int64_t used, int64_t row, int64_t c, A* form, A* distance) const {
    *form = *distance = A(0);
    if (row >= used || c >= in.C || in.label[row] == c) return;
    const int64_t at = row * in.C + c;
    A of_form = grad_variance ? grad_variance[at] : A(0), of_square = grad_square ? grad_square[at] : A(0);
    if (ratio) {
      of_form = square[at] <= threshold[row] ? A(0) : of_form / square[at];
      of_square -= of_form * ratio[at];
    }
    *form = 2 * of_form;
    *distance = 2 * of_square;
  }
};

// A block owns a row.
template <class A>
__global__ void __launch_bounds__(kThreads) threshold_kernel(Backward<A> b) {
  for (int64_t row = blockIdx.x; row < b.in.used(); row += gridDim.x) {
    const A zero = row_threshold(b.square + row * b.in.C, b.in.C);
    if (threadIdx.x == 0) b.threshold[row] = zero;
  }
}

// A block owns kSide classes x kSide features and runs through the slots: what they give to the others.
template <class A>
__global__ void __launch_bounds__(kThreads, 1) class_gradient_kernel(Backward<A> b) {
  __shared__ Tile<A> own, cov, form, distance;
  const PairInputs<A>& in = b.in;
  const int64_t used = in.used(), feature_tiles = (in.D + kSide - 1) / kSide;
  const int tx = threadIdx.x % kGrid, ty = threadIdx.x / kGrid;
  for (int64_t tile = blockIdx.x; tile < (in.C + kSide - 1) / kSide * feature_tiles; tile += gridDim.x) {
    const int64_t first_class = tile / feature_tiles * kSide, first = tile % feature_tiles * kSide;
    A other[kOwn][kOwn], sum[kOwn][kOwn] = {};
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j)
        other[i][j] = class_value(in, first_class + ty + i * kGrid, first + tx + j * kGrid);
    for (int64_t first_row = 0; first_row < used; first_row += kDepth) {
      __syncthreads();
      fill_tile<false>(own, [&](int m, int k) { return slot_value(in, in.weight, used, first_row + m, first + k); });
      if (in.cov)
        fill_tile<false>(cov, [&](int m, int k) { return slot_value(in, in.cov, used, first_row + m, first + k); });
      else
        fill_tile<false>(cov, [&](int, int) { return A(0); });
      fill_tile<false>(form, [&](int m, int c) {
        A of_form;
        b.coefficients(used, first_row + m, first_class + c, &of_form, &distance[m][c]);
        return of_form;
      });
      __syncthreads();
#pragma unroll 4
      for (int m = 0; m < kDepth; ++m)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const int c = ty + i * kGrid, k = tx + j * kGrid;
            sum[i][j] += (form[m][c] * cov[m][k] + distance[m][c]) * (other[i][j] - own[m][k]);
          }
    }
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j) {
        const int64_t c = first_class + ty + i * kGrid, k = first + tx + j * kGrid;
        if (c < in.C && k < in.D) b.grad_weight[c * in.D + k] = sum[i][j];
      }
  }
}

// A block owns kSide slots x kSide features and runs through the classes: what they give to the slots' own rows, added
// to what is there, and the gradient of their diagonals. Labels of slots are distinct.
template <bool kCov, class A>
__global__ void __launch_bounds__(kThreads) slot_gradient_kernel(Backward<A> b) {
  __shared__ Tile<A> other, form, distance;
  const PairInputs<A>& in = b.in;
  const int64_t used = in.used(), feature_tiles = (in.D + kSide - 1) / kSide;
  const int tx = threadIdx.x % kGrid, ty = threadIdx.x / kGrid;
  for (int64_t tile = blockIdx.x; tile < in.row_tiles() * feature_tiles; tile += gridDim.x) {
    const int64_t first_row = tile / feature_tiles * kSide, first = tile % feature_tiles * kSide;
    if (first_row >= used) return;
    A own[kOwn][kOwn], cov[kOwn][kOwn], sum[kOwn][kOwn] = {}, cov_sum[kOwn][kOwn] = {};
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j) {
        const int64_t row = first_row + ty + i * kGrid, k = first + tx + j * kGrid;
        own[i][j] = slot_value(in, in.weight, used, row, k);
        cov[i][j] = in.cov ? slot_value(in, in.cov, used, row, k) : A(0);
      }
    for (int64_t first_class = 0; first_class < in.C; first_class += kDepth) {
      __syncthreads();
      fill_tile<false>(other, [&](int c, int k) { return class_value(in, first_class + c, first + k); });
      fill_tile<true>(form, [&](int c, int r) {
        A of_form;
        b.coefficients(used, first_row + r, first_class + c, &of_form, &distance[c][r]);
        return of_form;
      });
      __syncthreads();
#pragma unroll 4
      for (int c = 0; c < kDepth; ++c)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const A difference = other[c][tx + j * kGrid] - own[i][j], of_form = form[c][ty + i * kGrid];
            sum[i][j] += (of_form * cov[i][j] + distance[c][ty + i * kGrid]) * difference;
            if (kCov) cov_sum[i][j] += of_form * (difference * difference);
          }
    }
    for (int i = 0; i < kOwn; ++i)
      for (int j = 0; j < kOwn; ++j) {
        const int64_t row = first_row + ty + i * kGrid, k = first + tx + j * kGrid;
        if (row >= used || k >= in.D) continue;
        const int64_t at = in.label[row] * in.D + k;
        b.grad_weight[at] -= sum[i][j];
        if (kCov) b.grad_cov[at] = A(0.5) * cov_sum[i][j];
      }
  }
}

std::tuple<Tensor, Tensor> pair_terms_bwd_cuda(OptionalTensor grad_variance, OptionalTensor grad_square, Tensor weight,
                                               OptionalTensor cov, Tensor label, Tensor num_slots, Tensor variance,
                                               Tensor square, bool normalize, bool want_cov) {
  const Device device(weight);
  const int64_t M = label.size(0), C = weight.size(0), D = weight.size(1);
  const ScalarType dtype = weight.scalar_type();
  Tensor grad_weight = allocate<2>(weight, {C, D}, dtype);
  Tensor grad_cov = want_cov ? allocate<2>(weight, {C, D}, dtype) : allocate<1>(weight, {0}, dtype);
  Tensor threshold = allocate<1>(weight, {M}, dtype);
  device.zero(grad_cov);
  dispatch_accumulate(weight, [&](auto tag) {
    using A = decltype(tag);
    Backward<A> b{};
    b.in = pair_inputs<A>(weight, cov, label, num_slots);
    b.grad_variance = optional_data<A>(grad_variance);
    b.grad_square = optional_data<A>(grad_square);
    b.grad_weight = data<A>(grad_weight);
    b.grad_cov = data<A>(grad_cov);
    if (M == 0 || (!b.grad_variance && !b.grad_square)) return device.zero(grad_weight);
    if (normalize && b.grad_variance) {
      b.ratio = data<A>(variance);
      b.square = data<A>(square);
      b.threshold = data<A>(threshold);
      device.launch(threshold_kernel<A>, M, kThreads, b);
    }
    const int64_t feature_tiles = ceil_div(D, kSide);
    device.launch(class_gradient_kernel<A>, ceil_div(C, kSide) * feature_tiles, kThreads, b);
    device.launch(b.grad_cov ? slot_gradient_kernel<true, A> : slot_gradient_kernel<false, A>,
                  ceil_div(M, kSide) * feature_tiles, kThreads, b);
  });
  return {grad_weight, grad_cov};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("pair_terms_bwd", TORCH_BOX(&pair_terms_bwd_cuda)); }

}  // namespace classfair
