#include "kernels/cuda/attention_weights.cuh"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_dispatch.h"

namespace torch_selfattn::kernels::cuda {

namespace {

std::int64_t tiles(std::int64_t length, std::int64_t tile) { return (length + tile - 1) / tile; }

template <typename Acc>
std::int64_t result_blocks(const AttentionWeights& call) {
  const AttentionProblem& p = call.problem;
  return p.batch * (call.average_heads ? 1 : p.heads) * tiles(p.query_length, Tile<Acc>::kTokens) *
         tiles(p.key_length, Tile<Acc>::kTokens);
}

}  // namespace

const char* attention_weights_not_supported(const AttentionWeights& call) {
  const AttentionProblem& p = call.problem;
  const bool fits = p.compute_in_double() ? grid_fits(result_blocks<double>(call))
                                          : grid_fits(result_blocks<float>(call));
  return fits ? attention_not_supported(p) : "more than 2^31 tiles of weights, ask for fewer rows";
}

std::int64_t attention_weights_workspace_bytes(const AttentionProblem& p) {
  return p.compute_in_double() ? RowStatistics<double>::bytes(p) : RowStatistics<float>::bytes(p);
}

cudaError_t attention_weights(const AttentionWeights& call, void* workspace, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  if (p.batch * p.heads * p.query_length * p.key_length == 0) return cudaSuccess;
  return dispatch(p, [&](auto instance) -> cudaError_t {
    using T = typename decltype(instance)::Element;
    using Score = typename decltype(instance)::Policy;
    using Shape = Tile<Accumulator<T>>;
    const auto run = [&](auto kernel, std::int64_t blocks) {
      if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                    Shape::kSharedBytes, stream, call, workspace);
    };
    const cudaError_t error = run(attention_weights_statistics_kernel<T, Score>,
                                  p.batch * p.heads * tiles(p.query_length, Shape::kTokens));
    if (error != cudaSuccess) return error;
    return run(attention_weights_kernel<T, Score>, result_blocks<Accumulator<T>>(call));
  });
}

}  // namespace torch_selfattn::kernels::cuda
