#pragma once

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/sm80/device_limits.h"

namespace torch_selfattn::kernels::cuda::sm80 {

// The widest heads that tensor cores compute the additive score of.
constexpr int kMostAdditiveElements = 256;  // of query and key
constexpr int kMostAdditiveValues = 256;

// Why no pass of a method that computes the additive score on tensor cores can run a problem,
// whatever its sizes, or null.
inline const char* kind_not_on_tensor_cores(const AttentionProblem& p, const DeviceLimits& device) {
  if (p.score != ScoreKind::kAdditive) return "it has the additive score only";
  if (p.activation != Activation::kTanh) return "it has tanh only";
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    return "the inputs are not float16 or bfloat16";
  }
  if (device.capability_major < 8) return "this GPU's compute capability is below 8.0";
  return nullptr;
}

// The same of the forward methods, sizes included.
inline const char* additive_on_tensor_cores_not_supported(const AttentionProblem& p,
                                                          const DeviceLimits& device) {
  if (const char* reason = kind_not_on_tensor_cores(p, device)) return reason;
  if (p.head_dim < 1) return "the queries have no elements";
  if (p.head_dim > kMostAdditiveElements) return "the head dim of query and key is above 256";
  if (p.value_dim > kMostAdditiveValues) return "the head dim of value is above 256";
  if (p.key_length == 0) return "there are no keys";
  return nullptr;
}

}  // namespace torch_selfattn::kernels::cuda::sm80
