// The row code for processors with AVX-512.
#if defined(__x86_64__)
#define CLASSFAIR_ISA avx512
#define CLASSFAIR_VECTOR_BYTES 64
#define CLASSFAIR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "cpu/isa/row_code.h"
#endif
