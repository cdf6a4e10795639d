#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "ops/attention.h"
#include "ops/autograd/graph.h"

// How the autograd nodes of attention keep the tensors and numbers of a problem.
namespace torch_selfattn::ops {

using Options = AttentionOptions<c10::SymInt>;

// The numbers of a problem in a node. Only what differs from the default is saved: each entry costs
// a tenth of a microsecond, and most calls need none. (Entries apart, not one tuple: compiled
// autograd lifts symbolic integers from plain entries only.)
inline void save_integer(torch::autograd::AutogradContext* ctx, const char* name,
                         const c10::SymInt& value, int64_t otherwise) {
  if (value.is_symbolic() || value.expect_int() != otherwise) ctx->saved_data[name] = value;
}

inline c10::SymInt saved_integer(torch::autograd::AutogradContext* ctx, const char* name,
                                 int64_t otherwise) {
  const auto entry = ctx->saved_data.find(name);
  return entry == ctx->saved_data.end() ? c10::SymInt(otherwise) : entry->second.toSymInt();
}

inline bool saved_flag(torch::autograd::AutogradContext* ctx, const char* name) {
  return ctx->saved_data.count(name) > 0;
}

inline void save_options(torch::autograd::AutogradContext* ctx, const Options& options) {
  if (options.scale.has_value()) ctx->saved_data["scale"] = *options.scale;
  if (options.negative_slope.has_value()) {
    ctx->saved_data["negative_slope"] = *options.negative_slope;
  }
  if (options.dropout_p > 0) ctx->saved_data["dropout_p"] = options.dropout_p;
  save_integer(ctx, "window_left", options.window_left, -1);
  save_integer(ctx, "window_right", options.window_right, -1);
  save_integer(ctx, "query_offset", options.query_offset, 0);
}

inline Options saved_options(torch::autograd::AutogradContext* ctx) {
  Options options{std::nullopt,
                  std::nullopt,
                  0.0,
                  saved_integer(ctx, "window_left", -1),
                  saved_integer(ctx, "window_right", -1),
                  saved_integer(ctx, "query_offset", 0)};
  if (saved_flag(ctx, "scale")) options.scale = ctx->saved_data["scale"].toDouble();
  if (saved_flag(ctx, "negative_slope")) {
    options.negative_slope = ctx->saved_data["negative_slope"].toDouble();
  }
  if (saved_flag(ctx, "dropout_p")) options.dropout_p = ctx->saved_data["dropout_p"].toDouble();
  return options;
}

inline at::Tensor or_undefined(const OptionalTensor& t) {
  return t.has_value() ? *t : at::Tensor();
}
inline OptionalTensor or_nothing(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// The tensors of a problem that are differentiable come first: in a node's arguments, in what it
// saves, and in what it returns.
constexpr size_t kDifferentiable = 6;
constexpr size_t kTensors = 9;
inline torch::autograd::variable_list list_tensors(const AttentionTensors& t) {
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
  explicit SavedTensors(const torch::autograd::variable_list& saved)
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

  at::Tensor query, key, value;
  OptionalTensor weight, attn_mask, alibi_slopes, key_lengths, key_starts, query_offsets;
};

// f(the differentiable tensors of a problem).
template <typename Function>
auto with_differentiable(const AttentionTensors& t, const Function& f) {
  return f(t.query, t.key, t.value, t.weight, t.attn_mask, t.alibi_slopes);
}

// Which of the optional gradients somebody waits for: the edge of such an argument.
inline void save_edge(torch::autograd::AutogradContext* ctx, const char* name, int edge,
                      const OptionalTensor& argument) {
  if (requires_grad(argument)) ctx->saved_data[name] = static_cast<int64_t>(edge);
}
inline void save_edges(torch::autograd::AutogradContext* ctx, const AttentionTensors& t) {
  if (!requires_grad(t.attn_mask) && !requires_grad(t.alibi_slopes)) return;
  EdgeCounter edges;
  for (int i = 0; i < 3; ++i) edges.add(true);
  edges.add(t.weight.has_value());
  save_edge(ctx, "mask_edge", edges.add(t.attn_mask.has_value()), t.attn_mask);
  save_edge(ctx, "slopes_edge", edges.add(t.alibi_slopes.has_value()), t.alibi_slopes);
}

inline bool wants_gradient(torch::autograd::AutogradContext* ctx, const char* edge) {
  return saved_flag(ctx, edge) &&
         ctx->needs_input_grad(static_cast<size_t>(ctx->saved_data[edge].toInt()));
}

}  // namespace torch_selfattn::ops
