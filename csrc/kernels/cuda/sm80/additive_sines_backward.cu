#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_sines.h"
#include "kernels/cuda/sm80/additive_sines_gradients.cuh"
#include "kernels/cuda/sm80/additive_sines_plan.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

namespace {

constexpr int kRowThreads = 256;

// The statistics of all queries with those that do not exist, and redo, which nobody has set.
__global__ void __launch_bounds__(kRowThreads)
    additive_sines_statistics_kernel(const __grid_constant__ AttentionProblem p,
                                     const __grid_constant__ SineGradientWorkspace workspace,
                                     const float* grad_lse) {
  const std::int64_t index = std::int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  const std::int64_t padded = workspace.sines.padded_queries;
  if (index < p.batch * p.kv_heads) workspace.redo[index] = 0;
  if (index >= p.batch * p.heads * padded) return;
  const std::int64_t row = index / padded * p.query_length + index % padded;
  workspace.statistics[index] = index % padded < p.query_length
                                    ? statistics_of(Workspace<float>::of(p, workspace.generic), row,
                                                    grad_lse != nullptr ? grad_lse[row] : 0.0f)
                                    : float4{kInfinity<float>, 0, 0, 0};
}

// Adds up the parts of w dw of a head to those of dw that the generic kernel would leave for its
// first tile of queries; the others are 0.
__global__ void __launch_bounds__(kRowThreads)
    additive_sines_weight_parts_kernel(const __grid_constant__ AttentionProblem p,
                                       const __grid_constant__ SineGradientWorkspace workspace) {
  const auto generic = Workspace<float>::of(p, workspace.generic);
  const std::int64_t tiles = Workspace<float>::query_tiles(p);
  const std::int64_t index = std::int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  const std::int64_t d = index % p.head_dim;
  const std::int64_t tile = index / p.head_dim % tiles;
  const std::int64_t row = index / p.head_dim / tiles;
  if (row >= p.batch * p.heads) return;
  float sum = 0;
  // What is redone leaves its parts unwritten.
  const bool redo = workspace.redo[row / p.group_size()] != 0;
  if (tile == 0 && !redo) {
    const std::int64_t parts = workspace.weight_parts_of_head;
    for (std::int64_t part = row * parts; part < (row + 1) * parts; ++part) {
      sum += workspace.weight_parts[part * p.head_dim + d];
    }
    const std::int64_t word = d / kChunkWords * kSineTerms * kChunkWords + d % kChunkWords;
    sum /=
        workspace.sines.vectors[(row * kSineVectors + kOfElement) * workspace.sines.words + word];
  }
  generic.weight_parts[index] = sum;
}

SineGradientWorkspace workspace_of(const AttentionProblem& p, void* memory) {
  return SineGradientWorkspace::of(p, memory, attention_backward_workspace_bytes(p));
}

template <int kTiles>
cudaError_t backward(const AttentionBackward& call, void* memory, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const auto workspace = workspace_of(p, memory);
  const SineWorkspace& sines = workspace.sines;
  const std::int64_t heads = p.batch * p.heads;
  const std::int64_t kv_heads = p.batch * p.kv_heads;
  LaunchSequence launches(stream);
  launches.then([&] { return attention_backward_statistics(call, workspace.generic, stream); });
  launches.run(additive_sines_statistics_kernel,
               (heads * sines.padded_queries + kRowThreads - 1) / kRowThreads, kRowThreads, 0, p,
               workspace, static_cast<const float*>(call.grad_lse));
  prepare_sines<SineNumber>(launches, p, sines, true);
  launches.run(additive_sines_gradients_kernel<false, kTiles>,
               heads * (sines.padded_queries / kSineRows) * sine_slices(p, false), kSineThreads,
               SineGradientTile<kTiles>::kSharedBytes, call, workspace);
  launches.run(additive_sines_gradients_kernel<true, kTiles>,
               kv_heads * (sines.padded_keys / kSineRows) * sine_slices(p, true), kSineThreads,
               SineGradientTile<kTiles>::kSharedBytes, call, workspace);
  const std::int64_t parts = heads * Workspace<float>::query_tiles(p) * p.head_dim;
  launches.run(additive_sines_weight_parts_kernel, (parts + kRowThreads - 1) / kRowThreads,
               kRowThreads, 0, p, workspace);
  launches.then([&] {
    return attention_backward_gradients(call, workspace.generic, stream, workspace.redo);
  });
  return launches.error();
}

}  // namespace

const char* additive_sines_backward_not_supported(const AttentionProblem& p, bool bias_gradients,
                                                  const DeviceLimits& device) {
  if (const char* const reason = additive_sines_not_supported(p, device)) return reason;
  if (p.dtype != DType::kBFloat16) {
    return "gradients of scores may be beyond float16: it has those of bfloat16 only";
  }
  if (bias_gradients) return "it has no gradient of a mask or of ALiBi slopes";
  if (p.query_length == 0 || p.batch * p.heads == 0) return "there are no queries";
  if (SineGradientTile<1>::kSharedBytes > device.shared_bytes_per_block) {
    return "this GPU has too little shared memory";
  }
  return nullptr;
}

std::int64_t additive_sines_backward_workspace_bytes(const AttentionProblem& p) {
  return workspace_of(p, nullptr).bytes;
}

cudaError_t additive_sines_backward(const AttentionBackward& call, const DeviceLimits& device,
                                    void* workspace, cudaStream_t stream) {
  return SineGradientTile<2>::kSharedBytes <= device.shared_bytes_per_block
             ? backward<2>(call, workspace, stream)
             : backward<1>(call, workspace, stream);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
