#pragma once

#include <cstdint>

#include "kernels/cpu/operand.h"

// Rows as the matrix products read them (operand.h): along the rows, across them, as panels. What
// is returned is the largest magnitude that was seen, if the operand has several parts.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Elements of a row in whole vectors of `vector` that lie side by side.
inline std::int64_t whole_elements(const Rows& rows, std::int64_t vector) {
  return rows.element_stride == 1 ? rows.width / vector * vector : 0;
}

// n rows from `begin` to to[n][padded words], packed along the rows, words as transform(words)
// says.
template <typename Operand, typename Transform, typename T = typename Operand::Scalar>
inline T pack_along_rows(const Rows& rows, std::int64_t begin, std::int64_t n, T* to,
                         const Transform& transform) {
  constexpr int lanes = kLanes<T>;
  constexpr int parts = Operand::kParts;
  const std::int64_t words = Operand::words(rows.width);
  const std::int64_t whole_words = whole_elements(rows, Operand::kPack * lanes) / Operand::kPack;
  Largest<Operand> largest;
  for (std::int64_t r = begin; r < begin + n; ++r, to += padded<T>(words)) {
    const auto pack = [&]<bool kWhole>(std::int64_t x) __attribute__((always_inline)) {
      const auto n_words = smaller<std::int64_t>(lanes, words / parts - x);
      const auto along = Operand::template load_along<kWhole>(rows, r, x, n_words);
      largest.add(along);
      for (int part = 0; part < parts; ++part) {
        store(to + place_of<Operand>(x, part), transform(along.part[part]));
      }
    };
    std::int64_t x = 0;
    for (; x < whole_words; x += lanes) pack.template operator()<true>(x);
    for (; x < words / parts; x += lanes) pack.template operator()<false>(x);
  }
  return largest.magnitude();
}
template <typename Operand, typename T = typename Operand::Scalar>
inline T pack_along_rows(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
  return pack_along_rows<Operand>(rows, begin, n, to, Unchanged<T>{});
}

// Whether all rows are there of which word x of a sum over n rows, and those it is loaded with,
// are.
template <typename Operand>
constexpr bool has_all_rows(std::int64_t x, std::int64_t n) {
  return round_up((x + 1) * Operand::kPack, Operand::kStep) <= n;
}

// n rows from `begin` to to[words(n)][padded width], packed across the rows.
template <typename Operand, typename T = typename Operand::Scalar>
inline T pack_across_rows(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
  constexpr int parts = Operand::kParts;
  constexpr int lanes = kLanes<T>;
  const std::int64_t width = padded<T>(rows.width);
  const std::int64_t whole_width = whole_elements(rows, lanes);
  Largest<Operand> largest;
  for (std::int64_t x = 0; x < Operand::words(n) / parts; ++x) {
    const auto pack = [&]<bool kWhole>(std::int64_t d) __attribute__((always_inline)) {
      const std::int64_t elements = smaller<std::int64_t>(lanes, rows.width - d);
      const auto across =
          Operand::template load_across<kWhole>(rows, begin, begin + n, x, d, elements);
      largest.add(across);
      for (int part = 0; part < parts; ++part) {
        store(to + place_of<Operand>(x, part) * width + d, across.part[part]);
      }
    };
    std::int64_t d = 0;
    if (has_all_rows<Operand>(x, n)) {
      for (; d < whole_width; d += lanes) pack.template operator()<true>(d);
    }
    for (; d < rows.width; d += lanes) pack.template operator()<false>(d);
  }
  return largest.magnitude();
}

// n rows from `begin`, transposed, as the left operand of a sum over rows: steps
// to[ceil(n / kStep)][padded width][kStepWords words of neighbouring rows], zeros behind row n.
template <typename Operand, typename T = typename Operand::Scalar>
inline T pack_transposed(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
  constexpr int lanes = kLanes<T>;
  constexpr int parts = Operand::kParts;
  const std::int64_t width = padded<T>(rows.width);
  const std::int64_t whole_width = whole_elements(rows, lanes);
  Largest<Operand> largest;
  for (std::int64_t x = 0; x < Operand::words(n) / parts; x += lanes) {
    const auto pack = [&]<bool kWhole>(std::int64_t d) __attribute__((always_inline)) {
      const std::int64_t elements = smaller<std::int64_t>(lanes, rows.width - d);
      Vec<T> square[parts][lanes];
#pragma GCC unroll 16
      for (int y = 0; y < lanes; ++y) {
        const auto across =
            Operand::template load_across<kWhole>(rows, begin, begin + n, x + y, d, elements);
        largest.add(across);
        for (int part = 0; part < parts; ++part) square[part][y] = across.part[part];
      }
      for (int part = 0; part < parts; ++part) {
        transpose<T>(square[part]);
#pragma GCC unroll 16
        for (int e = 0; e < lanes; ++e) {
          store(to + (d + e) * Operand::kStepWords + part * lanes, square[part][e]);
        }
      }
    };
    std::int64_t d = 0;
    if (has_all_rows<Operand>(x + lanes - 1, n)) {
      for (; d < whole_width; d += lanes) pack.template operator()<true>(d);
    }
    for (; d < rows.width; d += lanes) pack.template operator()<false>(d);
    to += width * Operand::kStepWords;
  }
  return largest.magnitude();
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
  constexpr int parts = Operand::kParts;
  const std::int64_t words = Operand::words(rows.width) / parts;
  const std::int64_t whole_words = whole_elements(rows, Operand::kPack * lanes) / Operand::kPack;
  for (int half = 0; half < kPanel<T>; half += lanes) {
    const auto pack = [&]<bool kWhole>(std::int64_t x) __attribute__((always_inline)) {
      const std::int64_t count = smaller<std::int64_t>(lanes, words - x);
      Vec<T> square[parts][lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) {
        const std::int64_t row = half + r;
        prefetch_elements(rows, begin + row + lanes, x * Operand::kPack);
        if (kWhole || row < n) {
          const auto along = Operand::template load_along<kWhole>(rows, begin + row, x, count);
          for (int part = 0; part < parts; ++part) {
            square[part][r] = transform(along.part[part], x);
          }
        } else {
          for (int part = 0; part < parts; ++part) square[part][r] = Vec<T>{};
        }
      }
      for (int part = 0; part < parts; ++part) {
        transpose<T>(square[part]);
        T* const panel = to + place_of<Operand>(x, part) * kPanel<T> + half;
#pragma GCC unroll 16
        for (int e = 0; e < lanes; ++e) {
          if (kWhole || e < count) store(panel + e * kPanel<T>, square[part][e]);
        }
      }
    };
    std::int64_t x = 0;
    if (half + lanes <= n) {
      for (; x < whole_words; x += lanes) pack.template operator()<true>(x);
    }
    for (; x < words; x += lanes) pack.template operator()<false>(x);
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
inline T pack_panels(const Rows& rows, std::int64_t begin, std::int64_t n, T* to,
                     const Transform& transform) {
  Largest<Operand> largest;
  for (std::int64_t r = 0; r < n; r += kPanel<T>) {
    pack_panel<Operand>(rows, begin + r, smaller<std::int64_t>(kPanel<T>, n - r),
                        to + r * Operand::words(rows.width), [&](Vec<T> words, std::int64_t d) {
                          largest.add_part(words);
                          return transform(words, d);
                        });
  }
  return largest.magnitude();
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
