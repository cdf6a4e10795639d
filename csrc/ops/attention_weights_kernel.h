#pragma once

#include <utility>

#include "ops/attention_weights.h"

// As ops/attention_kernel.h, for _attention_weights_forward and _attention_weights_backward.
namespace torch_selfattn::ops {

using WeightsBackwardTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Functions with the arguments of the schemas.
template <typename Int>
using WeightsFunction = at::Tensor(const at::Tensor& query, const at::Tensor& key,
                                   const OptionalTensor& weight, const OptionalTensor& attn_mask,
                                   const OptionalTensor& key_lengths,
                                   const OptionalTensor& key_starts,
                                   const OptionalTensor& query_offsets,
                                   const OptionalTensor& alibi_slopes,
                                   const OptionalTensor& query_indices, std::optional<double> scale,
                                   std::optional<double> negative_slope, Int window_left,
                                   Int window_right, Int query_offset, bool average_heads);
template <typename Int>
using WeightsBackwardFunction = WeightsBackwardTuple(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const OptionalTensor& weight, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
    const OptionalTensor& query_indices, std::optional<double> scale,
    std::optional<double> negative_slope, Int window_left, Int window_right, Int query_offset,
    bool average_heads, bool attn_mask_grad, bool alibi_slopes_grad);

template <auto kernel>
struct WeightsKernel;

// Int = int64_t or SymInt: what the kernel takes.
template <typename Int, at::Tensor (*kernel)(const WeightsInputs&, const AttentionTensors&,
                                             const AttentionOptions<Int>&)>
struct WeightsKernel<kernel> {
  static at::Tensor call(const at::Tensor& query, const at::Tensor& key,
                         const OptionalTensor& weight, const OptionalTensor& attn_mask,
                         const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                         const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                         const OptionalTensor& query_indices, std::optional<double> scale,
                         std::optional<double> negative_slope, Int window_left, Int window_right,
                         Int query_offset, bool average_heads) {
    return kernel(
        {query_indices, average_heads},
        {query, key, key, weight, attn_mask, key_lengths, key_starts, query_offsets, alibi_slopes},
        {scale, negative_slope, 0.0, std::move(window_left), std::move(window_right),
         std::move(query_offset)});
  }
};

template <typename Int,
          BackwardResults (*kernel)(const WeightsBackwardInputs&, const AttentionTensors&,
                                    const AttentionOptions<Int>&)>
struct WeightsKernel<kernel> {
  static WeightsBackwardTuple call(
      const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
      const OptionalTensor& weight, const OptionalTensor& attn_mask,
      const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
      const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
      const OptionalTensor& query_indices, std::optional<double> scale,
      std::optional<double> negative_slope, Int window_left, Int window_right, Int query_offset,
      bool average_heads, bool attn_mask_grad, bool alibi_slopes_grad) {
    BackwardResults r = kernel(
        {grad, query_indices, average_heads, attn_mask_grad, alibi_slopes_grad},
        {query, key, key, weight, attn_mask, key_lengths, key_starts, query_offsets, alibi_slopes},
        {scale, negative_slope, 0.0, std::move(window_left), std::move(window_right),
         std::move(query_offset)});
    return {std::move(r.grad_query), std::move(r.grad_key), std::move(r.grad_weight),
            std::move(r.grad_attn_mask), std::move(r.grad_alibi_slopes)};
  }
};

}  // namespace torch_selfattn::ops
