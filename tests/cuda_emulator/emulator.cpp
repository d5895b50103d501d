// Runs a kernel's blocks one after another in shuffled order, and the threads of a block as fibres in shuffled order
// between the points at which they wait for each other. Looks at every access before it happens.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "memory.h"

// Saves the six registers that a function must keep, and goes on where `to` did.
asm(R"(
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulator_switch(void** from, void* to);

namespace emulator {

Place place;

namespace {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr std::size_t kStack = 128 << 10;

enum class State { kReady, kBarrier, kWarp, kDone };

// A thread of the running block.
struct Fibre {
  void* stack = nullptr;  // where it was left
  State state = State::kDone;
  Warp kind{};
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
  std::vector<Memory> tensors;
};

struct Emulator {
  std::vector<Fibre> fibres = std::vector<Fibre>(kMaxThreads);
  char* stacks = nullptr;
  void* scheduler = nullptr;
  bool in_kernel = false;
  int current = 0, threads = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::string fault;
  uint32_t block = 0, epoch = 0;
  uint64_t launch_number = 0, block_number = 0;
  std::mt19937 random{std::getenv("CUDA_EMULATOR_SEED") ? std::atoi(std::getenv("CUDA_EMULATOR_SEED")) : 0u};
  Range library, writable;  // of the kernel's library; its writable part is shared memory
  Memory shared;
  std::array<Memory*, 256> recent{};                            // by address
  std::unordered_map<uintptr_t, std::vector<Stamp>> published;  // by the atomic's address
  std::vector<Published> taken;                                 // by this block
  // What Python asked for.
  bool recording = false;
  uint64_t memsets = 0, allocations = 0;
  std::vector<Launched> launches;
  std::vector<Memory*> touched;
  struct Request {
    Memory* memory;
    std::vector<uintptr_t> sectors;
  };
  std::unordered_map<std::string, Request> requests;
};

Emulator& emulator() {
  static Emulator* const one = new Emulator;
  return *one;
}

Fibre& current() { return emulator().fibres[emulator().current]; }

void leave() { emulator_switch(&current().stack, emulator().scheduler); }

// Ends the launch: the fibre is never entered again.
[[noreturn]] void fail(const std::string& what) {
  Emulator& e = emulator();
  std::ostringstream text;
  text << what << " (block " << e.block << ", thread " << e.current << ")";
  e.fault = text.str();
  e.in_kernel = false;
  leave();
  std::abort();
}

void run_fibre() {
  Emulator& e = emulator();
  e.body(e.context);
  current().state = State::kDone;
  leave();
}

void enter(int thread) {
  Emulator& e = emulator();
  e.current = thread;
  place.thread.x = thread;
  e.in_kernel = true;
  emulator_switch(&e.scheduler, e.fibres[thread].stack);
  e.in_kernel = false;
  if (!e.fault.empty()) throw std::runtime_error(e.fault);
}

void prepare_fibre(int thread) {
  Emulator& e = emulator();
  Fibre& f = e.fibres[thread];
  void** top = reinterpret_cast<void**>(e.stacks + (thread + 1) * kStack) - 1;
  *--top = reinterpret_cast<void*>(&run_fibre);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  f.stack = top;
  f.state = State::kReady;
  f.seen.fill(0);
  f.seen[thread % kWarp] = 1;
  f.fenced = Stamp{};
  f.passed.clear();
}

// --- Waiting ---

uint64_t result_of(const Fibre& f, int warp, unsigned mask) {
  const auto lane = [&](int l) -> const Fibre& { return emulator().fibres[warp * kWarp + l]; };
  if (f.kind == Warp::kSync) return 0;
  if (f.kind == Warp::kShuffle) return lane(f.from).value;
  uint64_t lanes = 0;
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1 && (f.kind == Warp::kMatch ? lane(l).value == f.value : lane(l).value != 0)) lanes |= 1ull << l;
  return lanes;
}

// Lets the lanes go on that wait with the same mask as `lane`, if none of them is missing.
bool release_lanes(int warp, int lane) {
  Emulator& e = emulator();
  Fibre* const lanes = &e.fibres[warp * kWarp];
  const unsigned mask = lanes[lane].mask;
  std::array<uint32_t, kWarp> joined{};
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    const bool waits = warp * kWarp + l < e.threads && lanes[l].state == State::kWarp;
    if (!waits || lanes[l].mask != mask || lanes[l].kind != lanes[lane].kind) return false;
    for (int k = 0; k < kWarp; ++k) joined[k] = std::max(joined[k], lanes[l].seen[k]);
  }
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (lanes[l].kind == Warp::kShuffle && !(mask >> lanes[l].from & 1)) {
      e.current = warp * kWarp + l;
      throw std::runtime_error("a shuffle takes the value of lane " + std::to_string(lanes[l].from) +
                               ", which its mask leaves out");
    }
    lanes[l].result = result_of(lanes[l], warp, mask);
  }
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    lanes[l].seen = joined;
    ++lanes[l].seen[l];
    lanes[l].state = State::kReady;
  }
  return true;
}

