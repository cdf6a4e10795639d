#include "ops/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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

// The saved tensors of both nodes begin alike.
constexpr size_t kTensors = 8;
variable_list list_tensors(const AttentionTensors& t) {
  return {t.query,
          t.key,
          t.value,
          or_undefined(t.weight),
          or_undefined(t.attn_mask),
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
        key_lengths(or_nothing(saved[5])),
        key_starts(or_nothing(saved[6])),
        query_offsets(or_nothing(saved[7])) {}

  AttentionTensors tensors() const {
    return {query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets};
  }

  Tensor query, key, value;
  OptionalTensor weight, attn_mask, key_lengths, key_starts, query_offsets;
};

// p = exp(s - lse), out = (p f) v with f the dropout factors. With g = d loss / d out, u = d loss /
// d lse and delta_i = sum_d g_id out_id:
//   dv = (p f)^T g,  ds_ij = p_ij (f_ij g_i . v_j - delta_i + u_i),
//   dq, dk, dw, dmask from ds by the derivative of the score (docs/formulas.md).
// Saves the inputs, out, lse and the generator's state: p and f are computed again, O(L) memory.
class Attention : public Function<Attention> {
 public:
  static constexpr bool is_traceable = true;  // backward: dispatcher calls and ctx only

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensor& weight,
                               const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
                               const OptionalTensor& key_starts,
                               const OptionalTensor& query_offsets, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, lse, philox_state] = attention_forward(
        query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets, options.scale,
        options.dropout_p, options.window_left, options.window_right, options.query_offset);
    variable_list saved = list_tensors(
        {query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets});
    saved.insert(saved.end(), {output, lse, philox_state});
    ctx->save_for_backward(std::move(saved));
    save_options(ctx, options);
    if (requires_grad(attn_mask)) {
      EdgeCounter edges;
      for (int i = 0; i < 3; ++i) edges.add(true);
      edges.add(weight.has_value());
      ctx->saved_data["mask_edge"] = static_cast<int64_t>(edges.add(true));
    }
    ctx->set_materialize_grads(false);
    return {output, lse, philox_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(kTensors + 1);  // one slot per argument of forward
    if (!grads[0].defined() && !grads[1].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const SavedTensors problem(saved);
    const Options options = saved_options(ctx);
    const Tensor& output = saved[kTensors];
    const Tensor grad_output =
        grads[0].defined() ? grads[0] : at::zeros_symint(output.sym_sizes(), output.options());
    const bool mask_grad =
        saved_flag(ctx, "mask_edge") &&
        ctx->needs_input_grad(static_cast<size_t>(ctx->saved_data["mask_edge"].toInt()));
    auto [grad_query, grad_key, grad_value, grad_weight, grad_mask] = attention_backward(
        grad_output, or_nothing(grads[1]), problem.query, problem.key, problem.value,
        problem.weight, problem.attn_mask, problem.key_lengths, problem.key_starts,
        problem.query_offsets, output, saved[kTensors + 1], saved[kTensors + 2], options.scale,
        options.dropout_p, options.window_left, options.window_right, options.query_offset,
        mask_grad);
    results[0] = grad_query;
    results[1] = grad_key;
    results[2] = grad_value;
    if (problem.weight.has_value()) results[3] = grad_weight;
    if (mask_grad) results[4] = grad_mask;
    return results;
  }
};

// Double backward. The gradients are functions of g, u and the inputs alone (out and lse follow
// from these), so this node returns the derivatives with respect to them and none for out and lse.
// They are taken of the gradients composed of differentiable operators, O(Lq Lk) memory.
class AttentionBackward : public Function<AttentionBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output,
                               const OptionalTensor& grad_lse, const Tensor& query,
                               const Tensor& key, const Tensor& value, const OptionalTensor& weight,
                               const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
                               const OptionalTensor& key_starts,
                               const OptionalTensor& query_offsets, const Tensor& output,
                               const Tensor& lse, const Tensor& philox_state,
                               const Options& options, bool attn_mask_grad) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_query, grad_key, grad_value, grad_weight, grad_mask] = attention_backward(
        grad_output, grad_lse, query, key, value, weight, attn_mask, key_lengths, key_starts,
        query_offsets, output, lse, philox_state, options.scale, options.dropout_p,
        options.window_left, options.window_right, options.query_offset, attn_mask_grad);
    variable_list saved = list_tensors(
        {query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets});
    saved.insert(saved.end(), {grad_output, or_undefined(grad_lse), philox_state});
    ctx->save_for_backward(std::move(saved));
    save_options(ctx, options);
    if (attn_mask_grad) ctx->saved_data["attn_mask_grad"] = true;
    ctx->set_materialize_grads(false);
    return {grad_query, grad_key, grad_value, grad_weight, grad_mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool create_graph = at::GradMode::is_enabled();
    const bool attn_mask_grad = saved_flag(ctx, "attn_mask_grad");
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
    const ComposedBackward composed =
        composed_attention_backward(grad_output, grad_lse, problem.tensors(), inputs[kTensors + 2],
                                    saved_options(ctx), attn_mask_grad);

    variable_list outputs;
    variable_list output_grads;
    const Tensor composed_outputs[] = {composed.grad_query, composed.grad_key, composed.grad_value,
                                       composed.grad_weight, composed.grad_attn_mask};
    for (size_t i = 0; i < 5; ++i) {
      if (!grads[i].defined() || !requires_grad(composed_outputs[i])) continue;
      outputs.push_back(composed_outputs[i]);
      output_grads.push_back(grads[i]);
    }
    // Slots of forward's arguments: grad_output, grad_lse, the eight tensors, out, lse, philox
    // state, options, flag.
    constexpr size_t kSlots = 2 + kTensors + 3 + 2;
    variable_list results(kSlots);
    const auto slot_of = [](size_t saved_index) {
      return saved_index < kTensors ? saved_index + 2 : saved_index - kTensors;
    };
    variable_list wanted;
    std::vector<size_t> slots;
    for (size_t i = 0; i < kTensors + 2; ++i) {
      if (!requires_grad(inputs[i])) continue;
      wanted.push_back(inputs[i]);
      slots.push_back(slot_of(i));
    }
    if (outputs.empty() || wanted.empty()) return results;
    const variable_list derivatives =
        torch::autograd::grad(outputs, wanted, output_grads, /*retain_graph=*/std::nullopt,
                              create_graph, /*allow_unused=*/true);
    for (size_t i = 0; i < slots.size(); ++i) results[slots[i]] = derivatives[i];
    return results;
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_forward_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets,
    std::optional<double> scale, double dropout_p, SymInt window_left, SymInt window_right,
    SymInt query_offset) {
  const Options options{scale, dropout_p, std::move(window_left), std::move(window_right),
                        std::move(query_offset)};
  if (must_compose(query, key, value, weight, attn_mask)) {
    const auto state_options = query.options().dtype(at::kLong).requires_grad(false);
    Tensor philox_state = at::empty({dropout_p > 0 ? 2 : 0}, state_options);
    if (dropout_p > 0) philox_state.random_();
    ComposedForward composed = composed_attention(
        {query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets},
        philox_state, options);
    return {std::move(composed.output), std::move(composed.lse), std::move(philox_state)};
  }
  if (!needs_graph(query, key, value, weight, attn_mask)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return attention_forward(query, key, value, weight, attn_mask, key_lengths, key_starts,
                             query_offsets, scale, dropout_p, options.window_left,
                             options.window_right, options.query_offset);
  }
  variable_list results = Attention::apply(query, key, value, weight, attn_mask, key_lengths,
                                           key_starts, query_offsets, options);
  return {std::move(results[0]), std::move(results[1]), std::move(results[2])};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_autograd(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets, const Tensor& output,
    const Tensor& lse, const Tensor& philox_state, std::optional<double> scale, double dropout_p,
    SymInt window_left, SymInt window_right, SymInt query_offset, bool attn_mask_grad) {
  const Options options{scale, dropout_p, std::move(window_left), std::move(window_right),
                        std::move(query_offset)};
  if (must_compose(grad_output, grad_lse, query, key, value, weight, attn_mask)) {
    ComposedBackward composed = composed_attention_backward(
        grad_output, grad_lse,
        {query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets},
        philox_state, options, attn_mask_grad);
    const auto or_empty = [&](const Tensor& t) {
      return t.defined() ? t : at::empty({0}, query.options().requires_grad(false));
    };
    return {std::move(composed.grad_query), std::move(composed.grad_key),
            std::move(composed.grad_value), or_empty(composed.grad_weight),
            or_empty(composed.grad_attn_mask)};
  }
  if (!needs_graph(grad_output, grad_lse, query, key, value, weight, attn_mask)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return attention_backward(grad_output, grad_lse, query, key, value, weight, attn_mask,
                              key_lengths, key_starts, query_offsets, output, lse, philox_state,
                              scale, dropout_p, options.window_left, options.window_right,
                              options.query_offset, attn_mask_grad);
  }
  variable_list results = AttentionBackward::apply(
      grad_output, grad_lse, query, key, value, weight, attn_mask, key_lengths, key_starts,
      query_offsets, output, lse, philox_state, options, attn_mask_grad);
  return {std::move(results[0]), std::move(results[1]), std::move(results[2]),
          std::move(results[3]), std::move(results[4])};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_selfattn, Autograd, m) {
  m.impl("_attention_forward", TORCH_FN(attention_forward_autograd));
  m.impl("_attention_backward", TORCH_FN(attention_backward_autograd));
}

}  // namespace torch_selfattn::ops
