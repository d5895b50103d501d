// Torch's CPU allocator while kernels are emulated: every tensor is known, NaN at first, and has a gap on both sides.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>

#include "memory.h"

namespace emulator {

namespace {

constexpr std::size_t kGap = 512;

void release(void* data) {
  if (data == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(heap().mutex);
    heap().blocks.erase(reinterpret_cast<uintptr_t>(data));
  }
  std::free(static_cast<char*>(data) - kGap);
}

struct PoisonedAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    const std::size_t whole = (bytes + 2 * kGap + 63) / 64 * 64;
    char* const block = static_cast<char*>(std::aligned_alloc(64, whole));
    TORCH_CHECK(block != nullptr, "DefaultCPUAllocator: can't allocate memory");
    char* const data = block + kGap;
    std::memset(data, 0xff, bytes);
    const std::lock_guard<std::mutex> lock(heap().mutex);
    Memory& memory = heap().blocks[reinterpret_cast<uintptr_t>(data)];
    memory.base = reinterpret_cast<uintptr_t>(data);
    memory.size = bytes;
    ++heap().allocations;
    return {data, data, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

const bool installed = [] {
  c10::SetCPUAllocator(new PoisonedAllocator, /*priority=*/100);
  return true;
}();

}  // namespace

Heap& heap() {
  static Heap* const whole = new Heap;  // never destroyed: tensors outlive static objects
  return *whole;
}

}  // namespace emulator
