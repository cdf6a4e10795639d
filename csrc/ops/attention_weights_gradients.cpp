#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "ops/attention_weights.h"
#include "ops/autograd/composed_attention.h"

namespace torch_selfattn::ops {

using at::Tensor;
using c10::SymInt;

namespace {

// Elements of the largest tensor of a chunk, 16 MiB in float32.
constexpr int64_t kChunkElements = int64_t{1} << 22;

OptionalTensor widened(const OptionalTensor& t) {
  const bool narrow =
      t.has_value() && (t->scalar_type() == at::kHalf || t->scalar_type() == at::kBFloat16);
  return narrow ? OptionalTensor(t->to(at::kFloat)) : t;
}

}  // namespace

BackwardResults attention_weights_gradients(const WeightsBackwardInputs& inputs,
                                            const AttentionTensors& t,
                                            const AttentionOptions<SymInt>& options) {
  const BackwardResults results = empty_weights_gradients(inputs, t);
  const Tensor query = *widened(t.query);
  const Tensor key = *widened(t.key);
  const OptionalTensor weight = widened(t.weight);
  const OptionalTensor mask = widened(t.attn_mask);
  const OptionalTensor slopes = widened(t.alibi_slopes);
  const int64_t rows = query.size(2);
  const int64_t row_elements = query.size(0) * query.size(1) * key.size(2) *
                               (weight.has_value() ? std::max<int64_t>(query.size(3), 1) : 1);
  const int64_t chunk = std::max<int64_t>(kChunkElements / std::max<int64_t>(row_elements, 1), 1);

  const auto zeros = [](const OptionalTensor& x, bool wanted) {
    return wanted ? at::zeros_like(*x) : Tensor();
  };
  Tensor grad_key = at::zeros_like(key);
  Tensor grad_weight = zeros(weight, weight.has_value());
  Tensor grad_mask = zeros(mask, inputs.attn_mask_grad);
  Tensor grad_slopes = zeros(slopes, inputs.alibi_slopes_grad);
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t n = std::min(chunk, rows - first);
    const Tensor chunk_query = query.narrow(2, first, n);
    const bool mask_has_rows = mask.has_value() && mask->size(2) != 1;
    const OptionalTensor chunk_mask = mask_has_rows ? mask->narrow(2, first, n) : mask;
    const Tensor chunk_grad = inputs.grad.narrow(2, first, n);
    const OptionalTensor indices =
        inputs.query_indices.has_value()
            ? inputs.query_indices->narrow(1, first, n)
            : at::arange(first, first + n, query.options().dtype(at::kLong)).unsqueeze(0);
    const BackwardResults grads =
        composed_attention_weights_backward({chunk_grad, indices, inputs.average_heads,
                                             inputs.attn_mask_grad, inputs.alibi_slopes_grad},
                                            {chunk_query, key, key, weight, chunk_mask,
                                             t.key_lengths, t.key_starts, t.query_offsets, slopes},
                                            options);
    results.grad_query.narrow(2, first, n).copy_(grads.grad_query);
    grad_key += grads.grad_key;
    if (grad_weight.defined()) grad_weight += grads.grad_weight;
    if (grad_slopes.defined()) grad_slopes += grads.grad_alibi_slopes;
    if (grad_mask.defined()) {
      Tensor part = mask_has_rows ? grad_mask.narrow(2, first, n) : grad_mask;
      part += grads.grad_attn_mask;
    }
  }
  results.grad_key.copy_(grad_key);
  if (grad_weight.defined()) results.grad_weight.copy_(grad_weight);
  if (grad_mask.defined()) results.grad_attn_mask.copy_(grad_mask);
  if (grad_slopes.defined()) results.grad_alibi_slopes.copy_(grad_slopes);
  return results;
}

}  // namespace torch_selfattn::ops
