#pragma once

#include "ops/positional.h"

// Argument rules of the positional encodings, on symbolic sizes only, called by Meta and by every
// backend. Messages: `op: rule (got ...)`. RuntimeError for shapes, dtypes and devices that don't
// fit together, ValueError for a number out of range, NotImplementedError for what is not
// supported.
namespace torch_selfattn::ops {

void check_sinusoidal_encoding(const at::Tensor& like, const c10::SymInt& length,
                               const c10::SymInt& dim, double base);
void check_rotary_tables(const at::Tensor& like, const c10::SymInt& length, const c10::SymInt& dim,
                         double base, double scaling);
void check_add_sinusoidal_encoding(const at::Tensor& x, const OptionalTensor& positions,
                                   double base);
void check_add_learned_encoding(const at::Tensor& x, const at::Tensor& table,
                                const OptionalTensor& positions, const c10::SymInt& offset);
void check_add_learned_encoding_backward(const at::Tensor& grad, const OptionalTensor& positions,
                                         const c10::SymInt& offset, const c10::SymInt& rows,
                                         at::ScalarType dtype);
void check_rotary_embedding(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            const OptionalTensor& position_ids);

// Of the public layer only: the inner one takes R from cos.
void check_rotary_dim(const c10::SymInt& rotary_dim, const at::Tensor& cos);

// For backends that have the numbers at hand: ValueError unless 0 <= offset + id < rows for all.
void check_positions_on_cpu(const char* op, const char* name, const OptionalTensor& ids,
                            int64_t offset, int64_t rows);

}  // namespace torch_selfattn::ops
