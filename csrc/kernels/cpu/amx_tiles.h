#pragma once

#include <cstdint>

#include "kernels/cpu/operand.h"

// Products by the tile unit (AMX). tdpbf16ps adds to 16 x 16 floats the products of 16 rows of 16
// words and 16 rows of words of 16 columns: the pair is the word of operand.h, so rows packed along
// and panels are its tiles as they are, and loading one is a matter of its stride.
//
// The register tile is 32 x 32: four tiles of sums, two of A, two of B, all eight there are. A step
// of 16 words is four loads and four products of four independent sums; where elements have several
// parts (float_parts.h), it is that for each product of two parts, but loads only what the one
// before did not.
// Bound: tdpbf16ps, 16,384 operations. Measured on Sapphire Rapids: 3.3 TFLOP/s of a core by
// itself, against 0.3 of vdpbf16ps; 2.2 for a 32 x 32 block of depth 64 with its stores, 1.7 where
// it adds to sums in memory. What is left of the kernels is the passes over the scores. The unit's
// power is limited: with numbers that are not 0 it takes a quarter longer than with zeros.
//
// Sums go on in steps of 16 words. So operands are packed in whole steps, zeros behind (kStep), and
// whole steps of scores are written. A, transposed, is not a tile: sums over the rows of a tile of
// scores, those of dk and dv, take it as the right operand instead and come out transposed
// (kTransposes, add_over_rows in score_gradient.h). Nor can sums be scaled on their way to memory:
// the softmax does it (kFinishes).
#if defined(__AMX_BF16__)
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// What ldtilecfg reads.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1;
  std::uint8_t reserved[15] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The products of parts that make up a product, parts counted from the largest: those left out are
// below the last part of either. Neighbours have a part in common, so that its tiles stay. The
// first kExact are made only where sums begin, not where they are added to: what becomes scores
// keeps all digits of two parts, since the lse of float16 is float.
template <int kParts>
struct PartProducts {
  static constexpr int kCount = 1, kExact = 0;
  static constexpr int kLeft[] = {0};
  static constexpr int kRight[] = {0};
};
template <>
struct PartProducts<2> {
  static constexpr int kCount = 4, kExact = 1;
  static constexpr int kLeft[] = {1, 1, 0, 0};
  static constexpr int kRight[] = {1, 0, 0, 1};
};
template <>
struct PartProducts<3> {
  static constexpr int kCount = 6, kExact = 0;
  static constexpr int kLeft[] = {2, 1, 1, 0, 0, 0};
  static constexpr int kRight[] = {0, 0, 1, 1, 2, 0};
};

// Operands of bfloat16 words, multiplied by tiles.
template <typename Packed>
struct Tiles : Packed {
  using Packed::kPack;
  using Packed::kParts;
  static constexpr int kTileRows = 32;
  static constexpr int kStep = 32;
  static constexpr int kStepWords = kStep / kPack * kParts;
  // A register tile's rows of scores, 32 KiB, stay in L1 until they have been multiplied.
  static constexpr std::int64_t kBandRows = kTileRows;
  static constexpr std::int64_t kGradientKeys = 256;
  static constexpr bool kTransposes = true;
  static constexpr bool kFinishes = false;

  static constexpr std::int64_t words(std::int64_t n) {
    return round_up(n, kStep) / kStep * kStepWords;
  }

  // Weights of one part lose far more when they are rounded.
  template <typename T>
  static TSA_INLINE Vec<T> exp2_of_score(Vec<T> x) {
    if constexpr (kParts == 1) return exp2_of_bfloat16(x);
    return exp2_or_infinity<T>(x);
  }

