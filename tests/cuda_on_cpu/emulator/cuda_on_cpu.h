#pragma once

// Lets g++ compile a CUDA source and run it on the CPU, one fiber per GPU thread. This header is
// what kernels/cuda/launch.h and ptx.cuh include under CUDA_ON_CPU: the scheduler and the emulated
// instructions. builtins.h, included at the end, is the part of CUDA C++ that only nvcc knows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace cuda_on_cpu {

// Thrown by the launch in which a fault was found: what, where, and (for a deadlock) who waits for
// what.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The seed chooses the order of warps and when asynchronous work completes. Its first value is that
// of the environment variable CUDA_ON_CPU_SEED, or 0.
void set_seed(std::uint64_t seed);
void run_grid(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
              const std::function<void()>& kernel);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Blocks until every lane of `mask` has called with the same operation and mask; the last one runs
// operation(arguments of each lane). Reports name the source line of `site`, by default the call;
// callers are therefore inlined into the kernel.
using WarpOperation = void (*)(void* const* lane_arguments, std::uint32_t mask);
void warp_collective(std::uint32_t mask, const char* name, WarpOperation operation, void* arguments,
                     const void* site = nullptr);
void sync_warp(std::uint32_t mask);
void sync_threads();
int sync_threads_count(int predicate);
void sync_some_threads(int id, int count);  // a named barrier
int current_lane();
std::uint32_t active_lanes();

// Dynamic shared memory. Each region asked for is a separate allocation with red zones; asking
// again for (part of) a known region gives the same bytes.
void* shared_region(std::uint32_t offset, std::size_t bytes);
std::uint32_t shared_address(const void* pointer);  // consistent, but not the GPU's number

// Emulated instructions.
void cp_async(void* to, const void* from, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

struct MmaArguments {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};
void mma_bf16(void* const* arguments, std::uint32_t mask);
void mma_f16(void* const* arguments, std::uint32_t mask);
void mma_tf32(void* const* arguments, std::uint32_t mask);

struct LdmatrixArguments {
  std::uint32_t* registers;
  std::uint32_t address;
  int count;
  bool transpose;
};
void ldmatrix(void* const* arguments, std::uint32_t mask);

// Tells the race detector of an access; does nothing in the other builds.
void race_access(const void* pointer, std::size_t bytes, bool write, bool atomic, const void* site);

}  // namespace cuda_on_cpu

#include "builtins.h"
