// All row code, once for one instruction set. The including file sets CLASSFAIR_ISA (a namespace),
// CLASSFAIR_VECTOR_BYTES and, unless every processor has the set, CLASSFAIR_TARGET.
//
// Every other header is included before the target begins: its inline functions are shared with files for lesser
// processors, and the linker keeps one copy of each. (target_clones would not reach lambdas inside parallel_for.)
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/isa/kernels.h"

#define CLASSFAIR_PRAGMA(text) _Pragma(#text)
#if defined(CLASSFAIR_TARGET) && defined(__clang__)
#define CLASSFAIR_BEGIN_TARGET(set) \
  CLASSFAIR_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define CLASSFAIR_END_TARGET CLASSFAIR_PRAGMA(clang attribute pop)
#elif defined(CLASSFAIR_TARGET)
#define CLASSFAIR_BEGIN_TARGET(set) CLASSFAIR_PRAGMA(GCC push_options) CLASSFAIR_PRAGMA(GCC target(set))
#define CLASSFAIR_END_TARGET CLASSFAIR_PRAGMA(GCC pop_options)
#else
#define CLASSFAIR_TARGET
#define CLASSFAIR_BEGIN_TARGET(set)
#define CLASSFAIR_END_TARGET
#endif

CLASSFAIR_BEGIN_TARGET(CLASSFAIR_TARGET)

#include "cpu/isa/simd.h"
#include "cpu/softmax_loss/columns.h"
#include "cpu/softmax_loss/forward.h"
#include "cpu/softmax_loss/backward.h"
#include "cpu/softmax_loss/narrow.h"
#include "cpu/pair_terms/forward.h"
#include "cpu/pair_terms/backward.h"
#include "cpu/class_moments/rows.h"

namespace classfair {
namespace CLASSFAIR_ISA {

template <class... K>
void set_all(std::tuple<K...>* table) {
  (set_kernels(&std::get<K>(*table)), ...);
}
void fill_kernels(Kernels* table) { set_all(table); }

}  // namespace CLASSFAIR_ISA
}  // namespace classfair

CLASSFAIR_END_TARGET
