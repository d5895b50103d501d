// The row code for every processor.
#define CLASSFAIR_ISA baseline
#define CLASSFAIR_VECTOR_BYTES 16
#include "cpu/isa/row_code.h"
