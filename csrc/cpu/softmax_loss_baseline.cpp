// softmax_loss's row code for every processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/softmax_loss.h"

#define CLASSFAIR_ISA baseline
#define CLASSFAIR_VECTOR_BYTES 16
#include "cpu/softmax_loss_rows.h"
