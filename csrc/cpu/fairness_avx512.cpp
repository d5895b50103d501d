// The group penalties' code for AVX-512.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/fairness.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define CLASSFAIR_ISA avx512
#define CLASSFAIR_VECTOR_BYTES 64
#include "cpu/fairness_rows.h"

#endif
