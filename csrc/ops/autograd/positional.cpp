#include "ops/positional.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/autograd/graph.h"
#include "ops/positional_checks.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// ---- The operators composed of differentiable ones: for torch.func, forward-mode AD, gradients of
// ---- rotary tables, and the derivative of a backward operator.

at::ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// (L, D) or (B, L, D), as it broadcasts against x (..., L, D) or (B, ..., L, D).
Tensor beside(const Tensor& x, Tensor rows) {
  if (rows.dim() == 3) {
    while (rows.dim() < x.dim()) rows = rows.unsqueeze(1);
  }
  return rows;
}

// table[offset + ids], (L, D) or (B, L, D).
Tensor gather_rows(const Tensor& table, const OptionalTensor& ids, const SymInt& offset,
                   const SymInt& length) {
  if (!ids.has_value()) return table.narrow_symint(0, offset, length);
  const Tensor flat = (ids->to(at::kLong) + offset).reshape({-1});
  std::vector<SymInt> size(ids->sym_sizes().begin(), ids->sym_sizes().end());
  size.push_back(table.sym_size(1));
  return at::index_select(table, 0, flat).reshape_symint(size);
}

Tensor composed_add_sinusoid(const Tensor& x, const OptionalTensor& positions, double scale,
                             double base, const SymInt& offset) {
  check_add_sinusoidal_encoding(x, positions, base);
  const at::ScalarType dtype = compute_dtype(x);
  const at::TensorOptions options = x.options().dtype(at::kDouble);
  const SymInt& dim = x.sym_size(-1);
  const Tensor position = positions.has_value() ? positions->to(at::kDouble) + offset
                                                : at::arange(x.sym_size(-2), options) + offset;
  const Tensor exponent = at::arange((dim + 1) / 2, options) * 2 / dim;
  const Tensor angle = position.unsqueeze(-1) / at::pow(at::Scalar(base), exponent);
  const Tensor encoding =
      at::stack({angle.sin(), angle.cos()}, -1).flatten(-2).narrow_symint(-1, 0, dim) * scale;
  return (x.to(dtype) + beside(x, encoding.to(dtype))).to(x.scalar_type());
}

Tensor composed_add_learned(const Tensor& x, const Tensor& table, const OptionalTensor& positions,
                            const SymInt& offset) {
  check_add_learned_encoding(x, table, positions, offset);
  const at::ScalarType dtype = compute_dtype(x);
  const Tensor rows = gather_rows(table, positions, offset, x.sym_size(-2));
  return (x.to(dtype) + beside(x, rows).to(dtype)).to(x.scalar_type());
}

Tensor composed_table_grad(const Tensor& grad, const OptionalTensor& positions,
                           const SymInt& offset, const SymInt& rows, at::ScalarType dtype) {
  const SymInt& length = grad.sym_size(-2);
  const SymInt& dim = grad.sym_size(-1);
  const bool per_sample = positions.has_value() && positions->dim() == 2;
  // Sum over the dimensions that share ids, then over equal ids.
  Tensor sum = grad.to(compute_dtype(grad));
  if (per_sample) {
    if (sum.dim() > 3) sum = sum.flatten(1, -3).sum(1);
  } else if (sum.dim() > 2) {
    sum = sum.flatten(0, -3).sum(0);
  }
  const Tensor ids = positions.has_value()
                         ? (positions->to(at::kLong) + offset)
                               .expand_symint(sum.sym_sizes().slice(0, sum.dim() - 1))
                         : at::arange(length, grad.options().dtype(at::kLong)) + offset;
  return at::zeros_symint({rows, dim}, sum.options())
      .index_add(0, ids.reshape({-1}), sum.reshape_symint({-1, dim}))
      .to(dtype);
}

Tensor composed_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                       const OptionalTensor& position_ids, bool interleaved, bool conjugate) {
  check_rotary_embedding(x, cos, sin, position_ids);
  const auto rows = [&](const Tensor& table) {
    return beside(x, position_ids.has_value() ? gather_rows(table, position_ids, 0, 0) : table);
  };
  const SymInt pairs = cos.sym_size(-1);
  const SymInt rotated = pairs * 2;
  const Tensor c = rows(cos);
  const Tensor s = conjugate ? -rows(sin) : rows(sin);
  const int64_t side = interleaved ? -1 : -2;  // where the two elements of a pair stand
  const Tensor in_pairs = x.narrow_symint(-1, 0, rotated)
                              .to(compute_dtype(x))
                              .unflatten_symint(-1, interleaved ? std::vector<SymInt>{pairs, 2}
                                                                : std::vector<SymInt>{2, pairs});
  const Tensor a = in_pairs.select(side, 0);
  const Tensor b = in_pairs.select(side, 1);
  const Tensor y = at::stack({a * c - b * s, b * c + a * s}, side).flatten(-2).to(x.scalar_type());
  return at::cat({y, x.narrow_symint(-1, rotated, x.sym_size(-1) - rotated)}, -1);
}

// ---- Gradients
// -----------------------------------------------------------------------------------

// y = x + s E, E constant:  dx = dy.  Saves nothing.
class AddSinusoid : public Function<AddSinusoid> {
 public:
  static constexpr bool is_traceable = true;  // backward: dispatcher calls and ctx only

