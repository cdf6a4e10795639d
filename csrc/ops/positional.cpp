#include "ops/positional.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/where.h>
#include <c10/core/DefaultDtype.h>
#include <torch_selfattn/positional.h>

#include "ops/operator_handle.h"
#include "ops/positional_checks.h"
#include "ops/registration.h"

namespace torch_selfattn {

using at::Tensor;
using c10::SymInt;

Tensor sinusoidal_encoding(SymInt length, SymInt dim, double base, SymInt offset,
                           std::optional<at::ScalarType> dtype, std::optional<at::Device> device) {
  static const auto op = ops::operator_handle<decltype(sinusoidal_encoding)>("sinusoidal_encoding");
  return op.call(std::move(length), std::move(dim), base, std::move(offset), dtype, device);
}

Tensor add_sinusoidal_encoding(const Tensor& x, double scale, double base, SymInt offset,
                               const std::optional<Tensor>& positions) {
  static const auto op =
      ops::operator_handle<decltype(add_sinusoidal_encoding)>("add_sinusoidal_encoding");
  return op.call(x, scale, base, std::move(offset), positions);
}

Tensor add_learned_encoding(const Tensor& x, const Tensor& table, SymInt offset,
                            const std::optional<Tensor>& positions) {
  static const auto op =
      ops::operator_handle<decltype(add_learned_encoding)>("add_learned_encoding");
  return op.call(x, table, std::move(offset), positions);
}

Tensor rotary_embedding(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                        std::optional<SymInt> rotary_dim,
                        const std::optional<Tensor>& position_ids) {
  static const auto op = ops::operator_handle<decltype(rotary_embedding)>("rotary_embedding");
  return op.call(x, cos, sin, interleaved, std::move(rotary_dim), position_ids);
}

std::tuple<Tensor, Tensor> rotary_tables(SymInt length, SymInt dim, double base, SymInt offset,
                                         double scaling, std::optional<at::ScalarType> dtype,
                                         std::optional<at::Device> device) {
  static const auto op = ops::operator_handle<decltype(rotary_tables)>("rotary_tables");
  return op.call(std::move(length), std::move(dim), base, std::move(offset), scaling, dtype,
                 device);
}

Tensor alibi_slopes(int64_t num_heads, at::ScalarType dtype, std::optional<at::Device> device) {
  TORCH_CHECK_VALUE(num_heads > 0,
                    "alibi_slopes: num_heads must be positive (got num_heads=", num_heads, ")");
  int64_t n = 1;
  while (2 * n <= num_heads) n *= 2;
  const Tensor head = at::arange(num_heads, at::TensorOptions().dtype(at::kDouble).device(device));
  // In steps of -8 / n: 1, 2, ..., n, then 1/2, 3/2, ...
  const double count = static_cast<double>(n);
  const Tensor exponent = at::where(head < count, head + 1.0, head - count + 0.5);
  return at::exp2(exponent * (-8.0 / count)).to(dtype);
}

namespace ops {

Tensor sinusoidal_encoding_forward(const Tensor& like, SymInt length, SymInt dim, double base,
                                   SymInt offset) {
  static const auto op =
      operator_handle<decltype(sinusoidal_encoding_forward)>("_sinusoidal_encoding_forward");
  return op.call(like, std::move(length), std::move(dim), base, std::move(offset));
}

std::tuple<Tensor, Tensor> rotary_tables_forward(const Tensor& like, SymInt length, SymInt dim,
                                                 double base, SymInt offset, double scaling) {
  static const auto op = operator_handle<decltype(rotary_tables_forward)>("_rotary_tables_forward");
  return op.call(like, std::move(length), std::move(dim), base, std::move(offset), scaling);
}

Tensor add_sinusoidal_encoding_forward(const Tensor& x, const OptionalTensor& positions,
                                       double scale, double base, SymInt offset) {
  static const auto op = operator_handle<decltype(add_sinusoidal_encoding_forward)>(
      "_add_sinusoidal_encoding_forward");
  return op.call(x, positions, scale, base, std::move(offset));
}

Tensor add_learned_encoding_forward(const Tensor& x, const Tensor& table,
                                    const OptionalTensor& positions, SymInt offset) {
  static const auto op =
      operator_handle<decltype(add_learned_encoding_forward)>("_add_learned_encoding_forward");
  return op.call(x, table, positions, std::move(offset));
}

Tensor add_learned_encoding_backward(const Tensor& grad, const OptionalTensor& positions,
                                     SymInt offset, SymInt rows, at::ScalarType dtype) {
  static const auto op =
      operator_handle<decltype(add_learned_encoding_backward)>("_add_learned_encoding_backward");
  return op.call(grad, positions, std::move(offset), std::move(rows), dtype);
}

Tensor rotary_embedding_forward(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                const OptionalTensor& position_ids, bool interleaved,
                                bool conjugate) {
  static const auto op =
      operator_handle<decltype(rotary_embedding_forward)>("_rotary_embedding_forward");
  return op.call(x, cos, sin, position_ids, interleaved, conjugate);
}

namespace {

// A tensor without elements that carries dtype and device into the dispatcher.
Tensor empty_like_options(at::ScalarType dtype, std::optional<at::Device> device) {
  return at::empty({0}, at::TensorOptions().dtype(dtype).device(device));
}

Tensor sinusoidal_encoding_composite(SymInt length, SymInt dim, double base, SymInt offset,
                                     std::optional<at::ScalarType> dtype,
                                     std::optional<at::Device> device) {
  const at::ScalarType default_dtype = c10::get_default_dtype_as_scalartype();
  return sinusoidal_encoding_forward(empty_like_options(dtype.value_or(default_dtype), device),
                                     std::move(length), std::move(dim), base, std::move(offset));
}

Tensor add_sinusoidal_encoding_composite(const Tensor& x, double scale, double base, SymInt offset,
                                         const OptionalTensor& positions) {
  return add_sinusoidal_encoding_forward(x, positions, scale, base, std::move(offset));
}

Tensor add_learned_encoding_composite(const Tensor& x, const Tensor& table, SymInt offset,
                                      const OptionalTensor& positions) {
  return add_learned_encoding_forward(x, table, positions, std::move(offset));
}

Tensor rotary_embedding_composite(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                  bool interleaved, std::optional<SymInt> rotary_dim,
                                  const OptionalTensor& position_ids) {
  if (rotary_dim.has_value()) check_rotary_dim(*rotary_dim, cos);
  return rotary_embedding_forward(x, cos, sin, position_ids, interleaved, /*conjugate=*/false);
}

std::tuple<Tensor, Tensor> rotary_tables_composite(SymInt length, SymInt dim, double base,
                                                   SymInt offset, double scaling,
                                                   std::optional<at::ScalarType> dtype,
                                                   std::optional<at::Device> device) {
  return rotary_tables_forward(empty_like_options(dtype.value_or(at::kFloat), device),
                               std::move(length), std::move(dim), base, std::move(offset), scaling);
}

void register_public(torch::Library& m) {
  m.impl("sinusoidal_encoding", TORCH_FN(sinusoidal_encoding_composite));
  m.impl("add_sinusoidal_encoding", TORCH_FN(add_sinusoidal_encoding_composite));
  m.impl("add_learned_encoding", TORCH_FN(add_learned_encoding_composite));
  m.impl("rotary_embedding", TORCH_FN(rotary_embedding_composite));
  m.impl("rotary_tables", TORCH_FN(rotary_tables_composite));
}

}  // namespace

TORCH_SELFATTN_IMPL(CompositeImplicitAutograd, m) { register_public(m); }

// Without this torch.vmap runs a composite operator once per sample, with a warning.
TORCH_SELFATTN_IMPL(FuncTorchBatchedDecomposition, m) { register_public(m); }

}  // namespace ops
}  // namespace torch_selfattn
