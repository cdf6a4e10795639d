#pragma once

#include <cstdint>

#include "kernels/cpu/simd.h"

// What the vector units and the memory of this machine can do, as loops in which nothing waits for
// anything else: the limits that benchmarks/limits.py divides the kernels' times by. Compiled for
// each instruction set like the kernels themselves.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Instructions of a round: products and FMAs, additions, divisions.
struct Round {
  int fmas, additions, divisions;
};
constexpr Round operator+(Round a, Round b) {
  return {a.fmas + b.fmas, a.additions + b.additions, a.divisions + b.divisions};
}
constexpr Round operator*(int n, Round a) { return {n * a.fmas, n * a.additions, n * a.divisions}; }

// What eight elements of a vector of pairs take in the additive score (score.h, score_gradient.h),
// where a head has as many elements as its values, so that a product with them is eight FMAs. With
// AVX-512 eight elements share a division, four those of a slope; else four and two.
constexpr Round kProduct = {8, 0, 0};
constexpr Round kScore = kVectorBytes == 64 ? Round{21, 6, 1} : Round{18, 8, 2};
constexpr Round kSlopes = 2 * (kVectorBytes == 64 ? Round{21, 12, 1} : Round{18, 12, 2});
constexpr Round kForward = kScore + kProduct;
constexpr Round kBackward = kScore + kSlopes + 2 * kProduct;

// Rounds in which the instructions of a kind follow each other in as many chains as hide their
// latency, the kinds evenly mixed. The values stay normal numbers: those of x tend to 2, the others
// alternate between two values. They begin differently, or the compiler would make one chain of
// all, and with something that it does not know, or it would see what they alternate between. 15
// registers.
template <Round round>
float arithmetic(std::int64_t rounds) {
  constexpr int kFmaChains = 8, kAdditionChains = 3, kDivisionChains = 2;
  VecF x[kFmaChains], s[kAdditionChains], y[kDivisionChains];
  const float unknown = static_cast<float>(rounds % 2) + 1.f;
  for (int n = 0; n < kFmaChains; ++n) x[n] = splat(unknown * static_cast<float>(n));
  for (int n = 0; n < kAdditionChains; ++n) s[n] = splat(unknown * (0.25f + static_cast<float>(n)));
  for (int n = 0; n < kDivisionChains; ++n) y[n] = splat(unknown * (1.25f + static_cast<float>(n)));
  const VecF a = splat(0.75f), b = splat(0.5f);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 128
    for (int n = 0; n < round.fmas; ++n) {
      x[n % kFmaChains] = fma(x[n % kFmaChains], a, b);
      // How many of another kind have been made before FMA n.
      const int additions = n * round.additions / round.fmas;
      const int divisions = n * round.divisions / round.fmas;
      if (additions < (n + 1) * round.additions / round.fmas) {
        VecF& v = s[additions % kAdditionChains];
        v = a - v;
      }
      if (divisions < (n + 1) * round.divisions / round.fmas) {
        VecF& v = y[divisions % kDivisionChains];
        v = a / v;
      }
    }
  }
  for (int n = 1; n < kFmaChains; ++n) x[0] += x[n];
  for (const VecF& v : s) x[0] += v;
  for (const VecF& v : y) x[0] += v;
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
#define TSA_LOOPS(isa)                                                                             \
  namespace torch_selfattn::loops {                                                                \
  extern const Loops isa##_loops = {                                                               \
      kernels::cpu::isa::kVectorBytes,                                                             \
      {kernels::cpu::isa::arithmetic<kernels::cpu::isa::Round{8, 0, 0}>,                           \
       kernels::cpu::isa::arithmetic<kernels::cpu::isa::kForward>,                                 \
       kernels::cpu::isa::arithmetic<kernels::cpu::isa::kForward + kernels::cpu::isa::kBackward>}, \
      kernels::cpu::isa::read,                                                                     \
  };                                                                                               \
  }
