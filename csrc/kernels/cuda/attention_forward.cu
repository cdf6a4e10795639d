#include "kernels/cuda/attention_forward.cuh"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_dispatch.h"

namespace torch_selfattn::kernels::cuda {

cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream,
                              const std::uint8_t* wanted) {
  const AttentionProblem& p = call.problem;
  if (p.batch * p.heads * p.query_length == 0) return cudaSuccess;
  return dispatch(p, [&](auto instance) {
    using T = typename decltype(instance)::Element;
    using Score = typename decltype(instance)::Policy;
    using Shape = Tile<Accumulator<T>>;
    const std::int64_t slices = p.value_dim > 0 ? (p.value_dim - 1) / Shape::kWidth + 1 : 1;
    const std::int64_t tiles = (p.query_length - 1) / Shape::kTokens + 1;
    const std::int64_t blocks = p.batch * p.heads * tiles * slices;
    if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
    return launch(attention_forward_kernel<T, Score>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kThreads), Shape::kSharedBytes, stream, call, wanted);
  });
}

namespace {

__global__ void __launch_bounds__(kThreads)
    dropout_factors_kernel(const std::int64_t* philox_state, double dropout_p,
                           std::int64_t key_length, double* factors) {
  const Dropout dropout = Dropout::make(dropout_p, philox_state);
  const std::int64_t row = blockIdx.x;
  for (std::int64_t j = threadIdx.x; j < key_length; j += kThreads) {
    factors[row * key_length + j] = dropout.factor(row, j, key_length);
  }
}

}  // namespace

cudaError_t attention_dropout_factors(const std::int64_t* philox_state, double dropout_p,
                                      std::int64_t rows, std::int64_t key_length, double* factors,
                                      cudaStream_t stream) {
  if (rows * key_length == 0) return cudaSuccess;
  if (!grid_fits(rows)) return cudaErrorInvalidConfiguration;
  return launch(dropout_factors_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0,
                stream, philox_state, dropout_p, key_length, factors);
}

}  // namespace torch_selfattn::kernels::cuda
