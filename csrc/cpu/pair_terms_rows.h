// The code of pair_terms for the instruction set in force; see softmax_loss_rows.h.
#include "cpu/simd.h"
#include "cpu/pair_terms_forward.h"
#include "cpu/pair_terms_backward.h"

namespace classfair {
namespace CLASSFAIR_ISA {

template <class A>
PairKernels<A> pair_kernels() {
  return {forward_block<A>, normalize_row<A>, threshold<A>, backward_panels<A>, kPanel<A>};
}
template PairKernels<double> pair_kernels();
template PairKernels<float> pair_kernels();

}  // namespace CLASSFAIR_ISA
}  // namespace classfair
