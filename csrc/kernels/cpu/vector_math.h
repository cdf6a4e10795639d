#pragma once

#include "kernels/cpu/simd.h"

// Exponentials for softmax and for the additive score. NaN in, NaN out.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr float log2e = 1.44269504088896340736f;
  static constexpr float ln2 = 0.693147180559945309417f;
  static constexpr float round_bias = 0x1.8p23f;  // x + round_bias - round_bias rounds x
  static constexpr float min_exponent = -127.f;   // 2^-127 is computed as 0
  static constexpr float infinite_exponent = 128.f;
  static constexpr int mantissa_bits = 23;
  // Bound of |q|, |k| up to which e^(2q) e^(2k) is a good representation of e^(2(q + k)).
  static constexpr float max_exponent_argument = 32.f;
  // A product of four numbers up to cap is finite, and 1 / cap is negligible beside 1.
  static constexpr float cap = 3.5e9f;
  // A product of eight of these is a normal number.
  static constexpr float unit = 0x1p-15f;
  // 2^127 log2(e): scores are limited to this in units of log2.
  static constexpr float max_score = 0x1p127f * 1.44269504088896340736f;
};
template <>
struct MathConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2 = 0.693147180559945309417;
  static constexpr double round_bias = 0x1.8p52;
  static constexpr double min_exponent = -1023.0;
  static constexpr double infinite_exponent = 1024.0;
  static constexpr int mantissa_bits = 52;
  static constexpr double max_exponent_argument = 32.0;
  static constexpr double cap = 1e70;
  static constexpr double unit = 0x1p-127;
  static constexpr double max_score = 0x1p1023 * 1.44269504088896340736;
};
template <typename T>
using Math = MathConstants<T>;

template <typename T>
constexpr T infinity();
template <>
constexpr float infinity<float>() {
  return __builtin_inff();
}
template <>
constexpr double infinity<double>() {
  return __builtin_inf();
}

template <typename T>
TSA_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

// p * 2^n where rounded = n + round_bias: n is in the low bits and becomes an exponent, which for
// the least is that of 0. A product, since a sum of bits would make numbers of some NaNs.
template <typename T>
TSA_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> rounded) {
  constexpr auto zero = static_cast<unsigned>(-Math<T>::min_exponent);
  return p * (Vec<T>)(((WordVec<T>)rounded + zero) << Math<T>::mantissa_bits);
}

// 2^r for |r| <= 1/2: relative error 2.4e-7 (float, minimax), 1e-16 (double, Taylor).
TSA_INLINE VecF exp2_fraction(VecF r) {
  VecF p = fma(splat(1.3390863365e-03f), r, splat(9.6760319183e-03f));
  p = fma(p, r, splat(5.5503571142e-02f));
  p = fma(p, r, splat(2.4022107485e-01f));
  p = fma(p, r, splat(6.9314718803e-01f));
  return fma(p, r, splat(1.f));
}
TSA_INLINE VecD exp2_fraction(VecD r) {
  // ln(2)^n / n!
  constexpr double c[] = {6.931471805599453e-01,  2.402265069591007e-01,  5.550410866482158e-02,
                          9.618129107628477e-03,  1.3333558146428443e-03, 1.5403530393381608e-04,
                          1.5252733804059841e-05, 1.3215486790144309e-06, 1.0178086009239699e-07,
                          7.0549116208011230e-09, 4.4455382718708116e-10, 2.5678435993488204e-11,
                          1.3691488853904128e-12};
  VecD p = splat(c[12]);
#pragma GCC unroll 12
  for (int n = 11; n >= 0; --n) p = fma(p, r, splat(c[n]));
  return fma(p, r, splat(1.0));
}
// As above with degree 6 in float: relative error below 1e-7.
TSA_INLINE VecF exp2_fraction_accurate(VecF r) {
  VecF p = fma(splat(1.5403530e-4f), r, splat(1.3333558e-3f));
  p = fma(p, r, splat(9.6181291e-3f));
  p = fma(p, r, splat(5.5504109e-2f));
  p = fma(p, r, splat(2.4022651e-1f));
  p = fma(p, r, splat(6.9314718e-1f));
  return fma(p, r, splat(1.f));
}
TSA_INLINE VecD exp2_fraction_accurate(VecD r) { return exp2_fraction(r); }

#if defined(__AVX512DQ__)
// 2^x = 2^n fraction(r), x = n + r, n = floor(x): instructions of their own for r and for the
// product. Below -126 it is 0: subnormal results would be slow.
template <typename Fraction>
TSA_INLINE VecF exp2_in_two(VecF x, const Fraction& fraction) {
  const __mmask16 in_range = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.f), _CMP_NLE_UQ);
  const VecF r = (VecF)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (VecF)_mm512_maskz_scalef_ps(in_range, (__m512)fraction(r), (__m512)x);
}
// For what is rounded to bfloat16, whose rounding is 45 times as large: relative error 8.6e-5,
// infinity beyond 128. 2^r for 0 <= r < 1, minimax with 2^0 = 1.
TSA_INLINE VecF exp2_of_bfloat16(VecF x) {
  return exp2_in_two(x, [](VecF r) {
    VecF p = fma(splat(7.7067039906978607e-02f), r, splat(2.2764499485492706e-01f));
    p = fma(p, r, splat(6.9511675834655762e-01f));
    return fma(p, r, splat(1.f));
  });
}
#endif

