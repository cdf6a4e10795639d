#pragma once

#include <cstdint>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/operand.h"

// C (+)= A B for operands in cache: a register tile of kTileRows x 2 vectors of C, one broadcast
// word of A for two vectors of B (operand.h says what a word is and how two are multiplied), or the
// tiles of amx_tiles.h.
// Bound: the FMA units (8 x 2: ten loads for sixteen FMAs).
//   A(i, k) = a[i * a_row + k * a_depth], B(k, :) = b + k * ldb, C(i, :) = c + i * ldc
// k counts words. `finish` is applied to C before it is stored.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// kUnitDepth: a_depth is 1 (A as it lies); else a_row is 1 (A transposed).
template <typename Operand, int kRows, int kVectors, bool kAdd, bool kUnitDepth, typename Finish,
          typename T = typename Operand::Scalar>
[[gnu::noinline]] void multiply_tile(const T* __restrict a, std::int64_t a_stride,
                                     const T* __restrict b, std::int64_t ldb, std::int64_t depth,
                                     T* __restrict c, std::int64_t ldc, Finish finish) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t a_row = kUnitDepth ? a_stride : 1;
  const std::int64_t a_depth = kUnitDepth ? 1 : a_stride;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = kAdd ? load(c + i * ldc + v * lanes) : Vec<T>{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec<T> b_k[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_k[v] = load(b + k * ldb + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> a_ik = Operand::broadcast(a[i * a_row + k * a_depth]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = Operand::add_product(a_ik, b_k[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * lanes, finish(sum[i][v]));
  }
}

// rows <= kTileRows, columns = two vectors or one.
template <typename Operand, int kVectors, bool kAdd, bool kUnitDepth,
          typename T = typename Operand::Scalar, typename Finish = Unchanged<T>>
  requires(!Operand::kTransposes)
TSA_INLINE void multiply_rows(std::int64_t rows, const T* a, std::int64_t a_stride, const T* b,
                              std::int64_t ldb, std::int64_t depth, T* c, std::int64_t ldc,
                              Finish finish = {}) {
  const std::int64_t a_row = kUnitDepth ? a_stride : 1;
  if (rows == Operand::kTileRows) {
    multiply_tile<Operand, Operand::kTileRows, kVectors, kAdd, kUnitDepth>(a, a_stride, b, ldb,
                                                                           depth, c, ldc, finish);
    return;
  }
  if (rows >= 4) {
    multiply_tile<Operand, 4, kVectors, kAdd, kUnitDepth>(a, a_stride, b, ldb, depth, c, ldc,
                                                          finish);
    a += 4 * a_row, c += 4 * ldc, rows -= 4;
  }
  if (rows >= 2) {
    multiply_tile<Operand, 2, kVectors, kAdd, kUnitDepth>(a, a_stride, b, ldb, depth, c, ldc,
                                                          finish);
    a += 2 * a_row, c += 2 * ldc, rows -= 2;
  }
  if (rows == 1) {
    multiply_tile<Operand, 1, kVectors, kAdd, kUnitDepth>(a, a_stride, b, ldb, depth, c, ldc,
                                                          finish);
  }
}

// The same by tiles.
template <typename Operand, int kVectors, bool kAdd, bool kUnitDepth,
          typename T = typename Operand::Scalar>
  requires(Operand::kTransposes && kUnitDepth)
TSA_INLINE void multiply_rows(std::int64_t rows, const T* a, std::int64_t lda, const T* b,
                              std::int64_t ldb, std::int64_t depth, T* c, std::int64_t ldc) {
  Operand::template multiply<kVectors, kAdd>(rows, a, lda, Operand::kStepWords, b, ldb, depth, c,
                                             ldc);
}

// The same sum, where a pair with A(i, k) = 0 contributes nothing even if B(k, :) holds NaN or inf.
// kSide = kRight: where it is the zeros of B. Slow: only blocks that hold such numbers come here.
enum class Side : bool { kLeft, kRight };
template <typename Operand, bool kAdd, bool kUnitDepth, Side kSide = Side::kLeft,
          typename T = typename Operand::Scalar>
[[gnu::noinline]] void multiply_skipping_zeros(std::int64_t rows, const T* a, std::int64_t a_stride,
                                               const T* b, std::int64_t ldb, std::int64_t depth,
                                               T* c, std::int64_t ldc, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t d = 0; d < columns; d += kLanes<T>) {
      Vec<T> sum = kAdd ? load(c + i * ldc + d) : Vec<T>{};
      for (std::int64_t k = 0; k < depth; ++k) {
        const T a_ik = kUnitDepth ? a[i * a_stride + k] : a[i + k * a_stride];
        const Vec<T> b_k = load(b + k * ldb + d);
        if constexpr (kSide == Side::kLeft) {
          sum = Operand::add_product_unless_zero(a_ik, b_k, sum);
        } else {
          sum = Operand::add_product_unless_right_zero(a_ik, b_k, sum);
        }
      }
      store(c + i * ldc + d, sum);
    }
  }
}

enum class Zeros : bool { kMultiply, kSkip };  // kSkip: as multiply_skipping_zeros

// Columns of C that one strip covers. Callers loop over strips outside and over rows inside, so
// that a strip of B stays in L1.
template <typename T>
constexpr int kStrip = 2 * kLanes<T>;

// At most Operand::kTileRows rows; columns = one vector or two.
template <typename Operand, bool kAdd, bool kUnitDepth, typename T = typename Operand::Scalar>
TSA_INLINE void multiply(Zeros zeros, std::int64_t rows, const T* a, std::int64_t a_stride,
                         const T* b, std::int64_t ldb, std::int64_t depth, T* c, std::int64_t ldc,
                         std::int64_t columns) {
  if constexpr (Operand::kParts == 1) {  // else there is no careful pass
    if (zeros == Zeros::kSkip) {
      multiply_skipping_zeros<Operand, kAdd, kUnitDepth>(rows, a, a_stride, b, ldb, depth, c, ldc,
                                                         columns);
      return;
    }
  }
  if (columns == kStrip<T>) {
    multiply_rows<Operand, 2, kAdd, kUnitDepth>(rows, a, a_stride, b, ldb, depth, c, ldc);
  } else {
    multiply_rows<Operand, 1, kAdd, kUnitDepth>(rows, a, a_stride, b, ldb, depth, c, ldc);
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
