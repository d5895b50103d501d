// label_index on the CPU: a stable radix sort of the keys, then one pass over the sorted rows.
#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "terms.h"

namespace classfair {

namespace {

constexpr int64_t kMaxKeys = int64_t{1} << 60;

// Rows in stable order of keys in [0, max_key], 8 bits a pass.
std::vector<int64_t> radix_order(const std::vector<int64_t>& key, int64_t max_key) {
  const int64_t rows = static_cast<int64_t>(key.size());
  std::vector<int64_t> order(rows), next(rows);
  std::iota(order.begin(), order.end(), 0);
  for (int shift = 0; shift == 0 || (shift < 64 && (max_key >> shift) > 0); shift += 8) {
    std::array<int64_t, 257> begin{};
    for (int64_t i = 0; i < rows; ++i) ++begin[((key[i] >> shift) & 255) + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    for (int64_t i : order) next[begin[(key[i] >> shift) & 255]++] = i;
    order.swap(next);
  }
  return order;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> label_index_cpu(Tensor target, OptionalTensor group,
                                                                   int64_t num_classes, int64_t num_groups,
                                                                   int64_t ignore_index) {
  STD_TORCH_CHECK(num_classes >= 1 && num_groups >= 1 && num_classes <= kMaxKeys / num_groups,
                  "label_index: expected from 1 to 2^60 keys");
  target = packed(target);
  group = packed(group);
  check_numel(group, target.numel(), "group");
  const int64_t rows = target.numel(), keys = num_classes * num_groups, capacity = std::min(rows, keys);
  const int64_t* label = data<int64_t>(target);
  const int64_t* group_of = optional_data<int64_t>(group);
  std::vector<int64_t> key(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t g = group_of ? group_of[i] : 0;
    const LabelKind kind = classify_label(label[i], num_classes, ignore_index);
    const bool bad_group = kind == LabelKind::kValid && (g < -1 || g >= num_groups);
    if (kind == LabelKind::kInvalid || bad_group)
      throw std::out_of_range("label_index: expected " +
                              (bad_group
                                   ? "group in [0, " + std::to_string(num_groups) + ") or -1, got " + std::to_string(g)
                                   : "label in [0, " + std::to_string(num_classes) + ") or ignore_index " +
                                         std::to_string(ignore_index) + ", got " + std::to_string(label[i])) +
                              " at row " + std::to_string(i));
    // Rows without a slot sort last.
    key[i] = kind == LabelKind::kValid && g >= 0 ? label[i] * num_groups + g : keys;
  }
  const std::vector<int64_t> sorted = radix_order(key, keys);

  Tensor slot = allocate<1>(target, {rows}, ScalarType::Long);
  Tensor key_of_slot = allocate<1>(target, {capacity}, ScalarType::Long);
  Tensor order = allocate<1>(target, {rows}, ScalarType::Long);
  Tensor start = allocate<1>(target, {capacity + 1}, ScalarType::Long);
  Tensor num_slots = allocate<0>(target, {}, ScalarType::Long);
  int64_t* slots = static_cast<int64_t*>(slot.data_ptr());
  int64_t* key_of = static_cast<int64_t*>(key_of_slot.data_ptr());
  int64_t* starts = static_cast<int64_t*>(start.data_ptr());
  std::copy(sorted.begin(), sorted.end(), static_cast<int64_t*>(order.data_ptr()));
  int64_t used = 0, placed = 0;
  for (int64_t position = 0; position < rows; ++position) {
    const int64_t i = sorted[position];
    if (key[i] == keys) {
      slots[i] = -1;
      continue;
    }
    if (used == 0 || key_of[used - 1] != key[i]) {
      key_of[used] = key[i];
      starts[used++] = position;
    }
    slots[i] = used - 1;
    placed = position + 1;
  }
  std::fill(key_of + used, key_of + capacity, 0);
  std::fill(starts + used, starts + capacity + 1, placed);  // unused slots are empty
  *static_cast<int64_t*>(num_slots.data_ptr()) = used;
  return {slot, key_of_slot, order, start, num_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CPU, m) { m.impl("label_index", TORCH_BOX(&label_index_cpu)); }

}  // namespace classfair
