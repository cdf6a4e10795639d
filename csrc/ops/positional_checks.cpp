#include "ops/positional_checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

// A condition on symbolic numbers whose failure is a ValueError (TORCH_SYM_CHECK: RuntimeError).
#define TSA_SYM_CHECK_VALUE(condition, ...) \
  TORCH_CHECK_VALUE((condition).expect_true(__FILE__, __LINE__), __VA_ARGS__)

bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

void check_rows(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 2, op, ": ", name, " must be (..., L, D), at least 2-D (got ", name, "=",
              x.sym_sizes(), ")");
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported_dtype(x.scalar_type()), op, ": ", name,
                              " must be float64, float32, float16 or bfloat16 (got ", name,
                              ".dtype=", x.dtype(), ")");
}

void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK(tensor.device() == x.device(), op, ": ", name,
              " must be on the device of x (got x=", x.device(), ", ", name, "=", tensor.device(),
              ")");
}

// (L), or (B, L) with B = x.size(0), or 1: the same ids for all samples.
void check_ids(const char* op, const char* name, const OptionalTensor& ids, const Tensor& x) {
  if (!ids.has_value()) return;
  TORCH_CHECK(ids->scalar_type() == at::kLong || ids->scalar_type() == at::kInt, op, ": ", name,
              " must be int64 or int32 (got ", name, ".dtype=", ids->dtype(), ")");
  check_same_device(op, name, *ids, x);
  TORCH_CHECK(ids->dim() == 1 || (ids->dim() == 2 && x.dim() >= 3), op, ": ", name,
              " must be (L), or (B, L) for an x of (B, ..., L, D) (got x=", x.sym_sizes(), ", ",
              name, "=", ids->sym_sizes(), ")");
  TORCH_SYM_CHECK(ids->sym_size(-1).sym_eq(x.sym_size(-2)), op, ": ", name,
                  " must have one id for each row of x (got x=", x.sym_sizes(), ", ", name, "=",
                  ids->sym_sizes(), ")");
  if (ids->dim() == 2) {
    TORCH_SYM_CHECK(ids->sym_size(0).sym_eq(x.sym_size(0)).sym_or(ids->sym_size(0).sym_eq(1)), op,
                    ": ", name, " must have the batch size of x or 1 (got x=", x.sym_sizes(), ", ",
                    name, "=", ids->sym_sizes(), ")");
  }
}

void check_base(const char* op, double base) {
  TORCH_CHECK_VALUE(std::isfinite(base) && base > 0, op, ": base must be positive (got ", base,
                    ")");
}

void check_extent(const char* op, const char* name, const SymInt& extent) {
  TSA_SYM_CHECK_VALUE(extent.sym_ge(0), op, ": ", name, " must not be negative (got ", extent, ")");
}

// Without ids the positions are known without reading a tensor.
void check_offset(const Tensor& x, const SymInt& rows, const SymInt& offset) {
  TSA_SYM_CHECK_VALUE(offset.sym_ge(0), "add_learned_encoding: offset must not be negative (got ",
                      offset, ")");
  TSA_SYM_CHECK_VALUE((offset + x.sym_size(-2)).sym_le(rows),
                      "add_learned_encoding: offset + the length of x must not exceed the rows of "
                      "the table (got x=",
                      x.sym_sizes(), ", offset=", offset, ", rows=", rows, ")");
}

}  // namespace

void check_sinusoidal_encoding(const Tensor& like, const SymInt& length, const SymInt& dim,
                               double base) {
  const char* op = "sinusoidal_encoding";
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported_dtype(like.scalar_type()), op,
                              ": dtype must be float64, float32, float16 or bfloat16 (got ",
                              like.dtype(), ")");
  check_extent(op, "length", length);
  check_extent(op, "dim", dim);
  check_base(op, base);
}

void check_rotary_tables(const Tensor& like, const SymInt& length, const SymInt& dim, double base,
                         double scaling) {
  const char* op = "rotary_tables";
  TORCH_CHECK_NOT_IMPLEMENTED(
      like.scalar_type() == at::kFloat || like.scalar_type() == at::kDouble, op,
      ": dtype must be float32 or float64, half precision cannot hold the angles; "
      "rotary_embedding takes float32 tables for any x (got ",
      like.dtype(), ")");
  check_extent(op, "length", length);
  check_extent(op, "dim", dim);
  TSA_SYM_CHECK_VALUE((dim % 2).sym_eq(0), op, ": dim must be even (got ", dim, ")");
  check_base(op, base);
  TORCH_CHECK_VALUE(std::isfinite(scaling) && scaling > 0, op, ": scaling must be positive (got ",
                    scaling, ")");
}

void check_add_sinusoidal_encoding(const Tensor& x, const OptionalTensor& positions, double base) {
  const char* op = "add_sinusoidal_encoding";
  check_rows(op, "x", x);
  check_ids(op, "positions", positions, x);
  check_base(op, base);
}

