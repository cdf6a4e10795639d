#pragma once

#include "ops/attention.h"

// Attention composed of differentiable ATen operators, O(Lq Lk) memory (times E for the additive
// score): what double backward, torch.func transforms and forward-mode AD differentiate. It follows
// the rules of kernels/common/attention_problem.h: a row without keys gives 0 with zero
// derivatives, and no derivative is NaN because of one.
namespace torch_selfattn::ops {

// philox_state: of the forward operator, or empty without dropout.
ForwardResults composed_attention(const AttentionTensors& tensors, const at::Tensor& philox_state,
                                  const AttentionOptions<c10::SymInt>& options);

// Reads neither output nor lse. Gradients that are not wanted are undefined.
BackwardResults composed_attention_backward(const BackwardInputs& inputs,
                                            const AttentionTensors& tensors,
                                            const AttentionOptions<c10::SymInt>& options);

// The pairs (i, j) that may attend before the mask tensor is looked at, as a boolean tensor
// broadcastable to (B, H, Lq, Lk); undefined if all may. rows: the query indices, (R), or undefined
// for all Lq.
at::Tensor allowed_pairs(const AttentionTensors& tensors,
                         const AttentionOptions<c10::SymInt>& options, const at::Tensor& rows);

// |i + offset - j|, the distances that ALiBi slopes are multiplied by, of the same rows and
// broadcast in the same way.
at::Tensor key_distances(const AttentionTensors& tensors,
                         const AttentionOptions<c10::SymInt>& options, const at::Tensor& rows,
                         at::ScalarType dtype);

// log-softmax statistics of scores (B, H, R, Lk) with the rules above.
struct Softmax {
  at::Tensor weights;
  at::Tensor lse;
};
Softmax masked_softmax(const at::Tensor& scores, const at::Tensor& allowed);

// (B, Hk, L, D) as (B, H, L, D): each head repeated for the query heads that read it.
at::Tensor repeat_heads(const at::Tensor& t, const c10::SymInt& heads);

}  // namespace torch_selfattn::ops
