#pragma once

#include <cstdint>

#include "kernels/cpu/rows.h"

// What the matrix products multiply. Operands consist of words of the size of Scalar; a word holds
// kPack neighbours along the dimension that is summed over, and a product of two words adds kPack
// products to a sum in Scalar. So one register tile (gemm.h), one packing and one driver serve
// every operand:
//   Elements<T>     a word is one element
//   Bfloat16Pairs   a word is two bfloat16, vdpbf16ps multiplies and adds both; the inputs are
//                   multiplied as they are, nothing is widened
//   Bfloat16Tiles   the same words, multiplied by the tile unit (amx_tiles.h)
//   FloatTiles<n>   elements in n parts of bfloat16, multiplied by the tile unit (float_parts.h)
//
// An element of several parts has a word for each; the words of kLanes neighbours follow each other
// part by part.
//
// They are loaded as words along a row (load_along) or across rows (load_across), with kWhole a
// whole vector of elements side by side, of rows that are all there: then nothing is looked at.
//
// Two ways to pack rows for a sum along the row, and one for a sum over rows:
//   along rows   [row][word]           the left operand of scores
//   panels       [panel][word][key]    the right operand of scores
//   across rows  [row / kPack][element]: words of neighbouring rows, the right operand of p v
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// What the register tile of vectors has in common.
struct VectorProducts {
#if defined(__AVX512F__)
  static constexpr int kTileRows = 8;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 6;
#else
  static constexpr int kTileRows = 4;
#endif
  // Of a tile of scores: keys in forward, rows and keys in backward.
  static constexpr std::int64_t kBlockKeys = 256;
  // Rows of a block that go through scores, softmax and values before the next ones do: all.
  static constexpr std::int64_t kBandRows = std::int64_t{1} << 32;
  static constexpr std::int64_t kGradientRows = 64;
  static constexpr std::int64_t kGradientKeys = 128;
  static constexpr std::int64_t kForwardRows = 64;  // of a block of queries
  static constexpr bool kTransposes = false;        // the left operand must lie along rows
  static constexpr bool kFinishes = true;           // a sum can be changed before it is stored
  static constexpr int kParts = 1;                  // of an element
  static constexpr bool kGivesUp = false;           // what has no careful pass: Failure
  // The softmax's exponential, infinity beyond 128.
  template <typename T>
  static TSA_INLINE Vec<T> exp2_of_score(Vec<T> x) {
    return exp2_or_infinity<T>(x);
  }
  // What a thread holds while it multiplies.
  struct [[maybe_unused]] Session {};
};

// The words of kLanes neighbours, a vector for each part.
template <typename T, int kParts = 1>
struct Words {
  Vec<T> part[kParts];
};
// Of 2 x 2 vectors: the words along each of the two rows, and across them.
template <typename T, int kParts = 1>
struct WordSquare {
  Words<T, kParts> along[2], across[2];
};

template <typename T>
struct Elements : VectorProducts {
  using Scalar = T;
  static constexpr int kPack = 1;
  static constexpr int kStep = kPack;  // elements that a sum takes at once

  // Of a sum over n elements.
  static constexpr std::int64_t words(std::int64_t n) { return n; }

  static TSA_INLINE Vec<T> broadcast(T word) { return splat(word); }
  static TSA_INLINE Vec<T> add_product(Vec<T> a, Vec<T> b, Vec<T> sum) { return fma(a, b, sum); }
  // The same sum, in which an element 0 of a contributes nothing whatever b is.
  static TSA_INLINE Vec<T> add_product_unless_zero(T a, Vec<T> b, Vec<T> sum) {
    return a == T(0) ? sum : fma(splat(a), b, sum);
  }

  // n <= kLanes words of a row from word d on, zeros behind. Words are counted as of one part.
  template <bool kWhole>
  static TSA_INLINE Words<T> load_along(const Rows& rows, std::int64_t row, std::int64_t d,
                                        std::int64_t n) {
    return {{load_elements_of_row<T>(rows, row, d, n)}};
  }
  // Word x of a sum over the rows [begin, end), for n elements from d; zeros behind the last row.
  template <bool kWhole>
  static TSA_INLINE Words<T> load_across(const Rows& rows, std::int64_t begin, std::int64_t end,
                                         std::int64_t x, std::int64_t d, std::int64_t n) {
    return {
        {kWhole || begin + x < end ? load_elements_of_row<T>(rows, begin + x, d, n) : Vec<T>{}}};
  }
  static const T* in_place(const Rows& rows) { return rows_in_place<T>(rows); }

