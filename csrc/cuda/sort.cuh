// Stable sorting of rows by an integer key, without a host synchronisation.
#pragma once

#include "cuda/common.cuh"

namespace classfair {

struct Sorted {
  Tensor order;  // (items,) int64, stable
  Tensor key;    // (items,) int64: keys in that order
};

// key: (items,) int64 in [0, max_key].
Sorted sort_by_key(const Device& device, const Tensor& key, int64_t max_key);

// (num_keys + 1,) int64: key k owns positions [start[k], start[k + 1]) of a sorted key array.
Tensor segment_starts(const Device& device, const Tensor& sorted_key, int64_t num_keys);

}  // namespace classfair
