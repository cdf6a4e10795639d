#include "ops/positional.h"

#include "kernels/cpu/positional.h"
#include "ops/cpu/parallel.h"
#include "ops/positional_checks.h"
#include "ops/positional_problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using kernels::cpu::positional_kernels;

Tensor sinusoidal_encoding_forward_cpu(const Tensor& like, int64_t length, int64_t dim, double base,
                                       int64_t offset) {
  check_sinusoidal_encoding(like, length, dim, base);
  const Tensor out = empty_sinusoidal_encoding(like, length, dim);
  positional_kernels().sinusoid_table(prepare_sinusoidal_encoding(out, base, offset),
                                      torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> rotary_tables_forward_cpu(const Tensor& like, int64_t length,
                                                     int64_t dim, double base, int64_t offset,
                                                     double scaling) {
  check_rotary_tables(like, length, dim, base, scaling);
  auto [cos, sin] = empty_rotary_tables(like, length, dim);
  positional_kernels().sinusoid_table(prepare_rotary_tables(cos, sin, base, offset, scaling),
                                      torch_parallel());
  return {cos, sin};
}

Tensor add_sinusoidal_encoding_forward_cpu(const Tensor& x, const OptionalTensor& positions,
                                           double scale, double base, int64_t offset) {
  check_add_sinusoidal_encoding(x, positions, base);
  const Tensor out = empty_rows_like(x);
  const auto prepared = prepare_add_sinusoid(x, out, positions, scale, base, offset);
  positional_kernels().add_sinusoid(prepared.problem, torch_parallel());
  return out;
}

Tensor add_learned_encoding_forward_cpu(const Tensor& x, const Tensor& table,
                                        const OptionalTensor& positions, int64_t offset) {
  check_add_learned_encoding(x, table, positions, offset);
  check_positions_on_cpu("add_learned_encoding", "positions", positions, offset, table.size(0));
  const Tensor out = empty_rows_like(x);
  const auto prepared = prepare_add_learned(x, out, table, positions, offset);
  positional_kernels().add_learned(prepared.problem, torch_parallel());
  return out;
}

Tensor add_learned_encoding_backward_cpu(const Tensor& grad, const OptionalTensor& positions,
                                         int64_t offset, int64_t rows, at::ScalarType dtype) {
  check_add_learned_encoding_backward(grad, positions, offset, rows, dtype);
  check_positions_on_cpu("add_learned_encoding", "positions", positions, offset, rows);
  const Tensor grad_table = empty_table_grad(grad, rows, dtype);
  const auto prepared = prepare_table_grad(grad, grad_table, positions, offset);
  positional_kernels().learned_table_grad(prepared.problem, torch_parallel());
  return grad_table;
}

Tensor rotary_embedding_forward_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                    const OptionalTensor& position_ids, bool interleaved,
                                    bool conjugate) {
  check_rotary_embedding(x, cos, sin, position_ids);
  check_positions_on_cpu("rotary_embedding", "position_ids", position_ids, 0, cos.size(-2));
  const Tensor out = empty_rows_like(x);
  const auto prepared = prepare_rotary(x, out, cos, sin, position_ids, interleaved, conjugate);
  positional_kernels().rotary(prepared.problem, torch_parallel());
  return out;
}

}  // namespace

TORCH_SELFATTN_IMPL(CPU, m) {
  m.impl("_sinusoidal_encoding_forward", TORCH_FN(sinusoidal_encoding_forward_cpu));
  m.impl("_rotary_tables_forward", TORCH_FN(rotary_tables_forward_cpu));
  m.impl("_add_sinusoidal_encoding_forward", TORCH_FN(add_sinusoidal_encoding_forward_cpu));
  m.impl("_add_learned_encoding_forward", TORCH_FN(add_learned_encoding_forward_cpu));
  m.impl("_add_learned_encoding_backward", TORCH_FN(add_learned_encoding_backward_cpu));
  m.impl("_rotary_embedding_forward", TORCH_FN(rotary_embedding_forward_cpu));
}

}  // namespace torch_selfattn::ops
