#pragma once

#include "kernels/cuda/attention_backward.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

// What the gradient kernels need to know of a query: p = 2^((s - maximum) log2 e + exponent),
// delta, grad_lse.
__device__ __forceinline__ float4 statistics_of(const Workspace<float>& generic, std::int64_t row,
                                                float grad_lse) {
  const float inverse_sum = generic.inverse_sum[row];
  const float maximum = generic.maximum[row];
  // A row without a key, or one that does not exist: p = 0.
  if (inverse_sum == 0 || maximum == -kInfinity<float>) return {kInfinity<float>, 0, 0, 0};
  return {maximum, log2f(inverse_sum), generic.delta[row], grad_lse};
}

}  // namespace torch_selfattn::kernels::cuda::sm80
