#pragma once

// Functions that both the CPU kernels (any C++ compiler) and the CUDA kernels (nvcc) use. Inlined
// always: an out-of-line copy from a file compiled for AVX-512 could become the whole program's.
#if defined(__CUDACC__)
#define TSA_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TSA_HOST_DEVICE inline __attribute__((always_inline))
#else
#define TSA_HOST_DEVICE inline
#endif
