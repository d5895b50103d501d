// label_index on GPUs: keys, a stable sort, then slots by counting the positions at which a new key begins.
#include <algorithm>
#include <tuple>

#include "cuda/common.cuh"
#include "cuda/sort.cuh"
#include "terms.h"

namespace classfair {

namespace {

struct Labels {
  const int64_t *target, *group;  // (rows,), group may be null
  int64_t rows, classes, groups, ignore_index;
};

// A thread owns a row. Rows without a slot (ignored, bad, in no group) get the key after the last.
__global__ void key_kernel(Labels in, int64_t* key) {
  for (int64_t i = global_thread(); i < in.rows; i += grid_threads()) {
    const int64_t label = in.target[i], g = in.group ? in.group[i] : 0;
    const bool placed =
        classify_label(label, in.classes, in.ignore_index) == LabelKind::kValid && g >= 0 && g < in.groups;
    key[i] = placed ? label * in.groups + g : in.classes * in.groups;
  }
}

__device__ bool opens_slot(const int64_t* key, int64_t position, int64_t num_keys) {
  return key[position] < num_keys && (position == 0 || key[position] != key[position - 1]);
}

// A block owns a chunk of sorted positions; writes how many slots open in it.
__global__ void count_slots_kernel(const int64_t* key, int64_t rows, int64_t num_keys, int64_t chunk_rows,
                                   int64_t* opened) {
  const int64_t begin = blockIdx.x * chunk_rows, end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
  int64_t count = 0;
  for (int64_t position = begin + threadIdx.x; position < end; position += kThreads)
    count += opens_slot(key, position, num_keys);
  count = block_reduce(count, Sum{});
  if (threadIdx.x == 0) opened[blockIdx.x] = count;
}

struct Slots {
  int64_t *slot, *key_of_slot, *start, *num_slots;
  int64_t capacity;
};

// A block owns a chunk of sorted positions: writes the slots of its rows and the slots that open in it; then all blocks
// together write the unused slots.
__global__ void place_kernel(const int64_t* key, const int64_t* order, int64_t rows, int64_t num_keys,
                             int64_t chunk_rows, int64_t chunks, const int64_t* opened, Slots out) {
  int64_t before = 0, used = 0;
  for (int64_t k = threadIdx.x; k < chunks; k += kThreads) {
    used += opened[k];
    if (k < blockIdx.x) before += opened[k];
  }
  before = block_reduce(before, Sum{});
  used = block_reduce(used, Sum{});

  const int64_t begin = blockIdx.x * chunk_rows, end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
  for (int64_t tile = begin; tile < end; tile += kThreads) {
    const int64_t position = tile + threadIdx.x;
    const bool opens = position < end && opens_slot(key, position, num_keys);
    int64_t total = 0;
    const int64_t slot = before + block_exclusive_sum(opens, &total) + opens - 1;
    before += total;
    if (position < end) out.slot[order[position]] = key[position] < num_keys ? slot : -1;
    if (opens) out.key_of_slot[slot] = key[position], out.start[slot] = position;
  }

  const int64_t placed = lower_bound(key, rows, num_keys);
  for (int64_t s = used + global_thread(); s <= out.capacity; s += grid_threads()) {
    out.start[s] = placed;
    if (s < out.capacity) out.key_of_slot[s] = 0;
  }
  if (global_thread() == 0) *out.num_slots = used;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> label_index_cuda(Tensor target, OptionalTensor group,
                                                                    int64_t num_classes, int64_t num_groups,
                                                                    int64_t ignore_index) {
  const Device device(target);
  const int64_t rows = target.numel(), keys = num_classes * num_groups, capacity = std::min(rows, keys);
  const Labels labels{data<int64_t>(target), optional_data<int64_t>(group), rows, num_classes, num_groups,
                      ignore_index};
  const Tensor key = new_int64(target, rows);
  device.launch(key_kernel, ceil_div(rows, kThreads), kThreads, labels, data<int64_t>(key));
  Sorted sorted = sort_by_key(device, key, keys);

  Tensor slot = new_int64(target, rows), key_of_slot = new_int64(target, capacity);
  Tensor start = new_int64(target, capacity + 1), num_slots = allocate<0>(target, {}, ScalarType::Long);
  // At most about a thousand chunks, so that every block can add up the counts of all others.
  const int64_t chunk_rows = 4 * kThreads * (1 + (rows >> 20));
  const int64_t chunks = std::max<int64_t>(1, ceil_div(rows, chunk_rows));
  const Tensor opened = new_int64(target, chunks);
  device.launch(count_slots_kernel, chunks, kThreads, data<int64_t>(sorted.key), rows, keys, chunk_rows,
                data<int64_t>(opened));
  device.launch(
      place_kernel, chunks, kThreads, data<int64_t>(sorted.key), data<int64_t>(sorted.order), rows, keys, chunk_rows,
      chunks, data<int64_t>(opened),
      Slots{data<int64_t>(slot), data<int64_t>(key_of_slot), data<int64_t>(start), data<int64_t>(num_slots), capacity});
  return {slot, key_of_slot, sorted.order, start, num_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("label_index", TORCH_BOX(&label_index_cuda)); }

}  // namespace classfair
