// The row code of every primitive as a table of functions, one table for each instruction set (row_code.h).
#pragma once

#include <tuple>

#include "common.h"
#include "cpu/class_moments/class_moments.h"
#include "cpu/pair_terms/pair_terms.h"
#include "cpu/softmax_loss/softmax_loss.h"

namespace classfair {

// std::get<RowKernels<float>>(kernels()) are those of softmax_loss for float logits.
using Kernels = std::tuple<RowKernels<double>, RowKernels<float>, RowKernels<Half>, RowKernels<BFloat16>,
                           PairKernels<double>, PairKernels<float>, MomentKernels<double>, MomentKernels<float>,
                           MomentKernels<Half>, MomentKernels<BFloat16>>;

// Of the instruction set that this machine runs.
const Kernels& kernels();

}  // namespace classfair
