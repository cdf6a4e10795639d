#include "ops/packed_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops/checks.h"
#include "ops/known_equal.h"
#include "ops/operator_handle.h"
#include "ops/problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

using at::Tensor;
using c10::SymInt;

ForwardResults packed_attention_forward(const PackedTensors& t, const HeadCounts<SymInt>& heads,
                                        const AttentionOptions<SymInt>& o) {
  static const auto op = operator_handle<PackedFunction<SymInt>>("_packed_attention_forward");
  auto [output, lse, philox_state] =
      op.call(t.packed, t.query, t.weight, t.attn_mask, t.key_lengths, t.key_starts,
              t.query_offsets, t.alibi_slopes, heads.query, heads.key, o.scale, o.negative_slope,
              o.dropout_p, o.window_left, o.window_right, o.query_offset);
  return {std::move(output), std::move(lse), std::move(philox_state)};
}

PackedGradients packed_attention_backward(const BackwardInputs& in, const PackedTensors& t,
                                          const HeadCounts<SymInt>& heads,
                                          const AttentionOptions<SymInt>& o) {
  static const auto op =
      operator_handle<PackedBackwardFunction<SymInt>>("_packed_attention_backward");
  auto [packed, query, weight, attn_mask, alibi_slopes] =
      op.call(in.grad_output, in.grad_lse, t.packed, t.query, t.weight, t.attn_mask, t.key_lengths,
              t.key_starts, t.query_offsets, t.alibi_slopes, in.output, in.lse, in.philox_state,
              heads.query, heads.key, o.scale, o.negative_slope, o.dropout_p, o.window_left,
              o.window_right, o.query_offset, in.attn_mask_grad, in.alibi_slopes_grad);
  return {std::move(packed), std::move(query), std::move(weight), std::move(attn_mask),
          std::move(alibi_slopes)};
}

Tensor split_heads(const Tensor& x, const SymInt& heads) {
  const SymInt dim = x.sym_size(-1) / heads;
  return x.unflatten_symint(-1, {heads, dim}).transpose(-3, -2);
}

Tensor join_heads(const Tensor& x) { return x.transpose(-3, -2).flatten(-2); }

HeadViews split_packed(const Tensor& packed, const OptionalTensor& query,
                       const HeadCounts<SymInt>& heads) {
  const char* op = "multi_head_attention";
  TORCH_CHECK(packed.dim() == 3 && (!query.has_value() || query->dim() == 3), op,
              ": the inner operator takes projections of three dimensions (got packed=",
              packed.sym_sizes(), ")");
  TORCH_CHECK_VALUE(heads.query > 0 && heads.key > 0, op,
                    ": num_heads and num_kv_heads must be positive (got num_heads=", heads.query,
                    ", num_kv_heads=", heads.key, ")");
  const SymInt own_heads = query.has_value() ? SymInt(0) : heads.query;
  const SymInt parts = own_heads + heads.key * 2;
  TORCH_CHECK(known_equal(packed.sym_size(2) % parts, 0), op,
              ": the packed projection must have columns for all heads (got packed=",
              packed.sym_sizes(), ", num_heads=", heads.query, ", num_kv_heads=", heads.key, ")");
  const SymInt dim = packed.sym_size(2) / parts;
  const auto part = [&](const SymInt& first, const SymInt& count) {
    return split_heads(packed.narrow_symint(2, first * dim, count * dim), count);
  };
  return {query.has_value() ? split_heads(*query, heads.query) : part(0, heads.query),
          part(own_heads, heads.key), part(own_heads + heads.key, heads.key)};
}

PackedBackward prepare_packed_backward(const BackwardInputs& inputs, const PackedTensors& t,
                                       const HeadCounts<SymInt>& heads,
                                       const AttentionOptions<SymInt>& options) {
  PackedBackward p;
  p.heads = split_packed(t.packed, t.query, heads);
  p.grad_output = split_heads(inputs.grad_output, heads.query);
  p.output = split_heads(inputs.output, heads.query);
  check_attention_backward({p.grad_output, inputs.grad_lse, p.output, inputs.lse,
                            inputs.philox_state, inputs.attn_mask_grad, inputs.alibi_slopes_grad},
                           p.heads.with(t), options);
  // In the memory order of the projections, so that they go back through the same views.
  p.grads = {at::empty_like(t.packed),
             t.query.has_value() ? at::empty_like(*t.query) : at::empty({0}, t.packed.options()),
             empty_gradient(t.weight, t.weight.has_value(), t.packed),
             empty_gradient(t.attn_mask, inputs.attn_mask_grad, t.packed),
             empty_gradient(t.alibi_slopes, inputs.alibi_slopes_grad, t.packed)};
  const OptionalTensor grad_query = t.query.has_value() ? OptionalTensor(p.grads.query) : t.query;
  HeadViews views = split_packed(p.grads.packed, grad_query, heads);
  p.results = {std::move(views.query), std::move(views.key), std::move(views.value),
               p.grads.weight,         p.grads.attn_mask,    p.grads.alibi_slopes};
  return p;
}

namespace {

// Every backend: the forward operator on the views, whose output lies in memory as the views do.
ForwardResults packed_attention_forward_composite(const PackedTensors& tensors,
                                                  const HeadCounts<SymInt>& heads,
                                                  const AttentionOptions<SymInt>& options) {
  const HeadViews views = split_packed(tensors.packed, tensors.query, heads);
  ForwardResults results = attention_forward(views.with(tensors), options);
  results.output = join_heads(results.output);
  return results;
}

}  // namespace

TORCH_SELFATTN_IMPL(CompositeExplicitAutograd, m) {
  m.impl("_packed_attention_forward",
         TORCH_FN(PackedKernel<packed_attention_forward_composite>::call));
}

}  // namespace torch_selfattn::ops
