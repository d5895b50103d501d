// Kernels with one fault each, if `broken`: what the emulator must find, and must not find without the fault.
#include "cuda/common.cuh"

namespace classfair {

namespace {

constexpr int kBlocks = 3, kBlock = 64;

struct Arguments {
  const float* x;                   // (kBlocks * kBlock,)
  float* out;                       // the same
  unsigned long long* blocks_done;  // (), 0
  bool broken;
};

__device__ int place() { return blockIdx.x * kBlock + threadIdx.x; }

__global__ void missing_barrier(Arguments a) {
  __shared__ float values[kBlock];
  values[threadIdx.x] = a.x[place()];
  if (!a.broken) __syncthreads();
  a.out[place()] = values[kBlock - 1 - threadIdx.x];
}

// What is read after one barrier may not be written before the next.
__global__ void missing_second_barrier(Arguments a) {
  __shared__ float values[kBlock];
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = a.x[place()] + round;
    __syncthreads();
    a.out[place()] = values[kBlock - 1 - threadIdx.x];
    if (!a.broken) __syncthreads();
  }
}

__global__ void missing_warp_barrier(Arguments a) {
  __shared__ float values[kBlock];
  values[threadIdx.x] = a.x[place()];
  if (!a.broken) __syncwarp();
  a.out[place()] = values[threadIdx.x ^ 1];
}

__global__ void divergent_barrier(Arguments a) {
  if (!a.broken || threadIdx.x < 40) __syncthreads();
  a.out[place()] = a.x[place()];
}

__global__ void missing_lane(Arguments a) {
  float v = a.x[place()];
  if (!a.broken || threadIdx.x != 5) v += __shfl_xor_sync(~0u, v, 1);
  a.out[place()] = v;
}

__global__ void lane_outside_its_mask(Arguments a) {
  const unsigned half = threadIdx.x % kWarp < 16 ? 0xffffu : 0xffff0000u;
  a.out[place()] = __shfl_xor_sync(a.broken ? 0xffffu : half, a.x[place()], 1);
}

__global__ void unwritten_shared(Arguments a) {
  __shared__ float values[kBlock];
  if (!a.broken || threadIdx.x != 9) values[threadIdx.x] = a.x[place()];
  __syncthreads();
  a.out[place()] = values[kBlock - 1 - threadIdx.x];
}

__global__ void read_out_of_bounds(Arguments a) { a.out[place()] = a.x[place() + (a.broken ? 1 : 0)]; }

__global__ void write_out_of_bounds(Arguments a) { a.out[place() - (a.broken ? 1 : 0)] = a.x[place()]; }

__global__ void misaligned(Arguments a) {
  const auto* two = reinterpret_cast<const int64_t*>(a.x + (a.broken ? 1 : 0));
  if (threadIdx.x == 0) a.out[blockIdx.x] = static_cast<float>(*two);
}

__global__ void race_of_threads(Arguments a) {
  if (a.broken || threadIdx.x == 0) a.out[blockIdx.x] = a.x[place()];
}

__global__ void race_of_blocks(Arguments a) {
  if (threadIdx.x == 0) a.out[a.broken ? 0 : blockIdx.x] = a.x[place()];
}

// The last block reads what the others have written. `fence`, `atomic`: of the others' part in it.
__device__ void last_block(const Arguments& a, bool fence, bool atomic) {
  __shared__ bool last;
  a.out[place()] = a.x[place()];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fence) __threadfence();
    last = (atomic ? atomicAdd(a.blocks_done, 1ull) : blockIdx.x) + 1 == kBlocks;
    if (fence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (int b = 0; b < kBlocks; ++b) sum += a.out[b * kBlock + threadIdx.x];
  __syncthreads();
  a.out[place()] = sum;
}

__global__ void last_block_without_fence(Arguments a) { last_block(a, !a.broken, true); }
__global__ void last_block_without_atomic(Arguments a) { last_block(a, true, !a.broken); }

constexpr void (*kKernels[])(Arguments) = {
    missing_barrier,       missing_second_barrier, missing_warp_barrier,     divergent_barrier,        missing_lane,
    lane_outside_its_mask, unwritten_shared,       read_out_of_bounds,       write_out_of_bounds,      misaligned,
    race_of_threads,       race_of_blocks,         last_block_without_fence, last_block_without_atomic};

Tensor run(Tensor x, int64_t kernel, bool broken) {
  const Device device(x);
  Tensor out = allocate<1>(x, {kBlocks * kBlock}, ScalarType::Float), done = new_int64(x, 1);
  device.zero(done);
  device.launch(kKernels[kernel], kBlocks, kBlock,
                Arguments{data<float>(x), data<float>(out), data<unsigned long long>(done), broken});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(classfair_broken, m) { m.def("run(Tensor x, int kernel, bool broken) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(classfair_broken, CUDA, m) { m.impl("run", TORCH_BOX(&run)); }

}  // namespace classfair
