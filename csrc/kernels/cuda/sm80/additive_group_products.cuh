#pragma once

#include "kernels/cuda/sm80/additive_group_workspace.h"
#include "kernels/cuda/sm80/fragments.cuh"

// The products phi of the group method. Of a number x, sigma(2x) and sigma(-2x) are its two sides;
// of a token and a group of four features, phi^s is the product of one side of each feature. Bit d
// of s chooses that of feature d: 1 is sigma(2x). The 16 products are the k axis of an MMA:
//
//   sum_d w_d tanh(q_d + k_d) = num / den,  num = sum_s W_s phi_q^s phi_k^s,
//   den = sum_s phi_q^s phi_k^s,            W_s = sum_d (bit d of s ? w_d : -w_d).
//
// In the operands of mma.m16n8k16 lane l has, of token l / 4, the products s = 2p, 2p + 1 and
// 2p + 8, 2p + 9 with p = l % 4. So the four lanes of a token each take one feature of the group,
// exchange sides, and each multiplies what it stores: no lane computes what another has.
namespace torch_selfattn::kernels::cuda::sm80 {

// 2^28 in every product of a key, and in those of a query where it is needed: docs/kernels.md.
constexpr float kFactor = 0x1p28f;
// A denominator of joined groups is at least this, or fewer are joined: 2^-126 is the last normal
// number, which the reciprocal needs, and products are rounded.
constexpr float kLeastDenominator = 0x1p-116f;
// The error of a score is about 2^-9 |scale| |w|_2: docs/tolerances.md.
constexpr float kLargestWeightNorm = 16;

__device__ __forceinline__ std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                         *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const std::uint32_t*>(&product);
}

// The smaller side of x with the sign of x: one number for both sides, which are m and 1 - m.
__device__ __forceinline__ float smaller_side(float x) {
  const float e = exp2_approx(-2 * kLog2E * fabsf(x));
  return copysignf(e * reciprocal_approx(1 + e), x);
}

struct Sides {
  float plus;
  float minus;
  static __device__ __forceinline__ Sides of(float smaller) {
    const float m = fabsf(smaller);
    return __float_as_int(smaller) < 0 ? Sides{m, 1 - m} : Sides{1 - m, m};
  }
  __device__ __forceinline__ float at(bool bit) const { return bit ? plus : minus; }
};

// Of the lane's feature to those of its token's four lanes.
__device__ __forceinline__ void exchange(float (&smaller)[4], float mine) {
#pragma unroll
  for (int d = 0; d < 4; ++d) smaller[d] = __shfl_sync(~0u, mine, d, 4);
}

// The lane's products times `factor`: s = 2p, 2p + 1 and s = 2p + 8, 2p + 9.
__device__ __forceinline__ uint2 products(const float (&smaller)[4], float factor) {
  const unsigned p = threadIdx.x % 4;
  const Sides first = Sides::of(smaller[0]);
  const Sides last = Sides::of(smaller[3]);
  const float middle =
      factor * Sides::of(smaller[1]).at((p & 1) != 0) * Sides::of(smaller[2]).at((p & 2) != 0);
  const float minus = middle * last.minus;
  const float plus = middle * last.plus;
  return {pack<__nv_bfloat16>(minus * first.minus, minus * first.plus),
          pack<__nv_bfloat16>(plus * first.minus, plus * first.plus)};
}

}  // namespace torch_selfattn::kernels::cuda::sm80
