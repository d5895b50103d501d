// What the row code of every instruction set is given: features sorted by slot, and the state of a merge.
#pragma once

#include <cstdint>

#include "common.h"

namespace classfair {

// Columns that one call works on. Each column is summed on its own, so the split changes no bit of a result.
constexpr int64_t kMomentColumns = 512;
// Rows whose moments are taken in two looks, the second of which finds them in cache.
constexpr int64_t kMomentRows = 32;

// Features of larger size make their row one that is not finite: squares of up to 10^7 such rows add up without an
// overflow, and leave room for what is multiplied with a variance.
template <class A>
constexpr A kLargestFeature = sizeof(A) == 4 ? A(1e15) : A(1e150);

template <class T>
struct Moments {
  using A = acc_t<T>;
  const T* features;  // (N, D), rows `stride` apart
  int64_t stride, D;
  A *mean, *variance;  // (M, D); variance null where not wanted
};

template <class A>
struct Merge {
  const A *mean, *variance;        // (M, D) of a batch; variance null where absent
  A *state_mean, *state_variance;  // (C, D)
  A *state_mean_error,
      *state_variance_error;  // (C, D), what rounding has left out of them; null where that is not kept
  int64_t D;
};

template <class T>
struct MomentKernels {
  using A = acc_t<T>;
  // Moments of `count` rows over columns [begin, end) of a slot; false where a row may have a feature that is too
  // large.
  bool (*slot_columns)(const Moments<T>&, int64_t slot, const int64_t* rows, int64_t count, int64_t begin, int64_t end);
  // Whether every feature of a row is finite and not too large.
  bool (*usable_row)(const Moments<T>&, int64_t row);
  // Merges columns [begin, end) of a slot into a class with the weight w of the batch.
  void (*merge_columns)(const Merge<A>&, int64_t slot, int64_t label, A w, int64_t begin, int64_t end);
};

}  // namespace classfair
