#pragma once

// How CUDA sources of this project start kernels and get dynamic shared memory. With CUDA_ON_CPU
// defined, g++ compiles the same sources and the kernels run on the CPU (tests/cuda_on_cpu), so
// there is no <<<>>> and no `extern __shared__` elsewhere.
#include <cstddef>
#include <cstdint>

#if defined(CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace torch_selfattn::kernels::cuda {

#if defined(CUDA_ON_CPU)

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t dynamic_shared_bytes, cudaStream_t /*stream*/,
                   Arguments&&... arguments) {
  cuda_on_cpu::run_grid(grid, block, dynamic_shared_bytes,
                        [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

// `count` elements at byte `offset` of the launch's dynamic shared memory. A part of a region that
// was asked for before is that same memory; a region must not straddle another one's end.
template <typename T>
__device__ __forceinline__ T* shared_at(std::uint32_t offset, std::uint32_t count) {
  return static_cast<T*>(cuda_on_cpu::shared_region(offset, count * sizeof(T)));
}

#elif defined(__CUDACC__)

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t dynamic_shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (dynamic_shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename T>
__device__ __forceinline__ T* shared_at(std::uint32_t offset, std::uint32_t /*count*/) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory + offset);
}

#endif

}  // namespace torch_selfattn::kernels::cuda
