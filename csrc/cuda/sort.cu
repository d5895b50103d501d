// Few items: each is ranked by counting the smaller ones, one launch. Many: radix sort, 8 bits and three launches a
// pass.
#include <utility>

#include "cuda/sort.cuh"

namespace classfair {

namespace {

constexpr int64_t kMaxRanked = 4096;
constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kWarpItems = 256;  // consecutive items of one warp in a radix pass
constexpr int64_t kTileItems = kWarps * kWarpItems;

// A warp owns an item: it reads all keys and writes the item to its place.
__global__ void rank_kernel(const int64_t* key, int64_t items, int64_t* order, int64_t* sorted) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = global_thread() / kWarp; item < items; item += grid_threads() / kWarp) {
    const int64_t mine = key[item];
    int64_t smaller = 0;
    for (int64_t j = lane; j < items; j += kWarp) smaller += key[j] < mine || (key[j] == mine && j < item);
    const int64_t rank = warp_reduce(smaller, Sum{});
    if (lane == 0) order[rank] = item, sorted[rank] = mine;
  }
}

// Shared by the two radix kernels: calls use(position, digit) for the items of this thread's warp in `tile`, 32 at a
// time and in order; digit is kDigits past the end.
template <class Use>
__device__ void for_warp_items(const int64_t* key, int64_t items, int shift, int64_t tile, Use use) {
  const int64_t begin = tile * kTileItems + threadIdx.x / kWarp * kWarpItems;
  for (int64_t offset = 0; offset < kWarpItems; offset += kWarp) {
    const int64_t position = begin + offset + threadIdx.x % kWarp;
    use(position, position < items ? static_cast<int>((key[position] >> shift) & (kDigits - 1)) : kDigits);
  }
}

// One round of 32 items: the number of items of the same digit before this one, in `counters` and among lower lanes;
// then counts the round.
__device__ int64_t warp_rank(int64_t* counters, int digit) {
  const unsigned peers = __match_any_sync(~0u, digit);
  const int below = __popc(peers & ((1u << (threadIdx.x % kWarp)) - 1));
  const int64_t earlier = counters[digit];
  __syncwarp();
  if (below == 0) counters[digit] = earlier + __popc(peers);
  __syncwarp();
  return earlier + below;
}

// A block owns a tile of items; writes its counts to count[digit * tiles + tile].
__global__ void radix_count_kernel(const int64_t* key, int64_t items, int shift, int64_t tiles, int64_t* count) {
  __shared__ int64_t counters[kWarps][kDigits + 1];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int w = 0; w < kWarps; ++w) counters[w][threadIdx.x] = 0;
    if (threadIdx.x < kWarps) counters[threadIdx.x][kDigits] = 0;
    __syncthreads();
    int64_t* mine = counters[threadIdx.x / kWarp];
    for_warp_items(key, items, shift, tile, [&](int64_t, int digit) { warp_rank(mine, digit); });
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < kWarps; ++w) total += counters[w][threadIdx.x];
    count[threadIdx.x * tiles + tile] = total;
    __syncthreads();
  }
}

// A block owns a digit: its counts become the items of the digit in earlier tiles; total[digit] is their sum.
__global__ void radix_scan_kernel(int64_t* count, int64_t tiles, int64_t* total) {
  int64_t* mine = count + blockIdx.x * tiles;
  int64_t carry = 0;
  for (int64_t begin = 0; begin < tiles; begin += kThreads) {
    const int64_t tile = begin + threadIdx.x;
    int64_t sum = 0;
    const int64_t before = block_exclusive_sum(tile < tiles ? mine[tile] : 0, &sum);
    if (tile < tiles) mine[tile] = carry + before;
    carry += sum;
  }
  if (threadIdx.x == 0) total[blockIdx.x] = carry;
}

// A block owns a tile of items and moves them to their places by this digit. order_in null: the items in order.
__global__ void radix_scatter_kernel(const int64_t* key, const int64_t* order_in, int64_t items, int shift,
                                     int64_t tiles, const int64_t* count, const int64_t* total, int64_t* key_out,
                                     int64_t* order_out) {
  __shared__ int64_t counters[kWarps][kDigits + 1];
  int64_t all = 0;
  const int64_t digit_begin = block_exclusive_sum(total[threadIdx.x], &all);
  int64_t* mine = counters[threadIdx.x / kWarp];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int w = 0; w < kWarps; ++w) counters[w][threadIdx.x] = 0;
    if (threadIdx.x < kWarps) counters[threadIdx.x][kDigits] = 0;
    __syncthreads();
    for_warp_items(key, items, shift, tile, [&](int64_t, int digit) { warp_rank(mine, digit); });
    __syncthreads();
    // Counts of each warp become the place of its first item of the digit.
    int64_t place = digit_begin + count[threadIdx.x * tiles + tile];
    for (int w = 0; w < kWarps; ++w) {
      const int64_t own = counters[w][threadIdx.x];
      counters[w][threadIdx.x] = place;
      place += own;
    }
    __syncthreads();
    for_warp_items(key, items, shift, tile, [&](int64_t position, int digit) {
      const int64_t to = warp_rank(mine, digit);
      if (digit == kDigits) return;
      key_out[to] = key[position];
      order_out[to] = order_in ? order_in[position] : position;
    });
    __syncthreads();
  }
}

// A thread owns a key and finds its first position.
__global__ void segment_starts_kernel(const int64_t* sorted, int64_t items, int64_t num_keys, int64_t* start) {
  for (int64_t key = global_thread(); key <= num_keys; key += grid_threads())
    start[key] = lower_bound(sorted, items, key);
}

}  // namespace

Sorted sort_by_key(const Device& device, const Tensor& key, int64_t max_key) {
  const int64_t items = key.numel();
  Sorted out{new_int64(key, items), new_int64(key, items)};
  if (items <= kMaxRanked) {
    device.launch(rank_kernel, ceil_div(items, kWarps), kThreads, data<int64_t>(key), items, data<int64_t>(out.order),
                  data<int64_t>(out.key));
    return out;
  }
  const int64_t tiles = ceil_div(items, kTileItems);
  const Tensor count = new_int64(key, kDigits * tiles), total = new_int64(key, kDigits);
  Sorted other{new_int64(key, items), new_int64(key, items)};
  const int64_t* from = data<int64_t>(key);
  const int64_t* from_order = nullptr;
  for (int shift = 0; shift == 0 || (shift < 63 && (max_key >> shift) > 0); shift += kDigitBits) {
    device.launch(radix_count_kernel, tiles, kThreads, from, items, shift, tiles, data<int64_t>(count));
    device.launch(radix_scan_kernel, kDigits, kThreads, data<int64_t>(count), tiles, data<int64_t>(total));
    device.launch(radix_scatter_kernel, tiles, kThreads, from, from_order, items, shift, tiles, data<int64_t>(count),
                  data<int64_t>(total), data<int64_t>(out.key), data<int64_t>(out.order));
    from = data<int64_t>(out.key);
    from_order = data<int64_t>(out.order);
    std::swap(out, other);
  }
  return other;
}

Tensor segment_starts(const Device& device, const Tensor& sorted_key, int64_t num_keys) {
  Tensor start = new_int64(sorted_key, num_keys + 1);
  device.launch(segment_starts_kernel, ceil_div(num_keys + 1, kThreads), kThreads, data<int64_t>(sorted_key),
                sorted_key.numel(), num_keys, data<int64_t>(start));
  return start;
}

}  // namespace classfair
