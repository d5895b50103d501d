// What the parts of the emulator share: the running block, and the memory that kernels may touch.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

constexpr int kMaxThreads = 1024, kWarp = 32;

// One access. `clock` is the thread's own: it ticks where the thread meets others of its warp, and at a fence.
struct Stamp {
  uint32_t block = 0, epoch = 0, clock = 0;  // epoch: barriers that the block has passed
  int32_t thread = -1;                       // -1: none
};

// The last accesses of one element in a launch.
struct Cell {
  uint64_t launch = 0;  // of shared memory: a number of the launch and block
  Stamp writer;
  Stamp readers[2];     // the last one, and another, of another warp where there is one
  bool atomic = false;  // the writer's access was
};

// What a launch did to a tensor: bytes of its threads, requests of its warps, and the sectors that those take.
struct Traffic {
  uintptr_t base = 0;
  uint64_t read = 0, written = 0, requests = 0, sectors = 0;
};

// A tensor's memory, or the shared memory of a library. Traffic: in the last launch that touched it.
struct Memory : Traffic {
  uint64_t size = 0, launch = 0;
  int granule = 0;  // bytes of a cell: the smallest access so far
  std::vector<Cell> cells;

  bool contains(uintptr_t address, uint64_t bytes) const { return address >= base && address + bytes <= base + size; }
  Cell* cells_at(uintptr_t address, int bytes);
};

// Torch's CPU memory from the moment that the library is loaded.
struct Heap {
  std::map<uintptr_t, Memory> blocks;  // by address
  std::mutex mutex;
  uint64_t allocations = 0;

  Memory* below(uintptr_t address);  // the nearest block at or below, null where there is none
};

enum class State { kReady, kBarrier, kWarp, kDone };

// A thread of the running block.
struct Fibre {
  void* stack = nullptr;  // where it was left
  State state = State::kDone;
  Warp kind{};  // what it waits for, with what it gives and gets
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int from = 0;
  std::array<uint32_t, kWarp> seen{};           // what it knows of the clocks of its warp, its own included
  Stamp fenced;                                 // when it last passed a fence
  std::unordered_map<const void*, int> passed;  // accesses by their place in the code
};

// A block's writes up to `stamp`, made known by an atomic of a thread that had passed a fence.
struct Published {
  Stamp stamp;
  Stamp taken;  // by whom in this block, and when; its thread must pass a fence before it counts
  bool fenced = false;
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t address) const { return address >= begin && address < end; }
};

struct Launched {
  uintptr_t kernel;  // in its library
  int64_t blocks, threads;
  std::vector<Traffic> touched;
};

// The accesses of a warp's lanes at one place in the code, each lane's k-th.
struct Request {
  Memory* memory;
  std::vector<uintptr_t> sectors;
};

struct Machine {
  std::vector<Fibre> fibres = std::vector<Fibre>(kMaxThreads);
  Range stacks;
  void* scheduler = nullptr;
  bool in_kernel = false;
  int current = 0, threads = 0;
  uint32_t block = 0, epoch = 0;
  uint64_t launch = 0, blocks_run = 0;
  std::string fault;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::mt19937 random;

  Range library;  // of the running kernel; `shared` is its writable part
  Memory shared;
  std::array<Memory*, 256> recent{};                            // by address
  std::vector<Memory*> touched;                                 // in this launch
  std::unordered_map<uintptr_t, std::vector<Stamp>> published;  // in this launch, by the atomic's address
  std::vector<Published> taken;                                 // by this block

  bool recording = false;
  uint64_t memsets = 0, allocations = 0;
  std::vector<Launched> launches;
  std::map<std::array<uintptr_t, 3>, Request> requests;  // of this block, by code, warp and k

  Fibre& now() { return fibres[current]; }
};

Heap& heap();
Machine& machine();
// Ends the launch with an error that names block and thread; their fibre is never entered again.
[[noreturn]] void fail(const std::string& what);
void add_requests();  // of the block that has ended

}  // namespace emulator
