#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/attention_kernel.h"
#include "ops/autograd/composed_attention.h"
#include "ops/autograd/graph.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Options = AttentionOptions<SymInt>;

// The numbers of a problem in a node. Only what differs from the default is saved: each entry costs
// a tenth of a microsecond, and most calls need none. (Entries apart, not one tuple: compiled
// autograd lifts symbolic integers from plain entries only.)
void save_integer(AutogradContext* ctx, const char* name, const SymInt& value, int64_t otherwise) {
  if (value.is_symbolic() || value.expect_int() != otherwise) ctx->saved_data[name] = value;
}

SymInt saved_integer(AutogradContext* ctx, const char* name, int64_t otherwise) {
  const auto entry = ctx->saved_data.find(name);
  return entry == ctx->saved_data.end() ? SymInt(otherwise) : entry->second.toSymInt();
}

bool saved_flag(AutogradContext* ctx, const char* name) { return ctx->saved_data.count(name) > 0; }

void save_options(AutogradContext* ctx, const Options& options) {
  if (options.scale.has_value()) ctx->saved_data["scale"] = *options.scale;
  if (options.dropout_p > 0) ctx->saved_data["dropout_p"] = options.dropout_p;
  save_integer(ctx, "window_left", options.window_left, -1);
  save_integer(ctx, "window_right", options.window_right, -1);
  save_integer(ctx, "query_offset", options.query_offset, 0);
}

Options saved_options(AutogradContext* ctx) {
  Options options{std::nullopt, 0.0, saved_integer(ctx, "window_left", -1),
                  saved_integer(ctx, "window_right", -1), saved_integer(ctx, "query_offset", 0)};
  if (saved_flag(ctx, "scale")) options.scale = ctx->saved_data["scale"].toDouble();
  if (saved_flag(ctx, "dropout_p")) options.dropout_p = ctx->saved_data["dropout_p"].toDouble();
  return options;
}

Tensor or_undefined(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
OptionalTensor or_nothing(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// The tensors of a problem that are differentiable come first: in a node's arguments, in what it
// saves, and in what it returns.
constexpr size_t kDifferentiable = 6;
constexpr size_t kTensors = 9;
variable_list list_tensors(const AttentionTensors& t) {
  return {t.query,
          t.key,
          t.value,
          or_undefined(t.weight),
          or_undefined(t.attn_mask),
          or_undefined(t.alibi_slopes),
          or_undefined(t.key_lengths),
          or_undefined(t.key_starts),
          or_undefined(t.query_offsets)};
}

struct SavedTensors {
  explicit SavedTensors(const variable_list& saved)
      : query(saved[0]),
        key(saved[1]),
        value(saved[2]),
        weight(or_nothing(saved[3])),
        attn_mask(or_nothing(saved[4])),
        alibi_slopes(or_nothing(saved[5])),
        key_lengths(or_nothing(saved[6])),
        key_starts(or_nothing(saved[7])),
        query_offsets(or_nothing(saved[8])) {}

  AttentionTensors tensors() const {
    return {query,       key,        value,         weight,      attn_mask,
            key_lengths, key_starts, query_offsets, alibi_slopes};
  }

  Tensor query, key, value;
  OptionalTensor weight, attn_mask, alibi_slopes, key_lengths, key_starts, query_offsets;
};

// f(the differentiable tensors of a problem).
template <typename Function>
auto with_differentiable(const AttentionTensors& t, const Function& f) {
  return f(t.query, t.key, t.value, t.weight, t.attn_mask, t.alibi_slopes);
}

// Which of the optional gradients somebody waits for: the edges of these arguments.
void save_edges(AutogradContext* ctx, const AttentionTensors& t) {
  const bool mask = requires_grad(t.attn_mask);
  const bool slopes = requires_grad(t.alibi_slopes);
  if (!mask && !slopes) return;
  EdgeCounter edges;
  for (int i = 0; i < 3; ++i) edges.add(true);
  edges.add(t.weight.has_value());
  const int mask_edge = edges.add(t.attn_mask.has_value());
  const int slopes_edge = edges.add(t.alibi_slopes.has_value());
  if (mask) ctx->saved_data["mask_edge"] = static_cast<int64_t>(mask_edge);
  if (slopes) ctx->saved_data["slopes_edge"] = static_cast<int64_t>(slopes_edge);
}

bool wants_gradient(AutogradContext* ctx, const char* edge) {
  return saved_flag(ctx, edge) &&
         ctx->needs_input_grad(static_cast<size_t>(ctx->saved_data[edge].toInt()));
}

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
    const Tensor grad_output =
        grads[0].defined() ? grads[0] : at::zeros_symint(output.sym_sizes(), output.options());
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

    // With create_graph the saved tensors keep their history, and the third derivative with them.
    const auto input = [&](const Tensor& t) {
      if (!t.defined() || !t.is_floating_point()) return t;
      return create_graph && t.requires_grad() ? t : t.detach().requires_grad_(t.requires_grad());
    };
    variable_list inputs;
    for (const Tensor& t : saved) inputs.push_back(input(t));
    const SavedTensors problem(inputs);
    const Tensor& grad_output = inputs[kTensors];
    const OptionalTensor grad_lse = or_nothing(inputs[kTensors + 1]);
    const Tensor unread;  // output and lse
    const BackwardResults composed = composed_attention_backward(
        {grad_output, grad_lse, unread, unread, inputs[kTensors + 2],
         saved_flag(ctx, "attn_mask_grad"), saved_flag(ctx, "alibi_slopes_grad")},
        problem.tensors(), saved_options(ctx));

    variable_list outputs;
    variable_list output_grads;
    const Tensor composed_outputs[kDifferentiable] = {
        composed.grad_query,  composed.grad_key,       composed.grad_value,
        composed.grad_weight, composed.grad_attn_mask, composed.grad_alibi_slopes};
    for (size_t i = 0; i < kDifferentiable; ++i) {
      if (!grads[i].defined() || !requires_grad(composed_outputs[i])) continue;
      outputs.push_back(composed_outputs[i]);
      output_grads.push_back(grads[i]);
    }
    // Slots of forward's arguments: the differentiable tensors, grad_output, grad_lse; then what is
    // no tensor.
    variable_list results(kDifferentiable + 2 + 3);
    variable_list wanted;
    std::vector<size_t> slots;
    const auto want = [&](size_t saved_index, size_t slot) {
      if (!requires_grad(inputs[saved_index])) return;
      wanted.push_back(inputs[saved_index]);
      slots.push_back(slot);
    };
    for (size_t i = 0; i < kDifferentiable; ++i) want(i, i);
    for (size_t i = 0; i < 2; ++i) want(kTensors + i, kDifferentiable + i);
    if (outputs.empty() || wanted.empty()) return results;
    const variable_list derivatives =
        torch::autograd::grad(outputs, wanted, output_grads, /*retain_graph=*/std::nullopt,
                              create_graph, /*allow_unused=*/true);
    for (size_t i = 0; i < slots.size(); ++i) results[slots[i]] = derivatives[i];
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

TORCH_LIBRARY_IMPL(torch_selfattn, Autograd, m) {
  m.impl("_attention_forward", TORCH_FN(AttentionKernel<attention_forward_autograd>::call));
  m.impl("_attention_backward", TORCH_FN(AttentionKernel<attention_backward_autograd>::call));
}

}  // namespace torch_selfattn::ops
