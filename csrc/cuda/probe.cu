// The smallest kernel there is: `classfair doctor` runs it to learn whether this binary has code for this GPU.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

namespace classfair {

namespace {

__global__ void double_kernel(const float* in, float* out, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) out[i] = 2.f * in[i];
}

Tensor probe_cuda(Tensor input) {
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float && input.is_contiguous(), "probe: expected contiguous float32");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
  Tensor output = torch::stable::empty_like(input);
  const int64_t size = input.numel();
  if (size == 0) return output;
  constexpr int kThreads = 256;
  double_kernel<<<static_cast<unsigned>((size + kThreads - 1) / kThreads), kThreads, 0,
                  static_cast<cudaStream_t>(stream)>>>(static_cast<const float*>(input.data_ptr()),
                                                       static_cast<float*>(output.data_ptr()), size);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "probe: ", cudaGetErrorString(error));
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(classfair_native, CUDA, m) { m.impl("probe", TORCH_BOX(&probe_cuda)); }

}  // namespace classfair
