#pragma once

#include <utility>

#include "ops/attention_kernel.h"

// Attention of heads that lie side by side in the output of a projection, as multi_head_attention
// has them. What the operators of attention.h take apart is one tensor here, and so is its
// gradient: the projection's backward gets it in one piece, and nothing is copied or added up.
//   packed (B, L, (H + 2 Hk) E): query, key and value heads of self-attention, or, with
//   query (B, Lq, H E), (B, Lk, 2 Hk E): key and value heads; output (B, Lq, H E).
// The other arguments are those of attention.h.
namespace torch_selfattn::ops {

// As AttentionTensors.
struct PackedTensors {
  const at::Tensor& packed;
  const OptionalTensor& query;
  const OptionalTensor& weight;
  const OptionalTensor& attn_mask;
  const OptionalTensor& key_lengths;
  const OptionalTensor& key_starts;
  const OptionalTensor& query_offsets;
  const OptionalTensor& alibi_slopes;
};

template <typename Int>
struct HeadCounts {
  Int query;
  Int key;
};

// A gradient without anything to compute has no elements.
struct PackedGradients {
  at::Tensor packed;
  at::Tensor query;
  at::Tensor weight;
  at::Tensor attn_mask;
  at::Tensor alibi_slopes;
};

// Typed dispatcher calls of the operators with an underscore; output and its gradient are those of
// the heads side by side.
ForwardResults packed_attention_forward(const PackedTensors& tensors,
                                        const HeadCounts<c10::SymInt>& heads,
                                        const AttentionOptions<c10::SymInt>& options);
PackedGradients packed_attention_backward(const BackwardInputs& inputs,
                                          const PackedTensors& tensors,
                                          const HeadCounts<c10::SymInt>& heads,
                                          const AttentionOptions<c10::SymInt>& options);

// (B, L, heads * E) as (B, heads, L, E), a view, and back.
at::Tensor split_heads(const at::Tensor& x, const c10::SymInt& heads);
at::Tensor join_heads(const at::Tensor& x);

// The heads of a packed problem, (B, H, Lq, E), (B, Hk, Lk, E) twice: views.
struct HeadViews {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;

  AttentionTensors with(const PackedTensors& t) const {
    return {query,         key,          value,           t.weight,      t.attn_mask,
            t.key_lengths, t.key_starts, t.query_offsets, t.alibi_slopes};
  }
};
// Checks the shapes as well.
HeadViews split_packed(const at::Tensor& packed, const OptionalTensor& query,
                       const HeadCounts<c10::SymInt>& heads);

// The backward operator of a device, by its kernel for the heads: `run` fills results, which are
// views of the packed gradients, from arguments that the checks have accepted.
struct PackedBackward {
  HeadViews heads;
  at::Tensor grad_output;  // (B, H, Lq, E), as is
  at::Tensor output;
  PackedGradients grads;
  BackwardResults results;
};
PackedBackward prepare_packed_backward(const BackwardInputs& inputs, const PackedTensors& tensors,
                                       const HeadCounts<c10::SymInt>& heads,
                                       const AttentionOptions<c10::SymInt>& options);

// As ops/attention_kernel.h.
using PackedBackwardTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename Int>
using PackedFunction = ForwardTuple(const at::Tensor& packed, const OptionalTensor& query,
                                    const OptionalTensor& weight, const OptionalTensor& attn_mask,
                                    const OptionalTensor& key_lengths,
                                    const OptionalTensor& key_starts,
                                    const OptionalTensor& query_offsets,
                                    const OptionalTensor& alibi_slopes, Int num_heads,
                                    Int num_kv_heads, std::optional<double> scale,
                                    std::optional<double> negative_slope, double dropout_p,
                                    Int window_left, Int window_right, Int query_offset);
template <typename Int>
using PackedBackwardFunction = PackedBackwardTuple(
    const at::Tensor& grad_output, const OptionalTensor& grad_lse, const at::Tensor& packed,
    const OptionalTensor& query, const OptionalTensor& weight, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
    const at::Tensor& output, const at::Tensor& lse, const at::Tensor& philox_state, Int num_heads,
    Int num_kv_heads, std::optional<double> scale, std::optional<double> negative_slope,
    double dropout_p, Int window_left, Int window_right, Int query_offset, bool attn_mask_grad,
    bool alibi_slopes_grad);

template <auto kernel>
struct PackedKernel;

template <typename Int, ForwardResults (*kernel)(const PackedTensors&, const HeadCounts<Int>&,
                                                 const AttentionOptions<Int>&)>
struct PackedKernel<kernel> {
  static ForwardTuple call(const at::Tensor& packed, const OptionalTensor& query,
                           const OptionalTensor& weight, const OptionalTensor& attn_mask,
                           const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                           const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                           Int num_heads, Int num_kv_heads, std::optional<double> scale,
                           std::optional<double> negative_slope, double dropout_p, Int window_left,
                           Int window_right, Int query_offset) {
    ForwardResults r = kernel(
        {packed, query, weight, attn_mask, key_lengths, key_starts, query_offsets, alibi_slopes},
        {std::move(num_heads), std::move(num_kv_heads)},
        {scale, negative_slope, dropout_p, std::move(window_left), std::move(window_right),
         std::move(query_offset)});
    return {std::move(r.output), std::move(r.lse), std::move(r.philox_state)};
  }
};

template <typename Int,
          PackedGradients (*kernel)(const BackwardInputs&, const PackedTensors&,
                                    const HeadCounts<Int>&, const AttentionOptions<Int>&)>
struct PackedKernel<kernel> {
  static PackedBackwardTuple call(
      const at::Tensor& grad_output, const OptionalTensor& grad_lse, const at::Tensor& packed,
      const OptionalTensor& query, const OptionalTensor& weight, const OptionalTensor& attn_mask,
      const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
      const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
      const at::Tensor& output, const at::Tensor& lse, const at::Tensor& philox_state,
      Int num_heads, Int num_kv_heads, std::optional<double> scale,
      std::optional<double> negative_slope, double dropout_p, Int window_left, Int window_right,
      Int query_offset, bool attn_mask_grad, bool alibi_slopes_grad) {
    PackedGradients r = kernel(
        {grad_output, grad_lse, output, lse, philox_state, attn_mask_grad, alibi_slopes_grad},
        {packed, query, weight, attn_mask, key_lengths, key_starts, query_offsets, alibi_slopes},
        {std::move(num_heads), std::move(num_kv_heads)},
        {scale, negative_slope, dropout_p, std::move(window_left), std::move(window_right),
         std::move(query_offset)});
    return {std::move(r.packed), std::move(r.query), std::move(r.weight), std::move(r.attn_mask),
            std::move(r.alibi_slopes)};
  }
};

}  // namespace torch_selfattn::ops
