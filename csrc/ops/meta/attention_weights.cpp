#include "ops/attention_weights_kernel.h"
#include "ops/checks.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

Tensor attention_weights_forward_meta(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                      const AttentionOptions<SymInt>& options) {
  check_attention_weights(tensors, inputs.query_indices, options);
  return empty_attention_weights(inputs, tensors);
}

BackwardResults attention_weights_backward_meta(const WeightsBackwardInputs& inputs,
                                                const AttentionTensors& tensors,
                                                const AttentionOptions<SymInt>& options) {
  check_attention_weights_backward(inputs.grad, tensors, inputs.query_indices, options,
                                   inputs.average_heads);
  return empty_weights_gradients(inputs, tensors);
}

}  // namespace

TORCH_SELFATTN_IMPL(Meta, m) {
  m.impl("_attention_weights_forward",
         TORCH_FN(WeightsKernel<attention_weights_forward_meta>::call));
  m.impl("_attention_weights_backward",
         TORCH_FN(WeightsKernel<attention_weights_backward_meta>::call));
}

}  // namespace torch_selfattn::ops
