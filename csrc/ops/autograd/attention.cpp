#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/attention_kernel.h"
#include "ops/autograd/composed_attention.h"
#include "ops/autograd/double_backward.h"
#include "ops/autograd/graph.h"
#include "ops/autograd/saved_problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// p = exp(s - lse), out = (p f) v with f the dropout factors. With g = d loss / d out, u = d loss /
// d lse and delta_i = sum_d g_id out_id:
//   dv = (p f)^T g,  ds_ij = p_ij (f_ij g_i . v_j - delta_i + u_i),
//   dq, dk, dw, dmask, dslopes from ds by the derivative of the score (docs/formulas.md).
// Saves the inputs, out, lse and the generator's state: p and f are computed again, O(L) memory.
class Attention : public Function<Attention> {
 public:
  static constexpr bool is_traceable = true;  // backward: dispatcher calls and ctx only

  // The tensors before the problem are its differentiable ones: their edges are what apply() needs.
  static variable_list forward(AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/,
                               const Tensor& /*value*/, const OptionalTensor& /*weight*/,
                               const OptionalTensor& /*attn_mask*/,
                               const OptionalTensor& /*alibi_slopes*/,
                               const AttentionTensors& tensors, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ForwardResults results = attention_forward(tensors, options);
    variable_list saved = list_tensors(tensors);
    saved.insert(saved.end(), {results.output, results.lse, results.philox_state});
    ctx->save_for_backward(std::move(saved));
    save_options(ctx, options);
    save_edges(ctx, tensors);
    ctx->set_materialize_grads(false);
    return {std::move(results.output), std::move(results.lse), std::move(results.philox_state)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(kDifferentiable + 2);  // one slot per argument of forward
    if (!grads[0].defined() && !grads[1].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const SavedTensors problem(saved);
    const Tensor& output = saved[kTensors];
    const Tensor grad_output = grads[0].defined() ? grads[0] : at::zeros_like(output);
    const OptionalTensor grad_lse = or_nothing(grads[1]);
    const bool mask_grad = wants_gradient(ctx, "mask_edge");
    const bool slopes_grad = wants_gradient(ctx, "slopes_edge");
    BackwardResults computed =
        attention_backward({grad_output, grad_lse, output, saved[kTensors + 1], saved[kTensors + 2],
                            mask_grad, slopes_grad},
                           problem.tensors(), saved_options(ctx));
    results[0] = std::move(computed.grad_query);
    results[1] = std::move(computed.grad_key);
    results[2] = std::move(computed.grad_value);
    if (problem.weight.has_value()) results[3] = std::move(computed.grad_weight);
    if (mask_grad) results[4] = std::move(computed.grad_attn_mask);
    if (slopes_grad) results[5] = std::move(computed.grad_alibi_slopes);
    return results;
  }
};

// Double backward. The gradients are functions of g, u and the inputs alone (out and lse follow
// from these), so this node returns the derivatives with respect to them and none for out and lse.
// They are taken of the gradients composed of differentiable operators, O(Lq Lk) memory.
class AttentionBackward : public Function<AttentionBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/,
                               const Tensor& /*value*/, const OptionalTensor& /*weight*/,
                               const OptionalTensor& /*attn_mask*/,
                               const OptionalTensor& /*alibi_slopes*/,
                               const Tensor& /*grad_output*/, const OptionalTensor& /*grad_lse*/,
                               const BackwardInputs& inputs, const AttentionTensors& tensors,
                               const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    BackwardResults results = attention_backward(inputs, tensors, options);
    variable_list saved = list_tensors(tensors);
    saved.insert(saved.end(),
                 {inputs.grad_output, or_undefined(inputs.grad_lse), inputs.philox_state});
    ctx->save_for_backward(std::move(saved));
    save_options(ctx, options);
    if (inputs.attn_mask_grad) ctx->saved_data["attn_mask_grad"] = true;
    if (inputs.alibi_slopes_grad) ctx->saved_data["alibi_slopes_grad"] = true;
    ctx->set_materialize_grads(false);
    return {std::move(results.grad_query),     std::move(results.grad_key),
            std::move(results.grad_value),     std::move(results.grad_weight),
            std::move(results.grad_attn_mask), std::move(results.grad_alibi_slopes)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);

    const variable_list inputs = composition_inputs(saved, create_graph);
    const SavedTensors problem(inputs);
    const Tensor& grad_output = inputs[kTensors];
    const OptionalTensor grad_lse = or_nothing(inputs[kTensors + 1]);
    const Tensor unread;  // output and lse
    const BackwardResults composed = composed_attention_backward(
        {grad_output, grad_lse, unread, unread, inputs[kTensors + 2],
         saved_flag(ctx, "attn_mask_grad"), saved_flag(ctx, "alibi_slopes_grad")},
        problem.tensors(), saved_options(ctx));
    const variable_list derivatives = derivatives_of<kDifferentiable>(
        {composed.grad_query, composed.grad_key, composed.grad_value, composed.grad_weight,
         composed.grad_attn_mask, composed.grad_alibi_slopes},
        grads, inputs, create_graph);
    // Slots of forward's arguments: the differentiable tensors, grad_output, grad_lse; then what is
    // no tensor.
    variable_list results(kDifferentiable + 2 + 3);
    for (size_t i = 0; i < kDifferentiable; ++i) results[i] = derivatives[i];
    for (size_t i = 0; i < 2; ++i) results[kDifferentiable + i] = derivatives[kTensors + i];
    return results;
  }
};

