#include "ops/packed_attention.h"

#include <ATen/autocast_mode.h>

#include "ops/autocast/bias.h"
#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

// As the forward operator in attention.cpp beside it.
template <c10::DispatchKey dispatch_key, c10::DeviceType device>
ForwardResults packed_attention_forward_autocast(const PackedTensors& t,
                                                 const HeadCounts<c10::SymInt>& heads,
                                                 const AttentionOptions<c10::SymInt>& options) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(dispatch_key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [dtype](const auto& x) { return at::autocast::cached_cast(dtype, x, device); };
  const at::Tensor packed = cast(t.packed);
  const OptionalTensor query = cast(t.query);
  const OptionalTensor weight = cast(t.weight);
  const OptionalTensor attn_mask = cast_bias(t.attn_mask, cast);
  const OptionalTensor alibi_slopes = cast_bias(t.alibi_slopes, cast);
  return packed_attention_forward({packed, query, weight, attn_mask, t.key_lengths, t.key_starts,
                                   t.query_offsets, alibi_slopes},
                                  heads, options);
}

}  // namespace

TORCH_SELFATTN_IMPL(AutocastCPU, m) {
  m.impl("_packed_attention_forward",
         TORCH_FN((PackedKernel<packed_attention_forward_autocast<c10::DispatchKey::AutocastCPU,
                                                                  c10::DeviceType::CPU>>::call)));
}

TORCH_SELFATTN_IMPL(AutocastCUDA, m) {
  m.impl("_packed_attention_forward",
         TORCH_FN((PackedKernel<packed_attention_forward_autocast<c10::DispatchKey::AutocastCUDA,
                                                                  c10::DeviceType::CUDA>>::call)));
}

}  // namespace torch_selfattn::ops