// 2^x for x <= 127 (float): the softmax's exponential. Exactly 0 for x <= -127 (with AVX-512 -126)
// and for -inf.
template <typename T>
TSA_INLINE Vec<T> exp2(Vec<T> x) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) {
    // As above; relative error 8.3e-8.
    return exp2_in_two(x, [](VecF r) {
      VecF p = fma(splat(1.8671300818856168e-03f), r, splat(9.0170302844952230e-03f));
      p = fma(p, r, splat(5.5799913145911020e-02f));
      p = fma(p, r, splat(2.4016445013609056e-01f));
      p = fma(p, r, splat(6.9315131180751990e-01f));
      return fma(p, r, splat(1.f));
    });
  }
#endif
  x = at_least(splat(Math<T>::min_exponent), x);
  const Vec<T> rounded = x + splat(Math<T>::round_bias);
  const Vec<T> r = x - (rounded - splat(Math<T>::round_bias));
  return scale_by_power<T>(exp2_fraction(r), rounded);
}

// The same for any x: infinity beyond 128 (float).
template <typename T>
TSA_INLINE Vec<T> exp2_or_infinity(Vec<T> x) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) return exp2<T>(x);  // scalef overflows by itself
#endif
  return exp2<T>(at_most(splat(Math<T>::infinite_exponent), x));
}

// e^(2x) to about 1 ulp, x limited to +-43 (float) or +-340 (double): 2^n e^(2r) with
// r = x - n ln(2)/2, where ln(2)/2 = high + low and n * high is exact, with or without FMA.
template <typename T>
TSA_INLINE Vec<T> exp_2x(Vec<T> x, T limit, T high, T low) {
  constexpr T two_log2e = T(2.88539008177792681472);
  x = at_least(splat(-limit), at_most(splat(limit), x));
  const Vec<T> rounded = fma(x, splat(two_log2e), splat(Math<T>::round_bias));
  const Vec<T> n = rounded - splat(Math<T>::round_bias);
  const Vec<T> r = fnma(n, splat(low), fnma(n, splat(high), x));
  return scale_by_power<T>(exp2_fraction_accurate(r * splat(two_log2e)), rounded);
}
TSA_INLINE VecF exp_2x(VecF x) {
  return exp_2x<float>(x, 43.f, 0x1.62ep-2f, 1.5973092472654708e-05f);
}
TSA_INLINE VecD exp_2x(VecD x) {
  return exp_2x<double>(x, 340.0, 0x1.62e42fefa2000p-2, 3.6855012825838994e-13);
}

TSA_INLINE float log_of(float x) { return __builtin_logf(x); }
TSA_INLINE double log_of(double x) { return __builtin_log(x); }

// log(2^exponent x) for normal x > 0 or NaN, to about 1 ulp of the larger of 1 and the result.
template <typename T>
TSA_INLINE Vec<T> log_scaled(Vec<T> x, Vec<T> exponent) {
#if defined(__FMA__)
  if constexpr (sizeof(T) == 4) {
    // x is 2^n m, 1/sqrt(2) <= m < sqrt(2), and log m is 2 artanh s, s = (m - 1) / (m + 1), by its
    // series.
    const auto bits = (IntVec<float>)x;
    const IntVec<float> n = (bits - 0x3f3504f3) >> 23;
    const auto m = (VecF)(bits - (n << 23));
    const VecF s = (m - splat(1.f)) / (m + splat(1.f));
    const VecF z = s * s;
    VecF p = fma(splat(2.f / 9.f), z, splat(2.f / 7.f));
    p = fma(p, z, splat(2.f / 5.f));
    p = fma(p, z, splat(2.f / 3.f));
    const VecF log_m = fma(s * z, p, s + s) + (x - x);  // NaN stays NaN
    const VecF ln2 = splat(Math<float>::ln2);
    // exponent + n = sum + rest, exactly: it may be small beside either.
    const VecF power = __builtin_convertvector(n, VecF);
    const VecF sum = exponent + power;
    const VecF part = sum - exponent;
    const VecF rest = (exponent - (sum - part)) + (power - part);
    return fma(sum, ln2, fma(rest, ln2, log_m));
  }
#endif
  Vec<T> result{};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const auto log_x = static_cast<double>(log_of(x[lane]));
    result[lane] = static_cast<T>(static_cast<double>(exponent[lane]) * Math<double>::ln2 + log_x);
  }
  return result;
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
