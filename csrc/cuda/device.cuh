// The device and stream of a call, and launches on it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <limits>

#include "common.h"

namespace classfair {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // the runtime keeps it otherwise, and the next launch would report it
  STD_TORCH_CHECK(error == cudaSuccess, "classfair: ", cudaGetErrorString(error));
}

// Makes the device of `like` current for its own lifetime; everything goes to torch's current stream there, so scratch
// from torch's allocator may be released as soon as the launches that use it are queued.
class Device {
 public:
  explicit Device(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // A grid may be cut to its limit: kernels whose work can exceed it stride over their units of work.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) return;
    const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    check_cuda(cudaGetLastError());
  }

  void zero(const Tensor& tensor) const {
    if (tensor.numel() == 0) return;
    check_cuda(cudaMemsetAsync(tensor.data_ptr(), 0, tensor.numel() * tensor.element_size(), stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace classfair
