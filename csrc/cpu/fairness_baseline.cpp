// The group penalties' code for every processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/fairness.h"

#define CLASSFAIR_ISA baseline
#define CLASSFAIR_VECTOR_BYTES 16
#include "cpu/fairness_rows.h"
