#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/sm80/additive_exponential.h"
#include "kernels/cuda/sm80/additive_group.h"
#include "kernels/cuda/sm80/additive_sines.h"
#include "ops/cuda/attention_implementations.h"
#include "ops/implementation_choice.h"

namespace torch_selfattn::ops::cuda {

namespace {

using at::Tensor;

namespace sm80 = kernels::cuda::sm80;

sm80::DeviceLimits current_device() {
  const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();  // PyTorch keeps them
  return {device.major, static_cast<int64_t>(device.sharedMemPerBlockOptin)};
}

// `reason`, or where there is none why the implementation runs by name only.
const char* unless_by_name(const char* name, const char* reason, const char* why) {
  return reason == nullptr && !is_forced_implementation(name) ? why : reason;
}

const char* group_unless_by_name(const kernels::AttentionProblem& problem, const char* reason) {
  if (problem.dtype != kernels::DType::kFloat16) return reason;
  return unless_by_name(
      kAdditiveGroup, reason,
      "its products are bfloat16, coarser than float16 inputs: choose it by name");
}

constexpr const char* kSinesByName = "it was not timed on a GPU yet: choose it by name";

// Freed on return; the allocator gives it to no other stream before this one's work is done.
Tensor workspace_of(int64_t bytes, const AttentionTensors& tensors) {
  return at::empty({bytes}, tensors.query.options().dtype(at::kByte));
}

}  // namespace

const char* additive_group_not_supported(const ForwardRequest& request) {
  const kernels::AttentionProblem& problem = request.prepared.problem;
  return group_unless_by_name(problem,
                              sm80::additive_group_not_supported(problem, current_device()));
}

void additive_group_forward(const ForwardRequest& request, ForwardResults& results) {
  const Tensor workspace =
      workspace_of(sm80::additive_group_workspace_bytes(request.prepared.problem), request.tensors);
  C10_CUDA_CHECK(sm80::additive_group_forward(forward_arguments(request.prepared, results),
                                              workspace.mutable_data_ptr(),
                                              c10::cuda::getCurrentCUDAStream()));
}

const char* additive_group_backward_not_supported(const BackwardRequest& request) {
  const kernels::AttentionProblem& problem = request.prepared.problem;
  return group_unless_by_name(problem, sm80::additive_group_backward_not_supported(
                                           problem, request.bias_gradients, current_device()));
}

void additive_group_backward(const BackwardRequest& request, BackwardResults& results) {
  const Tensor workspace = workspace_of(
      sm80::additive_group_backward_workspace_bytes(request.prepared.problem), request.tensors);
  C10_CUDA_CHECK(sm80::additive_group_backward(
      backward_arguments(request.prepared, request.grad_output, request.grad_lse, request.output,
                         request.lse, results),
      current_device(), workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

const char* additive_sines_not_supported(const ForwardRequest& request) {
  return unless_by_name(
      kAdditiveSines,
      sm80::additive_sines_not_supported(request.prepared.problem, current_device()), kSinesByName);
}

void additive_sines_forward(const ForwardRequest& request, ForwardResults& results) {
  const sm80::DeviceLimits device = current_device();
  const Tensor workspace = workspace_of(
      sm80::additive_sines_workspace_bytes(request.prepared.problem, device), request.tensors);
  C10_CUDA_CHECK(sm80::additive_sines_forward(forward_arguments(request.prepared, results), device,
                                              workspace.mutable_data_ptr(),
                                              c10::cuda::getCurrentCUDAStream()));
}

const char* additive_sines_backward_not_supported(const BackwardRequest& request) {
  return unless_by_name(kAdditiveSines,
                        sm80::additive_sines_backward_not_supported(
                            request.prepared.problem, request.bias_gradients, current_device()),
                        kSinesByName);
}

void additive_sines_backward(const BackwardRequest& request, BackwardResults& results) {
  const Tensor workspace = workspace_of(
      sm80::additive_sines_backward_workspace_bytes(request.prepared.problem), request.tensors);
  C10_CUDA_CHECK(sm80::additive_sines_backward(
      backward_arguments(request.prepared, request.grad_output, request.grad_lse, request.output,
                         request.lse, results),
      current_device(), workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

const char* additive_exponential_not_supported(const ForwardRequest& request) {
  return sm80::additive_exponential_not_supported(request.prepared.problem, current_device());
}

void additive_exponential_forward(const ForwardRequest& request, ForwardResults& results) {
  const Tensor workspace = workspace_of(
      sm80::additive_exponential_workspace_bytes(request.prepared.problem), request.tensors);
  C10_CUDA_CHECK(sm80::additive_exponential_forward(forward_arguments(request.prepared, results),
                                                    workspace.mutable_data_ptr(),
                                                    c10::cuda::getCurrentCUDAStream()));
}

const char* additive_exponential_backward_not_supported(const BackwardRequest& request) {
  return sm80::additive_exponential_backward_not_supported(request.prepared.problem,
                                                           current_device());
}

void additive_exponential_backward(const BackwardRequest& request, BackwardResults& results) {
  const Tensor workspace =
      workspace_of(sm80::additive_exponential_backward_workspace_bytes(request.prepared.problem),
                   request.tensors);
  C10_CUDA_CHECK(sm80::additive_exponential_backward(
      backward_arguments(request.prepared, request.grad_output, request.grad_lse, request.output,
                         request.lse, results),
      workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace torch_selfattn::ops::cuda
