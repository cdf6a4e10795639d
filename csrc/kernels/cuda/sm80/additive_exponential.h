#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/sm80/device_limits.h"

// Additive attention in float32, whatever the inputs, by the exponential form on CUDA cores; only
// products with the values and with the gradient of the output are of tensor cores, each as three
// of TF32, or fewer for inputs of 16 bits. For float32, float16 and bfloat16 inputs with up to 128
// features and values, on GPUs with 103 KiB of shared memory for a block, 183 above 64 of them.
namespace torch_selfattn::kernels::cuda::sm80 {

// Why these kernels cannot run the problem, or null.
const char* additive_exponential_not_supported(const AttentionProblem& problem,
                                               const DeviceLimits& device);

// Three launches; the last is the generic kernel, for the tiles that are beyond the range.
// `workspace`: device memory of that many bytes, aligned to 16, used until they have run.
std::int64_t additive_exponential_workspace_bytes(const AttentionProblem& problem);
cudaError_t additive_exponential_forward(const AttentionForward& call, void* workspace,
                                         cudaStream_t stream);

// Backward, whichever forward left (out, lse). Its reasons are its own.
const char* additive_exponential_backward_not_supported(const AttentionProblem& problem,
                                                        const DeviceLimits& device);

// Ten launches, and one for the gradient of slopes; the generic kernel is among them, for the
// (batch, key head)s of which a tile is beyond the range, and once more for the gradient of a mask
// that is broadcast. `workspace` as above.
std::int64_t additive_exponential_backward_workspace_bytes(const AttentionProblem& problem);
cudaError_t additive_exponential_backward(const AttentionBackward& call, void* workspace,
                                          cudaStream_t stream);

}  // namespace torch_selfattn::kernels::cuda::sm80
