// Memory on the CPU: scratch of a thread, and new tensors of zeros.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace classfair {

// Working memory of one thread, kept between calls: fresh pages would cost more than the rows they serve. Uses with
// different numbers are different memory.
template <class A, int kUse = 0>
A* scratch(int64_t size) {
  thread_local std::vector<A> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}
template <class T>
T* scratch_tile(int64_t size) {
  return scratch<T, 1>(size);
}

inline void fill_zeros(const Tensor& tensor) {
  if (tensor.numel() > 0) std::memset(tensor.data_ptr(), 0, tensor.numel() * tensor.element_size());
}

template <std::size_t kDims>
Tensor zeros(const Tensor& like, const std::array<int64_t, kDims>& sizes, ScalarType dtype) {
  Tensor t = allocate(like, sizes, dtype);
  fill_zeros(t);
  return t;
}

}  // namespace classfair
