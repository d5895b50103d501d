// Sums over the rows of a segment (a group, a cell, a slot, a label) in a fixed order, without atomics.
#pragma once

#include "cuda/sort.cuh"

namespace classfair {

// Items sorted by key; segment s holds the keys [s * keys_per_segment, (s + 1) * keys_per_segment).
struct Segments {
  const int64_t* order;  // (items,), null: all items in their own order are segment 0
  const int64_t* key;    // (items,) sorted, null with order; keys of no segment are last
  const int64_t* start;  // (count * keys_per_segment + 1,), null with order
  int64_t items, count, keys_per_segment;
  int chunk_shift;  // 2^chunk_shift items are summed by one thread

  __device__ int64_t begin(int64_t s) const { return start ? start[s * keys_per_segment] : 0; }
  __device__ int64_t end(int64_t s) const { return start ? start[(s + 1) * keys_per_segment] : items; }
  int64_t chunks() const { return ceil_div(items, int64_t{1} << chunk_shift); }
};

// Chunks of about the square root of the items balance the two stages; at least 32, so that the chunks' sums stay a
// small part of the items' own memory.
inline int chunk_shift(int64_t items) {
  int shift = 5;
  while ((int64_t{1} << (2 * shift)) < items) ++shift;
  return shift;
}

inline Segments all_items(int64_t items) { return {nullptr, nullptr, nullptr, items, 1, 1, chunk_shift(items)}; }

inline Segments sorted_items(const Sorted& sorted, const Tensor& start, int64_t count, int64_t keys_per_segment) {
  const int64_t items = sorted.order.numel();
  return {data<int64_t>(sorted.order), data<int64_t>(sorted.key), data<int64_t>(start), items, count, keys_per_segment,
          chunk_shift(items)};
}

// Writes one thread's sums of a chunk. A segment that began in an earlier chunk goes to this chunk's carry.
template <class A>
struct ChunkWriter {
  A *out, *carry;  // this column of (count, C), and its place in (chunks, C)
  int64_t C, carried;
  int64_t segment = -1;
  A sum = 0;

  __device__ void next(int64_t s) {
    if (segment >= 0) *(segment == carried ? carry : out + segment * C) = sum;
    segment = s;
    sum = 0;
  }
};

// A thread owns a column of a chunk of items; it adds up value.column(value.row(item), c), into out (count, C) or
// carry.
template <class Value, class A>
__global__ void __launch_bounds__(kThreads, 2)
    segment_chunks_kernel(Value value, Segments in, int64_t C, int64_t chunks, A* out, A* carry) {
  constexpr int kAhead = 4;  // items read at a time: each loop below has its loads in flight together
  for (int64_t index = global_thread(); index < chunks * C; index += grid_threads()) {
    const int64_t chunk = divide(index, C), c = index - chunk * C;
    const int64_t begin = chunk << in.chunk_shift;
    const int64_t end =
        begin + (int64_t{1} << in.chunk_shift) < in.items ? begin + (int64_t{1} << in.chunk_shift) : in.items;
    int64_t carried = begin > 0 ? 0 : -1;
    if (in.key && begin > 0) carried = divide(in.key[begin - 1], in.keys_per_segment);
    ChunkWriter<A> writer{out + c, carry + index, C, carried};
    int64_t segment_end = 0;  // first key after the current segment
    for (int64_t position = begin; position < end; position += kAhead) {
      int64_t key[kAhead], item[kAhead];
      decltype(value.row(0)) row[kAhead];
      A v[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t p = position + j < end ? position + j : end - 1;
        key[j] = in.key ? in.key[p] : 0;
        item[j] = in.order ? in.order[p] : p;
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) row[j] = value.row(item[j]);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = value.column(row[j], static_cast<int>(c));
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (position + j >= end) break;
        if (key[j] >= segment_end) {
          const int64_t s = divide(key[j], in.keys_per_segment);
          writer.next(s < in.count ? s : -1);
          segment_end = (s + 1) * in.keys_per_segment;
        }
        writer.sum += v[j];
      }
    }
    writer.next(-1);
  }
}

// A thread owns a column of a segment: adds the carries of the segment's later chunks to its sum, in chunk order.
template <class A>
__global__ void __launch_bounds__(kThreads) segment_carries_kernel(Segments in, int64_t C, const A* carry, A* out) {
  for (int64_t index = global_thread(); index < in.count * C; index += grid_threads()) {
    const int64_t s = divide(index, C), c = index - s * C;
    const int64_t begin = in.begin(s), end = in.end(s);
    if (begin == end) {
      out[index] = A(0);
      continue;
    }
    const int64_t first = (begin >> in.chunk_shift) + 1, last = (end - 1) >> in.chunk_shift;
    if (first > last) continue;
    A sum = out[index];
    for (int64_t chunk = first; chunk <= last; ++chunk) sum += carry[chunk * C + c];
    out[index] = sum;
  }
}

// out[s, c] = sum of value(item, c) over the items of segment s; out is (count, C).
template <class Value, class A>
void sum_columns(const Device& device, const Value& value, const Segments& segments, int64_t C, const Tensor& like,
                 A* out) {
  const int64_t chunks = segments.chunks();
  const Tensor carry = allocate<2>(like, {chunks, C}, scalar_type_of<A>());
  device.launch(segment_chunks_kernel<Value, A>, ceil_div(chunks * C, kThreads), kThreads, value, segments, C, chunks,
                out, data<A>(carry));
  device.launch(segment_carries_kernel<A>, ceil_div(segments.count * C, kThreads), kThreads, segments, C,
                static_cast<const A*>(data<A>(carry)), out);
}

// A team of `width` threads owns a segment of one key: out[s] = sum of value[item] over it.
template <class A>
__global__ void __launch_bounds__(kThreads) segment_values_kernel(Segments in, const A* value, int width, A* out) {
  const Team team(width);
  const int64_t teams = kThreads / width;
  for (int64_t unit = blockIdx.x * teams; unit < in.count; unit += gridDim.x * teams) {
    const int64_t s = unit + threadIdx.x / width;
    if (s >= in.count) continue;
    A sum = 0;
    for (int64_t p = in.start[s] + team.lane; p < in.start[s + 1]; p += width) sum += value[in.order[p]];
    sum = team_reduce(team, sum, Sum{});
    if (team.lane == 0) out[s] = sum;
  }
}

// out[s] = sum of value[item] over segment s; value is (items,), out (count,), keys_per_segment 1.
template <class A>
void sum_values(const Device& device, const A* value, const Segments& segments, A* out) {
  const int width = segments.items / std::max<int64_t>(segments.count, 1) < kWarp * 2 ? kWarp : kThreads;
  device.launch(segment_values_kernel<A>, ceil_div(segments.count * width, kThreads), kThreads, segments, value, width,
                out);
}

}  // namespace classfair
