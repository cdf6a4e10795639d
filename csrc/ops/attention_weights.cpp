#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <torch_selfattn/ops.h>

#include "ops/attention_weights_kernel.h"
#include "ops/canonical.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/operator_handle.h"
#include "ops/registration.h"

namespace torch_selfattn {

using at::Tensor;
using c10::SymInt;
using ops::OptionalTensor;

Tensor attention_weights(const Tensor& query, const Tensor& key, const OptionalTensor& weight,
                         const OptionalTensor& rows, const OptionalTensor& heads,
                         const OptionalTensor& attn_mask, bool is_causal,
                         std::optional<double> scale, bool enable_gqa,
                         const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                         SymInt window_left, SymInt window_right, SymInt query_offset,
                         const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                         bool average_heads, std::string_view activation, double negative_slope) {
  static const auto op = ops::operator_handle<decltype(attention_weights)>("attention_weights");
  return op.call(query, key, weight, rows, heads, attn_mask, is_causal, scale, enable_gqa,
                 key_lengths, key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes, average_heads, activation,
                 negative_slope);
}

namespace ops {

Tensor attention_weights_forward(const WeightsInputs& in, const AttentionTensors& t,
                                 const AttentionOptions<SymInt>& o) {
  static const auto op = operator_handle<WeightsFunction<SymInt>>("_attention_weights_forward");
  return op.call(t.query, t.key, t.weight, t.attn_mask, t.key_lengths, t.key_starts,
                 t.query_offsets, t.alibi_slopes, in.query_indices, o.scale, o.negative_slope,
                 o.window_left, o.window_right, o.query_offset, in.average_heads);
}

BackwardResults attention_weights_backward(const WeightsBackwardInputs& in,
                                           const AttentionTensors& t,
                                           const AttentionOptions<SymInt>& o) {
  static const auto op =
      operator_handle<WeightsBackwardFunction<SymInt>>("_attention_weights_backward");
  auto [query, key, weight, attn_mask, alibi_slopes] = op.call(
      in.grad, t.query, t.key, t.weight, t.attn_mask, t.key_lengths, t.key_starts, t.query_offsets,
      t.alibi_slopes, in.query_indices, o.scale, o.negative_slope, o.window_left, o.window_right,
      o.query_offset, in.average_heads, in.attn_mask_grad, in.alibi_slopes_grad);
  return {std::move(query),  std::move(key),       Tensor(),
          std::move(weight), std::move(attn_mask), std::move(alibi_slopes)};
}

Tensor empty_attention_weights(const WeightsInputs& inputs, const AttentionTensors& t) {
  return at::empty_symint(
      {t.query.sym_size(0), inputs.average_heads ? SymInt(1) : t.query.sym_size(1),
       t.query.sym_size(2), t.key.sym_size(2)},
      t.query.options());
}

BackwardResults empty_weights_gradients(const WeightsBackwardInputs& inputs,
                                        const AttentionTensors& t) {
  const auto like = [](const Tensor& x) {
    const c10::SymIntArrayRef sizes = x.sym_sizes();
    return empty_in_order_of(x, {sizes[0], sizes[1], sizes[2], sizes[3]});
  };
  return {like(t.query),
          like(t.key),
          Tensor(),
          empty_gradient(t.weight, t.weight.has_value(), t.query),
          empty_gradient(t.attn_mask, inputs.attn_mask_grad, t.query),
          empty_gradient(t.alibi_slopes, inputs.alibi_slopes_grad, t.query)};
}

WeightsCall prepare_attention_weights(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                      const AttentionOptions<int64_t>& options,
                                      const Tensor& weights) {
  WeightsCall call{{}, prepare_problem(tensors, options), Tensor()};
  call.arguments = {call.prepared.problem, view(weights), inputs.average_heads};
  if (inputs.query_indices.has_value()) {
    call.indices = inputs.query_indices->to(at::kLong);
    call.arguments.query_indices = call.indices.const_data_ptr<int64_t>();
    for (int64_t d = 0; d < 2; ++d) {
      call.arguments.query_index_stride[d] = call.indices.size(d) == 1 ? 0 : call.indices.stride(d);
    }
  }
  return call;
}

namespace {

void check_selection(const char* name, const Tensor& query, const OptionalTensor& selection) {
  if (!selection.has_value()) return;
  TORCH_CHECK(selection->dim() == 1 &&
                  (selection->scalar_type() == at::kLong || selection->scalar_type() == at::kInt),
              "attention_weights: ", name, " must be int64 or int32, one dimension (got ", name,
              "=", selection->sym_sizes(), " ", selection->dtype(), ")");
  TORCH_CHECK(selection->device() == query.device(), "attention_weights: ", name,
              " must be on the device of query (got query=", query.device(), ", ", name, "=",
              selection->device(), ")");
}

Tensor select(const Tensor& t, int64_t dim, const OptionalTensor& selection) {
  return selection.has_value() ? at::index_select(t, dim, *selection) : t;
}

// A mask or slopes, whose broadcast dimensions stay.
OptionalTensor select_unless_broadcast(const OptionalTensor& t, int64_t dim,
                                       const OptionalTensor& selection) {
  if (!t.has_value() || TORCH_GUARD_OR_FALSE(t->sym_size(dim).sym_eq(1))) return t;
  return select(*t, dim, selection);
}

// Canonical shapes and only the rows and heads asked for, then the forward operator.
Tensor attention_weights_composite(
    const Tensor& query, const Tensor& key, const OptionalTensor& weight,
    const OptionalTensor& rows, const OptionalTensor& heads, const OptionalTensor& attn_mask,
    bool is_causal, std::optional<double> scale, bool enable_gqa, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, SymInt window_left, SymInt window_right, SymInt query_offset,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes, bool average_heads,
    std::string_view activation, double negative_slope) {
  const char* op = "attention_weights";
  check_selection("rows", query, rows);
  check_selection("heads", query, heads);
  const AttentionTensors given{query,       key,        key,           weight,      attn_mask,
                               key_lengths, key_starts, query_offsets, alibi_slopes};
  const CanonicalProblem c =
      canonicalize(op, given,
                   {scale, check_activation(op, weight.has_value(), activation, negative_slope),
                    0.0, std::move(window_left), std::move(window_right), std::move(query_offset)},
                   is_causal, enable_gqa);

  const SymInt key_heads = c.key->sym_size(1);
  const SymInt group = key_heads == 0 ? SymInt(1) : c.query->sym_size(1) / key_heads;
  Tensor chosen_key = *c.key;  // a head of its own for each chosen query head
  if (heads.has_value()) {
    chosen_key = at::index_select(
        *c.key, 1, group == 1 ? *heads : heads->div(group.guard_int(__FILE__, __LINE__), "floor"));
  }
  const Tensor chosen_query = select(select(*c.query, 1, heads), 2, rows);
  const bool weight_per_head = c.weight.has_value() && c.weight->dim() == 2;
  const OptionalTensor chosen_weight =
      weight_per_head ? OptionalTensor(select(*c.weight, 0, heads)) : c.weight;
  const OptionalTensor mask =
      select_unless_broadcast(select_unless_broadcast(c.attn_mask, 1, heads), 2, rows);
  const OptionalTensor slopes = select_unless_broadcast(c.alibi_slopes, 1, heads);
  const OptionalTensor indices = rows.has_value() ? OptionalTensor(rows->unsqueeze(0)) : rows;
  const Tensor weights =
      attention_weights_forward({indices, average_heads},
                                {chosen_query, chosen_key, chosen_key, chosen_weight, mask,
                                 c.key_lengths, c.key_starts, c.query_offsets, slopes},
                                c.options);
  const Tensor result = c.restore(weights);
  return average_heads && c.rank > 3 ? result.squeeze(-3) : result;
}

}  // namespace

TORCH_SELFATTN_IMPL(CompositeImplicitAutograd, m) {
  m.impl("attention_weights", TORCH_FN(attention_weights_composite));
}

TORCH_SELFATTN_IMPL(FuncTorchBatchedDecomposition, m) {
  m.impl("attention_weights", TORCH_FN(attention_weights_composite));
}

}  // namespace ops
}  // namespace torch_selfattn
