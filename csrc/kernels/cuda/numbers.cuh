#pragma once

#include <limits>
#include <type_traits>

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/ptx.cuh"

// The numbers that attention kernels compute in: the accumulator of each dtype, ways to it and
// back, and how they lie in memory.
namespace torch_selfattn::kernels::cuda {

using torch_selfattn::kernels::AttentionProblem;

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_acc(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <typename Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <typename Acc>
constexpr Acc kLargest = std::numeric_limits<Acc>::max();

// The tokens of one (batch, head): element d of token t is data[t * token_stride + d * dim_stride].
template <typename T>
struct Tokens {
  const T* data;
  std::int64_t token_stride;
  std::int64_t dim_stride;
  bool vectorized;  // 16-byte loads are possible from any token, at multiples of 16 bytes

  static __device__ __forceinline__ Tokens of(const ConstView& view, std::int64_t batch,
                                              std::int64_t head) {
    const T* data =
        static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1];
    const bool aligned =
        (reinterpret_cast<std::uintptr_t>(data) | (view.stride[2] * sizeof(T))) % 16 == 0;
    return {data, view.stride[2], view.stride[3], aligned && view.stride[3] == 1};
  }
};

template <typename T>
__device__ __forceinline__ void store(const View& view, std::int64_t batch, std::int64_t head,
                                      std::int64_t token, std::int64_t d, Accumulator<T> value) {
  static_cast<T*>(view.data)[batch * view.stride[0] + head * view.stride[1] +
                             token * view.stride[2] + d * view.stride[3]] = from_acc<T>(value);
}

}  // namespace torch_selfattn::kernels::cuda
