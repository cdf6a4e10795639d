#pragma once

#include "ops/attention.h"
#include "ops/attention_weights.h"

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

// The weights of ops/attention_weights.h and their gradients, of which that of a value is
// undefined.
at::Tensor composed_attention_weights(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                      const AttentionOptions<c10::SymInt>& options);
BackwardResults composed_attention_weights_backward(const WeightsBackwardInputs& inputs,
                                                    const AttentionTensors& tensors,
                                                    const AttentionOptions<c10::SymInt>& options);

}  // namespace torch_selfattn::ops
