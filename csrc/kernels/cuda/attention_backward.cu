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

namespace {

// launch() of blocks of kThreads, if there are any.
template <typename... Parameters, typename... Arguments>
cudaError_t run(cudaStream_t stream, void (*kernel)(Parameters...), std::int64_t blocks,
                std::size_t shared_bytes, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes, stream,
                arguments...);
}

}  // namespace

cudaError_t attention_backward_statistics(const AttentionBackward& call, void* workspace,
                                          cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  return dispatch(p, [&](auto instance) -> cudaError_t {
    using T = typename decltype(instance)::Element;
    using Score = typename decltype(instance)::Policy;
    using Acc = Accumulator<T>;
    return run(stream, attention_statistics_kernel<T, Score>,
               p.batch * p.heads * Workspace<Acc>::query_tiles(p), Tile<Acc>::kSharedBytes, call,
               workspace);
  });
}

cudaError_t attention_backward_gradients(const AttentionBackward& call, void* workspace,
                                         cudaStream_t stream, const std::uint32_t* wanted) {
  const AttentionProblem& p = call.problem;
  return dispatch(p, [&](auto instance) -> cudaError_t {
    using T = typename decltype(instance)::Element;
    using Score = typename decltype(instance)::Policy;
    using Acc = Accumulator<T>;
    const auto blocks = GradientBlock::count<Acc>(call);
    cudaError_t error = run(stream, attention_backward_kernel<T, Score>, blocks.total(),
                            Tile<Acc>::kSharedBytes, call, workspace, wanted);
    if (error != cudaSuccess) return error;

    const auto parts = Workspace<Acc>::of(p, workspace);
    const std::int64_t tiles = Workspace<Acc>::query_tiles(p);
    const auto sum_parts = [&]<typename Out>(Out* gradient, const PartialSums<Acc>& sums) {
      return run(stream, attention_sum_parts_kernel<Acc, Out>,
                 sums.size[0] * sums.size[1] * sums.column_blocks(), kThreads * sizeof(Acc), sums,
                 gradient);
    };
    if (call.grad_weight != nullptr) {
      error = sum_parts(static_cast<T*>(call.grad_weight), {parts.weight_parts,
                                                            p.batch,
                                                            p.heads,
                                                            tiles,
                                                            p.head_dim,
                                                            {p.weight_size[0], p.weight_size[1]},
                                                            static_cast<Acc>(p.scale),
                                                            32});
    }
    if (error != cudaSuccess || call.grad_slopes == nullptr) return error;
    const PartialSums<Acc> slope_sums{
        parts.slope_parts, p.batch, p.heads, tiles, 1, {p.slopes_size[0], p.slopes_size[1]},
        Acc(-1),           1};
    if (p.slopes_dtype == p.dtype) return sum_parts(static_cast<T*>(call.grad_slopes), slope_sums);
    return sum_parts(static_cast<float*>(call.grad_slopes), slope_sums);
  });
}

cudaError_t attention_backward(const AttentionBackward& call, void* workspace,
                               cudaStream_t stream) {
  const cudaError_t error = attention_backward_statistics(call, workspace, stream);
  if (error != cudaSuccess) return error;
  return attention_backward_gradients(call, workspace, stream);
}

}  // namespace torch_selfattn::kernels::cuda
