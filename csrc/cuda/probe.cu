// Whether the kernels of this build run on the current GPU: that takes code for its architecture and a driver new
// enough.
#include <cuda_runtime.h>

#include <string>

namespace classfair {

namespace {
__global__ void probe_kernel() {}
}  // namespace

std::string why_unusable() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // the runtime keeps it otherwise, and the next launch would report it
  return cudaGetErrorString(error);
}

}  // namespace classfair
