#include "ops/attention.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_selfattn/ops.h>

#include "ops/attention_kernel.h"
#include "ops/canonical.h"
#include "ops/checks.h"
#include "ops/explain.h"
#include "ops/operator_handle.h"
#include "ops/registration.h"

namespace torch_selfattn {

using at::Tensor;
using c10::SymInt;
using ops::OptionalTensor;

// The C++ functions: calls through the dispatcher.

Tensor dot_product_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                             const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                             std::optional<double> scale, bool enable_gqa,
                             const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                             SymInt window_left, SymInt window_right, SymInt query_offset,
                             const OptionalTensor& query_offsets,
                             const OptionalTensor& alibi_slopes) {
  static const auto op =
      ops::operator_handle<decltype(dot_product_attention)>("dot_product_attention");
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths,
                 key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes);
}

std::tuple<Tensor, Tensor> dot_product_attention_with_lse(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
    const OptionalTensor& key_lengths, const OptionalTensor& key_starts, SymInt window_left,
    SymInt window_right, SymInt query_offset, const OptionalTensor& query_offsets,
    const OptionalTensor& alibi_slopes) {
  static const auto op = ops::operator_handle<decltype(dot_product_attention_with_lse)>(
      "dot_product_attention_with_lse");
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths,
                 key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes);
}

Tensor additive_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& weight, const OptionalTensor& attn_mask, double dropout_p,
                          bool is_causal, std::optional<double> scale, bool enable_gqa,
                          const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                          SymInt window_left, SymInt window_right, SymInt query_offset,
                          const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                          std::string_view activation, double negative_slope) {
  static const auto op = ops::operator_handle<decltype(additive_attention)>("additive_attention");
  return op.call(query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                 key_lengths, key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes, activation, negative_slope);
}

std::tuple<Tensor, Tensor> additive_attention_with_lse(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
    SymInt window_left, SymInt window_right, SymInt query_offset,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
    std::string_view activation, double negative_slope) {
  static const auto op =
      ops::operator_handle<decltype(additive_attention_with_lse)>("additive_attention_with_lse");
  return op.call(query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                 key_lengths, key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes, activation, negative_slope);
}

std::string explain(const Tensor& query, const Tensor& key, const Tensor& value,
                    const OptionalTensor& weight, const OptionalTensor& attn_mask, double dropout_p,
                    bool is_causal, std::optional<double> scale, bool enable_gqa,
                    const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                    SymInt window_left, SymInt window_right, SymInt query_offset,
                    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                    std::string_view activation, double negative_slope) {
  static const auto op = ops::operator_handle<decltype(explain)>("explain");
  return op.call(query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                 key_lengths, key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes, activation, negative_slope);
}

