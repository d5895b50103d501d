// pair_terms's code for every processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/pair_terms.h"

#define CLASSFAIR_ISA baseline
#define CLASSFAIR_VECTOR_BYTES 16
#include "cpu/pair_terms_rows.h"
