#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/attention_weights.h"

// Launchers of the generic CUDA attention kernels. All pointers of a problem are device pointers;
// the launches go to `stream` and nothing waits for them. Same input, same bits.
namespace torch_selfattn::kernels::cuda {

// Why these kernels cannot run the problem, or null.
const char* attention_not_supported(const AttentionProblem& problem);

// One launch. `wanted`, of 16-bit and float32 problems: null, or one byte of device memory for each
// 64 queries, (B, H, ceil(Lq / 64)); tiles with a 0 are left alone.
cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream,
                              const std::uint8_t* wanted = nullptr);

// Two launches, and one for the gradient of each of weight and slopes. `workspace`: device memory
// of that many bytes, aligned to 16, used until the launches have run.
std::int64_t attention_backward_workspace_bytes(const AttentionProblem& problem);
cudaError_t attention_backward(const AttentionBackward& call, void* workspace, cudaStream_t stream);

// The two parts of attention_backward: its first launch, and the others. `wanted`: null, or a word
// of device memory for each (batch, key head); gradients of those with a 0 are left alone, but
// their weight_parts and slope_parts are summed up. Not with the gradient of a mask that is
// broadcast, to which all of them contribute. Where grad_query.data is null and dq is not empty
// there is only that.
cudaError_t attention_backward_statistics(const AttentionBackward& call, void* workspace,
                                          cudaStream_t stream);
cudaError_t attention_backward_gradients(const AttentionBackward& call, void* workspace,
                                         cudaStream_t stream,
                                         const std::uint32_t* wanted = nullptr);

// Two launches. The workspace as above.
const char* attention_weights_not_supported(const AttentionWeights& call);
std::int64_t attention_weights_workspace_bytes(const AttentionProblem& problem);
cudaError_t attention_weights(const AttentionWeights& call, void* workspace, cudaStream_t stream);

// factors[(b, h, i, j)] = 1/(1-p) or 0, contiguous float64 of (B, H, Lq, Lk). One launch.
cudaError_t attention_dropout_factors(const std::int64_t* philox_state, double dropout_p,
                                      std::int64_t rows, std::int64_t key_length, double* factors,
                                      cudaStream_t stream);

}  // namespace torch_selfattn::kernels::cuda
