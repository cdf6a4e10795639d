#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>
#include <c10/util/MaybeOwned.h>

#include "ops/attention.h"

// From a user's shapes to those of the inner operators and back.
namespace torch_selfattn::ops {

// What needs no view is borrowed from the arguments of canonicalize().
struct CanonicalProblem {
  c10::MaybeOwned<at::Tensor> query;
  c10::MaybeOwned<at::Tensor> key;
  c10::MaybeOwned<at::Tensor> value;
  OptionalTensor weight;
  OptionalTensor attn_mask;
  OptionalTensor key_lengths;
  OptionalTensor key_starts;
  OptionalTensor query_offsets;
  OptionalTensor alibi_slopes;
  AttentionOptions<c10::SymInt> options;
  int64_t rank = 4;               // of the user's query, key and value, broadcast
  c10::SymDimVector batch_shape;  // the dimensions before the heads, if rank > 4

  AttentionTensors tensors() const {
    return {*query,      *key,       *value,        weight,      attn_mask,
            key_lengths, key_starts, query_offsets, alibi_slopes};
  }
  // A result (B, H, ...) in the user's shape (..., H, ...).
  at::Tensor restore(const at::Tensor& result) const;
};

// Checks the arguments, broadcasts and flattens the leading dimensions by views where strides allow
// (a copy only for five and more dimensions that cannot be merged), and folds is_causal into
// window_right = 0. The common case, four dimensions that need no broadcasting, makes no view.
CanonicalProblem canonicalize(const char* op, const AttentionTensors& tensors,
                              AttentionOptions<c10::SymInt> options, bool is_causal,
                              bool enable_gqa);

}  // namespace torch_selfattn::ops
