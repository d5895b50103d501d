// Whether the kernels of this build run on a GPU: that takes code for its architecture and a driver new enough.
#include <cuda_runtime.h>

#include <string>

namespace classfair {

namespace {
__global__ void probe_kernel() {}
}  // namespace

std::string why_unusable(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) cudaGetLastError();  // the runtime keeps it otherwise, and the next launch would report it
  cudaSetDevice(current);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace classfair
