#pragma once

#include <cstdint>
#include <numeric>

namespace classfair {

// Values are summed in double, because a batch may have more rows than a float counts; and in lanes, because additions
// to one number wait for each other. The lanes are added in the end.
template <class A>
double ordered_sum(const A* values, int64_t size) {
  constexpr int64_t kLanes = 8;
  const int64_t whole = size - size % kLanes;
  double lane[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lane[k] += values[i + k];
  for (int64_t i = whole; i < size; ++i) lane[i - whole] += values[i];
  return std::accumulate(lane, lane + kLanes, 0.0);
}

}  // namespace classfair
