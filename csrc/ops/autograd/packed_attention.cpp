#include "ops/packed_attention.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>

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

using Heads = HeadCounts<SymInt>;

// f(the differentiable tensors).
template <typename Function>
auto with_packed_inputs(const PackedTensors& t, const Function& f) {
  return f(t.packed, t.query, t.weight, t.attn_mask, t.alibi_slopes);
}
constexpr size_t kInputs = 5;

// The derivative of attention (autograd/attention.cpp), from one tensor of projections to one of
// their gradients. Saves the same.
class PackedAttention : public Function<PackedAttention> {
 public:
  static constexpr bool is_traceable = true;  // backward: dispatcher calls and ctx only

  // The tensors before the problem are its differentiable ones: their edges are what apply() needs.
  static variable_list forward(AutogradContext* ctx, const Tensor& packed,
                               const OptionalTensor& query, const OptionalTensor& weight,
                               const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                               const PackedTensors& tensors, const Heads& heads,
                               const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ForwardResults results = packed_attention_forward(tensors, heads, options);
    ctx->save_for_backward({packed, or_undefined(query), or_undefined(weight),
                            or_undefined(attn_mask), or_undefined(alibi_slopes),
                            or_undefined(tensors.key_lengths), or_undefined(tensors.key_starts),
                            or_undefined(tensors.query_offsets), results.output, results.lse,
                            results.philox_state});
    save_options(ctx, options);
    ctx->saved_data["num_heads"] = heads.query;
    ctx->saved_data["num_kv_heads"] = heads.key;
    EdgeCounter edges;
    edges.add(true);
    edges.add(query.has_value());
    edges.add(weight.has_value());
    save_edge(ctx, "mask_edge", edges.add(attn_mask.has_value()), attn_mask);
    save_edge(ctx, "slopes_edge", edges.add(alibi_slopes.has_value()), alibi_slopes);
    ctx->set_materialize_grads(false);
    return {std::move(results.output), std::move(results.lse), std::move(results.philox_state)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(kInputs + 3);  // one slot per argument of forward
    if (!grads[0].defined() && !grads[1].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    std::array<OptionalTensor, 8> optional;  // saved[0], the packed tensor, is none
    for (size_t i = 1; i < optional.size(); ++i) optional[i] = or_nothing(saved[i]);
    const Tensor& output = saved[8];
    const Tensor grad_output = grads[0].defined() ? grads[0] : at::zeros_like(output);
    const OptionalTensor grad_lse = or_nothing(grads[1]);
    const bool mask_grad = wants_gradient(ctx, "mask_edge");
    const bool slopes_grad = wants_gradient(ctx, "slopes_edge");
    PackedGradients computed = packed_attention_backward(
        {grad_output, grad_lse, output, saved[9], saved[10], mask_grad, slopes_grad},
        {saved[0], optional[1], optional[2], optional[3], optional[5], optional[6], optional[7],
         optional[4]},
        {ctx->saved_data["num_heads"].toSymInt(), ctx->saved_data["num_kv_heads"].toSymInt()},
        saved_options(ctx));
    results[0] = std::move(computed.packed);
    if (optional[1].has_value()) results[1] = std::move(computed.query);
    if (optional[2].has_value()) results[2] = std::move(computed.weight);
    if (mask_grad) results[3] = std::move(computed.attn_mask);
    if (slopes_grad) results[4] = std::move(computed.alibi_slopes);
    return results;
  }
};

// Under torch.func and forward-mode AD the heads are taken apart by differentiable views, and the
// operator on them is composed; so are the derivatives of the backward operator.
ForwardResults packed_attention_forward_autograd(const PackedTensors& tensors, const Heads& heads,
                                                 const Options& options) {
  const auto compose = [](const auto&... t) { return must_compose(t...); };
  const auto graph = [](const auto&... t) { return needs_graph(t...); };
  if (with_packed_inputs(tensors, compose)) {
    const HeadViews views = split_packed(tensors.packed, tensors.query, heads);
    ForwardResults results = attention_forward(views.with(tensors), options);
    results.output = join_heads(results.output);
    return results;
  }
  if (!with_packed_inputs(tensors, graph)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return packed_attention_forward(tensors, heads, options);
  }
  variable_list results = with_packed_inputs(tensors, [&](const auto&... t) {
    return PackedAttention::apply(t..., tensors, heads, options);
  });
  return {std::move(results[0]), std::move(results[1]), std::move(results[2])};
}

PackedGradients packed_attention_backward_autograd(const BackwardInputs& inputs,
                                                   const PackedTensors& tensors, const Heads& heads,
                                                   const Options& options) {
  const auto compose_or_graph = [&](const auto&... t) {
    return must_compose(t..., inputs.grad_output, inputs.grad_lse) ||
           needs_graph(t..., inputs.grad_output, inputs.grad_lse);
  };
  if (!with_packed_inputs(tensors, compose_or_graph)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return packed_attention_backward(inputs, tensors, heads, options);
  }
  const HeadViews views = split_packed(tensors.packed, tensors.query, heads);
  const Tensor grad_output = split_heads(inputs.grad_output, heads.query);
  const Tensor output = split_heads(inputs.output, heads.query);
  BackwardResults grads =
      attention_backward({grad_output, inputs.grad_lse, output, inputs.lse, inputs.philox_state,
                          inputs.attn_mask_grad, inputs.alibi_slopes_grad},
                         views.with(tensors), options);
  const bool separate = tensors.query.has_value();
  std::vector<Tensor> parts;
  if (!separate) parts.push_back(join_heads(grads.grad_query));
  parts.push_back(join_heads(grads.grad_key));
  parts.push_back(join_heads(grads.grad_value));
  return {at::cat(parts, -1),
          separate ? join_heads(grads.grad_query)
                   : at::empty({0}, tensors.packed.options().requires_grad(false)),
          std::move(grads.grad_weight), std::move(grads.grad_attn_mask),
          std::move(grads.grad_alibi_slopes)};
}

}  // namespace

TORCH_SELFATTN_IMPL(Autograd, m) {
  m.impl("_packed_attention_forward",
         TORCH_FN(PackedKernel<packed_attention_forward_autograd>::call));
  m.impl("_packed_attention_backward",
         TORCH_FN(PackedKernel<packed_attention_backward_autograd>::call));
}

}  // namespace torch_selfattn::ops
