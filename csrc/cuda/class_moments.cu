// class_moments on GPUs: which rows enter, moments by chunks of sorted rows, and the merge into running state.
#include "cuda/class_moments.cuh"

#include <tuple>

#include "cuda/segments.cuh"

namespace classfair {

namespace {

template <class A>
struct Scratch {
  Tensor count, mean, squares;

  Scratch(const Tensor& like, int64_t pieces, int64_t D)
      : count(new_int64(like, pieces)),
        mean(allocate<2>(like, {pieces, D}, scalar_type_of<A>())),
        squares(allocate<2>(like, {pieces, D}, scalar_type_of<A>())) {}
  Pieces<A> pieces() const { return {data<int64_t>(count), data<A>(mean), data<A>(squares)}; }
};

using MomentsResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
MomentsResult moments(const Tensor& features, const Tensor& slot, const Tensor& order, const Tensor& start,
                      bool variance) {
  using A = acc_t<T>;
  const Device device(features);
  const int64_t rows = features.size(0), D = features.size(1), slots = start.numel() - 1;
  constexpr ScalarType acc = scalar_type_of<A>();
  Tensor count = new_int64(start, slots), nonfinite = allocate<0>(start, {}, ScalarType::Long);
  Tensor mean = allocate<2>(features, {slots, D}, acc);
  Tensor var = allocate<2>(features, {variance ? slots : 0, variance ? D : 0}, acc);
  const Tensor finite = allocate<1>(features, {rows}, ScalarType::Byte);
  const MomentsInput<T> in{data<T>(features),
                           data<int64_t>(slot),
                           data<int64_t>(order),
                           data<int64_t>(start),
                           data<uint8_t>(finite),
                           features.stride(0),
                           D,
                           rows,
                           slots,
                           chunk_shift(rows)};
  device.zero(nonfinite);
  device.launch(finite_kernel<T>, ceil_div(rows * kWarp, kThreads), kThreads, in, data<uint8_t>(finite),
                data<int64_t>(nonfinite));
  const int64_t chunks = in.chunks();
  const Scratch<A> first(features, slots, D), carry(features, chunks, D);
  device.launch(moment_chunks_kernel<T>, ceil_div(chunks * D, kThreads), kThreads, in, chunks, first.pieces(),
                carry.pieces());
  device.launch(moment_carries_kernel<T>, ceil_div(slots * D, kThreads), kThreads, in, first.pieces(), carry.pieces(),
                data<int64_t>(count), data<A>(mean), data<A>(var));
  return {count, mean, var, nonfinite};
}

MomentsResult class_moments_cuda(Tensor features, Tensor slot, Tensor order, Tensor start, bool variance) {
  if (features.size(1) > 1 && features.stride(1) != 1) features = torch::stable::contiguous(features);
  return dispatch_floating(features.scalar_type(),
                           [&](auto tag) { return moments<decltype(tag)>(features, slot, order, start, variance); });
}

template <class A>
A* written(const OptionalTensor& state) {
  return const_cast<A*>(optional_data<A>(state));
}

void class_moments_merge_cuda(Tensor count, Tensor mean, OptionalTensor variance, Tensor key, Tensor state_count,
                              Tensor state_mean, OptionalTensor state_variance, OptionalTensor state_mean_error,
                              OptionalTensor state_variance_error, std::optional<double> momentum) {
  STD_TORCH_CHECK(
      state_mean.is_contiguous() && mean.is_contiguous() && variance.has_value() == state_variance.has_value(),
      "class_moments_merge: expected contiguous rows and state, both with a variance or neither");
  STD_TORCH_CHECK(mean.scalar_type() == state_mean.scalar_type(),
                  "class_moments_merge: expected rows in the state's dtype");
  const Device device(mean);
  dispatch_floating(mean.scalar_type(), [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    const Merge<A> in{data<int64_t>(count),
                      data<int64_t>(key),
                      data<A>(mean),
                      optional_data<A>(variance),
                      data<int64_t>(state_count),
                      data<A>(state_mean),
                      written<A>(state_variance),
                      written<A>(state_mean_error),
                      written<A>(state_variance_error),
                      mean.size(0),
                      mean.size(1),
                      momentum.has_value(),
                      momentum.value_or(0.0)};
    device.launch(merge_kernel<A>, in.slots, kThreads, in);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) {
  m.impl("class_moments", TORCH_BOX(&class_moments_cuda));
  m.impl("class_moments_merge", TORCH_BOX(&class_moments_merge_cuda));
}

}  // namespace classfair
