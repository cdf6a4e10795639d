#pragma once

#include "kernels/cuda/sm80/additive_exponential_shape.h"

namespace torch_selfattn::kernels::cuda::sm80 {

// Fills `to` from the tensors of the problem; one launch. `grad_out`: null in forward.
cudaError_t prepare_operands(const AttentionProblem& problem, const PreparedOperands& to,
                             const ConstView* grad_out, cudaStream_t stream);

}  // namespace torch_selfattn::kernels::cuda::sm80
