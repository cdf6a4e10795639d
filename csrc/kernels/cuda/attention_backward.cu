#include "kernels/cuda/attention_backward.cuh"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_dispatch.h"

namespace torch_selfattn::kernels::cuda {

const char* attention_not_supported(const AttentionProblem& p) {
  // The smaller tiles are those of float64; a call has about twice as many blocks as this.
  const std::int64_t tile = Tile<double>::kTokens;
  const std::int64_t rows = p.batch * p.heads;
  const auto count = [&](std::int64_t length, std::int64_t dim) {
    return rows * (length / tile + 1) * (dim / Tile<double>::kWidth + 1);
  };
  const std::int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (count(p.query_length, dim) + count(p.key_length, dim) > 0x3fffffff) {
    return "more than 2^30 tiles of work, split the batch";
  }
  return nullptr;
}

std::int64_t attention_backward_workspace_bytes(const AttentionProblem& p) {
  return p.compute_in_double() ? Workspace<double>::bytes(p) : Workspace<float>::bytes(p);
}

cudaError_t attention_backward(const AttentionBackward& call, void* workspace,
                               cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  return dispatch(p, [&](auto instance) -> cudaError_t {
    using T = typename decltype(instance)::Element;
    using Score = typename decltype(instance)::Policy;
    using Acc = Accumulator<T>;
    using Shape = Tile<Acc>;
    const auto run = [&](auto kernel, std::int64_t blocks, std::size_t shared_bytes) {
      if (blocks == 0) return cudaSuccess;
      if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes,
                    stream, call, workspace);
    };
    const std::int64_t tiles = (p.query_length + Shape::kTokens - 1) / Shape::kTokens;
    cudaError_t error =
        run(attention_statistics_kernel<T, Score>, p.batch * p.heads * tiles, Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = GradientBlock::count<Acc>(call);
    error = run(attention_backward_kernel<T, Score>, blocks.total(), Shape::kSharedBytes);
    if (error != cudaSuccess || call.grad_weight == nullptr) return error;
    return run(attention_weight_gradient_kernel<T>,
               p.weight_size[0] * p.weight_size[1] * ((p.head_dim + 31) / 32),
               kThreads * sizeof(Acc));
  });
}

}  // namespace torch_selfattn::kernels::cuda
