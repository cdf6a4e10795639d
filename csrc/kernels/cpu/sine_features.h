#pragma once

#include <cstdint>

#include "kernels/cpu/packing.h"
#include "kernels/cpu/sine_plan.h"

// The additive score as a dot product. On an interval tanh is a straight line and a few sines
// (tanh_sines.h), and a sine of a sum is two products:
//
//   tanh(q + k) = s (q + k) + sum_m a_m (sin f_m q cos f_m k + cos f_m q sin f_m k),
//
// so w . tanh(q + k) is a dot product of features of the query and of the key, 2 `terms` of each
// element, and all that is done per pair is a matrix product in bfloat16. Features less a constant
// leave terms that depend on the query or on the key alone:
//
//   sin q cos k = (sin q - n) (cos k - m) + n (cos k - m) + m sin q,
//
// and these, as the straight line, are added up in float, once per token. With n, m near the means
// of the sines and cosines over the tokens the products are small, and their rounding with them.
// Any n, m are right; these are the means of a normal distribution of the mean and variance that
// the tokens have.
//
// A pair of features is a word (operand.h): word m E + d has for element d of E
//   query  (w a_m (sin f_m q - n),  w a_m (cos f_m q - m'))
//   key    (cos f_m k - m,          sin f_m k - n')
// and three words behind these have what depends on one token, in three parts of bfloat16, times 1:
//   query  (1, part),  key  (part, 1).
//
// Of the straight line the query has s (q + c) and the key s (k - c), c the mean of the keys, so
// that what is added up is small. w is in units of the largest |w_d|, which is in the scale.
//
// Error of a score: |scale| times the root of sum_d (w_d e_d)^2, about, with the error e_d of the
// fit, and what rounding leaves of 2^-9 of each product. `terms` is chosen for the inputs: e_d
// depends on the largest |q_d + k_d|, which the extremes of the tokens bound. What gradients are
// off by is measured by some pairs.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Tokens whose features are made together, lanes being tokens: two vectors of them.
constexpr std::int64_t kTokens = std::int64_t{2} * kLanes<float>;

// Which token a lane of the two vectors is of.
enum class TokenOrder : bool {
  kHalves,  // the first 16, the next 16
  kPairs    // those of even, those of odd numbers
};

// to[d][kTokens] = elements of up to kTokens rows, 0 behind the last.
inline void turn_tokens(const Rows& rows, std::int64_t begin, std::int64_t n, TokenOrder order,
                        float* to) {
  constexpr std::int64_t lanes = kLanes<float>;
  static_assert(kPanel<float> == kTokens);
  pack_panel<Elements<float>>(rows, begin, n, to,
                              [](VecF x, std::int64_t /*d*/) { return usable(x); });
  if (order == TokenOrder::kHalves) return;
  for (std::int64_t d = 0; d < rows.width; ++d, to += kTokens) {
    VecF even, odd;
    part_pairs(to, even, odd);
    store(to, even);
    store(to + lanes, odd);
  }
}

// Two vectors, rounded to bfloat16, halves away from 0, as the low and high halves of words.
TSA_INLINE VecF words_of(VecF low, VecF high) {
  const WordVec<float> rounded = ((WordVec<float>)low + 0x8000u) >> 16;
  return (VecF)(rounded | (((WordVec<float>)high + 0x8000u) & 0xffff0000u));
}

// One word's features of kTokens tokens.
struct TokenFeatures {
  VecF first[2], second[2];
};

// Features of kTokens tokens from turn_tokens(): put(word, TokenFeatures) for all words, of which
// there are `words` with those behind the last, 0.
template <bool kIsQuery, typename Put>
inline void make_features(const SineHead& head, std::int64_t width, const float* tokens,
                          std::int64_t words, const Put& put) {
  constexpr std::int64_t lanes = kLanes<float>;
  VecF alone[2] = {};  // what depends on one token
  for (std::int64_t d = 0; d < width; ++d) {
    for (int x = 0; x < 2; ++x) {
      const VecF shift = splat(kIsQuery ? head.shift()[d] : -head.shift()[d]);
      const VecF token = load(tokens + d * kTokens + x * lanes) + shift;
      alone[x] = fma(token, splat(head.line()[d]), alone[x]);
    }
  }
  const std::int64_t stride = head.stride();
  const int terms = head.terms();
  for (int m = 0; m < terms; ++m) {
    const float* const vectors = head.vector(m, SineHead::Vector{});
    for (std::int64_t d = 0; d < width; ++d) {
      const auto of = [&](SineHead::Vector which) { return splat(vectors[which * stride + d]); };
      TokenFeatures features;
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        VecF sine, cosine;
        const VecF token = load(tokens + d * kTokens + x * lanes);
        sine_and_cosine_of_turns(token * of(SineHead::kTurns), sine, cosine);
        if constexpr (kIsQuery) {
          const VecF weight = of(SineHead::kWeight);
          features.first[x] = fma(sine, weight, -of(SineHead::kQuerySine));
          features.second[x] = fma(cosine, weight, -of(SineHead::kQueryCosine));
          alone[x] = fma(sine, of(SineHead::kOfSine), alone[x]);
          alone[x] = fma(cosine, of(SineHead::kOfCosine), alone[x]);
        } else {
          features.first[x] = cosine - of(SineHead::kKeyCosine);
          features.second[x] = sine - of(SineHead::kKeySine);
          alone[x] = fma(features.first[x], of(SineHead::kQuerySine), alone[x]);
          alone[x] = fma(features.second[x], of(SineHead::kQueryCosine), alone[x]);
        }
      }
      put(m * width + d, features);
    }
  }
  // Parts of it, times 1.
  std::int64_t word = terms * width;
  for (int part = 0; part < SinePlan::kPartWords; ++part, ++word) {
    TokenFeatures features;
    for (int x = 0; x < 2; ++x) {
      const auto high = (VecF)(((WordVec<float>)alone[x] + 0x8000u) & 0xffff0000u);
      features.first[x] = kIsQuery ? splat(1.f) : high;
      features.second[x] = kIsQuery ? high : splat(1.f);
      alone[x] -= high;
    }
    put(word, features);
  }
  for (; word < words; ++word) put(word, TokenFeatures{});
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
