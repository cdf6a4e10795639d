#include "kernels/cuda/sm80/additive_exponential.h"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/sm80/additive_exponential_forward.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

namespace {

std::int64_t query_tiles(const AttentionProblem& p) {
  return (p.query_length + kTileTokens - 1) / kTileTokens;
}

}  // namespace

const char* additive_exponential_not_supported(const AttentionProblem& p,
                                               const DeviceLimits& device) {
  if (p.score != ScoreKind::kAdditive) return "it has the additive score only";
  if (p.activation != Activation::kTanh) return "it has tanh only";
  if (p.dtype == DType::kFloat64) return "it computes in float32";
  if (device.capability_major < 8) return "this GPU's compute capability is below 8.0";
  if (p.head_dim > kMostExponentialDims) return "the head dim of query and key is above 128";
  if (p.value_dim > kMostExponentialDims) return "the head dim of value is above 128";
  const std::int64_t bytes = with_exponential_width(p, [](auto width) -> std::int64_t {
    return 4 * ExponentialTile<decltype(width)::value>::kForward;
  });
  if (bytes > device.shared_bytes_per_block) return "this GPU has too little shared memory";
  if (p.batch * p.heads * query_tiles(p) > 0x7fffffff) {
    return "more than 2^31 tiles of work, split the batch";
  }
  return attention_not_supported(p);  // the generic kernel must be able to take over
}

std::int64_t additive_exponential_workspace_bytes(const AttentionProblem& p) {
  return p.batch * p.heads * query_tiles(p);
}

cudaError_t additive_exponential_forward(const AttentionForward& call, void* workspace,
                                         cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  auto* const redo = static_cast<std::uint8_t*>(workspace);
  const std::int64_t blocks = p.batch * p.heads * query_tiles(p);
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = with_exponential_width(p, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    return launch(additive_exponential_forward_kernel<kWidth>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kThreads), 4 * ExponentialTile<kWidth>::kForward, stream, call, redo);
  });
  if (error != cudaSuccess) return error;
  return attention_forward(call, stream, redo);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
