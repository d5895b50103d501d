// Looks at every access of a kernel before it happens: is it within a tensor, is it ordered with those of other
// threads, was shared memory written. And counts it.
#include <algorithm>
#include <sstream>

#include "emulator.h"

namespace emulator {

// The cells of an access. Where it is smaller than a cell, or not aligned as one, all cells are split.
Cell* Memory::cells_at(uintptr_t address, int bytes) {
  if (granule == 0) granule = bytes, cells.resize((size + bytes - 1) / bytes);
  const uintptr_t offset = address - base, alignment = offset & -offset;
  const int wanted = offset == 0 ? bytes : static_cast<int>(std::min<uintptr_t>(alignment, bytes));
  if (wanted < granule) {
    std::vector<Cell> finer((size + wanted - 1) / wanted);
    for (uint64_t i = 0; i < finer.size(); ++i) finer[i] = cells[i * wanted / granule];
    cells.swap(finer);
    granule = wanted;
  }
  return &cells[offset / granule];
}

namespace {

Stamp now() {
  Machine& m = machine();
  return {m.block, m.epoch, m.now().seen[lane()], m.current};
}

bool same_warp(const Stamp& a, const Stamp& b) { return a.block == b.block && a.thread / kWarp == b.thread / kWarp; }

// Whether an access is known to have happened before what the running thread does.
bool ordered(const Stamp& s) {
  Machine& m = machine();
  const Stamp me = now();
  if (s.thread < 0) return true;
  if (s.block == me.block)
    return s.thread == me.thread || s.epoch < me.epoch ||
           (same_warp(s, me) && m.now().seen[s.thread % kWarp] >= s.clock);
  return std::any_of(m.taken.begin(), m.taken.end(), [&](const Published& p) {
    const bool covered = p.stamp.thread == s.thread ? s.clock <= p.stamp.clock : s.epoch < p.stamp.epoch;
    return p.stamp.block == s.block && covered && p.fenced && (p.taken.thread == me.thread || p.taken.epoch < me.epoch);
  });
}

[[noreturn]] void fail_race(const Stamp& s, const char* did, const char* does) {
  fail("race: what thread " + std::to_string(s.thread) + " of block " + std::to_string(s.block) + " " + did + " is " +
       does + " without waiting");
}

void read_cell(Cell& cell) {
  if (!ordered(cell.writer)) fail_race(cell.writer, "wrote", "read");
  const Stamp me = now();
  Stamp* const r = cell.readers;
  const bool mine = r[0].thread == me.thread && r[0].block == me.block;
  if (!mine && (same_warp(r[1], me) || ordered(r[1]))) r[1] = r[0];
  r[0] = me;
}

void write_cell(Cell& cell, bool atomic) {
  if (!ordered(cell.writer) && !(atomic && cell.atomic)) fail_race(cell.writer, "wrote", "written");
  for (const Stamp& reader : cell.readers)
    if (!ordered(reader)) fail_race(reader, "reads", "written");
  cell = Cell{cell.launch, now(), {}, atomic};
}

Memory& tensor_at(uintptr_t address, int bytes) {
  Memory*& recent = machine().recent[address >> 9 & 255];
  if (recent && recent->contains(address, bytes)) return *recent;
  Memory* const found = heap().below(address);
  if (found && found->contains(address, bytes)) return *(recent = found);
  std::ostringstream text;
  text << "index out of bounds: " << bytes << " bytes at ";
  if (found && address > 4096)
    text << "byte " << address - found->base << " of a tensor of " << found->size << " bytes";
  else
    text << "address " << address;
  fail(text.str());
}

void count(Memory& memory, uintptr_t address, int bytes, bool write, const void* code) {
  Machine& m = machine();
  if (memory.launch != m.launch) {
    static_cast<Traffic&>(memory) = Traffic{memory.base};
    memory.launch = m.launch;
    m.touched.push_back(&memory);
  }
  (write ? memory.written : memory.read) += bytes;
  const auto k = static_cast<uintptr_t>(m.now().passed[code]++);
  Request& request = m.requests[{reinterpret_cast<uintptr_t>(code), static_cast<uintptr_t>(m.current / kWarp), k}];
  request.memory = &memory;
  for (uintptr_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector)
    request.sectors.push_back(sector);
}

void access(uintptr_t address, int bytes, bool write, bool atomic, const void* code) {
  Machine& m = machine();
  const auto own = reinterpret_cast<uintptr_t>(&place);
  if (m.stacks.contains(address) || (address >= own && address < own + sizeof(place))) return;
  const bool shared = m.shared.contains(address, bytes);
  if (!shared && m.library.contains(address)) return;  // constants
  Memory& memory = shared ? m.shared : tensor_at(address, bytes);
  if (!shared && m.recording) count(memory, address, bytes, write, code);
  const uint64_t launch = shared ? m.blocks_run : m.launch;
  Cell* cell = memory.cells_at(address, bytes);
  for (int k = 0; k < bytes; k += memory.granule, ++cell) {
    if (cell->launch != launch) *cell = Cell{launch, {}, {}, false};
    if (shared && !write && cell->writer.thread < 0) fail("shared memory is read that the block has not written");
    if (write)
      write_cell(*cell, atomic);
    else
      read_cell(*cell);
  }
}

void hook(const void* address, std::size_t bytes, bool write, bool aligned, const void* code) {
  Machine& m = machine();
  if (!m.in_kernel) return;
  m.in_kernel = false;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (aligned && at % bytes != 0) fail("misaligned address: " + std::to_string(bytes) + " bytes at once");
  for (std::size_t k = 0; k < bytes; k += 16)
    access(at + k, static_cast<int>(std::min<std::size_t>(16, bytes - k)), write, false, code);
  m.in_kernel = true;
}

}  // namespace

void fence() {
  Machine& m = machine();
  m.now().fenced = now();
  ++m.now().seen[lane()];
  for (Published& p : m.taken) p.fenced |= p.taken.thread == m.current;
}

uint64_t atomic_add(void* address, int bytes, uint64_t value) {
  Machine& m = machine();
  m.in_kernel = false;
  const auto at = reinterpret_cast<uintptr_t>(address);
  access(at, bytes, true, true, __builtin_return_address(0));
  std::vector<Stamp>& known = m.published[at];
  for (const Stamp& s : known) m.taken.push_back({s, now(), false});
  if (m.now().fenced.thread >= 0) known.push_back(m.now().fenced);
  uint64_t before = 0;
  std::memcpy(&before, address, bytes);
  const uint64_t after = before + value;
  std::memcpy(address, &after, bytes);
  m.in_kernel = true;
  return before;
}

void add_requests() {
  for (auto& [key, request] : machine().requests) {
    auto& s = request.sectors;
    std::sort(s.begin(), s.end());
    request.memory->sectors += std::unique(s.begin(), s.end()) - s.begin();
    ++request.memory->requests;
  }
  machine().requests.clear();
}

}  // namespace emulator

// What g++ -fsanitize=thread calls before each access of instrumented code.
#define HOOK(name, bytes, write, aligned) \
  extern "C" void __tsan_##name(void* p) { emulator::hook(p, bytes, write, aligned, __builtin_return_address(0)); }
#define HOOKS(bytes)                               \
  HOOK(read##bytes, bytes, false, true)            \
  HOOK(write##bytes, bytes, true, true)            \
  HOOK(unaligned_read##bytes, bytes, false, false) \
  HOOK(unaligned_write##bytes, bytes, true, false)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, std::size_t n) {
  emulator::hook(p, n, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, std::size_t n) {
  emulator::hook(p, n, true, false, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}
// Reference counts of the code around the kernels.
extern "C" int __tsan_atomic32_fetch_add(int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
