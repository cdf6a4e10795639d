#pragma once

#include <cstdint>

#include "kernels/cpu/simd.h"

// What the vector units and the memory of this machine can do, as loops in which nothing waits for
// anything else: the limits that benchmarks/limits.py divides the kernels' times by. Compiled for
// each instruction set like the kernels themselves.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Four rounds of kFmas fused multiply-adds and kDivisions divisions. Chains of their own hide the
// latency: nine of FMAs (4 cycles, 2 units), and 4 kDivisions of divisions. The values stay
// normal numbers: x tends to 2, y alternates between two values. They begin differently, or the
// compiler would make one chain of all. At most 15 registers.
template <int kFmas, int kDivisions>
float arithmetic(std::int64_t rounds) {
  VecF x[kFmas + 1], y[4 * kDivisions + 1];
  for (int n = 0; n <= kFmas; ++n) x[n] = splat(static_cast<float>(n));
  for (int n = 0; n <= 4 * kDivisions; ++n) y[n] = splat(1.25f + 0.0625f * static_cast<float>(n));
  const VecF a = splat(0.75f), b = splat(0.5f);
  for (std::int64_t i = 0; i < rounds; i += 4) {
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 10
      for (int n = 0; n < kFmas; ++n) x[n] = fma(x[n], a, b);
#pragma GCC unroll 2
      for (int n = 0; n < kDivisions; ++n) {
        VecF& v = y[round * kDivisions + n];
        v = a / v;
      }
    }
  }
  for (const VecF& v : y) x[0] += v;
  for (int n = 1; n <= kFmas; ++n) x[0] += x[n];
  return x[0][0];
}

// Reads all whole vectors of the n floats (as integers: no value is slow to add).
inline float read(const float* data, std::int64_t n) {
  constexpr int kUnroll = 8;
  IntVec<float> sum[kUnroll] = {};
  for (std::int64_t i = 0; i + kUnroll * kLanes<float> <= n; i += kUnroll * kLanes<float>) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] ^= (IntVec<float>)load(data + i + u * kLanes<float>);
    }
  }
  for (int u = 1; u < kUnroll; ++u) sum[0] ^= sum[u];
  return static_cast<float>(sum[0][0]);
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA

// The loops of one instruction set, as one table.
#define TSA_LOOPS(isa)                                                                       \
  namespace torch_selfattn::loops {                                                          \
  extern const Loops isa##_loops = {                                                         \
      kernels::cpu::isa::kVectorBytes,                                                       \
      {kernels::cpu::isa::arithmetic<kFmasOfAScore, 0>, kernels::cpu::isa::arithmetic<0, 2>, \
       kernels::cpu::isa::arithmetic<kFmasOfAScore, 1>},                                     \
      kernels::cpu::isa::read,                                                               \
  };                                                                                         \
  }