  // Holds the tiles for a thread. They are released at the end, so that a switch to another thread
  // has nothing to save. In between they are configured for whole register tiles.
  class Session {
   public:
    Session() { configure(kTileRows); }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // C(i, :) (+)= sum_k A(i, k) B(k, :) for rows <= kTileRows and kVectors vectors of columns; k
  // counts words, depth is a multiple of kStepWords. Step s of A begins at a + s * a_step.
  template <int kVectors, bool kAdd>
  static void multiply(std::int64_t rows, const float* a, std::int64_t a_row, std::int64_t a_step,
                       const float* b, std::int64_t ldb, std::int64_t depth, float* c,
                       std::int64_t ldc) {
    const bool partial = rows % kTile != 0;
    if (partial) configure(rows);
    if (rows > kTile) {
      multiply_tiles<2, kVectors, kAdd>(a, a_row, a_step, b, ldb, depth, c, ldc);
    } else {
      multiply_tiles<1, kVectors, kAdd>(a, a_row, a_step, b, ldb, depth, c, ldc);
    }
    if (partial) configure(kTileRows);
  }

 private:
  static constexpr int kTile = 16;  // rows, and words of a row

  // GCC's intrinsics do not say what memory they read: all that is to be read must be in it.
  static TSA_INLINE void write_memory(const void* to) { __asm__ volatile("" ::"r"(to) : "memory"); }

  // For so many rows of A and C. Tiles 0 to 3 are sums, 0 and 1 of the upper rows; 4 and 5 are A;
  // 6 and 7 are B.
  static void configure(std::int64_t rows) {
    TileConfiguration configuration;
    const auto upper = static_cast<std::uint8_t>(smaller<std::int64_t>(rows, kTile));
    const auto lower = static_cast<std::uint8_t>(rows > kTile ? rows - kTile : kTile);
    configuration.rows[0] = configuration.rows[1] = configuration.rows[4] = upper;
    configuration.rows[2] = configuration.rows[3] = configuration.rows[5] = lower;
    write_memory(&configuration);
    _tile_loadconfig(&configuration);
  }

  template <int kRowTiles, int kVectors, bool kAdd>
  [[gnu::noinline]] static void multiply_tiles(const float* a, std::int64_t a_row,
                                               std::int64_t a_step, const float* b,
                                               std::int64_t ldb, std::int64_t depth, float* c,
                                               std::int64_t ldc) {
    write_memory(a);
    constexpr bool two_rows = kRowTiles == 2;
    constexpr bool two_vectors = kVectors == 2;
    const std::int64_t a_bytes = a_row * 4;
    const std::int64_t b_bytes = ldb * 4;
    const std::int64_t c_bytes = ldc * 4;
    float* const c_lower = c + kTile * ldc;
    if constexpr (kAdd) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (two_vectors) _tile_loadd(1, c + kTile, c_bytes);
      if constexpr (two_rows) _tile_loadd(2, c_lower, c_bytes);
      if constexpr (two_rows && two_vectors) _tile_loadd(3, c_lower + kTile, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (two_vectors) _tile_zero(1);
      if constexpr (two_rows) _tile_zero(2);
      if constexpr (two_rows && two_vectors) _tile_zero(3);
    }
    using Products = PartProducts<kParts>;
    constexpr int first = kAdd ? Products::kExact : 0;
    for (std::int64_t k = 0; k < depth; k += kStepWords, a += a_step, b += kStepWords * ldb) {
#pragma GCC unroll 8
      for (int n = first; n < Products::kCount; ++n) {
        const bool new_left = n == first || Products::kLeft[n] != Products::kLeft[n - 1];
        const bool new_right = n == first || Products::kRight[n] != Products::kRight[n - 1];
        const float* const left = a + Products::kLeft[n] * kTile;
        const float* const right = b + Products::kRight[n] * kTile * ldb;
        if (new_left) _tile_loadd(4, left, a_bytes);
        if (new_right) _tile_loadd(6, right, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (two_rows) {
          if (new_left) _tile_loadd(5, left + kTile * a_row, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (two_vectors) {
          if (new_right) _tile_loadd(7, right + kTile, b_bytes);
          _tile_dpbf16ps(1, 4, 7);
          if constexpr (two_rows) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (two_vectors) _tile_stored(1, c + kTile, c_bytes);
    if constexpr (two_rows) _tile_stored(2, c_lower, c_bytes);
    if constexpr (two_rows && two_vectors) _tile_stored(3, c_lower + kTile, c_bytes);
  }
};

using Bfloat16Tiles = Tiles<Bfloat16Pairs>;

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
#endif
