#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/sm80/device_limits.h"

// Additive attention by the group method on tensor cores (mma.sync, sm_80 and newer), for
// float16 and bfloat16. docs/kernels.md derives the method and its range.
namespace torch_selfattn::kernels::cuda::sm80 {

// Why these kernels cannot run the problem, or null.
const char* additive_group_not_supported(const AttentionProblem& problem,
                                         const DeviceLimits& device);

// Four launches, the last of which is the generic kernel, for the tiles that the method leaves to
// it. `workspace`: device memory of that many bytes, aligned to 16, used until they have run.
std::int64_t additive_group_workspace_bytes(const AttentionProblem& problem);
cudaError_t additive_group_forward(const AttentionForward& call, void* workspace,
                                   cudaStream_t stream);

// Backward, whichever forward left (out, lse). Its reasons are its own; `bias_gradients`: those of
// mask or slopes are asked for.
const char* additive_group_backward_not_supported(const AttentionProblem& problem,
                                                  bool bias_gradients, const DeviceLimits& device);

// Nine launches; the generic kernel is among them, for the (batch, key head)s that the method
// leaves to it. `workspace` as above.
std::int64_t additive_group_backward_workspace_bytes(const AttentionProblem& problem);
cudaError_t additive_group_backward(const AttentionBackward& call, const DeviceLimits& device,
                                    void* workspace, cudaStream_t stream);

}  // namespace torch_selfattn::kernels::cuda::sm80
