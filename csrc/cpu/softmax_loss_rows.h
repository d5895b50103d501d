// The row code for the instruction set in force; the including file sets CLASSFAIR_ISA and CLASSFAIR_VECTOR_BYTES, and
// has included every other header before its target pragma: inline functions of those are shared with files for lesser
// processors.
#include "cpu/simd.h"
#include "cpu/softmax_loss_columns.h"
#include "cpu/softmax_loss_forward.h"
#include "cpu/softmax_loss_backward.h"

namespace classfair {
namespace CLASSFAIR_ISA {

template <class T>
RowKernels<T> row_kernels() {
  return {forward_chunk<T>, joint_cell<T>, backward_chunk<T>};
}
template RowKernels<double> row_kernels();
template RowKernels<float> row_kernels();
template RowKernels<Half> row_kernels();
template RowKernels<BFloat16> row_kernels();

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
