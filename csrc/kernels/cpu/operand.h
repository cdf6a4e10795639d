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
  static constexpr bool kTransposes = false;  // the left operand must lie along rows
  static constexpr bool kFinishes = true;     // a sum can be changed before it is stored
  // What a thread holds while it multiplies.
  struct [[maybe_unused]] Session {};
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

  // n <= kLanes words of a row from word d on, zeros behind.
  static TSA_INLINE Vec<T> load_along(const Rows& rows, std::int64_t row, std::int64_t d,
                                      std::int64_t n) {
    return load_elements_of_row<T>(rows, row, d, n);
  }
  static TSA_INLINE Vec<T> load_across(const Rows& rows, std::int64_t row, std::int64_t /*end*/,
                                       std::int64_t d, std::int64_t n) {
    return load_elements_of_row<T>(rows, row, d, n);
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
struct Bfloat16Pairs : VectorProducts {
  using Scalar = float;
  static constexpr int kPack = 2;
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

  static TSA_INLINE VecF load_along(const Rows& rows, std::int64_t row, std::int64_t word,
                                    std::int64_t n) {
    const std::int64_t elements = smaller<std::int64_t>(2 * n, rows.width - 2 * word);
    if (rows.element_stride == 1) {
      const auto* const from = bits_of(rows) + rows.at(row) + 2 * word;
      if (elements == std::int64_t{2} * kLanes<float>) return (VecF)_mm512_loadu_si512(from);
      const auto mask = static_cast<__mmask32>((std::uint64_t{1} << elements) - 1);
      return (VecF)_mm512_maskz_loadu_epi16(mask, from);
    }
    alignas(64) std::uint16_t gathered[2 * kLanes<float>] = {};
    gather(rows, row, 2 * word, elements, gathered);
    return (VecF)_mm512_load_si512(gathered);
  }
  // Elements [d, d + n) of row (low halves) and row + 1 (high halves, zeros if that is `end`).
  static TSA_INLINE VecF load_across(const Rows& rows, std::int64_t row, std::int64_t end,
                                     std::int64_t d, std::int64_t n) {
    const __m512i low = widened(rows, row, d, n);
    if (row + 1 >= end) return (VecF)low;
    return (VecF)_mm512_or_si512(low, _mm512_slli_epi32(widened(rows, row + 1, d, n), 16));
  }
  static const float* in_place(const Rows& /*rows*/) { return nullptr; }

  // The same as bits, which are in the order of what they stand for. NaN is above infinity, and
  // less than nothing.
  static TSA_INLINE VecF raise_bound(VecF bound, VecF words) {
    const __m512i magnitudes = (__m512i)((IntVec<float>)words & 0x7fff7fff);
    return (VecF)_mm512_max_epu16((__m512i)bound, magnitudes);
  }
  static TSA_INLINE float bound_of(VecF bound) {
    const auto bits = (__m512i)bound;
    const __m512i largest =
        _mm512_max_epu32(_mm512_slli_epi32(bits, 16), _mm512_and_si512(bits, high_halves()));
    return __builtin_bit_cast(float, _mm512_reduce_max_epu32(largest));
  }

  // Words of columns j, j + 1 of one row from 2 x kLanes columns.
  static TSA_INLINE VecF round_along(VecF first, VecF second) {
    return (VecF)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  static TSA_INLINE VecF round_along(const float* from) {
    return round_along(load(from), load(from + kLanes<float>));
  }
  // Words of two rows: low halves from a, high halves from b.
  static TSA_INLINE VecF round_across(VecF a, VecF b) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
    return (VecF)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

 private:
  static TSA_INLINE __m512i high_halves() { return _mm512_set1_epi32(-0x10000); }
  static const std::uint16_t* bits_of(const Rows& rows) {
    return static_cast<const std::uint16_t*>(rows.data);
  }
  static void gather(const Rows& rows, std::int64_t row, std::int64_t d, std::int64_t n,
                     std::uint16_t* to) {
    const auto* const from = bits_of(rows) + rows.at(row) + d * rows.element_stride;
    for (std::int64_t i = 0; i < n; ++i) to[i] = from[i * rows.element_stride];
  }
  static TSA_INLINE __m512i widened(const Rows& rows, std::int64_t row, std::int64_t d,
                                    std::int64_t n) {
    if (rows.element_stride == 1) {
      const auto* const from = bits_of(rows) + rows.at(row) + d;
      if (n == kLanes<float>) {
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

// n rows from `begin` to to[n][padded words], packed along the rows.
template <typename Operand, typename T = typename Operand::Scalar>
inline void pack_along_rows(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
  const std::int64_t words = Operand::words(rows.width);
  for (std::int64_t r = begin; r < begin + n; ++r, to += padded<T>(words)) {
    for (std::int64_t d = 0; d < words; d += kLanes<T>) {
      store(to + d, Operand::load_along(rows, r, d, smaller<std::int64_t>(kLanes<T>, words - d)));
    }
  }
}

// n rows from `begin` to to[words(n)][padded width], packed across the rows.
template <typename Operand, typename T = typename Operand::Scalar>
inline void pack_across_rows(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
  const std::int64_t end = begin + n;
  for (std::int64_t r = begin; r < end; r += Operand::kPack, to += padded<T>(rows.width)) {
    for (std::int64_t d = 0; d < rows.width; d += kLanes<T>) {
      const std::int64_t elements = smaller<std::int64_t>(kLanes<T>, rows.width - d);
      store(to + d, Operand::load_across(rows, r, end, d, elements));
    }
  }
  const std::int64_t behind = Operand::words(n) - (n + Operand::kPack - 1) / Operand::kPack;
  fill_zero(to, behind * padded<T>(rows.width));
}

// n rows from `begin`, transposed, as the left operand of a sum over rows: steps
// to[ceil(n / kStep)][padded width][kLanes words of neighbouring rows], zeros behind row n.
template <typename Operand, typename T = typename Operand::Scalar>
inline void pack_transposed(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t end = begin + n;
  const std::int64_t width = padded<T>(rows.width);
  for (std::int64_t r = begin; r < end; r += Operand::kStep, to += width * lanes) {
    for (std::int64_t d = 0; d < rows.width; d += lanes) {
      const std::int64_t elements = smaller<std::int64_t>(lanes, rows.width - d);
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int x = 0; x < lanes; ++x) {
        const std::int64_t row = r + x * Operand::kPack;
        square[x] = row < end ? Operand::load_across(rows, row, end, d, elements) : Vec<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int e = 0; e < lanes; ++e) store(to + (d + e) * lanes, square[e]);
    }
  }
}

// to[columns][ld_to] = the transpose of from[rows][ld] for multiples of kLanes.
template <typename T>
inline void turn_round(const T* from, std::int64_t ld, std::int64_t columns, T* to,
                       std::int64_t rows) {
  constexpr int lanes = kLanes<T>;
  for (std::int64_t d = 0; d < rows; d += lanes) {
    for (std::int64_t j = 0; j < columns; j += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int x = 0; x < lanes; ++x) square[x] = load(from + (d + x) * ld + j);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int x = 0; x < lanes; ++x) store(to + (j + x) * rows + d, square[x]);
    }
  }
}

// Has element d of a row fetched. A square of elements is read across rows, an order in which the
// hardware does not see the next ones coming.
TSA_INLINE void prefetch_elements(const Rows& rows, std::int64_t row, std::int64_t d) {
  const std::int64_t index = rows.at(row) + d * rows.element_stride;
  __builtin_prefetch(static_cast<const char*>(rows.data) + index * element_size(rows.dtype));
}

// n <= kPanel rows from `begin` to a panel to[words][kPanel].
template <typename Operand, typename Transform, typename T = typename Operand::Scalar>
inline void pack_panel(const Rows& rows, std::int64_t begin, std::int64_t n, T* to,
                       const Transform& transform) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t words = Operand::words(rows.width);
  for (int half = 0; half < kPanel<T>; half += lanes) {
    for (std::int64_t d = 0; d < words; d += lanes) {
      const std::int64_t count = smaller<std::int64_t>(lanes, words - d);
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) {
        const std::int64_t row = half + r;
        prefetch_elements(rows, begin + row + lanes, d * Operand::kPack);
        square[r] =
            row < n ? transform(Operand::load_along(rows, begin + row, d, count), d) : Vec<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int e = 0; e < lanes; ++e) {
        if (e < count) store(to + (d + e) * kPanel<T> + half, square[e]);
      }
    }
  }
}

// n rows from `begin` to ceil(n / kPanel) panels, one behind the other; bounds[panel] is of the
// words that transform(words, d, bound) has taken into `bound`.
template <typename Operand, typename Transform, typename T = typename Operand::Scalar>
inline void pack_bounded_panels(const Rows& rows, std::int64_t begin, std::int64_t n, T* to,
                                T* bounds, const Transform& transform) {
  for (std::int64_t r = 0; r < n; r += kPanel<T>, to += kPanel<T> * Operand::words(rows.width)) {
    Vec<T> bound{};
    pack_panel<Operand>(rows, begin + r, smaller<std::int64_t>(kPanel<T>, n - r), to,
                        [&](Vec<T> words, std::int64_t d) { return transform(words, d, bound); });
    *bounds++ = Operand::bound_of(bound);
  }
}

// n rows from `begin` to ceil(n / kPanel) panels, one behind the other.
template <typename Operand, typename Transform, typename T = typename Operand::Scalar>
inline void pack_panels(const Rows& rows, std::int64_t begin, std::int64_t n, T* to,
                        const Transform& transform) {
  for (std::int64_t r = 0; r < n; r += kPanel<T>) {
    pack_panel<Operand>(rows, begin + r, smaller<std::int64_t>(kPanel<T>, n - r),
                        to + r * Operand::words(rows.width), transform);
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
