#include "ops/packed_attention.h"

#include "ops/registration.h"

namespace torch_selfattn::ops {

namespace {

using c10::SymInt;

PackedGradients packed_attention_backward_meta(const BackwardInputs& inputs,
                                               const PackedTensors& tensors,
                                               const HeadCounts<SymInt>& heads,
                                               const AttentionOptions<SymInt>& options) {
  return prepare_packed_backward(inputs, tensors, heads, options).grads;
}

}  // namespace

TORCH_SELFATTN_IMPL(Meta, m) {
  m.impl("_packed_attention_backward",
         TORCH_FN(PackedKernel<packed_attention_backward_meta>::call));
}

}  // namespace torch_selfattn::ops
