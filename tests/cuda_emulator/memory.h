// What kernels may touch and what they touched: torch's allocations and the library's shared memory, with the last
// accesses of every element.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace emulator {

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

struct Memory {
  uintptr_t base = 0;
  uint64_t size = 0;
  // Of this launch.
  uint64_t launch = 0, read = 0, written = 0, requests = 0, sectors = 0;
  int granule = 0;  // bytes of a cell: the smallest access so far
  std::vector<Cell> cells;

  bool contains(uintptr_t address, uint64_t bytes) const { return address >= base && address + bytes <= base + size; }
  // The cells of an access, split where they are larger than it.
  Cell* at(uintptr_t address, int bytes) {
    if (granule == 0) granule = bytes, cells.resize((size + bytes - 1) / bytes);
    const int misalignment = static_cast<int>((address - base) & -(address - base));
    const int wanted = misalignment != 0 && misalignment < bytes ? misalignment : bytes;
    if (wanted < granule) {
      std::vector<Cell> finer((size + wanted - 1) / wanted);
      for (uint64_t i = 0; i < finer.size(); ++i) finer[i] = cells[i * wanted / granule];
      cells.swap(finer);
      granule = wanted;
    }
    return &cells[(address - base) / granule];
  }
};

// Torch's CPU memory from the moment that the library is loaded: exact sizes, poisoned, far from each other.
struct Heap {
  std::map<uintptr_t, Memory> blocks;  // by address
  std::mutex mutex;
  uint64_t allocations = 0;

  // Nearest block at or below an address, null where there is none.
  Memory* below(uintptr_t address) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto after = blocks.upper_bound(address);
    return after == blocks.begin() ? nullptr : &std::prev(after)->second;
  }
};
Heap& heap();

}  // namespace emulator
