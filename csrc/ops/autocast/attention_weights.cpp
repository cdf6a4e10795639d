#include "ops/attention_weights_kernel.h"
#include "ops/autocast/bias.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;

// Weights are to be looked at: they keep the dtype of the query and are not made coarser, so the
// key and the score's weight follow the query.
template <c10::DispatchKey dispatch_key>
Tensor attention_weights_forward_autocast(const WeightsInputs& inputs, const AttentionTensors& t,
                                          const AttentionOptions<c10::SymInt>& options) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(dispatch_key);
  const auto cast = [&](const OptionalTensor& x) {
    return x.has_value() ? OptionalTensor(x->to(t.query.scalar_type())) : x;
  };
  const Tensor key = t.key.to(t.query.scalar_type());
  const OptionalTensor weight = cast(t.weight);
  const OptionalTensor attn_mask = cast_bias(t.attn_mask, cast);
  const OptionalTensor alibi_slopes = cast_bias(t.alibi_slopes, cast);
  return attention_weights_forward(inputs,
                                   {t.query, key, key, weight, attn_mask, t.key_lengths,
                                    t.key_starts, t.query_offsets, alibi_slopes},
                                   options);
}

}  // namespace

TORCH_SELFATTN_IMPL(AutocastCPU, m) {
  m.impl(
      "_attention_weights_forward",
      TORCH_FN((
          WeightsKernel<attention_weights_forward_autocast<c10::DispatchKey::AutocastCPU>>::call)));
}

TORCH_SELFATTN_IMPL(AutocastCUDA, m) {
  m.impl("_attention_weights_forward",
         TORCH_FN((WeightsKernel<
                   attention_weights_forward_autocast<c10::DispatchKey::AutocastCUDA>>::call)));
}

}  // namespace torch_selfattn::ops
