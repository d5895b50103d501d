// class_moments on the CPU: the two operators, how their work is cut over threads, and rows that do not enter. The row
// code is in rows.h, which is compiled once for each instruction set.
#include "cpu/class_moments/class_moments.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa/kernels.h"

namespace classfair {

namespace {

constexpr int64_t kGrainElements = 1 << 15;  // of features, below which a second thread does not pay

// Calls work(slot, begin, end) for every slot and block of columns, balanced over threads by the number of rows: slot s
// covers the interval [start[s], start[s + 1]) * blocks, and the thread in whose range a unit begins does all of it.
template <class Work>
void for_slot_columns(const int64_t* start, int64_t slots, int64_t D, Work work) {
  const int64_t blocks = (D + kMomentColumns - 1) / kMomentColumns, units = start[slots] * blocks;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::min(std::max<int64_t>(D, 1), kMomentColumns));
  parallel_for(0, units, grain, [&](int64_t from, int64_t to) {
    int64_t s = std::upper_bound(start, start + slots, from / blocks) - start - 1;
    for (; s < slots && start[s] * blocks < to; ++s) {
      const int64_t rows = start[s + 1] - start[s];
      for (int64_t block = 0; rows > 0 && block < blocks; ++block) {
        const int64_t unit = start[s] * blocks + block * rows, begin = block * kMomentColumns;
        if (unit >= from && unit < to) work(s, begin, std::min(begin + kMomentColumns, D));
      }
    }
  });
}

template <class T>
struct Batch {
  Moments<T> moments;
  const int64_t *order, *start;  // (N,), (M + 1,)
  int64_t slots;
  int64_t *count, *nonfinite;  // (M,), ()
};

template <class A>
void zero_slot(A* values, int64_t slot, int64_t D) {
  if (values != nullptr && D > 0) std::memset(values + slot * D, 0, D * sizeof(A));
}

// A slot whose result is suspicious, again without the rows that are not finite or too large.
template <class T>
void leave_out_rows(const Batch<T>& b, const MomentKernels<T>& code, int64_t slot) {
  std::vector<int64_t> kept;
  for (int64_t p = b.start[slot]; p < b.start[slot + 1]; ++p)
    if (code.usable_row(b.moments, b.order[p])) kept.push_back(b.order[p]);
  const int64_t rows = b.start[slot + 1] - b.start[slot], count = static_cast<int64_t>(kept.size());
  b.count[slot] = count;
  *b.nonfinite += rows - count;
  if (count == rows) return;  // large, but not too large
  zero_slot(b.moments.mean, slot, b.moments.D);
  zero_slot(b.moments.variance, slot, b.moments.D);
  if (count > 0) code.slot_columns(b.moments, slot, kept.data(), count, 0, b.moments.D);
}

// All rows are taken as they are, which is nearly always right; a slot whose result says otherwise is done again.
template <class T>
void fill_moments(const Batch<T>& b) {
  const auto& code = std::get<MomentKernels<T>>(kernels());
  const Moments<T>& in = b.moments;
  const int64_t blocks = (in.D + kMomentColumns - 1) / kMomentColumns;
  std::vector<char> odd(b.slots * blocks, 0);
  for_slot_columns(b.start, b.slots, in.D, [&](int64_t slot, int64_t begin, int64_t end) {
    const int64_t first = b.start[slot];
    odd[slot * blocks + begin / kMomentColumns] =
        !code.slot_columns(in, slot, b.order + first, b.start[slot + 1] - first, begin, end);
  });
  *b.nonfinite = 0;
  for (int64_t slot = 0; slot < b.slots; ++slot) {
    b.count[slot] = b.start[slot + 1] - b.start[slot];
    if (b.count[slot] == 0) zero_slot(in.mean, slot, in.D), zero_slot(in.variance, slot, in.D);
    const char* mine = odd.data() + slot * blocks;
    if (std::any_of(mine, mine + blocks, [](char o) { return o != 0; })) leave_out_rows(b, code, slot);
  }
}

// Throws where an index of another batch would lead out of the features.
void check_index(const int64_t* order, const int64_t* start, int64_t slots, int64_t rows, int64_t positions) {
  bool good = start[0] >= 0 && start[slots] <= positions;
  for (int64_t s = 0; s < slots; ++s) good &= start[s] <= start[s + 1];
  for (int64_t p = 0; good && p < start[slots]; ++p) good &= order[p] >= 0 && order[p] < rows;
  if (!good) throw std::out_of_range("class_moments: expected an index of these features, got one of other rows");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_moments_cpu(Tensor features, Tensor slot, Tensor order, Tensor start,
                                                             bool variance) {
  if (features.size(1) > 1 && features.stride(1) != 1) features = torch::stable::contiguous(features);
  order = packed(order);
  start = packed(start);
  const int64_t slots = start.numel() - 1, D = features.size(1);
  STD_TORCH_CHECK(slots >= 0, "class_moments: expected start of M + 1 elements");
  check_index(static_cast<const int64_t*>(order.data_ptr()), static_cast<const int64_t*>(start.data_ptr()), slots,
              features.size(0), order.numel());
  return dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    constexpr ScalarType acc = scalar_type_of<A>();
    Tensor count = allocate<1>(start, {slots}, ScalarType::Long);
    Tensor mean = allocate<2>(features, {slots, D}, acc);
    Tensor var = allocate<2>(features, {variance ? slots : 0, variance ? D : 0}, acc);
    Tensor nonfinite = allocate<0>(start, {}, ScalarType::Long);
    const Moments<T> in{data<T>(features), features.stride(0), D, data<A>(mean), data<A>(var)};
    fill_moments<T>(
        {in, data<int64_t>(order), data<int64_t>(start), slots, data<int64_t>(count), data<int64_t>(nonfinite)});
    return std::make_tuple(count, mean, var, nonfinite);
  });
}

