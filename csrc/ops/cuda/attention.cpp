#include "kernels/cuda/attention.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/attention_kernel.h"
#include "ops/checks.h"
#include "ops/cuda/attention_implementations.h"
#include "ops/explain.h"
#include "ops/implementation_choice.h"
#include "ops/packed_attention.h"
#include "ops/registration.h"

// Host code only: compiled by the C++ compiler, the kernels are in kernels/cuda. Nothing here waits
// for the GPU, so key_lengths and key_starts are not looked at; the kernels clamp them.
namespace torch_selfattn::ops::cuda {

namespace {

using at::Tensor;

const char* generic_not_supported(const ForwardRequest& request) {
  return kernels::cuda::attention_not_supported(request.prepared.problem);
}

void generic_forward(const ForwardRequest& request, ForwardResults& results) {
  C10_CUDA_CHECK(kernels::cuda::attention_forward(forward_arguments(request.prepared, results),
                                                  c10::cuda::getCurrentCUDAStream()));
}

const char* generic_backward_not_supported(const BackwardRequest& request) {
  return kernels::cuda::attention_not_supported(request.prepared.problem);
}

void generic_backward(const BackwardRequest& request, BackwardResults& results) {
  // Freed on return; the allocator gives it to no other stream before this one's work is done.
  const Tensor workspace =
      at::empty({kernels::cuda::attention_backward_workspace_bytes(request.prepared.problem)},
                request.tensors.query.options().dtype(at::kByte));
  C10_CUDA_CHECK(kernels::cuda::attention_backward(
      backward_arguments(request.prepared, request.grad_output, request.grad_lse, request.output,
                         request.lse, results),
      workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

const ForwardImplementation forward_implementations[] = {
    {"cudnn", cudnn_not_supported, cudnn_forward},
    {"flash", flash_not_supported, flash_forward},
    {"efficient", efficient_not_supported, efficient_forward},
    {kAdditiveSines, additive_sines_not_supported, additive_sines_forward},
    {kAdditiveGroup, additive_group_not_supported, additive_group_forward},
    {kAdditiveExponential, additive_exponential_not_supported, additive_exponential_forward},
    {"generic", generic_not_supported, generic_forward},
};

const BackwardImplementation backward_implementations[] = {
    {"cudnn", cudnn_backward_not_supported, cudnn_backward},
    {"flash", flash_backward_not_supported, flash_backward},
    {"efficient", efficient_backward_not_supported, efficient_backward},
    {kAdditiveSines, additive_sines_backward_not_supported, additive_sines_backward},
    {kAdditiveGroup, additive_group_backward_not_supported, additive_group_backward},
    {kAdditiveExponential, additive_exponential_backward_not_supported,
     additive_exponential_backward},
    {"generic", generic_backward_not_supported, generic_backward},
};

ForwardResults attention_forward_cuda(const AttentionTensors& tensors,
                                      const AttentionOptions<int64_t>& options) {
  check_attention_forward(tensors, symbolic(options));
  const c10::cuda::CUDAGuard device(tensors.query.device());
  const PreparedProblem prepared = prepare_problem(tensors, options);
  ForwardResults results = empty_forward_results(tensors, options.dropout_p);
  // PyTorch's CUDA generator fills it on the device: follows torch.manual_seed, and CUDA graphs
  // draw new numbers at each replay.
  if (options.dropout_p > 0) results.philox_state.random_();
  const ForwardRequest request{tensors, options, prepared};
  choose_from(forward_implementations, request, tensors.name(), "forward", "cuda")
      .run(request, results);
  return results;
}

// Fills the results, or puts others of the same strides in their place, of arguments that
// check_attention_backward has accepted.
void run_backward(const BackwardInputs& inputs, const AttentionTensors& tensors,
                  const AttentionOptions<int64_t>& options, BackwardResults& results) {
  PreparedProblem prepared = prepare_problem(tensors, options);
  const Tensor state = inputs.philox_state.contiguous();
  if (options.dropout_p > 0) prepared.problem.philox_state = state.const_data_ptr<int64_t>();
  const Tensor lse = inputs.lse.contiguous();
  const Tensor grad_lse =
      inputs.grad_lse.has_value() ? inputs.grad_lse->to(lse.scalar_type()).contiguous() : Tensor();
  const bool bias_gradients = inputs.attn_mask_grad || inputs.alibi_slopes_grad;
  const BackwardRequest request{tensors,  options,       prepared, inputs.grad_output,
                                grad_lse, inputs.output, lse,      bias_gradients};
  choose_from(backward_implementations, request, tensors.name(), "backward", "cuda")
      .run(request, results);
}

BackwardResults attention_backward_cuda(const BackwardInputs& inputs,
                                        const AttentionTensors& tensors,
                                        const AttentionOptions<int64_t>& options) {
  check_attention_backward(inputs, tensors, symbolic(options));
  const c10::cuda::CUDAGuard device(tensors.query.device());
  BackwardResults results = empty_backward_results(inputs, tensors);
  run_backward(inputs, tensors, options, results);
  return results;
}

PackedGradients packed_attention_backward_cuda(const BackwardInputs& inputs,
                                               const PackedTensors& tensors,
                                               const HeadCounts<int64_t>& heads,
                                               const AttentionOptions<int64_t>& options) {
  const c10::cuda::CUDAGuard device(tensors.packed.device());
  PackedBackward p =
      prepare_packed_backward(inputs, tensors, {heads.query, heads.key}, symbolic(options));
  BackwardResults results = p.results;
  run_backward({p.grad_output, inputs.grad_lse, p.output, inputs.lse, inputs.philox_state,
                inputs.attn_mask_grad, inputs.alibi_slopes_grad},
               p.heads.with(tensors), options, results);
  const auto put = [](const Tensor& to, const Tensor& computed) {
    if (!computed.is_same(to)) to.copy_(computed);
  };
  put(p.results.grad_query, results.grad_query);
  put(p.results.grad_key, results.grad_key);
  put(p.results.grad_value, results.grad_value);
  return std::move(p.grads);
}

Tensor attention_dropout_factors_cuda(const Tensor& philox_state, int64_t batch, int64_t heads,
                                      int64_t query_length, int64_t key_length, double dropout_p,
                                      at::ScalarType dtype) {
  check_dropout_factors(philox_state, dropout_p);
  const c10::cuda::CUDAGuard device(philox_state.device());
  const Tensor factors = at::empty({batch, heads, query_length, key_length},
                                   philox_state.options().dtype(at::kDouble));
  const Tensor contiguous_state = philox_state.contiguous();
  C10_CUDA_CHECK(kernels::cuda::attention_dropout_factors(
      contiguous_state.const_data_ptr<int64_t>(), dropout_p, batch * heads * query_length,
      key_length, factors.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  return factors.to(dtype);
}

std::vector<Candidate> attention_candidates_cuda(const AttentionTensors& tensors,
                                                 const AttentionOptions<int64_t>& options) {
  const c10::cuda::CUDAGuard device(tensors.query.device());
  const PreparedProblem prepared = prepare_problem(tensors, options);
  return list_candidates(forward_implementations, ForwardRequest{tensors, options, prepared});
}

const bool registered = register_candidates(at::kCUDA, &attention_candidates_cuda);

}  // namespace

TORCH_SELFATTN_IMPL(CUDA, m) {
  m.impl("_attention_forward", TORCH_FN(AttentionKernel<attention_forward_cuda>::call));
  m.impl("_attention_backward", TORCH_FN(AttentionKernel<attention_backward_cuda>::call));
  m.impl("_packed_attention_backward",
         TORCH_FN(PackedKernel<packed_attention_backward_cuda>::call));
  m.impl("_attention_dropout_factors", TORCH_FN(attention_dropout_factors_cuda));
}

}  // namespace torch_selfattn::ops::cuda
