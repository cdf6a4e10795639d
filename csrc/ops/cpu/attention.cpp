#include "kernels/cpu/attention.h"

#include <ATen/ops/empty.h>

#include <utility>

#include "kernels/common/philox.h"
#include "ops/attention_kernel.h"
#include "ops/checks.h"
#include "ops/cpu/huge_pages.h"
#include "ops/cpu/parallel.h"
#include "ops/explain.h"
#include "ops/implementation_choice.h"
#include "ops/packed_attention.h"
#include "ops/problem.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;

void check_key_bounds(const AttentionTensors& tensors) {
  const int64_t key_length = tensors.key.size(2);
  check_key_bounds_on_cpu(tensors.name(), "key_lengths", tensors.key_lengths, key_length);
  check_key_bounds_on_cpu(tensors.name(), "key_starts", tensors.key_starts, key_length);
}

ForwardResults attention_forward_cpu(const AttentionTensors& tensors,
                                     const AttentionOptions<int64_t>& options) {
  check_attention_forward(tensors, symbolic(options));
  check_key_bounds(tensors);
  const PreparedProblem prepared = prepare_problem(tensors, options);
  ForwardResults results = empty_forward_results(tensors, options.dropout_p);
  if (options.dropout_p > 0) results.philox_state.random_();  // follows torch.manual_seed
  const auto& implementation = choose_from(kernels::cpu::attention_implementations(),
                                           prepared.problem, tensors.name(), "forward", "cpu");
  implementation.forward(forward_arguments(prepared, results), torch_parallel());
  return results;
}

// Fills the results, of arguments that check_attention_backward has accepted.
void run_backward(const BackwardInputs& inputs, const AttentionTensors& tensors,
                  const AttentionOptions<int64_t>& options, const BackwardResults& results) {
  check_key_bounds(tensors);
  for (const Tensor& gradient :
       {results.grad_query, results.grad_key, results.grad_value, results.grad_attn_mask}) {
    prefer_huge_pages(gradient);
  }
  PreparedProblem prepared = prepare_problem(tensors, options);
  if (options.dropout_p > 0) {
    prepared.problem.philox_state = inputs.philox_state.const_data_ptr<int64_t>();
  }
  const Tensor lse = inputs.lse.contiguous();
  const Tensor grad_lse =
      inputs.grad_lse.has_value() ? inputs.grad_lse->to(lse.scalar_type()).contiguous() : Tensor();
  const auto& implementation = choose_from(kernels::cpu::attention_implementations(),
                                           prepared.problem, tensors.name(), "backward", "cpu");
  implementation.backward(
      backward_arguments(prepared, inputs.grad_output, grad_lse, inputs.output, lse, results),
      torch_parallel());
}

BackwardResults attention_backward_cpu(const BackwardInputs& inputs,
                                       const AttentionTensors& tensors,
                                       const AttentionOptions<int64_t>& options) {
  check_attention_backward(inputs, tensors, symbolic(options));
  BackwardResults results = empty_backward_results(inputs, tensors);
  run_backward(inputs, tensors, options, results);
  return results;
}

PackedGradients packed_attention_backward_cpu(const BackwardInputs& inputs,
                                              const PackedTensors& tensors,
                                              const HeadCounts<int64_t>& heads,
                                              const AttentionOptions<int64_t>& options) {
  PackedBackward p =
      prepare_packed_backward(inputs, tensors, {heads.query, heads.key}, symbolic(options));
  run_backward({p.grad_output, inputs.grad_lse, p.output, inputs.lse, inputs.philox_state,
                inputs.attn_mask_grad, inputs.alibi_slopes_grad},
               p.heads.with(tensors), options, p.results);
  return std::move(p.grads);
}

Tensor attention_dropout_factors_cpu(const Tensor& philox_state, int64_t batch, int64_t heads,
                                     int64_t query_length, int64_t key_length, double dropout_p,
                                     at::ScalarType dtype) {
  check_dropout_factors(philox_state, dropout_p);
  const Tensor factors = at::empty({batch, heads, query_length, key_length}, at::kDouble);
  const auto dropout =
      kernels::Dropout::make(dropout_p, philox_state.contiguous().const_data_ptr<int64_t>());
  double* factor = factors.mutable_data_ptr<double>();
  torch_parallel().run(batch * heads * query_length, [&](int64_t row, int) {
    for (int64_t j = 0; j < key_length; ++j) {
      factor[row * key_length + j] = dropout.factor(row, j, key_length);
    }
  });
  return factors.to(dtype);
}

std::vector<Candidate> attention_candidates_cpu(const AttentionTensors& tensors,
                                                const AttentionOptions<int64_t>& options) {
  return list_candidates(kernels::cpu::attention_implementations(),
                         prepare_problem(tensors, options).problem);
}

const bool registered = register_candidates(at::kCPU, &attention_candidates_cpu);

}  // namespace

TORCH_SELFATTN_IMPL(CPU, m) {
  m.impl("_attention_forward", TORCH_FN(AttentionKernel<attention_forward_cpu>::call));
  m.impl("_attention_backward", TORCH_FN(AttentionKernel<attention_backward_cpu>::call));
  m.impl("_packed_attention_backward", TORCH_FN(PackedKernel<packed_attention_backward_cpu>::call));
  m.impl("_attention_dropout_factors", TORCH_FN(attention_dropout_factors_cpu));
}

}  // namespace torch_selfattn::ops
