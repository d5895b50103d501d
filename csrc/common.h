// Stable-ABI includes, accumulate types and dtype dispatch. Every gap of the stable ABI is filled here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace classfair {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Sums and statistics: float, or double for double.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
}

// Calls function(T{}) with the C++ type of a floating dtype. A template, because launches inside a dispatch macro
// would split at the commas of <<<>>>.
template <class F>
auto dispatch_floating(ScalarType dtype, F&& function) {
  switch (dtype) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "classfair: expected a floating dtype");
      return function(float{});
  }
}

// Calls function(A{}) with the C++ type of the sums; half precision is widened before it comes here.
template <class F>
auto dispatch_accumulate(const Tensor& sums, F&& function) {
  if (sums.scalar_type() == ScalarType::Double) return function(double{});
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float, "classfair: expected float32 or float64");
  return function(float{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b for a >= 0 and b > 0. A 64-bit division costs a GPU five times as much as one of 32 bits, and is rarely needed.
C10_HOST_DEVICE inline int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// A new contiguous tensor on the device of `like`. torch::stable::new_empty goes through the boxed dispatcher, which
// costs three times as much; nine outputs a call make that 10 microseconds.
template <std::size_t kDims>
Tensor allocate(const Tensor& like, const std::array<int64_t, kDims>& sizes, ScalarType dtype) {
  std::array<int64_t, kDims> strides{};
  int64_t stride = 1;
  for (std::size_t d = kDims; d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(
      kDims, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      static_cast<int32_t>(like.device().type()), like.get_device_index(), &handle);
  // The stable ABI loses torch's exception; those who retry with a smaller batch look for torch's words.
  STD_TORCH_CHECK(error == TORCH_SUCCESS,
                  like.is_cuda() ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory.",
                  " classfair: no memory for a tensor of ", stride, " elements, if torch's own message above agrees");
  return Tensor(handle);
}

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.data_ptr());
}

// The same values in the layout that kernels read. Callers pass contiguous tensors, but torch itself may not: it puts
// an expanded zero in the place of a ZeroTensor.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(packed(*tensor)) : tensor;
}

// Every kernel checks the sizes of what it reads: a caller in Python has said what is wrong before.
inline void check_numel(const OptionalTensor& tensor, int64_t numel, const char* name) {
  STD_TORCH_CHECK(!tensor.has_value() || tensor->numel() == numel, "classfair: expected ", name, " of ", numel,
                  " elements");
}

// Data of an optional tensor, null where it is absent.
template <class T>
const T* optional_data(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == scalar_type_of<T>(), "classfair: unexpected dtype of an optional input");
  return static_cast<const T*>(tensor->data_ptr());
}

}  // namespace classfair