void check_add_learned_encoding(const Tensor& x, const Tensor& table,
                                const OptionalTensor& positions, const SymInt& offset) {
  const char* op = "add_learned_encoding";
  check_rows(op, "x", x);
  TORCH_CHECK(table.dim() == 2, op, ": table must be (N, D) (got table=", table.sym_sizes(), ")");
  check_same_device(op, "table", table, x);
  TORCH_CHECK(table.scalar_type() == x.scalar_type() ||
                  (table.scalar_type() == at::kFloat && x.scalar_type() != at::kDouble),
              op,
              ": table must have the dtype of x, or float32 for an x of lower precision (got x=",
              x.dtype(), ", table=", table.dtype(), ")");
  TORCH_SYM_CHECK(table.sym_size(1).sym_eq(x.sym_size(-1)), op,
                  ": table must have as many columns as x (got x=", x.sym_sizes(),
                  ", table=", table.sym_sizes(), ")");
  check_ids(op, "positions", positions, x);
  if (!positions.has_value()) check_offset(x, table.sym_size(0), offset);
}

void check_add_learned_encoding_backward(const Tensor& grad, const OptionalTensor& positions,
                                         const SymInt& offset, const SymInt& rows,
                                         at::ScalarType dtype) {
  const char* op = "add_learned_encoding";
  check_rows(op, "grad", grad);
  TORCH_CHECK(
      dtype == grad.scalar_type() || (dtype == at::kFloat && grad.scalar_type() != at::kDouble), op,
      ": the gradient of the table has the dtype of grad, or float32 (got grad=", grad.dtype(),
      ", dtype=", dtype, ")");
  check_extent(op, "rows", rows);
  check_ids(op, "positions", positions, grad);
  if (!positions.has_value()) check_offset(grad, rows, offset);
}

void check_rotary_embedding(const Tensor& x, const Tensor& cos, const Tensor& sin,
                            const OptionalTensor& position_ids) {
  const char* op = "rotary_embedding";
  check_rows(op, "x", x);
  const at::ScalarType table_dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(cos.scalar_type() == table_dtype && sin.scalar_type() == table_dtype, op,
              ": cos and sin must be ", table_dtype == at::kDouble ? "float64" : "float32",
              " for this x, angles lose their meaning in half precision (got x=", x.dtype(),
              ", cos=", cos.dtype(), ", sin=", sin.dtype(), ")");
  check_same_device(op, "cos", cos, x);
  check_same_device(op, "sin", sin, x);
  const int64_t rank = cos.dim();
  TORCH_CHECK(sin.dim() == rank && (rank == 2 || (rank == 3 && x.dim() >= 3)), op,
              ": cos and sin must both be (L, R/2), or (B, L, R/2) for an x of (B, ..., L, D) "
              "(got x=",
              x.sym_sizes(), ", cos=", cos.sym_sizes(), ", sin=", sin.sym_sizes(), ")");
  for (int64_t d = 0; d < rank; ++d) {
    TORCH_SYM_CHECK(cos.sym_size(d).sym_eq(sin.sym_size(d)), op,
                    ": cos and sin must have the same shape (got cos=", cos.sym_sizes(),
                    ", sin=", sin.sym_sizes(), ")");
  }
  TORCH_SYM_CHECK((cos.sym_size(-1) * 2).sym_le(x.sym_size(-1)), op,
                  ": twice the last dimension of cos must not exceed the last of x (got x=",
                  x.sym_sizes(), ", cos=", cos.sym_sizes(), ")");
  check_ids(op, "position_ids", position_ids, x);
  if (position_ids.has_value()) {
    TORCH_CHECK(rank == 2, op, ": with position_ids, cos and sin must be tables (N, R/2) (got cos=",
                cos.sym_sizes(), ")");
    return;
  }
  TORCH_SYM_CHECK(cos.sym_size(-2).sym_eq(x.sym_size(-2)), op,
                  ": cos and sin must have one row for each row of x, or come with position_ids "
                  "(got x=",
                  x.sym_sizes(), ", cos=", cos.sym_sizes(), ")");
  if (rank == 3) {
    TORCH_SYM_CHECK(cos.sym_size(0).sym_eq(x.sym_size(0)).sym_or(cos.sym_size(0).sym_eq(1)), op,
                    ": cos and sin must have the batch size of x or 1 (got x=", x.sym_sizes(),
                    ", cos=", cos.sym_sizes(), ")");
  }
}

void check_rotary_dim(const SymInt& rotary_dim, const Tensor& cos) {
  TORCH_CHECK(cos.dim() >= 1,
              "rotary_embedding: cos must have a last dimension (got cos=", cos.sym_sizes(), ")");
  TORCH_SYM_CHECK(rotary_dim.sym_eq(cos.sym_size(-1) * 2),
                  "rotary_embedding: rotary_dim must be twice the last dimension of cos (got "
                  "rotary_dim=",
                  rotary_dim, ", cos=", cos.sym_sizes(), ")");
}

void check_positions_on_cpu(const char* op, const char* name, const OptionalTensor& ids,
                            int64_t offset, int64_t rows) {
  if (!ids.has_value()) return;
  const Tensor as_long = ids->to(at::kLong).contiguous();
  const int64_t* id = as_long.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < as_long.numel(); ++i) {
    TORCH_CHECK_VALUE(id[i] + offset >= 0 && id[i] + offset < rows, op, ": ", name,
                      " must lie in the table (got position ", id[i] + offset,
                      " where the table has ", rows, " rows)");
  }
}

}  // namespace torch_selfattn::ops
