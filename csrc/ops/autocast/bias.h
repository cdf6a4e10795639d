#pragma once

#include "ops/attention.h"

namespace torch_selfattn::ops {

// What is added to scores, a floating mask or ALiBi slopes, keeps its dtype if that is float32,
// which the kernels read as it is. A boolean mask stays one.
template <typename Cast>
OptionalTensor cast_bias(const OptionalTensor& x, const Cast& cast) {
  const bool keep = !x.has_value() || !x->is_floating_point() || x->scalar_type() == at::kFloat;
  return keep ? x : OptionalTensor(cast(x));
}

}  // namespace torch_selfattn::ops