  static Tensor forward(AutogradContext* /*ctx*/, const Tensor& x, const OptionalTensor& positions,
                        double scale, double base, const SymInt& offset) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return add_sinusoidal_encoding_forward(x, positions, scale, base, offset);
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& grads) {
    return {grads[0], Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// y[.., l, :] = x[.., l, :] + T[p(l), :]:  dx = dy,  dT[n] = sum of dy over the rows at position n.
// Saves the position ids and the number of rows of T.
class AddLearned : public Function<AddLearned> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& table,
                        const OptionalTensor& positions, const SymInt& offset) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({positions.value_or(Tensor())});
    ctx->saved_data["offset"] = offset;
    ctx->saved_data["rows"] = table.sym_size(0);
    ctx->saved_data["dtype"] = static_cast<int64_t>(table.scalar_type());
    return add_learned_encoding_forward(x, table, positions, offset);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor positions = ctx->get_saved_variables()[0];
    Tensor grad_table;
    if (ctx->needs_input_grad(1)) {
      grad_table = add_learned_encoding_backward(
          grads[0], positions.defined() ? OptionalTensor(positions) : std::nullopt,
          ctx->saved_data["offset"].toSymInt(), ctx->saved_data["rows"].toSymInt(),
          static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()));
    }
    return {ctx->needs_input_grad(0) ? grads[0] : Tensor(), grad_table, Tensor(), Tensor()};
  }
};

// dT[n] = sum of g over the rows at position n is linear in g:  dg[.., l, :] = ddT[p(l), :].
// Saves the position ids and the shape of g.
class AddLearnedBackward : public Function<AddLearnedBackward> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const OptionalTensor& positions,
                        const SymInt& offset, const SymInt& rows, at::ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({grad, positions.value_or(Tensor())});
    ctx->saved_data["offset"] = offset;
    return add_learned_encoding_backward(grad, positions, offset, rows, dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& grad = saved[0];
    const OptionalTensor positions = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const Tensor rows =
        gather_rows(grads[0], positions, ctx->saved_data["offset"].toSymInt(), grad.sym_size(-2));
    return {beside(grad, rows).to(grad.scalar_type()).expand_symint(grad.sym_sizes()), Tensor(),
            Tensor(), Tensor(), Tensor()};
  }
};

// (a, b) -> (a cos - b sin, b cos + a sin) for each pair is linear in x; its transpose is the
// rotation by minus the angle:  dx = rotary(dy, conjugate).  Saves the tables, not x: the gradient
// of cos and sin, rarely wanted, comes from the composed form.
class Rotary : public Function<Rotary> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin,
                        const OptionalTensor& position_ids, bool interleaved, bool conjugate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({cos, sin, position_ids.value_or(Tensor())});
    ctx->saved_data["interleaved"] = interleaved;
    ctx->saved_data["conjugate"] = conjugate;
    return rotary_embedding_forward(x, cos, sin, position_ids, interleaved, conjugate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor grad_x = rotary_embedding_forward(
        grads[0], saved[0], saved[1], saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt,
        ctx->saved_data["interleaved"].toBool(), !ctx->saved_data["conjugate"].toBool());
    return {grad_x, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// ---- Autograd kernels
// ----------------------------------------------------------------------------

Tensor add_sinusoidal_encoding_forward_autograd(const Tensor& x, const OptionalTensor& positions,
                                                double scale, double base, SymInt offset) {
  if (must_compose(x)) {
    return composed_add_sinusoid(x, positions, scale, base, offset);
  }
  if (!needs_graph(x)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return add_sinusoidal_encoding_forward(x, positions, scale, base, std::move(offset));
  }
  return AddSinusoid::apply(x, positions, scale, base, offset);
}

Tensor add_learned_encoding_forward_autograd(const Tensor& x, const Tensor& table,
                                             const OptionalTensor& positions, SymInt offset) {
  if (must_compose(x, table)) {
    return composed_add_learned(x, table, positions, offset);
  }
  if (!needs_graph(x, table)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return add_learned_encoding_forward(x, table, positions, std::move(offset));
  }
  return AddLearned::apply(x, table, positions, offset);
}

Tensor add_learned_encoding_backward_autograd(const Tensor& grad, const OptionalTensor& positions,
                                              SymInt offset, SymInt rows, at::ScalarType dtype) {
  if (must_compose(grad)) {
    return composed_table_grad(grad, positions, offset, rows, dtype);
  }
  if (!needs_graph(grad)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return add_learned_encoding_backward(grad, positions, std::move(offset), std::move(rows),
                                         dtype);
  }
  return AddLearnedBackward::apply(grad, positions, offset, rows, dtype);
}

Tensor rotary_embedding_forward_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                         const OptionalTensor& position_ids, bool interleaved,
                                         bool conjugate) {
  if (must_compose(x, cos, sin) || needs_graph(cos, sin)) {
    return composed_rotary(x, cos, sin, position_ids, interleaved, conjugate);
  }
  if (!needs_graph(x)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_embedding_forward(x, cos, sin, position_ids, interleaved, conjugate);
  }
  return Rotary::apply(x, cos, sin, position_ids, interleaved, conjugate);
}

}  // namespace

TORCH_SELFATTN_IMPL(Autograd, m) {
  m.impl("_add_sinusoidal_encoding_forward", TORCH_FN(add_sinusoidal_encoding_forward_autograd));
  m.impl("_add_learned_encoding_forward", TORCH_FN(add_learned_encoding_forward_autograd));
  m.impl("_add_learned_encoding_backward", TORCH_FN(add_learned_encoding_backward_autograd));
  m.impl("_rotary_embedding_forward", TORCH_FN(rotary_embedding_forward_autograd));
  // Tables depend on no tensor's values.
  m.impl("_sinusoidal_encoding_forward", torch::CppFunction::makeFallthrough());
  m.impl("_rotary_tables_forward", torch::CppFunction::makeFallthrough());
}

}  // namespace torch_selfattn::ops