  // The bound of some words, by lanes: the largest magnitude of an element. NaN is left out, since
  // a score that it is in is NaN and shows as such.
  static TSA_INLINE Vec<T> raise_bound(Vec<T> bound, Vec<T> words) {
    return at_least(absolute(words), bound);
  }
  static TSA_INLINE T bound_of(Vec<T> bound) { return max_lanes<T>(bound); }
};

#if defined(__AVX512BF16__)
// A word is two bfloat16.
struct Bfloat16Words : VectorProducts {
  using Scalar = float;
  static constexpr int kPack = 2;

  // The largest magnitude as bits, which are in the order of what they stand for. NaN is above
  // infinity, and less than nothing.
  static TSA_INLINE VecF raise_bound(VecF bound, VecF words) {
    const __m512i magnitudes = (__m512i)((IntVec<float>)words & 0x7fff7fff);
    return (VecF)_mm512_max_epu16((__m512i)bound, magnitudes);
  }
  static TSA_INLINE float bound_of(VecF bound) {
    const auto bits = (__m512i)bound;
    const __m512i high_halves = _mm512_and_si512(bits, _mm512_set1_epi32(-0x10000));
    const __m512i largest = _mm512_max_epu32(_mm512_slli_epi32(bits, 16), high_halves);
    return __builtin_bit_cast(float, _mm512_reduce_max_epu32(largest));
  }
  static const float* in_place(const Rows& /*rows*/) { return nullptr; }
};

struct Bfloat16Pairs : Bfloat16Words {
  static constexpr int kStep = kPack;

  static constexpr std::int64_t words(std::int64_t n) { return (n + 1) / 2; }

  static TSA_INLINE VecF broadcast(float word) {
    return (VecF)_mm512_set1_epi32(__builtin_bit_cast(std::int32_t, word));
  }
  static TSA_INLINE VecF add_product(VecF a, VecF b, VecF sum) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static TSA_INLINE VecF add_product_unless_zero(float a, VecF b, VecF sum) {
    const auto bits = __builtin_bit_cast(std::uint32_t, a);
    const float low = __builtin_bit_cast(float, bits << 16);
    const float high = __builtin_bit_cast(float, bits & 0xffff0000u);
    const auto b_bits = (IntVec<float>)b;
    if (low != 0.f) sum = fma(splat(low), (VecF)(b_bits << 16), sum);
    if (high != 0.f) sum = fma(splat(high), (VecF)(b_bits & ~0xffff), sum);
    return sum;
  }
  // The same, in which an element 0 of b contributes nothing whatever a is.
  static TSA_INLINE VecF add_product_unless_right_zero(float a, VecF b, VecF sum) {
    const auto bits = __builtin_bit_cast(std::uint32_t, a);
    const auto b_bits = (IntVec<float>)b;
    const auto low = (VecF)(b_bits << 16);
    const auto high = (VecF)(b_bits & ~0xffff);
    sum = low == VecF{} ? sum : fma(splat(__builtin_bit_cast(float, bits << 16)), low, sum);
    return high == VecF{} ? sum
                          : fma(splat(__builtin_bit_cast(float, bits & 0xffff0000u)), high, sum);
  }

  template <bool kWhole>
  static TSA_INLINE Words<float> load_along(const Rows& rows, std::int64_t row, std::int64_t word,
                                            std::int64_t n) {
    if constexpr (kWhole) {
      return {{(VecF)_mm512_loadu_si512(bits_of(rows) + rows.at(row) + 2 * word)}};
    }
    const std::int64_t elements = smaller<std::int64_t>(2 * n, rows.width - 2 * word);
    if (rows.element_stride == 1) {
      const auto* const from = bits_of(rows) + rows.at(row) + 2 * word;
      const auto mask = static_cast<__mmask32>((std::uint64_t{1} << elements) - 1);
      return {{(VecF)_mm512_maskz_loadu_epi16(mask, from)}};
    }
    alignas(64) std::uint16_t gathered[2 * kLanes<float>] = {};
    gather(rows, row, 2 * word, elements, gathered);
    return {{(VecF)_mm512_load_si512(gathered)}};
  }
  // Of two neighbouring rows, the first in the low halves.
  template <bool kWhole>
  static TSA_INLINE Words<float> load_across(const Rows& rows, std::int64_t begin, std::int64_t end,
                                             std::int64_t x, std::int64_t d, std::int64_t n) {
    const std::int64_t row = begin + kPack * x;
    if (!kWhole && row >= end) return {};
    const __m512i low = widened<kWhole>(rows, row, d, n);
    if (!kWhole && row + 1 >= end) return {{(VecF)low}};
    const __m512i high = widened<kWhole>(rows, row + 1, d, n);
    return {{(VecF)_mm512_or_si512(low, _mm512_slli_epi32(high, 16))}};
  }

