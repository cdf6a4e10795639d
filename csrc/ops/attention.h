#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

// The inner layers of dense attention. weight is absent for the dot-product score.
//   query (B, H, Lq, E), key (B, Hk, Lk, E), value (B, Hk, Lk, Ev),
//   weight (B or 1, H or 1, E), the leading ones of which may be missing,
//   attn_mask (B or 1, H or 1, Lq or 1, Lk or 1), key_lengths, key_starts, query_offsets (B);
//   output (B, H, Lq, Ev), lse (B, H, Lq), philox_state (2) if dropout_p > 0, else (0).
// kernels/common/attention_problem.h says what they compute.
namespace torch_selfattn::ops {

using OptionalTensor = std::optional<at::Tensor>;

// Typed dispatcher calls of the operators with an underscore.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& weight, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
    const OptionalTensor& query_offsets, std::optional<double> scale, double dropout_p,
    c10::SymInt window_left, c10::SymInt window_right, c10::SymInt query_offset);

// grad_weight and grad_attn_mask have no elements where there is nothing to compute.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output, const OptionalTensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets, const at::Tensor& output,
    const at::Tensor& lse, const at::Tensor& philox_state, std::optional<double> scale,
    double dropout_p, c10::SymInt window_left, c10::SymInt window_right, c10::SymInt query_offset,
    bool attn_mask_grad);

// The factors 1/(1-p) or 0 that dropout multiplies the weights by, (B, H, Lq, Lk).
at::Tensor attention_dropout_factors(const at::Tensor& philox_state, c10::SymInt batch,
                                     c10::SymInt heads, c10::SymInt query_length,
                                     c10::SymInt key_length, double dropout_p,
                                     at::ScalarType dtype);

// The tensors of a canonical problem, as references into the arguments of an operator.
struct AttentionTensors {
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const OptionalTensor& weight;
  const OptionalTensor& attn_mask;
  const OptionalTensor& key_lengths;
  const OptionalTensor& key_starts;
  const OptionalTensor& query_offsets;

  const char* name() const {
    return weight.has_value() ? "additive_attention" : "dot_product_attention";
  }
};

// Its numbers. Int is int64_t in a backend and SymInt above it.
template <typename Int>
struct AttentionOptions {
  std::optional<double> scale;
  double dropout_p;
  Int window_left;
  Int window_right;
  Int query_offset;
};

inline AttentionOptions<c10::SymInt> symbolic(const AttentionOptions<int64_t>& o) {
  return {o.scale, o.dropout_p, o.window_left, o.window_right, o.query_offset};
}

}  // namespace torch_selfattn::ops
