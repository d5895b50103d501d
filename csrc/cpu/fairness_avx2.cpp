// The group penalties' code for AVX2.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/fairness.h"

#pragma GCC target("avx2,fma,f16c")
#define CLASSFAIR_ISA avx2
#define CLASSFAIR_VECTOR_BYTES 32
#include "cpu/fairness_rows.h"

#endif
