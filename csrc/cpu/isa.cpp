#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace classfair {

namespace {

Isa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa detect() {
  const Isa best = supported_isa();
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit == nullptr) return best;
  if (std::strcmp(limit, "default") == 0) return Isa::kBaseline;
  if (std::strcmp(limit, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
  return best;
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> compiled_isas() {
#if defined(__x86_64__)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

}  // namespace classfair
