// In the place of csrc/cuda/device.cuh, which holds all that is not a kernel: launches and memsets run at once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "common.h"

namespace emulator {

// Runs `body` once for each thread. `kernel` names it in reports and errors, and tells which library's memory is
// shared.
void launch(const void* kernel, int64_t blocks, int threads, void (*body)(void*), void* context);
void memset(void* address, int64_t bytes);

// Not instrumented: arguments are read from the launching function's frame.
template <class Call>
__attribute__((no_sanitize("thread"))) void call(void* context) {
  (*static_cast<Call*>(context))();
}

}  // namespace emulator

namespace classfair {

class Device {
 public:
  explicit Device(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) return;
    const auto body = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
    emulator::launch(reinterpret_cast<const void*>(kernel), blocks, threads, emulator::call<decltype(body)>,
                     const_cast<void*>(static_cast<const void*>(&body)));
  }
  void zero(const Tensor& tensor) const {
    if (tensor.numel() > 0) emulator::memset(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  }
};

}  // namespace classfair

// Implementations are registered for tensors on the CPU.
#define CUDA CPU
