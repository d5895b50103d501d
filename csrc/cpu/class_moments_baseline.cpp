// class_moments's row code for every processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/class_moments.h"

#define CLASSFAIR_ISA baseline
#define CLASSFAIR_VECTOR_BYTES 16
#include "cpu/class_moments_rows.h"