// Share of a batch of n_b rows in the moments of a class that has seen n.
double merge_weight(int64_t n, int64_t n_b, const std::optional<double>& momentum) {
  if (momentum.has_value()) return n > 0 ? *momentum : 1.0;
  return static_cast<double>(n_b) / static_cast<double>(n + n_b);
}

void class_moments_merge_cpu(Tensor count, Tensor mean, OptionalTensor variance, Tensor key, Tensor state_count,
                             Tensor state_mean, OptionalTensor state_variance, OptionalTensor state_mean_error,
                             OptionalTensor state_variance_error, std::optional<double> momentum) {
  STD_TORCH_CHECK(
      state_mean.is_contiguous() && mean.is_contiguous() && variance.has_value() == state_variance.has_value(),
      "class_moments_merge: expected contiguous rows and state, both with a variance or neither");
  STD_TORCH_CHECK(mean.scalar_type() == state_mean.scalar_type(),
                  "class_moments_merge: expected rows in the state's dtype");
  const int64_t slots = count.numel(), D = mean.size(1), classes = state_count.numel();
  for (const OptionalTensor& t : {OptionalTensor(mean), variance}) check_numel(t, slots * D, "rows");
  for (const OptionalTensor& t : {OptionalTensor(state_mean), state_variance, state_mean_error, state_variance_error})
    check_numel(t, classes * D, "state");
  check_numel(key, slots, "key");
  count = packed(count);
  key = packed(key);
  const int64_t *n_b = data<int64_t>(count), *label = data<int64_t>(key);
  int64_t* n = data<int64_t>(state_count);
  for (int64_t s = 0; s < slots; ++s)
    if (n_b[s] != 0 && (label[s] < 0 || label[s] >= classes))
      throw std::out_of_range("class_moments_merge: expected key in [0, " + std::to_string(classes) + "), got " +
                              std::to_string(label[s]));
  dispatch_floating(mean.scalar_type(), [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    const Merge<A> in{data<A>(mean),
                      optional_data<A>(variance),
                      data<A>(state_mean),
                      const_cast<A*>(optional_data<A>(state_variance)),
                      const_cast<A*>(optional_data<A>(state_mean_error)),
                      const_cast<A*>(optional_data<A>(state_variance_error)),
                      D};
    const auto& code = std::get<MomentKernels<A>>(kernels());
    parallel_for(
        0, slots, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(D, 1)), [&](int64_t from, int64_t to) {
          for (int64_t s = from; s < to; ++s) {
            if (n_b[s] == 0) continue;
            code.merge_columns(in, s, label[s], static_cast<A>(merge_weight(n[label[s]], n_b[s], momentum)), 0, D);
            n[label[s]] += n_b[s];
          }
        });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) {
  m.impl("class_moments", TORCH_BOX(&class_moments_cpu));
  m.impl("class_moments_merge", TORCH_BOX(&class_moments_merge_cpu));
}

}  // namespace classfair
