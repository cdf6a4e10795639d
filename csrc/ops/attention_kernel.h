#pragma once

#include <utility>

#include "ops/attention.h"

// The dispatcher passes the arguments of _attention_forward and _attention_backward one by one, in
// the order of their schemas; kernels take them in the structs of ops/attention.h. This adapter is
// the one place that knows both:
//   m.impl("_attention_forward", TORCH_FN(AttentionKernel<attention_forward_cpu>::call));
namespace torch_selfattn::ops {

using ForwardTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using BackwardTuple =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Functions with the arguments of the schemas.
template <typename Int>
using ForwardFunction =
    ForwardTuple(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                 const OptionalTensor& weight, const OptionalTensor& attn_mask,
                 const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                 const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                 std::optional<double> scale, std::optional<double> negative_slope,
                 double dropout_p, Int window_left, Int window_right, Int query_offset);
template <typename Int>
using BackwardFunction = BackwardTuple(
    const at::Tensor& grad_output, const OptionalTensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets,
    const OptionalTensor& alibi_slopes, const at::Tensor& output, const at::Tensor& lse,
    const at::Tensor& philox_state, std::optional<double> scale,
    std::optional<double> negative_slope, double dropout_p, Int window_left, Int window_right,
    Int query_offset, bool attn_mask_grad, bool alibi_slopes_grad);

template <auto kernel>
struct AttentionKernel;

// Int = int64_t or SymInt: what the kernel takes.
template <typename Int,
          ForwardResults (*kernel)(const AttentionTensors&, const AttentionOptions<Int>&)>
struct AttentionKernel<kernel> {
  static ForwardTuple call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& weight, const OptionalTensor& attn_mask,
                           const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                           const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                           std::optional<double> scale, std::optional<double> negative_slope,
                           double dropout_p, Int window_left, Int window_right, Int query_offset) {
    ForwardResults r = kernel({query, key, value, weight, attn_mask, key_lengths, key_starts,
                               query_offsets, alibi_slopes},
                              {scale, negative_slope, dropout_p, std::move(window_left),
                               std::move(window_right), std::move(query_offset)});
    return {std::move(r.output), std::move(r.lse), std::move(r.philox_state)};
  }
};

template <typename Int, BackwardResults (*kernel)(const BackwardInputs&, const AttentionTensors&,
                                                  const AttentionOptions<Int>&)>
struct AttentionKernel<kernel> {
  static BackwardTuple call(const at::Tensor& grad_output, const OptionalTensor& grad_lse,
                            const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const OptionalTensor& weight, const OptionalTensor& attn_mask,
                            const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                            const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                            const at::Tensor& output, const at::Tensor& lse,
                            const at::Tensor& philox_state, std::optional<double> scale,
                            std::optional<double> negative_slope, double dropout_p, Int window_left,
                            Int window_right, Int query_offset, bool attn_mask_grad,
                            bool alibi_slopes_grad) {
    BackwardResults r = kernel(
        {grad_output, grad_lse, output, lse, philox_state, attn_mask_grad, alibi_slopes_grad},
        {query, key, value, weight, attn_mask, key_lengths, key_starts, query_offsets,
         alibi_slopes},
        {scale, negative_slope, dropout_p, std::move(window_left), std::move(window_right),
         std::move(query_offset)});
    return {std::move(r.grad_query),  std::move(r.grad_key),       std::move(r.grad_value),
            std::move(r.grad_weight), std::move(r.grad_attn_mask), std::move(r.grad_alibi_slopes)};
  }
};

}  // namespace torch_selfattn::ops
