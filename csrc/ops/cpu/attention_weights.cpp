#include "kernels/cpu/attention.h"
#include "ops/attention_weights_kernel.h"
#include "ops/checks.h"
#include "ops/cpu/parallel.h"
#include "ops/implementation_choice.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;

constexpr const char* kName = "attention_weights";

void check_key_bounds(const AttentionTensors& tensors) {
  const int64_t key_length = tensors.key.size(2);
  check_key_bounds_on_cpu(kName, "key_lengths", tensors.key_lengths, key_length);
  check_key_bounds_on_cpu(kName, "key_starts", tensors.key_starts, key_length);
}

Tensor attention_weights_forward_cpu(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                     const AttentionOptions<int64_t>& options) {
  check_attention_weights(tensors, inputs.query_indices, symbolic(options));
  check_key_bounds(tensors);
  Tensor weights = empty_attention_weights(inputs, tensors);
  const WeightsCall call = prepare_attention_weights(inputs, tensors, options, weights);
  const auto& implementation = choose_from(kernels::cpu::attention_implementations(),
                                           call.arguments.problem, kName, "forward", "cpu");
  if (tensors.query.size(1) == 0) return weights.zero_();  // the mean of no heads
  implementation.weights(call.arguments, torch_parallel());
  return weights;
}

BackwardResults attention_weights_backward_cpu(const WeightsBackwardInputs& inputs,
                                               const AttentionTensors& tensors,
                                               const AttentionOptions<int64_t>& options) {
  const AttentionOptions<c10::SymInt> numbers = symbolic(options);
  check_attention_weights_backward(inputs.grad, tensors, inputs.query_indices, numbers,
                                   inputs.average_heads);
  check_key_bounds(tensors);
  return attention_weights_gradients(inputs, tensors, numbers);
}

}  // namespace

TORCH_SELFATTN_IMPL(CPU, m) {
  m.impl("_attention_weights_forward",
         TORCH_FN(WeightsKernel<attention_weights_forward_cpu>::call));
  m.impl("_attention_weights_backward",
         TORCH_FN(WeightsKernel<attention_weights_backward_cpu>::call));
}

}  // namespace torch_selfattn::ops
