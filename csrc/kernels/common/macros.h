#pragma once

// Functions that both the CPU kernels (any C++ compiler) and the CUDA kernels (nvcc) use.
#if defined(__CUDACC__)
#define TSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TSA_HOST_DEVICE inline
#endif
