// The instruction sets compiled in, and the one this machine runs.
#pragma once

#include <string>
#include <vector>

namespace classfair {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best one that this processor has. ATEN_CPU_CAPABILITY, the variable that limits torch's own kernels, limits it
// too.
Isa selected_isa();
const char* isa_name(Isa isa);
std::vector<std::string> compiled_isas();

}  // namespace classfair
