// The row code for processors with AVX2.
#if defined(__x86_64__)
#define CLASSFAIR_ISA avx2
#define CLASSFAIR_VECTOR_BYTES 32
#define CLASSFAIR_TARGET "avx2,fma,f16c"
#include "cpu/isa/row_code.h"
#endif
