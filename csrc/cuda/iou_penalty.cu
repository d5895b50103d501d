// The differences between the groups' intersections over union on GPUs: two passes over the statistics.
#include <tuple>

#include "cuda/common.cuh"

namespace classfair {

namespace {

constexpr int kWide = 1024;  // threads of a block that owns a row

template <class A>
struct IouInputs {
  const A *mass, *hit;   // (G, C)
  const int64_t* count;  // (G, C)
  int64_t G, C;
  bool paired, skip;
  A *mean, *weight;                 // (G + 1,) scratch
  A *value, *grad_mass, *grad_hit;  // (), (G, C), (G, C)
};

// One class in a group, or in all: 0 where it does not count or nobody is or is said to be of it.
template <class A>
struct Overlap {
  A iou = 0, inverse = 0;  // I/U, 1/U
  int64_t samples = 0;
  bool counts;

  __device__ Overlap(const IouInputs<A>& in, int64_t first, int64_t last, int64_t c) {
    A inter = 0, all = 0;
    for (int64_t g = first; g < last; ++g) {
      const int64_t at = g * in.C + c, n = in.count[at];
      inter += in.hit[at];
      all += in.mass[at] + static_cast<A>(n) - in.hit[at];
      samples += n;
    }
    counts = !in.skip || samples > 0;
    if (counts && all > A(0)) iou = inter / all, inverse = A(1) / all;
  }
  // Adds the derivatives of I/U, whose U holds -I.
  __device__ void add(A slope, A* of_mass, A* of_hit) const {
    *of_mass -= slope * inverse * iou;
    *of_hit += slope * inverse * (1 + iou);
  }
};

// A block owns a group, the last one all of them: writes the mean IoU, and the weight of a class in it, 0 without a
// sample.
template <class A>
__global__ void __launch_bounds__(kWide) iou_kernel(IouInputs<A> in) {
  for (int64_t row = blockIdx.x; row <= in.G; row += gridDim.x) {
    const int64_t first = row < in.G ? row : 0, last = row < in.G ? row + 1 : in.G;
    A iou = 0;
    int64_t classes = 0, samples = 0;
    for (int64_t c = threadIdx.x; c < in.C; c += blockDim.x) {
      const Overlap<A> x(in, first, last, c);
      iou += x.iou;
      classes += x.counts;
      samples += x.samples;
    }
    iou = block_reduce(iou, Sum{});
    classes = block_reduce(classes, Sum{});
    samples = block_reduce(samples, Sum{});
    const A number = static_cast<A>(classes > 0 ? classes : 1);
    if (threadIdx.x == 0) in.mean[row] = iou / number, in.weight[row] = samples > 0 ? A(1) / number : A(0);
  }
}

// What a row's IoU is above that of the groups from `first` on that have a sample: the sum, and the sum of squares.
template <class A>
struct Gaps {
  A sum = 0, squares = 0;

  __device__ Gaps(const IouInputs<A>& in, int64_t row, int64_t first) {
    if (!(in.weight[row] > A(0))) return;
    for (int64_t g = first; g < in.G; ++g) {
      const A gap = in.weight[g] > A(0) ? in.mean[row] - in.mean[g] : A(0);
      sum += gap;
      squares += gap * gap;
    }
  }
};

// A thread owns a class of a group: writes its gradients; the first block writes the value.
template <class A>
__global__ void __launch_bounds__(kThreads) iou_gradient_kernel(IouInputs<A> in) {
  for (int64_t at = global_thread(); at < in.G * in.C; at += grid_threads()) {
    const int64_t g = divide(at, in.C), c = at - g * in.C;
    A of_mass = 0, of_hit = 0, gap = 0;
    if (in.paired) {
      gap = Gaps<A>(in, g, 0).sum;
    } else {
      const A all = 2 * Gaps<A>(in, in.G, 0).sum * in.weight[in.G];
      Overlap<A>(in, 0, in.G, c).add(all, &of_mass, &of_hit);
      gap = in.weight[g] > A(0) ? in.mean[g] - in.mean[in.G] : A(0);
    }
    Overlap<A>(in, g, g + 1, c).add(2 * gap * in.weight[g], &of_mass, &of_hit);
    in.grad_mass[at] = of_mass;
    in.grad_hit[at] = of_hit;
  }
  if (blockIdx.x > 0) return;
  A value = 0;
  if (in.paired)
    for (int64_t g = threadIdx.x; g < in.G; g += kThreads) value += Gaps<A>(in, g, g + 1).squares;
  else if (threadIdx.x == 0)
    value = Gaps<A>(in, in.G, 0).squares;
  value = block_reduce(value, Sum{});
  if (threadIdx.x == 0) *in.value = value;
}

std::tuple<Tensor, Tensor, Tensor> iou_penalty_cuda(Tensor mass, Tensor hit, Tensor count, bool paired, bool skip) {
  const Device device(mass);
  const int64_t G = mass.size(0), C = mass.size(1);
  const ScalarType dtype = mass.scalar_type();
  Tensor value = allocate<0>(mass, {}, dtype);
  Tensor grad_mass = allocate<2>(mass, {G, C}, dtype), grad_hit = allocate<2>(mass, {G, C}, dtype);
  const Tensor mean = allocate<1>(mass, {G + 1}, dtype), weight = allocate<1>(mass, {G + 1}, dtype);
  dispatch_accumulate(mass, [&](auto tag) {
    using A = decltype(tag);
    const IouInputs<A> in{
        data<A>(mass),  data<A>(hit),       data<int64_t>(count), G, C, paired, skip, data<A>(mean), data<A>(weight),
        data<A>(value), data<A>(grad_mass), data<A>(grad_hit)};
    device.launch(iou_kernel<A>, G + 1, C > 4 * kThreads ? kWide : kThreads, in);
    device.launch(iou_gradient_kernel<A>, std::max<int64_t>(1, ceil_div(G * C, kThreads)), kThreads, in);
  });
  return {value, grad_mass, grad_hit};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("iou_penalty", TORCH_BOX(&iou_penalty_cuda)); }

}  // namespace classfair
