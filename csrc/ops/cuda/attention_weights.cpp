#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/attention.h"
#include "ops/attention_weights_kernel.h"
#include "ops/checks.h"
#include "ops/cuda/attention_implementations.h"
#include "ops/implementation_choice.h"
#include "ops/registration.h"

// Host code only, as attention.cpp beside it.
namespace torch_selfattn::ops::cuda {

namespace {

using at::Tensor;
using kernels::AttentionWeights;

void generic_weights(const AttentionWeights& call, const Tensor& like) {
  // Freed on return; the allocator gives it to no other stream before this one's work is done.
  const Tensor workspace =
      at::empty({kernels::cuda::attention_weights_workspace_bytes(call.problem)},
                like.options().dtype(at::kByte));
  C10_CUDA_CHECK(kernels::cuda::attention_weights(call, workspace.mutable_data_ptr(),
                                                  c10::cuda::getCurrentCUDAStream()));
}

const char* gives_no_weights(const AttentionWeights& /*call*/) {
  return "it does not give the attention weights";
}

// The names of the forward operator's list, so that forcing one of them has its reason here.
struct WeightsImplementation {
  const char* name;
  const char* (*not_supported)(const AttentionWeights&);
  void (*run)(const AttentionWeights&, const Tensor&);
};
const WeightsImplementation implementations[] = {
    {"cudnn", gives_no_weights, nullptr},
    {"flash", gives_no_weights, nullptr},
    {"efficient", gives_no_weights, nullptr},
    {kAdditiveSines, gives_no_weights, nullptr},
    {kAdditiveGroup, gives_no_weights, nullptr},
    {kAdditiveExponential, gives_no_weights, nullptr},
    {"generic", kernels::cuda::attention_weights_not_supported, generic_weights},
};

Tensor attention_weights_forward_cuda(const WeightsInputs& inputs, const AttentionTensors& tensors,
                                      const AttentionOptions<int64_t>& options) {
  check_attention_weights(tensors, inputs.query_indices, symbolic(options));
  const c10::cuda::CUDAGuard device(tensors.query.device());
  Tensor weights = empty_attention_weights(inputs, tensors);
  const WeightsCall call = prepare_attention_weights(inputs, tensors, options, weights);
  const auto& implementation =
      choose_from(implementations, call.arguments, "attention_weights", "forward", "cuda");
  if (tensors.query.size(1) == 0) return weights.zero_();  // the mean of no heads
  implementation.run(call.arguments, tensors.query);
  return weights;
}

BackwardResults attention_weights_backward_cuda(const WeightsBackwardInputs& inputs,
                                                const AttentionTensors& tensors,
                                                const AttentionOptions<int64_t>& options) {
  const AttentionOptions<c10::SymInt> numbers = symbolic(options);
  check_attention_weights_backward(inputs.grad, tensors, inputs.query_indices, numbers,
                                   inputs.average_heads);
  const c10::cuda::CUDAGuard device(tensors.query.device());
  return attention_weights_gradients(inputs, tensors, numbers);
}

}  // namespace

TORCH_SELFATTN_IMPL(CUDA, m) {
  m.impl("_attention_weights_forward",
         TORCH_FN(WeightsKernel<attention_weights_forward_cuda>::call));
  m.impl("_attention_weights_backward",
         TORCH_FN(WeightsKernel<attention_weights_backward_cuda>::call));
}

}  // namespace torch_selfattn::ops::cuda
