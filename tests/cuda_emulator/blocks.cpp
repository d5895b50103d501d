// Runs a kernel's blocks one after another in shuffled order, and the threads of a block as fibres, in shuffled order
// between the points at which they wait for each other.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "emulator.h"

// Saves the six registers that a function must keep, and goes on where `to` was left.
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

Machine& machine() {
  static Machine* const one = new Machine;
  return *one;
}

namespace {

constexpr std::size_t kStack = 128 << 10;

void leave() { emulator_switch(&machine().now().stack, machine().scheduler); }

void run_fibre() {
  machine().body(machine().context);
  machine().now().state = State::kDone;
  leave();
}

void enter(int thread) {
  Machine& m = machine();
  m.current = thread;
  place.thread.x = thread;
  m.in_kernel = true;
  emulator_switch(&m.scheduler, m.fibres[thread].stack);
  m.in_kernel = false;
  if (!m.fault.empty()) throw std::runtime_error(m.fault);
}

void prepare(int thread) {
  Fibre& f = machine().fibres[thread];
  void** top = reinterpret_cast<void**>(machine().stacks.begin + (thread + 1) * kStack) - 1;
  *--top = reinterpret_cast<void*>(&run_fibre);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  f = Fibre{};
  f.stack = top;
  f.state = State::kReady;
  f.seen[thread % kWarp] = 1;
}

uint64_t result_of(const Fibre& f, const Fibre* lanes) {
  if (f.kind == Warp::kSync) return 0;
  if (f.kind == Warp::kShuffle) return lanes[f.from].value;
  uint64_t same = 0;
  for (int l = 0; l < kWarp; ++l)
    if (f.mask >> l & 1 && lanes[l].value == f.value) same |= 1ull << l;
  return same;
}

// Lets go on the lanes that wait with the same mask as this one, if none of them is missing.
bool release_lanes(int thread) {
  Machine& m = machine();
  Fibre* const lanes = &m.fibres[thread / kWarp * kWarp];
  const Fibre asking = m.fibres[thread];
  std::array<uint32_t, kWarp> joined{};
  for (int l = 0; l < kWarp; ++l) {
    const Fibre& f = lanes[l];
    if (!(asking.mask >> l & 1)) continue;
    if (f.state != State::kWarp || f.mask != asking.mask || f.kind != asking.kind) return false;
    for (int k = 0; k < kWarp; ++k) joined[k] = std::max(joined[k], f.seen[k]);
  }
  for (int l = 0; l < kWarp; ++l)
    if (asking.mask >> l & 1) lanes[l].result = result_of(lanes[l], lanes);
  for (int l = 0; l < kWarp; ++l) {
    if (!(asking.mask >> l & 1)) continue;
    lanes[l].seen = joined;
    ++lanes[l].seen[l];
    lanes[l].state = State::kReady;
  }
  return true;
}

// Lets go on whoever can; an error where nobody can.
void release() {
  Machine& m = machine();
  bool any = false;
  for (int t = 0; t < m.threads; ++t)
    if (m.fibres[t].state == State::kWarp) any |= release_lanes(t);
  if (any) return;
  std::array<int, 4> number{};
  for (int t = 0; t < m.threads; ++t) ++number[static_cast<int>(m.fibres[t].state)];
  if (number[static_cast<int>(State::kBarrier)] < m.threads) {
    std::ostringstream text;
    text << "divergent barrier: in block " << m.block << " " << number[1] << " threads wait at __syncthreads, "
         << number[2] << " for lanes of their warp, and " << number[3] << " have returned";
    throw std::runtime_error(text.str());
  }
  ++m.epoch;
  for (int t = 0; t < m.threads; ++t) m.fibres[t].state = State::kReady;
}

void run_block(uint32_t block) {
  Machine& m = machine();
  m.block = place.block.x = block;
  m.epoch = 0;
  ++m.blocks_run;
  m.taken.clear();
  std::vector<int> order(m.threads);
  std::iota(order.begin(), order.end(), 0);
  std::for_each(order.begin(), order.end(), prepare);
  for (int done = 0; done < m.threads;) {
    std::shuffle(order.begin(), order.end(), m.random);
    int ran = 0;
    for (const int t : order)
      if (m.fibres[t].state == State::kReady) {
        enter(t);
        ++ran;
        done += m.fibres[t].state == State::kDone;
      }
    if (done < m.threads) release();
  }
  add_requests();
}

// Finds the library of a kernel, which holds its shared memory.
int find_library(dl_phdr_info* info, std::size_t, void* kernel) {
  Machine& m = machine();
  Range whole{info->dlpi_addr, 0}, writable;
  bool mine = false;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& part = info->dlpi_phdr[k];
    if (part.p_type != PT_LOAD) continue;
    const Range range{info->dlpi_addr + part.p_vaddr, info->dlpi_addr + part.p_vaddr + part.p_memsz};
    mine |= range.contains(reinterpret_cast<uintptr_t>(kernel));
    whole.end = std::max(whole.end, range.end);
    if (part.p_flags & PF_W) writable = range;
  }
  if (!mine || m.shared.base == writable.begin) return mine;
  m.library = whole;
  m.shared = Memory{};
  m.shared.base = writable.begin;
  m.shared.size = writable.end - writable.begin;
  return 1;
}

void start() {
  Machine& m = machine();
  void* const stacks =
      mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  m.stacks.begin = reinterpret_cast<uintptr_t>(stacks);
  m.stacks.end = m.stacks.begin + kMaxThreads * kStack;
}

}  // namespace

void fail(const std::string& what) {
  Machine& m = machine();
  m.fault = what + " (block " + std::to_string(m.block) + ", thread " + std::to_string(m.current) + ")";
  leave();
  std::abort();
}

uint64_t warp(Warp kind, unsigned mask, uint64_t value, int from) {
  Fibre& f = machine().now();
  if (!(mask >> lane() & 1)) fail("a thread calls a warp function whose mask leaves it out");
  if (kind == Warp::kShuffle && !(mask >> from & 1)) fail("a shuffle's mask leaves out the lane that it takes from");
  f.kind = kind, f.mask = mask, f.value = value, f.from = from;
  f.state = State::kWarp;
  leave();
  return f.result;
}

void barrier() {
  machine().now().state = State::kBarrier;
  leave();
}

void launch(const void* kernel, int64_t blocks, int threads, void (*body)(void*), void* context) {
  Machine& m = machine();
  if (threads > kMaxThreads) throw std::runtime_error("a block has more than 1024 threads");
  if (m.stacks.begin == 0) start();
  dl_iterate_phdr(find_library, const_cast<void*>(kernel));
  m.body = body, m.context = context, m.threads = threads;
  m.fault.clear();
  m.recent.fill(nullptr);
  m.published.clear();
  m.touched.clear();
  m.requests.clear();
  ++m.launch;
  place.threads.x = threads, place.blocks.x = static_cast<unsigned>(blocks);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), m.random);
  std::for_each(order.begin(), order.end(), run_block);
  if (!m.recording) return;
  Launched record{reinterpret_cast<uintptr_t>(kernel) - m.library.begin, blocks, threads, {}};
  for (const Memory* memory : m.touched) record.touched.push_back(*memory);
  m.launches.push_back(std::move(record));
}

void memset(void* address, int64_t bytes) {
  ++machine().memsets;
  std::memset(address, 0, bytes);
}

}  // namespace emulator

// For Python: another order of blocks and threads.
extern "C" void emulator_seed(int seed) { emulator::machine().random.seed(seed); }
