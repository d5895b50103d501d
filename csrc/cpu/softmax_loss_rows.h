// The row code for the instruction set in force; the including file sets CLASSFAIR_ISA and CLASSFAIR_VECTOR_BYTES, and
// has included every other header before its target pragma: inline functions of those are shared with files for lesser
// processors.
#include "cpu/simd.h"
#include "cpu/softmax_loss_columns.h"
#include "cpu/softmax_loss_forward.h"
#include "cpu/softmax_loss_backward.h"
#include "cpu/softmax_loss_narrow.h"

namespace classfair {
namespace CLASSFAIR_ISA {

template <class T>
RowKernels<T> row_kernels(bool narrow) {
  if (narrow) return {narrow_forward_chunk<T>, nullptr, narrow_backward_chunk<T>};
  return {forward_chunk<T>, joint_cell<T>, backward_chunk<T>};
}
template RowKernels<double> row_kernels(bool narrow);
template RowKernels<float> row_kernels(bool narrow);
template RowKernels<Half> row_kernels(bool narrow);
template RowKernels<BFloat16> row_kernels(bool narrow);

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
