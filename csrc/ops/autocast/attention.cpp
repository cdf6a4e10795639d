#include <ATen/autocast_mode.h>

#include "ops/attention_kernel.h"
#include "ops/autocast/bias.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;

// Lower precision under autocast, statistics stay float32. Only the forward operator needs it:
// backward runs on saved tensors that are already cast. (The key `Autocast` would mean AutocastCUDA
// only.)
template <c10::DispatchKey dispatch_key, c10::DeviceType device>
ForwardResults attention_forward_autocast(const AttentionTensors& t,
                                          const AttentionOptions<c10::SymInt>& options) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(dispatch_key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [dtype](const auto& x) { return at::autocast::cached_cast(dtype, x, device); };
  const Tensor query = cast(t.query);
  const Tensor key = cast(t.key);
  const Tensor value = cast(t.value);
  const OptionalTensor weight = cast(t.weight);
  const OptionalTensor attn_mask = cast_bias(t.attn_mask, cast);
  const OptionalTensor alibi_slopes = cast_bias(t.alibi_slopes, cast);
  return attention_forward({query, key, value, weight, attn_mask, t.key_lengths, t.key_starts,
                            t.query_offsets, alibi_slopes},
                           options);
}

}  // namespace

TORCH_SELFATTN_IMPL(AutocastCPU, m) {
  m.impl("_attention_forward",
         TORCH_FN((AttentionKernel<attention_forward_autocast<c10::DispatchKey::AutocastCPU,
                                                              c10::DeviceType::CPU>>::call)));
}

TORCH_SELFATTN_IMPL(AutocastCUDA, m) {
  m.impl("_attention_forward",
         TORCH_FN((AttentionKernel<attention_forward_autocast<c10::DispatchKey::AutocastCUDA,
                                                              c10::DeviceType::CUDA>>::call)));
}

}  // namespace torch_selfattn::ops