namespace ops {

ForwardResults attention_forward(const AttentionTensors& t, const AttentionOptions<SymInt>& o) {
  static const auto op = operator_handle<ForwardFunction<SymInt>>("_attention_forward");
  auto [output, lse, philox_state] =
      op.call(t.query, t.key, t.value, t.weight, t.attn_mask, t.key_lengths, t.key_starts,
              t.query_offsets, t.alibi_slopes, o.scale, o.negative_slope, o.dropout_p,
              o.window_left, o.window_right, o.query_offset);
  return {std::move(output), std::move(lse), std::move(philox_state)};
}

BackwardResults attention_backward(const BackwardInputs& in, const AttentionTensors& t,
                                   const AttentionOptions<SymInt>& o) {
  static const auto op = operator_handle<BackwardFunction<SymInt>>("_attention_backward");
  auto [query, key, value, weight, attn_mask, alibi_slopes] =
      op.call(in.grad_output, in.grad_lse, t.query, t.key, t.value, t.weight, t.attn_mask,
              t.key_lengths, t.key_starts, t.query_offsets, t.alibi_slopes, in.output, in.lse,
              in.philox_state, o.scale, o.negative_slope, o.dropout_p, o.window_left,
              o.window_right, o.query_offset, in.attn_mask_grad, in.alibi_slopes_grad);
  return {std::move(query),  std::move(key),       std::move(value),
          std::move(weight), std::move(attn_mask), std::move(alibi_slopes)};
}

Tensor attention_dropout_factors(const Tensor& philox_state, SymInt batch, SymInt heads,
                                 SymInt query_length, SymInt key_length, double dropout_p,
                                 at::ScalarType dtype) {
  static const auto op =
      operator_handle<decltype(attention_dropout_factors)>("_attention_dropout_factors");
  return op.call(philox_state, std::move(batch), std::move(heads), std::move(query_length),
                 std::move(key_length), dropout_p, dtype);
}

namespace {

// The composite layer: canonical shapes, then the forward operator.

std::tuple<Tensor, Tensor> attend(const char* op, const AttentionTensors& tensors,
                                  AttentionOptions<SymInt> options, bool is_causal,
                                  bool enable_gqa) {
  const CanonicalProblem c = canonicalize(op, tensors, std::move(options), is_causal, enable_gqa);
  ForwardResults results = attention_forward(c.tensors(), c.options);
  if (c.rank == 4) return {std::move(results.output), std::move(results.lse)};
  return {c.restore(results.output), c.restore(results.lse)};
}

std::tuple<Tensor, Tensor> dot_product_attention_with_lse_composite(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
    const OptionalTensor& key_lengths, const OptionalTensor& key_starts, SymInt window_left,
    SymInt window_right, SymInt query_offset, const OptionalTensor& query_offsets,
    const OptionalTensor& alibi_slopes) {
  const OptionalTensor no_weight;
  return attend("dot_product_attention",
                {query, key, value, no_weight, attn_mask, key_lengths, key_starts, query_offsets,
                 alibi_slopes},
                {scale, std::nullopt, dropout_p, std::move(window_left), std::move(window_right),
                 std::move(query_offset)},
                is_causal, enable_gqa);
}

Tensor dot_product_attention_composite(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const OptionalTensor& attn_mask, double dropout_p,
                                       bool is_causal, std::optional<double> scale, bool enable_gqa,
                                       const OptionalTensor& key_lengths,
                                       const OptionalTensor& key_starts, SymInt window_left,
                                       SymInt window_right, SymInt query_offset,
                                       const OptionalTensor& query_offsets,
                                       const OptionalTensor& alibi_slopes) {
  return std::get<0>(dot_product_attention_with_lse_composite(
      query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths,
      key_starts, std::move(window_left), std::move(window_right), std::move(query_offset),
      query_offsets, alibi_slopes));
}

std::tuple<Tensor, Tensor> additive_attention_with_lse_composite(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
    SymInt window_left, SymInt window_right, SymInt query_offset,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
    std::string_view activation, double negative_slope) {
  const OptionalTensor some_weight = weight;
  return attend(
      "additive_attention",
      {query, key, value, some_weight, attn_mask, key_lengths, key_starts, query_offsets,
       alibi_slopes},
      {scale, check_activation("additive_attention", true, activation, negative_slope), dropout_p,
       std::move(window_left), std::move(window_right), std::move(query_offset)},
      is_causal, enable_gqa);
}

Tensor additive_attention_composite(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& weight, const OptionalTensor& attn_mask,
                                    double dropout_p, bool is_causal, std::optional<double> scale,
                                    bool enable_gqa, const OptionalTensor& key_lengths,
                                    const OptionalTensor& key_starts, SymInt window_left,
                                    SymInt window_right, SymInt query_offset,
                                    const OptionalTensor& query_offsets,
                                    const OptionalTensor& alibi_slopes, std::string_view activation,
                                    double negative_slope) {
  return std::get<0>(additive_attention_with_lse_composite(
      query, key, value, weight, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths,
      key_starts, std::move(window_left), std::move(window_right), std::move(query_offset),
      query_offsets, alibi_slopes, activation, negative_slope));
}

std::string explain_composite(const Tensor& query, const Tensor& key, const Tensor& value,
                              const OptionalTensor& weight, const OptionalTensor& attn_mask,
                              double dropout_p, bool is_causal, std::optional<double> scale,
                              bool enable_gqa, const OptionalTensor& key_lengths,
                              const OptionalTensor& key_starts, SymInt window_left,
                              SymInt window_right, SymInt query_offset,
                              const OptionalTensor& query_offsets,
                              const OptionalTensor& alibi_slopes, std::string_view activation,
                              double negative_slope) {
  const AttentionTensors tensors{query,       key,        value,         weight,      attn_mask,
                                 key_lengths, key_starts, query_offsets, alibi_slopes};
  const CanonicalProblem c = canonicalize(
      tensors.name(), tensors,
      {scale, check_activation(tensors.name(), weight.has_value(), activation, negative_slope),
       dropout_p, std::move(window_left), std::move(window_right), std::move(query_offset)},
      is_causal, enable_gqa);
  const AttentionOptions<SymInt>& o = c.options;
  return explain_attention(
      c.tensors(),
      {o.scale, o.negative_slope, o.dropout_p, o.window_left.guard_int(__FILE__, __LINE__),
       o.window_right.guard_int(__FILE__, __LINE__), o.query_offset.guard_int(__FILE__, __LINE__)});
}

template <typename Library>
void register_composites(Library& m) {
  m.impl("dot_product_attention", TORCH_FN(dot_product_attention_composite));
  m.impl("dot_product_attention_with_lse", TORCH_FN(dot_product_attention_with_lse_composite));
  m.impl("additive_attention", TORCH_FN(additive_attention_composite));
  m.impl("additive_attention_with_lse", TORCH_FN(additive_attention_with_lse_composite));
}

}  // namespace

TORCH_SELFATTN_IMPL(CompositeImplicitAutograd, m) {
  register_composites(m);
  m.impl("explain", TORCH_FN(explain_composite));
}

// Without this torch.vmap runs a composite operator once per sample, with a warning.
TORCH_SELFATTN_IMPL(FuncTorchBatchedDecomposition, m) { register_composites(m); }

}  // namespace ops
}  // namespace torch_selfattn
