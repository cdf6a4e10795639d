#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/attention_weights_kernel.h"
#include "ops/autograd/composed_attention.h"
#include "ops/autograd/double_backward.h"
#include "ops/autograd/graph.h"
#include "ops/autograd/saved_problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What the nodes save: the tensors of a problem, in which the key stands for the value (it is no
// argument of theirs), the indices of the queries, and in backward the gradient.
constexpr size_t kIndices = kTensors;
constexpr size_t kGrad = kTensors + 1;

// f(the differentiable tensors): those of a problem without its value.
template <typename Function>
auto with_weights_inputs(const AttentionTensors& t, const Function& f) {
  return f(t.query, t.key, t.weight, t.attn_mask, t.alibi_slopes);
}
constexpr size_t kInputs = 5;

// Gradients of a problem's differentiable tensors without that of the value.
variable_list without_value(const variable_list& grads) {
  return {grads[0], grads[1], grads[3], grads[4], grads[5]};
}

void save_inputs(AutogradContext* ctx, const AttentionTensors& tensors,
                 const OptionalTensor& query_indices, const Tensor& grad, const Options& options,
                 bool average_heads) {
  variable_list saved = list_tensors(tensors);
  saved.push_back(or_undefined(query_indices));
  if (grad.defined()) saved.push_back(grad);
  ctx->save_for_backward(std::move(saved));
  save_options(ctx, options);
  if (average_heads) ctx->saved_data["average_heads"] = true;
}

// p = exp(s - lse). With g = d loss / d p (d loss / d mean / H with average_heads):
//   ds_ij = p_ij (g_ij - sum_n p_in g_in),
//   dq, dk, dw, dmask, dslopes from ds by the derivative of the score (docs/formulas.md).
// Saves the inputs: p is computed again.
class AttentionWeights : public Function<AttentionWeights> {
 public:
  static constexpr bool is_traceable = true;  // backward: dispatcher calls and ctx only

  // The tensors before the problem are its differentiable ones: their edges are what apply() needs.
  static Tensor forward(AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/,
                        const OptionalTensor& weight, const OptionalTensor& attn_mask,
                        const OptionalTensor& alibi_slopes, const WeightsInputs& inputs,
                        const AttentionTensors& tensors, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor weights = attention_weights_forward(inputs, tensors, options);
    save_inputs(ctx, tensors, inputs.query_indices, Tensor(), options, inputs.average_heads);
    EdgeCounter edges;
    edges.add(true);
    edges.add(true);
    edges.add(weight.has_value());
    save_edge(ctx, "mask_edge", edges.add(attn_mask.has_value()), attn_mask);
    save_edge(ctx, "slopes_edge", edges.add(alibi_slopes.has_value()), alibi_slopes);
    return weights;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const SavedTensors problem(saved);
    const OptionalTensor query_indices = or_nothing(saved[kIndices]);
    const bool mask_grad = wants_gradient(ctx, "mask_edge");
    const bool slopes_grad = wants_gradient(ctx, "slopes_edge");
    BackwardResults computed = attention_weights_backward(
        {grads[0], query_indices, saved_flag(ctx, "average_heads"), mask_grad, slopes_grad},
        problem.tensors(), saved_options(ctx));
    variable_list results(kInputs + 3);  // one slot per argument of forward
    results[0] = std::move(computed.grad_query);
    results[1] = std::move(computed.grad_key);
    if (problem.weight.has_value()) results[2] = std::move(computed.grad_weight);
    if (mask_grad) results[3] = std::move(computed.grad_attn_mask);
    if (slopes_grad) results[4] = std::move(computed.grad_alibi_slopes);
    return results;
  }
};

