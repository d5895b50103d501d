#pragma once

#include <cstdint>
#include <vector>

namespace classfair {

// Working memory of one thread, kept between calls: fresh pages would cost more than the rows they serve.
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

}  // namespace classfair
