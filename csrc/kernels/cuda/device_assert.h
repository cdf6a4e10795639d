#pragma once

#include <cassert>

#include "kernels/cuda/launch.h"

#if !defined(CUDA_ON_CPU)
// What assert() calls. <cassert> does not declare it in builds with NDEBUG.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file,
                                                  unsigned int line, const char* function) noexcept
    __attribute__((__noreturn__));
#endif

namespace torch_selfattn::kernels::cuda {

// A device-side assertion that also stands in release builds: the stream's next synchronisation
// reports cudaErrorAssert, and the device prints the message and the thread.
__device__ __forceinline__ void device_assert(bool condition, const char* message) {
  if (condition) return;
#if defined(CUDA_ON_CPU)
  cuda_on_cpu::fail("assertion: %s", message);
#else
  __assert_fail(message, __FILE__, __LINE__, "device_assert");
#endif
}

}  // namespace torch_selfattn::kernels::cuda
