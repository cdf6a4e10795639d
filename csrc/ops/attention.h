#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

// The inner layers of dense attention. weight is absent for the dot-product score.
//   query (B, H, Lq, E), key (B, Hk, Lk, E), value (B, Hk, Lk, Ev),
//   weight (B or 1, H or 1, E), the leading ones of which may be missing,
//   attn_mask (B or 1, H or 1, Lq or 1, Lk or 1), key_lengths, key_starts, query_offsets (B),
//   alibi_slopes (B or 1, H or 1);
//   output (B, H, Lq, Ev), lse (B, H, Lq), philox_state (2) if dropout_p > 0, else (0).
// kernels/common/attention_problem.h says what they compute.
namespace torch_selfattn::ops {

using OptionalTensor = std::optional<at::Tensor>;

// The tensors of a problem, as references into the arguments of an operator.
struct AttentionTensors {
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const OptionalTensor& weight;
  const OptionalTensor& attn_mask;
  const OptionalTensor& key_lengths;
  const OptionalTensor& key_starts;
  const OptionalTensor& query_offsets;
  const OptionalTensor& alibi_slopes;

  const char* name() const {
    return weight.has_value() ? "additive_attention" : "dot_product_attention";
  }
};

// Its numbers. Int is int64_t in a backend and SymInt above it.
template <typename Int>
struct AttentionOptions {
  std::optional<double> scale;
  std::optional<double> negative_slope;  // of leaky ReLU in the additive score; none: tanh
  double dropout_p;
  Int window_left;
  Int window_right;
  Int query_offset;
};

inline AttentionOptions<c10::SymInt> symbolic(const AttentionOptions<int64_t>& o) {
  return {o.scale, o.negative_slope, o.dropout_p, o.window_left, o.window_right, o.query_offset};
}

struct ForwardResults {
  at::Tensor output;
  at::Tensor lse;
  at::Tensor philox_state;
};

// What backward takes beside the problem, as references: what forward left, and which gradients of
// optional arguments are wanted (weight, if there is one, always has one).
struct BackwardInputs {
  const at::Tensor& grad_output;
  const OptionalTensor& grad_lse;
  const at::Tensor& output;
  const at::Tensor& lse;
  const at::Tensor& philox_state;
  bool attn_mask_grad;
  bool alibi_slopes_grad;
};

// A gradient without anything to compute has no elements.
struct BackwardResults {
  at::Tensor grad_query;
  at::Tensor grad_key;
  at::Tensor grad_value;
  at::Tensor grad_weight;
  at::Tensor grad_attn_mask;
  at::Tensor grad_alibi_slopes;
};

// Typed dispatcher calls of the operators with an underscore. A kernel of the first two has the
// same arguments; ops/attention_kernel.h registers it.
ForwardResults attention_forward(const AttentionTensors& tensors,
                                 const AttentionOptions<c10::SymInt>& options);
BackwardResults attention_backward(const BackwardInputs& inputs, const AttentionTensors& tensors,
                                   const AttentionOptions<c10::SymInt>& options);

// The factors 1/(1-p) or 0 that dropout multiplies the weights by, (B, H, Lq, Lk).
at::Tensor attention_dropout_factors(const at::Tensor& philox_state, c10::SymInt batch,
                                     c10::SymInt heads, c10::SymInt query_length,
                                     c10::SymInt key_length, double dropout_p,
                                     at::ScalarType dtype);

}  // namespace torch_selfattn::ops
