#include "ops/attention.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace torch_selfattn::ops {

namespace {

using at::Tensor;

// Lower precision under autocast, statistics stay float32. Only the forward operator needs it:
// backward runs on saved tensors that are already cast. A floating mask keeps its dtype if that is
// float32, which the kernels read as it is. (The key `Autocast` would mean AutocastCUDA only.)
template <c10::DispatchKey dispatch_key, c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> attention_forward_autocast(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& weight,
    const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, const OptionalTensor& query_offsets,
    std::optional<double> scale, double dropout_p, c10::SymInt window_left,
    c10::SymInt window_right, c10::SymInt query_offset) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(dispatch_key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [dtype](const auto& x) { return at::autocast::cached_cast(dtype, x, device); };
  const bool cast_mask = attn_mask.has_value() && attn_mask->is_floating_point() &&
                         attn_mask->scalar_type() != at::kFloat;
  return attention_forward(cast(query), cast(key), cast(value), cast(weight),
                           cast_mask ? cast(attn_mask) : attn_mask, key_lengths, key_starts,
                           query_offsets, scale, dropout_p, std::move(window_left),
                           std::move(window_right), std::move(query_offset));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_selfattn, AutocastCPU, m) {
  m.impl("_attention_forward",
         &attention_forward_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(torch_selfattn, AutocastCUDA, m) {
  m.impl("_attention_forward",
         &attention_forward_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace torch_selfattn::ops
