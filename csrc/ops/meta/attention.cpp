#include "ops/attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/problem.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

std::tuple<Tensor, Tensor, Tensor> attention_forward_meta(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets,
    std::optional<double> scale, double dropout_p, SymInt window_left, SymInt window_right,
    SymInt query_offset) {
  const AttentionTensors tensors{query,     key,         value,      weight,
                                 attn_mask, key_lengths, key_starts, query_offsets};
  check_attention_forward(tensors, {scale, dropout_p, std::move(window_left),
                                    std::move(window_right), std::move(query_offset)});
  ForwardResults results = empty_forward_results(tensors, dropout_p);
  return {std::move(results.output), std::move(results.lse), std::move(results.philox_state)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_meta(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets, const Tensor& output,
    const Tensor& lse, const Tensor& philox_state, std::optional<double> scale, double dropout_p,
    SymInt window_left, SymInt window_right, SymInt query_offset, bool attn_mask_grad) {
  const AttentionTensors tensors{query,     key,         value,      weight,
                                 attn_mask, key_lengths, key_starts, query_offsets};
  check_attention_backward(
      grad_output, grad_lse, tensors, output, lse, philox_state,
      {scale, dropout_p, std::move(window_left), std::move(window_right), std::move(query_offset)});
  BackwardResults results = empty_backward_results(tensors, attn_mask_grad);
  return {std::move(results.grad_query), std::move(results.grad_key), std::move(results.grad_value),
          std::move(results.grad_weight), std::move(results.grad_attn_mask)};
}

Tensor attention_dropout_factors_meta(const Tensor& philox_state, SymInt batch, SymInt heads,
                                      SymInt query_length, SymInt key_length, double dropout_p,
                                      at::ScalarType dtype) {
  check_dropout_factors(philox_state, dropout_p);
  return at::empty_symint(
      {std::move(batch), std::move(heads), std::move(query_length), std::move(key_length)},
      philox_state.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_selfattn, Meta, m) {
  m.impl("_attention_forward", TORCH_FN(attention_forward_meta));
  m.impl("_attention_backward", TORCH_FN(attention_backward_meta));
  m.impl("_attention_dropout_factors", TORCH_FN(attention_dropout_factors_meta));
}

}  // namespace torch_selfattn::ops
