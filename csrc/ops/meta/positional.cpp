#include "ops/positional.h"

#include "ops/positional_checks.h"
#include "ops/positional_problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

Tensor sinusoidal_encoding_forward_meta(const Tensor& like, SymInt length, SymInt dim, double base,
                                        SymInt /*offset*/) {
  check_sinusoidal_encoding(like, length, dim, base);
  return empty_sinusoidal_encoding(like, length, dim);
}

std::tuple<Tensor, Tensor> rotary_tables_forward_meta(const Tensor& like, SymInt length, SymInt dim,
                                                      double base, SymInt /*offset*/,
                                                      double scaling) {
  check_rotary_tables(like, length, dim, base, scaling);
  return empty_rotary_tables(like, length, dim);
}

Tensor add_sinusoidal_encoding_forward_meta(const Tensor& x, const OptionalTensor& positions,
                                            double /*scale*/, double base, SymInt /*offset*/) {
  check_add_sinusoidal_encoding(x, positions, base);
  return empty_rows_like(x);
}

Tensor add_learned_encoding_forward_meta(const Tensor& x, const Tensor& table,
                                         const OptionalTensor& positions, SymInt offset) {
  check_add_learned_encoding(x, table, positions, offset);
  return empty_rows_like(x);
}

Tensor add_learned_encoding_backward_meta(const Tensor& grad, const OptionalTensor& positions,
                                          SymInt offset, SymInt rows, at::ScalarType dtype) {
  check_add_learned_encoding_backward(grad, positions, offset, rows, dtype);
  return empty_table_grad(grad, rows, dtype);
}

Tensor rotary_embedding_forward_meta(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                     const OptionalTensor& position_ids, bool /*interleaved*/,
                                     bool /*conjugate*/) {
  check_rotary_embedding(x, cos, sin, position_ids);
  return empty_rows_like(x);
}

}  // namespace

TORCH_SELFATTN_IMPL(Meta, m) {
  m.impl("_sinusoidal_encoding_forward", TORCH_FN(sinusoidal_encoding_forward_meta));
  m.impl("_rotary_tables_forward", TORCH_FN(rotary_tables_forward_meta));
  m.impl("_add_sinusoidal_encoding_forward", TORCH_FN(add_sinusoidal_encoding_forward_meta));
  m.impl("_add_learned_encoding_forward", TORCH_FN(add_learned_encoding_forward_meta));
  m.impl("_add_learned_encoding_backward", TORCH_FN(add_learned_encoding_backward_meta));
  m.impl("_rotary_embedding_forward", TORCH_FN(rotary_embedding_forward_meta));
}

}  // namespace torch_selfattn::ops