// Lets go on who can; false where nobody can.
bool release() {
  Emulator& e = emulator();
  bool any = false;
  int at_barrier = 0;
  for (int t = 0; t < e.threads; ++t) {
    at_barrier += e.fibres[t].state == State::kBarrier;
    if (e.fibres[t].state == State::kWarp) any |= release_lanes(t / kWarp, t % kWarp);
  }
  if (at_barrier < e.threads) return any;
  ++e.epoch;
  for (int t = 0; t < e.threads; ++t) e.fibres[t].state = State::kReady;
  return true;
}

std::string who_waits() {
  std::array<int, 4> number{};
  for (int t = 0; t < emulator().threads; ++t) ++number[static_cast<int>(emulator().fibres[t].state)];
  std::ostringstream text;
  text << "divergent barrier: in block " << emulator().block << " " << number[1] << " threads wait at __syncthreads, "
       << number[2] << " for lanes of their warp, and " << number[3] << " have returned";
  return text.str();
}

void add_requests() {
  Emulator& e = emulator();
  for (auto& [key, request] : e.requests) {
    std::sort(request.sectors.begin(), request.sectors.end());
    request.memory->sectors += std::unique(request.sectors.begin(), request.sectors.end()) - request.sectors.begin();
    ++request.memory->requests;
  }
  e.requests.clear();
}

void run_block(uint32_t block) {
  Emulator& e = emulator();
  e.block = block;
  e.epoch = 0;
  ++e.block_number;
  e.taken.clear();
  place.block.x = block;
  std::vector<int> order(e.threads);
  std::iota(order.begin(), order.end(), 0);
  for (const int t : order) prepare_fibre(t);
  for (bool done = false; !done;) {
    std::shuffle(order.begin(), order.end(), e.random);
    for (const int t : order)
      if (e.fibres[t].state == State::kReady) enter(t);
    done = std::all_of(order.begin(), order.end(), [&](int t) { return e.fibres[t].state == State::kDone; });
    if (!done && !release()) throw std::runtime_error(who_waits());
  }
  add_requests();
}

// --- Accesses ---

Stamp now() {
  const Emulator& e = emulator();
  return {e.block, e.epoch, current().seen[e.current % kWarp], e.current};
}

// Whether an access of another thread is known to have happened before this one.
bool ordered(const Stamp& s) {
  const Emulator& e = emulator();
  if (s.thread < 0) return true;
  if (s.block == e.block) {
    const bool same_warp = s.thread / kWarp == e.current / kWarp;
    return s.thread == e.current || s.epoch < e.epoch || (same_warp && current().seen[s.thread % kWarp] >= s.clock);
  }
  return std::any_of(e.taken.begin(), e.taken.end(), [&](const Published& p) {
    const bool covered =
        p.stamp.block == s.block && (p.stamp.thread == s.thread ? s.clock <= p.stamp.clock : s.epoch < p.stamp.epoch);
    return covered && p.fenced && (p.taken.thread == e.current || p.taken.epoch < e.epoch);
  });
}

std::string describe(const Stamp& s) {
  return "thread " + std::to_string(s.thread) + " of block " + std::to_string(s.block);
}

void note_read(Cell& cell) {
  Stamp* const r = cell.readers;
  const Stamp me = now();
  const bool mine = r[0].thread == me.thread && r[0].block == me.block;
  const bool keep = r[1].thread / kWarp != me.thread / kWarp && !ordered(r[1]);
  if (!mine && !keep) r[1] = r[0];
  r[0] = me;
}

void note(Cell& cell, uint64_t launch, bool write, bool atomic) {
  if (cell.launch != launch) cell = Cell{launch, {}, {}, false};
  if (!ordered(cell.writer) && !(atomic && cell.atomic))
    fail("race: what " + describe(cell.writer) + " wrote is " + (write ? "written" : "read") + " without waiting");
  if (!write) return note_read(cell);
  for (const Stamp& reader : cell.readers)
    if (!ordered(reader)) fail("race: what " + describe(reader) + " reads is written without waiting");
  cell = Cell{launch, now(), {}, atomic};
}

