#pragma once

#include <optional>
#include <span>

#include "ops/attention.h"
#include "ops/problem.h"

// What may run a dense attention problem on CUDA, best first; the generic kernels, which end both
// lists, are in attention.cpp. Both passes choose for themselves:
// (output, lse) is all that one leaves to the other, so they may take different implementations.
namespace torch_selfattn::ops::cuda {

struct ForwardRequest {
  const AttentionTensors& tensors;
  const AttentionOptions<int64_t>& options;
  const PreparedProblem& prepared;
};

struct BackwardRequest {
  const AttentionTensors& tensors;
  const AttentionOptions<int64_t>& options;
  const PreparedProblem& prepared;
  const at::Tensor& grad_output;
  const at::Tensor& grad_lse;  // undefined without a gradient
  const at::Tensor& output;
  const at::Tensor& lse;  // contiguous
  bool bias_gradients;    // those of mask or slopes are asked for
};

struct ForwardImplementation {
  const char* name;
  const char* (*not_supported)(const ForwardRequest&);
  void (*run)(const ForwardRequest&, ForwardResults&);
};

struct BackwardImplementation {
  const char* name;
  const char* (*not_supported)(const BackwardRequest&);
  void (*run)(const BackwardRequest&, BackwardResults&);
};

// PyTorch's fused kernels.
const char* cudnn_not_supported(const ForwardRequest& request);
void cudnn_forward(const ForwardRequest& request, ForwardResults& results);
const char* cudnn_backward_not_supported(const BackwardRequest& request);
void cudnn_backward(const BackwardRequest& request, BackwardResults& results);

const char* flash_not_supported(const ForwardRequest& request);
void flash_forward(const ForwardRequest& request, ForwardResults& results);
const char* flash_backward_not_supported(const BackwardRequest& request);
void flash_backward(const BackwardRequest& request, BackwardResults& results);

const char* efficient_not_supported(const ForwardRequest& request);
void efficient_forward(const ForwardRequest& request, ForwardResults& results);
const char* efficient_backward_not_supported(const BackwardRequest& request);
void efficient_backward(const BackwardRequest& request, BackwardResults& results);

// Additive attention on tensor cores.
constexpr const char* kAdditiveGroup = "additive_group";
const char* additive_group_not_supported(const ForwardRequest& request);
void additive_group_forward(const ForwardRequest& request, ForwardResults& results);
const char* additive_group_backward_not_supported(const BackwardRequest& request);
void additive_group_backward(const BackwardRequest& request, BackwardResults& results);

constexpr const char* kAdditiveSines = "additive_sines";
const char* additive_sines_not_supported(const ForwardRequest& request);
void additive_sines_forward(const ForwardRequest& request, ForwardResults& results);
const char* additive_sines_backward_not_supported(const BackwardRequest& request);
void additive_sines_backward(const BackwardRequest& request, BackwardResults& results);

// Additive attention in float32, whatever the inputs.
constexpr const char* kAdditiveExponential = "additive_exponential";
const char* additive_exponential_not_supported(const ForwardRequest& request);
void additive_exponential_forward(const ForwardRequest& request, ForwardResults& results);
const char* additive_exponential_backward_not_supported(const BackwardRequest& request);
void additive_exponential_backward(const BackwardRequest& request, BackwardResults& results);

}  // namespace torch_selfattn::ops::cuda