  // Words of columns j, j + 1 of one row from 2 x kLanes columns.
  static TSA_INLINE VecF round_along(VecF first, VecF second) {
    return (VecF)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  // The same, stored.
  static TSA_INLINE void put_along(VecF first, VecF second, float* to) {
    store(to, round_along(first, second));
  }
  // Words of two rows: low halves from a, high halves from b.
  static TSA_INLINE VecF round_across(VecF a, VecF b) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
    return (VecF)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  // Word w of rows is of the rows pair_row(w) and kPairDistance behind it.
  static constexpr int kPairDistance = 1;
  static constexpr int pair_row(int w) { return kPack * w; }
  static TSA_INLINE Words<float> words_across(VecF a, VecF b) { return {{round_across(a, b)}}; }
  static TSA_INLINE WordSquare<float> words_of_square(VecF a0, VecF a1, VecF b0, VecF b1) {
    return {{{{round_along(a0, a1)}}, {{round_along(b0, b1)}}},
            {words_across(a0, b0), words_across(a1, b1)}};
  }

 private:
  static const std::uint16_t* bits_of(const Rows& rows) {
    return static_cast<const std::uint16_t*>(rows.data);
  }
  static void gather(const Rows& rows, std::int64_t row, std::int64_t d, std::int64_t n,
                     std::uint16_t* to) {
    const auto* const from = bits_of(rows) + rows.at(row) + d * rows.element_stride;
    for (std::int64_t i = 0; i < n; ++i) to[i] = from[i * rows.element_stride];
  }
  template <bool kWhole>
  static TSA_INLINE __m512i widened(const Rows& rows, std::int64_t row, std::int64_t d,
                                    std::int64_t n) {
    if (kWhole || rows.element_stride == 1) {
      const auto* const from = bits_of(rows) + rows.at(row) + d;
      if (kWhole || n == kLanes<float>) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      }
      const auto mask = static_cast<__mmask16>((1u << n) - 1u);
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    }
    alignas(32) std::uint16_t gathered[kLanes<float>] = {};
    gather(rows, row, d, n, gathered);
    return _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(gathered)));
  }
};
#endif

// Where part `part` of the words from x on lies, x a multiple of kLanes or parts one.
template <typename Operand>
TSA_INLINE std::int64_t place_of(std::int64_t x, int part) {
  if constexpr (Operand::kParts == 1) return x;
  constexpr std::int64_t lanes = kLanes<typename Operand::Scalar>;
  return (x / lanes * Operand::kParts + part) * lanes + x % lanes;
}

// The functions that pack return the largest magnitude that they have seen, if the operand has
// several parts: these have a range (Failure).
template <typename Operand, typename T = typename Operand::Scalar>
struct Largest {
  Vec<T> bound{};

  TSA_INLINE void add_part(Vec<T> words) {
    if constexpr (Operand::kParts > 1) bound = Operand::raise_bound(bound, words);
  }
  TSA_INLINE void add(const Words<T, Operand::kParts>& words) {
    for (int part = 0; part < Operand::kParts; ++part) add_part(words.part[part]);
  }
  T magnitude() const {
    if constexpr (Operand::kParts > 1) return Operand::bound_of(bound);
    return T(0);
  }
};

// Any thread may raise it.
class Flag {
 public:
  void raise() { __atomic_store_n(&raised_, true, __ATOMIC_RELAXED); }
  bool raised() const { return __atomic_load_n(&raised_, __ATOMIC_RELAXED); }

 private:
  bool raised_ = false;
};

// Whether numbers have been found that are out of the operand's range, or results that are not
// finite where there is no careful pass: what a kernel returns is worth nothing then. Only operands
// of several parts have a range; those that give up have no careful pass.
template <typename Operand>
class Failure {
 public:
  using T = typename Operand::Scalar;
  static constexpr bool kPossible = Operand::kGivesUp;

  void raise() { flag_.raise(); }
  bool raised() const { return kPossible && flag_.raised(); }
  // Of queries, keys or values that have been packed, and of the output's gradient.
  void check(T largest) {
    if constexpr (Operand::kParts > 1) {
      if (!Operand::in_range(largest, Operand::kLeast)) raise();
    }
  }
  void check_gradient(T largest) {
    if constexpr (Operand::kParts > 1) {
      if (!Operand::in_range(largest, Operand::kLeastGradient)) raise();
    }
  }

 private:
  Flag flag_;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