Memory* find(uintptr_t address, uint64_t bytes) {
  Emulator& e = emulator();
  Memory*& recent = e.recent[address >> 9 & 255];
  if (recent && recent->contains(address, bytes)) return recent;
  Memory* const found = heap().below(address);
  if (found && found->contains(address, bytes)) return recent = found;
  std::ostringstream text;
  text << "index out of bounds: " << bytes << " bytes at ";
  if (address < 4096)
    text << "a null pointer";
  else if (found)
    text << "byte " << address - found->base << " of a tensor of " << found->size << " bytes";
  else
    text << "no tensor";
  fail(text.str());
}

void count(Memory& memory, uintptr_t address, int bytes, bool write, const void* code) {
  Emulator& e = emulator();
  if (memory.launch != e.launch_number) {
    memory.launch = e.launch_number;
    memory.read = memory.written = memory.requests = memory.sectors = 0;
    e.touched.push_back(&memory);
  }
  (write ? memory.written : memory.read) += bytes;
  if (!e.recording) return;
  // The k-th time that each lane of a warp is at this place in the code is one request.
  const std::array<uintptr_t, 3> key{reinterpret_cast<uintptr_t>(code), static_cast<uintptr_t>(e.current / kWarp),
                                     static_cast<uintptr_t>(current().passed[code]++)};
  auto& request = e.requests[std::string(reinterpret_cast<const char*>(key.data()), sizeof(key))];
  request.memory = &memory;
  for (uintptr_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector)
    request.sectors.push_back(sector);
}

void access(uintptr_t address, int bytes, bool write, bool atomic, const void* code) {
  Emulator& e = emulator();
  const auto stacks = reinterpret_cast<uintptr_t>(e.stacks);
  if (address - stacks < kMaxThreads * kStack || address - reinterpret_cast<uintptr_t>(&place) < sizeof(place)) return;
  const bool shared = e.writable.contains(address);
  if (!shared && e.library.contains(address)) return;  // constants
  Memory& memory = shared ? e.shared : *find(address, bytes);
  if (!shared) count(memory, address, bytes, write, code);
  const uint64_t launch = shared ? e.block_number : e.launch_number;
  Cell* cell = memory.at(address, bytes);
  for (int k = 0; k < bytes; k += memory.granule, ++cell) {
    if (shared && !write && (cell->launch != launch || cell->writer.thread < 0))
      fail("shared memory is read that the block has not written");
    note(*cell, launch, write, atomic);
  }
}

void hook(const void* address, std::size_t bytes, bool write, const void* code) {
  Emulator& e = emulator();
  if (!e.in_kernel) return;
  e.in_kernel = false;
  auto at = reinterpret_cast<uintptr_t>(address);
  for (std::size_t k = 0; k < bytes; k += 16)
    access(at + k, static_cast<int>(std::min<std::size_t>(16, bytes - k)), write, false, code);
  e.in_kernel = true;
}

int find_library(dl_phdr_info* info, std::size_t, void* kernel) {
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  Range whole, writable;
  whole.begin = info->dlpi_addr;
  bool mine = false;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& part = info->dlpi_phdr[k];
    if (part.p_type != PT_LOAD) continue;
    const Range range{info->dlpi_addr + part.p_vaddr, info->dlpi_addr + part.p_vaddr + part.p_memsz};
    mine |= range.contains(address);
    whole.end = std::max(whole.end, range.end);
    if (part.p_flags & PF_W) writable = range;
  }
  if (!mine) return 0;
  Emulator& e = emulator();
  e.library = whole;
  if (e.writable.begin == writable.begin) return 1;
  e.writable = writable;
  e.shared = Memory{};
  e.shared.base = writable.begin;
  e.shared.size = writable.end - writable.begin;
  return 1;
}

}  // namespace

uint64_t warp(Warp kind, unsigned mask, uint64_t value, int from) {
  Fibre& f = current();
  if (!(mask >> (emulator().current % kWarp) & 1)) fail("a thread calls a warp function whose mask leaves it out");
  f.kind = kind, f.mask = mask, f.value = value, f.from = from;
  f.state = State::kWarp;
  leave();
  return f.result;
}

void barrier() {
  current().state = State::kBarrier;
  leave();
}