ForwardResults attention_forward_autograd(const AttentionTensors& tensors, const Options& options) {
  const auto compose = [](const auto&... t) { return must_compose(t...); };
  const auto graph = [](const auto&... t) { return needs_graph(t...); };
  if (with_differentiable(tensors, compose)) {
    const auto state_options = tensors.query.options().dtype(at::kLong).requires_grad(false);
    const bool drops = options.dropout_p > 0;
    const Tensor philox_state = at::empty({drops ? 2 : 0}, state_options);
    if (drops) philox_state.random_();
    return composed_attention(tensors, philox_state, options);
  }
  if (!with_differentiable(tensors, graph)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return attention_forward(tensors, options);
  }
  variable_list results = with_differentiable(
      tensors, [&](const auto&... t) { return Attention::apply(t..., tensors, options); });
  return {std::move(results[0]), std::move(results[1]), std::move(results[2])};
}

BackwardResults attention_backward_autograd(const BackwardInputs& inputs,
                                            const AttentionTensors& tensors,
                                            const Options& options) {
  const auto compose = [&](const auto&... t) {
    return must_compose(t..., inputs.grad_output, inputs.grad_lse);
  };
  const auto graph = [&](const auto&... t) {
    return needs_graph(t..., inputs.grad_output, inputs.grad_lse);
  };
  if (with_differentiable(tensors, compose)) {
    BackwardResults composed = composed_attention_backward(inputs, tensors, options);
    for (Tensor* grad :
         {&composed.grad_weight, &composed.grad_attn_mask, &composed.grad_alibi_slopes}) {
      if (!grad->defined()) *grad = at::empty({0}, tensors.query.options().requires_grad(false));
    }
    return composed;
  }
  if (!with_differentiable(tensors, graph)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return attention_backward(inputs, tensors, options);
  }
  variable_list results = with_differentiable(tensors, [&](const auto&... t) {
    return AttentionBackward::apply(t..., inputs.grad_output, inputs.grad_lse, inputs, tensors,
                                    options);
  });
  return {std::move(results[0]), std::move(results[1]), std::move(results[2]),
          std::move(results[3]), std::move(results[4]), std::move(results[5])};
}

}  // namespace

TORCH_SELFATTN_IMPL(Autograd, m) {
  m.impl("_attention_forward", TORCH_FN(AttentionKernel<attention_forward_autograd>::call));
  m.impl("_attention_backward", TORCH_FN(AttentionKernel<attention_backward_autograd>::call));
}

}  // namespace torch_selfattn::ops
