#include "kernels/cuda/sm80/additive_group.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/cuda/attention_implementations.h"
#include "ops/implementation_choice.h"

namespace torch_selfattn::ops::cuda {

namespace {

using at::Tensor;

kernels::cuda::sm80::DeviceLimits current_device() {
  const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();  // PyTorch keeps them
  return {device.major, static_cast<int64_t>(device.sharedMemPerBlockOptin)};
}

// Freed on return; the allocator gives it to no other stream before this one's work is done.
Tensor workspace_of(const AttentionTensors& tensors, int64_t bytes) {
  return at::empty({bytes}, tensors.query.options().dtype(at::kByte));
}

const char* not_supported(const kernels::AttentionProblem& problem) {
  const char* reason = kernels::cuda::sm80::additive_group_not_supported(problem, current_device());
  if (reason == nullptr && problem.dtype == kernels::DType::kFloat16 &&
      !is_forced_implementation(kAdditiveGroup)) {
    reason = "its products are bfloat16, coarser than float16 inputs: choose it by name";
  }
  return reason;
}

}  // namespace

const char* additive_group_not_supported(const ForwardRequest& request) {
  return not_supported(request.prepared.problem);
}

void additive_group_forward(const ForwardRequest& request, ForwardResults& results) {
  const Tensor workspace =
      workspace_of(request.tensors,
                   kernels::cuda::sm80::additive_group_workspace_bytes(request.prepared.problem));
  C10_CUDA_CHECK(kernels::cuda::sm80::additive_group_forward(
      forward_arguments(request.prepared, results), workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
}

const char* additive_group_backward_not_supported(const BackwardRequest& request) {
  return not_supported(request.prepared.problem);
}

void additive_group_backward(const BackwardRequest& request, BackwardResults& results) {
  const kernels::AttentionBackward call =
      backward_arguments(request.prepared, request.grad_output, request.grad_lse, request.output,
                         request.lse, results);
  const auto device = current_device();
  // It has no gradients of masks and slopes, nor heads as wide as the forward's.
  if (kernels::cuda::sm80::additive_group_backward_not_supported(call, device) != nullptr) {
    return generic_backward(request, results);
  }
  const Tensor workspace = workspace_of(
      request.tensors,
      kernels::cuda::sm80::additive_group_backward_workspace_bytes(request.prepared.problem));
  C10_CUDA_CHECK(kernels::cuda::sm80::additive_group_backward(
      call, device, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace torch_selfattn::ops::cuda