void fence() {
  Emulator& e = emulator();
  current().fenced = now();
  ++current().seen[e.current % kWarp];
  for (Published& p : e.taken) p.fenced |= p.taken.thread == e.current;
}

uint64_t atomic_add(void* address, int bytes, uint64_t value) {
  Emulator& e = emulator();
  e.in_kernel = false;
  const auto at = reinterpret_cast<uintptr_t>(address);
  access(at, bytes, true, true, __builtin_return_address(0));
  std::vector<Stamp>& known = e.published[at];
  for (const Stamp& s : known) e.taken.push_back({s, now(), false});
  if (current().fenced.thread >= 0) known.push_back(current().fenced);
  uint64_t before = 0;
  std::memcpy(&before, address, bytes);
  const uint64_t after = before + value;
  std::memcpy(address, &after, bytes);
  e.in_kernel = true;
  return before;
}

void launch(const void* kernel, int64_t blocks, int threads, void (*body)(void*), void* context) {
  Emulator& e = emulator();
  if (threads > kMaxThreads) throw std::runtime_error("a block has more than 1024 threads");
  if (e.stacks == nullptr)
    e.stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  dl_iterate_phdr(find_library, const_cast<void*>(kernel));
  e.body = body, e.context = context, e.threads = threads;
  e.fault.clear();
  e.recent.fill(nullptr);
  e.published.clear();
  e.touched.clear();
  ++e.launch_number;
  place.threads.x = threads, place.blocks.x = static_cast<unsigned>(blocks);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), e.random);
  for (const uint32_t block : order) run_block(block);
  if (!e.recording) return;
  Launched record{reinterpret_cast<uintptr_t>(kernel) - e.library.begin, blocks, threads, {}};
  for (const Memory* m : e.touched) {
    record.tensors.push_back(Memory{});
    Memory& copy = record.tensors.back();
    copy.base = m->base, copy.size = m->size, copy.read = m->read, copy.written = m->written;
    copy.requests = m->requests, copy.sectors = m->sectors;
  }
  e.launches.push_back(std::move(record));
}

void memset(void* address, int64_t bytes) {
  ++emulator().memsets;
  std::memset(address, 0, bytes);
}

}  // namespace emulator

// What g++ -fsanitize=thread calls at each access of instrumented code.
#define HOOK(size)                                                                                            \
  extern "C" void __tsan_read##size(void* p) { emulator::hook(p, size, false, __builtin_return_address(0)); } \
  extern "C" void __tsan_write##size(void* p) { emulator::hook(p, size, true, __builtin_return_address(0)); } \
  extern "C" void __tsan_unaligned_read##size(void* p) {                                                      \
    emulator::hook(p, size, false, __builtin_return_address(0));                                              \
  }                                                                                                           \
  extern "C" void __tsan_unaligned_write##size(void* p) { emulator::hook(p, size, true, __builtin_return_address(0)); }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
extern "C" void __tsan_read_range(void* p, std::size_t n) { emulator::hook(p, n, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, std::size_t n) { emulator::hook(p, n, true, __builtin_return_address(0)); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}
// Reference counts of the code around the kernels.
extern "C" int __tsan_atomic32_fetch_add(int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

// For Python: what is launched between the two calls, as JSON.
extern "C" void emulator_start() {
  emulator::Emulator& e = emulator::emulator();
  e.recording = true;
  e.launches.clear();
  e.memsets = 0;
  e.allocations = emulator::heap().allocations;
}

extern "C" const char* emulator_stop() {
  static std::string text;
  emulator::Emulator& e = emulator::emulator();
  e.recording = false;
  std::ostringstream json;
  json << "{\"memsets\": " << e.memsets << ", \"allocations\": " << emulator::heap().allocations - e.allocations
       << ", \"launches\": [";
  const char* separator = "";
  for (const auto& l : e.launches) {
    json << separator << "{\"kernel\": " << l.kernel << ", \"blocks\": " << l.blocks << ", \"threads\": " << l.threads
         << ", \"tensors\": [";
    separator = "";
    for (const auto& m : l.tensors) {
      json << separator << "{\"address\": " << m.base << ", \"bytes\": " << m.size << ", \"read\": " << m.read
           << ", \"written\": " << m.written << ", \"requests\": " << m.requests << ", \"sectors\": " << m.sectors
           << "}";
      separator = ", ";
    }
    json << "]}";
    separator = ", ";
  }
  json << "]}";
  text = json.str();
  return text.c_str();
}
