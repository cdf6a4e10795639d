#pragma once

#include <cstdint>

#include "kernels/cpu/amx_tiles.h"

// Elements in several parts of bfloat16, so that the tile unit multiplies numbers of more digits
// than it has: x = x_0 + x_1 + ..., where x_0 is x rounded to bfloat16, x_1 what is missing,
// rounded, and so on. Each part has 8 bits and a sign: two hold a float16, and 16 of the 24 bits of
// a float; three hold a float, exactly. Of the products of parts those are made that reach into the
// last digit, three of two parts, six of three (PartProducts); they are exact, and added up in
// float. Henry, Tang, Heinecke: Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations, 2019.
//
// A word pairs element w of 32 with element w + 16, in sums along rows and across rows, so that
// parts of two vectors become words without a shuffle. In memory the words of a step of 32 elements
// follow each other part by part.
//
// The tile unit takes subnormal numbers for 0, so that small parts are lost, and infinity has no
// parts. So there is a range of the largest magnitude of a block of rows, out of which the kernels
// give up. In it what is lost is below 2^-24 of what the block contributes, also by the products of
// backward, p dO v k with p down to 2^-17.
// Bound: tdpbf16ps, six times that of Bfloat16Tiles for three parts, a sixteenth of an FMA each.
#if defined(__AMX_BF16__)
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <int n>
struct FloatParts : Bfloat16Words {
  static constexpr int kParts = n;
  static constexpr bool kGivesUp = true;
  // Three times as many bytes as of bfloat16 come from the last-level cache for a block of queries.
  static constexpr std::int64_t kForwardRows = 128;

  static constexpr float kLeast = 0x1p-20f;          // of queries, keys and values
  static constexpr float kLeastGradient = 0x1p-43f;  // of the output's
  static TSA_INLINE bool in_range(float largest, float least) {
    return largest == 0.f || (largest >= least && largest <= 0x1p43f);
  }
  // Scores are not multiplied by others: what matters is their absolute error, so that small
  // operands are in range.
  static TSA_INLINE bool in_range_of_scores(float largest, VecF factor) {
    return largest <= 0x1p43f && absolute(factor)[0] <= 0x1p30f;
  }

  template <bool kWhole>
  static TSA_INLINE Words<float, n> load_along(const Rows& rows, std::int64_t row, std::int64_t x,
                                               std::int64_t /*n_words*/) {
    constexpr int lanes = kLanes<float>;
    const auto load_from = [&](std::int64_t d) __attribute__((always_inline)) {
      const std::int64_t elements = kWhole ? lanes : smaller<std::int64_t>(lanes, rows.width - d);
      return elements > 0 ? load_elements_of_row<float>(rows, row, d, elements) : VecF{};
    };
    return split(load_from(x * kPack), load_from(x * kPack + lanes));
  }
  template <bool kWhole>
  static TSA_INLINE Words<float, n> load_across(const Rows& rows, std::int64_t begin,
                                                std::int64_t end, std::int64_t x, std::int64_t d,
                                                std::int64_t elements) {
    constexpr int lanes = kLanes<float>;
    const std::int64_t row = begin + x / lanes * lanes * kPack + x % lanes;
    const auto load_row_of = [&](std::int64_t r) __attribute__((always_inline)) {
      if (!kWhole && r >= end) return VecF{};
      return load_elements_of_row<float>(rows, r, d, kWhole ? lanes : elements);
    };
    return split(load_row_of(row), load_row_of(row + lanes));
  }

  // Words of 2 x kLanes columns of a row, and of two rows that are kLanes apart.
  static TSA_INLINE Words<float, n> split(VecF first, VecF second) {
    Words<float, n> words;
#pragma GCC unroll 4
    for (int part = 0; part < n; ++part) {
      const VecF a = high_part(first, part);
      const VecF b = high_part(second, part);
      words.part[part] = joined(a, b);
      first -= a;
      second -= b;
    }
    return words;
  }
  static TSA_INLINE void put_along(VecF first, VecF second, float* to) {
    const Words<float, n> words = split(first, second);
#pragma GCC unroll 4
    for (int part = 0; part < n; ++part, to += kLanes<float>) store(to, words.part[part]);
  }

  static constexpr int kPairDistance = kLanes<float>;
  static constexpr int pair_row(int w) { return w; }
  static TSA_INLINE Words<float, n> words_across(VecF a, VecF b) { return split(a, b); }
  static TSA_INLINE WordSquare<float, n> words_of_square(VecF a0, VecF a1, VecF b0, VecF b1) {
    WordSquare<float, n> square;
#pragma GCC unroll 4
    for (int part = 0; part < n; ++part) {
      const VecF a[2] = {high_part(a0, part), high_part(a1, part)};
      const VecF b[2] = {high_part(b0, part), high_part(b1, part)};
      square.along[0].part[part] = joined(a[0], a[1]);
      square.along[1].part[part] = joined(b[0], b[1]);
      square.across[0].part[part] = joined(a[0], b[0]);
      square.across[1].part[part] = joined(a[1], b[1]);
      a0 -= a[0];
      a1 -= a[1];
      b0 -= b[0];
      b1 -= b[1];
    }
    return square;
  }

  // The largest of a part 0 may be less than its element, by 2^-8 of it.
  static TSA_INLINE float bound_of(VecF bound) {
    return (1.f + 0x1p-7f) * Bfloat16Words::bound_of(bound);
  }

  // x rounded to bfloat16, halves away from 0. The last part is what is left, cut off by joined():
  // so a NaN stays one, though the carry may make 0 of it in the parts before.
  static TSA_INLINE VecF high_part(VecF x, int part) {
    return part == n - 1 ? x : (VecF)(((WordVec<float>)x + 0x8000u) & kHighHalf);
  }
  // Two vectors of parts become words.
  static TSA_INLINE VecF joined(VecF low, VecF high) {
    const __m512i shifted = _mm512_srli_epi32((__m512i)low, 16);
    // shifted | (high & mask)
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(kHighHalf));
    return (VecF)_mm512_ternarylogic_epi32(shifted, (__m512i)high, mask, 0xf8);
  }

 private:
  static constexpr unsigned kHighHalf = 0xffff0000u;
};

template <int n>
using FloatTiles = Tiles<FloatParts<n>>;

// body.template operator()<Operand>() with the operand of a dtype.
template <typename Body>
inline bool with_tiles(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16: return body.template operator()<Bfloat16Tiles>();
    case DType::kFloat16: return body.template operator()<FloatTiles<2>>();
    default: return body.template operator()<FloatTiles<3>>();
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
#endif
