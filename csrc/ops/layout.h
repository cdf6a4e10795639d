#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <array>

namespace torch_selfattn::ops {

// An empty (B, H, L, D) tensor in the memory order of `like`: (B, L, H, D) if there the heads lie
// inside the length (the usual view of a projection's output), else contiguous. So results go back
// through the same view without a copy. Every backend and Meta use this one rule.
inline at::Tensor empty_in_order_of(const at::Tensor& like,
                                    const std::array<c10::SymInt, 4>& size) {
  const c10::SymIntArrayRef strides = like.sym_strides();
  if (!TORCH_GUARD_OR_FALSE(strides[1].sym_lt(strides[2]))) {
    return at::empty_symint(size, like.options());
  }
  // Like at::empty, strides of an empty tensor count every dimension as at least 1.
  const auto& [batch, heads, length, dim] = size;
  const c10::SymInt one = 1;
  const c10::SymInt d = dim.max(one);
  const c10::SymInt h = heads.max(one);
  const c10::SymInt l = length.max(one);
  const std::array<c10::SymInt, 4> stride = {l * h * d, d, h * d, 1};
  return at::empty_strided_symint(size, stride, like.options());
}

}  // namespace torch_selfattn::ops
