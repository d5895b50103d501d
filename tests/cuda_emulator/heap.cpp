// Torch's CPU allocator while kernels are emulated: every tensor is known, NaN at first, and has a gap on both sides.
// And the report of what was touched.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <sstream>

#include "emulator.h"

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
    char* const block = static_cast<char*>(std::aligned_alloc(64, (bytes + 2 * kGap + 63) / 64 * 64));
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

Memory* Heap::below(uintptr_t address) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto after = blocks.upper_bound(address);
  return after == blocks.begin() ? nullptr : &std::prev(after)->second;
}

}  // namespace emulator

// For Python: what is launched between the two calls, in lines of numbers.
extern "C" void emulator_start() {
  emulator::Machine& m = emulator::machine();
  m.recording = true;
  m.launches.clear();
  m.memsets = 0;
  m.allocations = emulator::heap().allocations;
}

extern "C" const char* emulator_stop() {
  static std::string lines;
  emulator::Machine& m = emulator::machine();
  m.recording = false;
  std::ostringstream out;
  out << m.memsets << ' ' << emulator::heap().allocations - m.allocations;
  for (const auto& l : m.launches) {
    out << '\n' << l.kernel << ' ' << l.blocks << ' ' << l.threads;
    for (const auto& t : l.touched)
      out << '\n' << t.base << ' ' << t.read << ' ' << t.written << ' ' << t.requests << ' ' << t.sectors;
  }
  lines = out.str();
  return lines.c_str();
}
