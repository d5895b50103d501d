// The instruction sets that row code is compiled for.
#pragma once

#include <string>
#include <vector>

namespace classfair {

// The best one that this processor has. ATEN_CPU_CAPABILITY, the variable that limits torch's own kernels, limits it
// too.
std::string selected_isa();
std::vector<std::string> compiled_isas();

}  // namespace classfair
