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

const char* not_supported(const kernels::AttentionProblem& problem) {
  const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();  // PyTorch keeps them
  const char* reason = kernels::cuda::sm80::additive_group_not_supported(
      problem, {device.major, static_cast<int64_t>(device.sharedMemPerBlockOptin)});
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
  // Freed on return; the allocator gives it to no other stream before this one's work is done.
  const Tensor workspace =
      at::empty({kernels::cuda::sm80::additive_group_workspace_bytes(request.prepared.problem)},
                request.tensors.query.options().dtype(at::kByte));
  C10_CUDA_CHECK(kernels::cuda::sm80::additive_group_forward(
      forward_arguments(request.prepared, results), workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
}

const char* additive_group_backward_not_supported(const BackwardRequest& request) {
  return not_supported(request.prepared.problem);
}

}  // namespace torch_selfattn::ops::cuda
