#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/dtype.h"
#include "kernels/common/macros.h"

// The problems of the positional-encoding kernels: raw pointers, sizes, strides in elements.
// x, out and gradients are (B, H, L, D) with any strides; B and H are 1 where the tensor has no
// such dimension. Formulas: docs/positional.md.
namespace torch_selfattn::kernels {

// The angle of pair i at position p is p * frequency(i) = p / (scaling * base^(2i / dim)).
struct Frequencies {
  std::int64_t dim = 0;
  double base = 10000.0;
  double scaling = 1.0;
};

// Row l of sample b stands at position offset + ids[b, l], or offset + l without ids.
struct Positions {
  const std::int64_t* ids = nullptr;
  std::int64_t stride[2] = {0, 0};  // (B, L); stride[0] is 0 where all samples share the ids
  std::int64_t offset = 0;

  TSA_HOST_DEVICE std::int64_t at(std::int64_t b, std::int64_t l) const {
    return offset + (ids != nullptr ? ids[b * stride[0] + l * stride[1]] : l);
  }
  bool per_sample() const { return ids != nullptr && stride[0] != 0; }
};

// Tables of sines and cosines for the positions offset ... offset + length - 1. One tensor with
// the two interleaved, or two tensors: pair i of row r lies at r * row_stride + i * pair_stride.
struct SinusoidTable {
  DType dtype = DType::kFloat32;
  std::int64_t length = 0;
  std::int64_t offset = 0;
  Frequencies frequencies;
  void* sine = nullptr;
  void* cosine = nullptr;
  std::int64_t sines = 0;    // per row
  std::int64_t cosines = 0;  // per row: sines or sines - 1
  std::int64_t row_stride = 0;
  std::int64_t pair_stride = 0;
};

// A (B, H, L, D) tensor in, another out.
struct RowProblem {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t length = 0;
  std::int64_t dim = 0;
  ConstView x;
  View out;
  Positions positions;
};

// out = x + scale * encoding(position)
struct AddSinusoid {
  RowProblem rows;
  double scale = 1.0;
  double base = 10000.0;
};

// out = x + table[position]; table (table_rows, D) of the dtype of x, or float32.
struct AddLearned {
  RowProblem rows;
  DType table_dtype = DType::kFloat32;
  const void* table = nullptr;
  std::int64_t table_rows = 0;
  std::int64_t table_stride[2] = {0, 0};
};

// grad_table[n] = sum of grad over all (b, h, l) whose position is n, in the order of b, h, l for
// each position id and of the position ids as they stand in the ids tensor: the same sums in the
// same order on every run and for any number of threads.
struct LearnedTableGrad {
  DType dtype = DType::kFloat32;        // of grad
  DType table_dtype = DType::kFloat32;  // of grad_table: the same, or float32
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t length = 0;
  std::int64_t dim = 0;
  std::int64_t table_rows = 0;
  std::int64_t offset = 0;
  ConstView grad;              // (B, H, L, D)
  void* grad_table = nullptr;  // contiguous (table_rows, D)

  // The ids in ascending order and where each of them stood (a stable sort), or null: then the id
  // of row l is l. Entry e of a shared (L) ids tensor is row e of every sample; entry e of a
  // (B, L) one is row e % L of sample e / L.
  const std::int64_t* sorted_ids = nullptr;
  const std::int64_t* order = nullptr;
  std::int64_t entries = 0;
  bool per_sample = false;
};

// Rotates the pairs (x[i], x[i + R/2]), or (x[2i], x[2i + 1]) if interleaved, of the first
// R = 2 * pairs elements of each row by the angle whose cosine and sine stand in row `position` of
// the tables; the rest of the row is copied. conjugate: by minus the angle.
//   (a, b) -> (a cos - b sin, b cos + a sin)
// That is linear in x, and its transpose is the same with conjugate flipped.
struct Rotary {
  RowProblem rows;
  std::int64_t pairs = 0;
  bool interleaved = false;
  bool conjugate = false;
  // float64 if x is, else float32. Strides of (sample, position, pair); stride[0] is 0 where all
  // samples share a table.
  const void* cosine = nullptr;
  const void* sine = nullptr;
  std::int64_t cosine_stride[3] = {0, 0, 0};
  std::int64_t sine_stride[3] = {0, 0, 0};
  std::int64_t table_rows = 0;
};

}  // namespace torch_selfattn::kernels
