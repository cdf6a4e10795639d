#pragma once

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/attention_scores.cuh"

// Which instantiation runs a problem: four dtypes by three scores, and no more.
namespace torch_selfattn::kernels::cuda {

template <typename T, typename Score>
struct Instance {
  using Element = T;
  using Policy = Score;
};

// body(Instance<T, Score>())
template <typename Body>
cudaError_t dispatch(const AttentionProblem& p, Body&& body) {
  const auto with_score = [&](auto element) {
    using T = decltype(element);
    if (p.score == ScoreKind::kDotProduct) return body(Instance<T, DotScore>());
    return p.activation == Activation::kTanh ? body(Instance<T, AdditiveScore>())
                                             : body(Instance<T, LeakyReluScore>());
  };
  switch (p.dtype) {
    case DType::kFloat64: return with_score(double());
    case DType::kFloat32: return with_score(float());
    case DType::kFloat16: return with_score(__half());
    case DType::kBFloat16: return with_score(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

inline bool grid_fits(std::int64_t blocks) { return blocks <= 0x7fffffff; }

}  // namespace torch_selfattn::kernels::cuda
