#include <ATen/ops/empty.h>

#include "ops/attention_kernel.h"
#include "ops/checks.h"
#include "ops/problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

ForwardResults attention_forward_meta(const AttentionTensors& tensors,
                                      const AttentionOptions<SymInt>& options) {
  check_attention_forward(tensors, options);
  return empty_forward_results(tensors, options.dropout_p);
}

BackwardResults attention_backward_meta(const BackwardInputs& inputs,
                                        const AttentionTensors& tensors,
                                        const AttentionOptions<SymInt>& options) {
  check_attention_backward(inputs, tensors, options);
  return empty_backward_results(inputs, tensors);
}

Tensor attention_dropout_factors_meta(const Tensor& philox_state, SymInt batch, SymInt heads,
                                      SymInt query_length, SymInt key_length, double dropout_p,
                                      at::ScalarType dtype) {
  check_dropout_factors(philox_state, dropout_p);
  return at::empty_symint(
      {std::move(batch), std::move(heads), std::move(query_length), std::move(key_length)},
      philox_state.options().dtype(dtype));
}

}  // namespace

TORCH_SELFATTN_IMPL(Meta, m) {
  m.impl("_attention_forward", TORCH_FN(AttentionKernel<attention_forward_meta>::call));
  m.impl("_attention_backward", TORCH_FN(AttentionKernel<attention_backward_meta>::call));
  m.impl("_attention_dropout_factors", TORCH_FN(attention_dropout_factors_meta));
}

}  // namespace torch_selfattn::ops
