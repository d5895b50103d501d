// What the kernels use of CUDA's language and runtime, in C++ for one CPU thread. emulator.cpp implements it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another, so that one copy serves all. The emulator refuses what a block did not write itself.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

struct Place {
  dim3 thread, block, threads, blocks;
};
extern Place place;  // of the thread that runs

enum class Warp { kSync, kShuffle, kMatch };

// Waits for the lanes of `mask`. Each gives `value` and takes that of lane `from` (kShuffle), or the lanes of its value
// (kMatch).
uint64_t warp(Warp kind, unsigned mask, uint64_t value, int from);
void barrier();
void fence();
uint64_t atomic_add(void* address, int bytes, uint64_t value);

template <class V>
V shuffle(unsigned mask, V value, int from) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = warp(Warp::kShuffle, mask, bits, from);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}
inline int lane() { return place.thread.x % 32; }

}  // namespace emulator

#define threadIdx emulator::place.thread
#define blockIdx emulator::place.block
#define blockDim emulator::place.threads
#define gridDim emulator::place.blocks

inline void __syncthreads() { emulator::barrier(); }
inline void __threadfence() { emulator::fence(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::warp(emulator::Warp::kSync, mask, 0, 0); }
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int with) {
  return emulator::shuffle(mask, value, emulator::lane() ^ with);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned by) {
  const int from = emulator::lane() - static_cast<int>(by);
  return emulator::shuffle(mask, value, from < 0 ? emulator::lane() : from);
}
inline unsigned __match_any_sync(unsigned mask, uint64_t value) {
  return static_cast<unsigned>(emulator::warp(emulator::Warp::kMatch, mask, value, 0));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Integers alone: an atomic of floats would not compile, and would depend on the order.
template <class V>
V atomicAdd(V* address, V value) {
  static_assert(std::is_integral_v<V>);
  return static_cast<V>(emulator::atomic_add(address, sizeof(V), static_cast<uint64_t>(value)));
}
