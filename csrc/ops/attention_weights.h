#pragma once

#include "kernels/common/attention_weights.h"
#include "ops/attention.h"
#include "ops/problem.h"

// The inner layers of attention_weights, beside those of attention.h. A problem's value is its key.
//   query_indices (B or 1, Lq): what query i counts as in windows and ALiBi, where the queries are
//   some rows of a longer sequence -> weights (B, H, Lq, Lk), or, with average_heads, their mean
//   over the heads (B, 1, Lq, Lk).
namespace torch_selfattn::ops {

// What they take beside the problem, as references.
struct WeightsInputs {
  const OptionalTensor& query_indices;
  bool average_heads;
};
struct WeightsBackwardInputs {
  const at::Tensor& grad;
  const OptionalTensor& query_indices;
  bool average_heads;
  bool attn_mask_grad;
  bool alibi_slopes_grad;
};

// Typed dispatcher calls of the operators with an underscore. A kernel has the same arguments;
// ops/attention_weights_kernel.h registers it. Of the gradients there is none of a value.
at::Tensor attention_weights_forward(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                     const AttentionOptions<c10::SymInt>& options);
BackwardResults attention_weights_backward(const WeightsBackwardInputs& inputs,
                                           const AttentionTensors& tensors,
                                           const AttentionOptions<c10::SymInt>& options);

// The results, not filled.
at::Tensor empty_attention_weights(const WeightsInputs& inputs, const AttentionTensors& tensors);
BackwardResults empty_weights_gradients(const WeightsBackwardInputs& inputs,
                                        const AttentionTensors& tensors);

// What the kernels read and write. `prepared` and `indices` are to be kept until they have run.
struct WeightsCall {
  kernels::AttentionWeights arguments;
  PreparedProblem prepared;
  at::Tensor indices;
};
WeightsCall prepare_attention_weights(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                      const AttentionOptions<int64_t>& options,
                                      const at::Tensor& weights);

// The backward operator of every device: tensor operations on some rows at a time, so that memory
// is that of the gradients and of a chunk of rows. In float32 at least; rounded at the end.
BackwardResults attention_weights_gradients(const WeightsBackwardInputs& inputs,
                                            const AttentionTensors& tensors,
                                            const AttentionOptions<c10::SymInt>& options);

}  // namespace torch_selfattn::ops
