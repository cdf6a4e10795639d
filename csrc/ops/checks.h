#pragma once

#include <string_view>

#include "ops/attention.h"

// Argument rules of the attention operators, on symbolic sizes only: the public layer calls them
// with the user's shapes, and every backend (Meta too) with the canonical ones, since Python can
// reach the inner operators directly. Messages: `op: rule (got ...)`. RuntimeError for shapes,
// dtypes and devices that don't fit together, with the sentence of PyTorch's own attention where it
// has one; ValueError for a number out of range; NotImplementedError for what is not supported.
namespace torch_selfattn::ops {

// Rules for tensors of any rank: devices, dtypes, the last two dimensions, and the numbers.
// will_be_cast: dtypes may differ, since autocast is about to bring them to one.
void check_attention_arguments(const char* op, const AttentionTensors& tensors,
                               const AttentionOptions<c10::SymInt>& options, bool will_be_cast);

// What `activation` and `negative_slope` of the public operators are in AttentionOptions.
std::optional<double> check_activation(const char* op, bool additive, std::string_view activation,
                                       double negative_slope);

// The same and the canonical shapes of ops/attention.h.
void check_attention_forward(const AttentionTensors& tensors,
                             const AttentionOptions<c10::SymInt>& options);
void check_attention_forward(const char* op, const AttentionTensors& tensors,
                             const AttentionOptions<c10::SymInt>& options);
void check_attention_backward(const BackwardInputs& inputs, const AttentionTensors& tensors,
                              const AttentionOptions<c10::SymInt>& options);

// Those of attention_weights: its value is its key.
void check_attention_weights(const AttentionTensors& tensors, const OptionalTensor& query_indices,
                             const AttentionOptions<c10::SymInt>& options);
void check_attention_weights_backward(const at::Tensor& grad, const AttentionTensors& tensors,
                                      const OptionalTensor& query_indices,
                                      const AttentionOptions<c10::SymInt>& options,
                                      bool average_heads);

void check_dropout_factors(const at::Tensor& philox_state, double dropout_p);

// For backends that have the numbers at hand: ValueError unless 0 <= every element <= key_length.
void check_key_bounds_on_cpu(const char* op, const char* name, const OptionalTensor& bounds,
                             int64_t key_length);

}  // namespace torch_selfattn::ops
