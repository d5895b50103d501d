#include "cpu/isa/isa.h"

#include <cstdlib>

#include "cpu/isa/kernels.h"

namespace classfair {

namespace baseline {
void fill_kernels(Kernels* table);
}
namespace avx2 {
void fill_kernels(Kernels* table);
}
namespace avx512 {
void fill_kernels(Kernels* table);
}

namespace {

struct InstructionSet {
  std::string name, torch_name;
  bool supported;  // by this processor
  void (*fill_kernels)(Kernels* table);
};

// Each has all instructions of those before it.
std::vector<InstructionSet> compiled() {
  std::vector<InstructionSet> sets{{"baseline", "default", true, baseline::fill_kernels}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  sets.push_back({"avx2", "avx2", avx2, avx2::fill_kernels});
  sets.push_back({"avx512", "avx512", avx2 && avx512, avx512::fill_kernels});
#endif
  return sets;
}

InstructionSet select() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable ? variable : "";
  InstructionSet best;
  for (const InstructionSet& set : compiled()) {
    if (set.supported) best = set;
    if (set.torch_name == limit) break;
  }
  return best;
}

const InstructionSet& selected() {
  static const InstructionSet set = select();
  return set;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels filled;
    selected().fill_kernels(&filled);
    return filled;
  }();
  return table;
}

std::string selected_isa() { return selected().name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : compiled()) names.push_back(set.name);
  return names;
}

}  // namespace classfair
