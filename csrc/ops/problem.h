#pragma once

#include "kernels/common/attention_problem.h"
#include "ops/attention.h"

namespace torch_selfattn::ops {

kernels::DType kernel_dtype(at::ScalarType dtype);

// A tensor of up to four dimensions as the kernels see it; strides are 0 where the size is 1.
kernels::ConstView const_view(const at::Tensor& tensor);
kernels::View view(const at::Tensor& tensor);

// A problem and the tensors it points into that no argument of the operator keeps alive.
struct PreparedProblem {
  kernels::AttentionProblem problem;
  at::Tensor key_lengths;
  at::Tensor key_starts;
  at::Tensor query_offsets;
};

// Arguments that check_attention_forward has accepted, for the kernels of their device.
PreparedProblem prepare_problem(const AttentionTensors& tensors,
                                const AttentionOptions<int64_t>& options);

// The tensors that the forward and backward operators return, shared by every backend and Meta.
ForwardResults empty_forward_results(const AttentionTensors& tensors, double dropout_p);
// Of an optional argument: contiguous, without elements if it is not wanted.
at::Tensor empty_gradient(const OptionalTensor& x, bool wanted, const at::Tensor& query);
BackwardResults empty_backward_results(const BackwardInputs& inputs,
                                       const AttentionTensors& tensors);

// What the kernels read and write, as pointers into the results above.
kernels::AttentionForward forward_arguments(const PreparedProblem& prepared,
                                            const ForwardResults& results);
// grad_lse: contiguous and of the dtype of lse, or undefined.
kernels::AttentionBackward backward_arguments(const PreparedProblem& prepared,
                                              const at::Tensor& grad_output,
                                              const at::Tensor& grad_lse, const at::Tensor& output,
                                              const at::Tensor& lse,
                                              const BackwardResults& results);

}  // namespace torch_selfattn::ops