// Double backward: derivatives of the gradients composed of differentiable operators, O(Lq Lk)
// memory.
class AttentionWeightsBackward : public Function<AttentionWeightsBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& /*query*/, const Tensor& /*key*/,
                               const OptionalTensor& /*weight*/,
                               const OptionalTensor& /*attn_mask*/,
                               const OptionalTensor& /*alibi_slopes*/, const Tensor& grad,
                               const WeightsBackwardInputs& inputs, const AttentionTensors& tensors,
                               const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    BackwardResults results = attention_weights_backward(inputs, tensors, options);
    save_inputs(ctx, tensors, inputs.query_indices, grad, options, inputs.average_heads);
    if (inputs.attn_mask_grad) ctx->saved_data["attn_mask_grad"] = true;
    if (inputs.alibi_slopes_grad) ctx->saved_data["alibi_slopes_grad"] = true;
    ctx->set_materialize_grads(false);
    return {std::move(results.grad_query), std::move(results.grad_key),
            std::move(results.grad_weight), std::move(results.grad_attn_mask),
            std::move(results.grad_alibi_slopes)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    const variable_list inputs = composition_inputs(ctx->get_saved_variables(), create_graph);
    const SavedTensors problem(inputs);
    const OptionalTensor query_indices = or_nothing(inputs[kIndices]);
    const AttentionTensors tensors{problem.query,      problem.key,           problem.key,
                                   problem.weight,     problem.attn_mask,     problem.key_lengths,
                                   problem.key_starts, problem.query_offsets, problem.alibi_slopes};
    const BackwardResults composed = composed_attention_weights_backward(
        {inputs[kGrad], query_indices, saved_flag(ctx, "average_heads"),
         saved_flag(ctx, "attn_mask_grad"), saved_flag(ctx, "alibi_slopes_grad")},
        tensors, saved_options(ctx));
    const variable_list derivatives =
        derivatives_of<kInputs>({composed.grad_query, composed.grad_key, composed.grad_weight,
                                 composed.grad_attn_mask, composed.grad_alibi_slopes},
                                grads, inputs, create_graph);
    variable_list results = without_value(derivatives);
    results.push_back(derivatives[kGrad]);
    results.resize(kInputs + 4);  // one slot per argument of forward
    return results;
  }
};

Tensor attention_weights_forward_autograd(const WeightsInputs& inputs,
                                          const AttentionTensors& tensors, const Options& options) {
  const auto compose = [](const auto&... t) { return must_compose(t...); };
  const auto graph = [](const auto&... t) { return needs_graph(t...); };
  if (with_weights_inputs(tensors, compose)) {
    return composed_attention_weights(inputs, tensors, options);
  }
  if (!with_weights_inputs(tensors, graph)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return attention_weights_forward(inputs, tensors, options);
  }
  return with_weights_inputs(tensors, [&](const auto&... t) {
    return AttentionWeights::apply(t..., inputs, tensors, options);
  });
}

BackwardResults attention_weights_backward_autograd(const WeightsBackwardInputs& inputs,
                                                    const AttentionTensors& tensors,
                                                    const Options& options) {
  const auto compose = [&](const auto&... t) { return must_compose(t..., inputs.grad); };
  const auto graph = [&](const auto&... t) { return needs_graph(t..., inputs.grad); };
  if (with_weights_inputs(tensors, compose)) {
    BackwardResults composed = composed_attention_weights_backward(inputs, tensors, options);
    for (Tensor* grad :
         {&composed.grad_weight, &composed.grad_attn_mask, &composed.grad_alibi_slopes}) {
      if (!grad->defined()) *grad = at::empty({0}, tensors.query.options().requires_grad(false));
    }
    return composed;
  }
  if (!with_weights_inputs(tensors, graph)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return attention_weights_backward(inputs, tensors, options);
  }
  variable_list results = with_weights_inputs(tensors, [&](const auto&... t) {
    return AttentionWeightsBackward::apply(t..., inputs.grad, inputs, tensors, options);
  });
  return {std::move(results[0]), std::move(results[1]), Tensor(),
          std::move(results[2]), std::move(results[3]), std::move(results[4])};
}

}  // namespace

TORCH_SELFATTN_IMPL(Autograd, m) {
  m.impl("_attention_weights_forward",
         TORCH_FN(WeightsKernel<attention_weights_forward_autograd>::call));
  m.impl("_attention_weights_backward",
         TORCH_FN(WeightsKernel<attention_weights_backward_autograd>::call));
}

}  // namespace torch_selfattn::ops
