#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/sm80/device_limits.h"

// Additive attention as dot products of sines on tensor cores (mma.sync, sm_80 and newer), for
// float16 and bfloat16. docs/kernels.md derives the method and its range.
namespace torch_selfattn::kernels::cuda::sm80 {

// Why these kernels cannot run the problem, or null.
const char* additive_sines_not_supported(const AttentionProblem& problem,
                                         const DeviceLimits& device);

// Five launches or six, the last of which is the generic kernel, for the tiles that the method
// leaves to it. `workspace`: device memory of that many bytes, aligned to 16, used until they have
// run.
std::int64_t additive_sines_workspace_bytes(const AttentionProblem& problem,
                                            const DeviceLimits& device);
cudaError_t additive_sines_forward(const AttentionForward& call, const DeviceLimits& device,
                                   void* workspace, cudaStream_t stream);

// Backward of bfloat16, whichever forward left (out, lse). `bias_gradients`: those of mask or
// slopes are asked for.
const char* additive_sines_backward_not_supported(const AttentionProblem& problem,
                                                  bool bias_gradients, const DeviceLimits& device);

// Eleven launches; the generic kernel is among them, for the (batch, key head)s that the method
// leaves to it. `workspace` as above.
std::int64_t additive_sines_backward_workspace_bytes(const AttentionProblem& problem);
cudaError_t additive_sines_backward(const AttentionBackward& call, const DeviceLimits& device,
                                    void* workspace, cudaStream_t stream);

// Whether the features of a block's queries stay in its shared memory: it is large enough.
bool additive_sines_queries_stay(const AttentionProblem& problem, const DeviceLimits& device);

}  // namespace torch_selfattn::kernels::cuda::sm80
