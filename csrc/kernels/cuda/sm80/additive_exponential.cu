#include "kernels/cuda/sm80/additive_exponential.h"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_exponential_forward.cuh"
#include "kernels/cuda/sm80/additive_exponential_prepare.h"

namespace torch_selfattn::kernels::cuda::sm80 {

const char* additive_exponential_not_supported(const AttentionProblem& p,
                                               const DeviceLimits& device) {
  if (const char* reason = exponential_form_not_supported(p, device)) return reason;
  const std::int64_t bytes = with_exponential_width(p, [](auto width) -> std::int64_t {
    return 4 * ExponentialTile<decltype(width)::value>::kForward;
  });
  if (bytes > device.shared_bytes_per_block) return "this GPU has too little shared memory";
  return attention_not_supported(p);  // the generic kernel must be able to take over
}

std::int64_t additive_exponential_workspace_bytes(const AttentionProblem& p) {
  return ExponentialForwardWorkspace::of(p, nullptr).bytes;
}

cudaError_t additive_exponential_forward(const AttentionForward& call, void* memory,
                                         cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const auto workspace = ExponentialForwardWorkspace::of(p, memory);
  LaunchSequence launches(stream);
  const std::int64_t blocks = p.batch * p.heads * workspace.operands.query.tiles;
  if (blocks == 0) return cudaSuccess;
  launches.then([&] { return prepare_operands(p, workspace.operands, nullptr, stream); });
  with_exponential_width(p, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launches.run(additive_exponential_forward_kernel<kWidth>, blocks, kThreads,
                 4 * ExponentialTile<kWidth>::kForward, call, workspace);
  });
  launches.then([&] { return attention_forward(call, stream, workspace.redo); });
  return launches.error();
}

}  // namespace torch_selfattn::kernels::cuda::sm80
