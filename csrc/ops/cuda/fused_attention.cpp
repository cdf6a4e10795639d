#include <ATen/Context.h>
#include <ATen/native/transformers/cuda/sdp_utils.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "ops/cuda/attention_implementations.h"
#include "ops/implementation_choice.h"

// PyTorch's own fused kernels for the problems that they compute as this package defines them: the
// plain dot product. Each reason says what they lack. PyTorch's predicates (can_use_...) come last:
// they know the hardware, head dims and alignments, and the switches of torch.backends.cuda.
namespace torch_selfattn::ops::cuda {

namespace {

using at::Tensor;

enum class Kernel { kCudnn, kFlash, kEfficient };

bool is_causal(const AttentionOptions<int64_t>& options) { return options.window_right == 0; }

// What none of them can do.
const char* not_plain(const AttentionTensors& t, const AttentionOptions<int64_t>& options) {
  if (t.weight.has_value()) return "it has no additive score";
  if (t.query.scalar_type() == at::kDouble) return "it has no float64";
  if (options.dropout_p > 0) return "its dropout draws other numbers than this package's";
  if (t.attn_mask.has_value()) {
    return "with a mask, NaN that the mask hides reaches its output";
  }
  if (t.key_lengths.has_value() || t.key_starts.has_value()) {
    return "it has no key_lengths or key_starts in this layout";
  }
  if (t.query_offsets.has_value() || options.query_offset != 0) return "it has no query offset";
  if (options.window_left >= 0 || options.window_right > 0) return "it has no window";
  if (t.alibi_slopes.has_value()) return "it has no ALiBi slopes";
  if (is_causal(options) && t.query.size(2) != t.key.size(2)) {
    return "causal with different lengths may be aligned otherwise";
  }
  for (const Tensor* tensor : {&t.query, &t.key, &t.value}) {
    if (tensor->numel() == 0) return "a tensor has no elements";
    // Their loads are of 16 bytes; PyTorch checks the last dimension only.
    const int64_t vector = 16 / static_cast<int64_t>(tensor->element_size());
    bool aligned = reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0;
    for (int64_t d = 0; d < 3; ++d) {
      aligned = aligned && (tensor->size(d) == 1 ||
                            (tensor->stride(d) > 0 && tensor->stride(d) % vector == 0));
    }
    if (!aligned || tensor->stride(3) != 1)
      return "a tensor is expanded or not aligned to 16 bytes";
  }
  return nullptr;
}

const char* not_supported(Kernel kernel, const AttentionTensors& t,
                          const AttentionOptions<int64_t>& options) {
  if (const char* reason = not_plain(t, options); reason != nullptr) return reason;
  const bool grouped = t.query.size(1) != t.key.size(1);
  if (kernel != Kernel::kFlash && grouped) return "it has no grouped heads";
  if (kernel != Kernel::kEfficient && t.query.size(3) != t.value.size(3)) {
    return "keys and values have different head dims";
  }
  const sdp::sdp_params parameters{t.query, t.key, t.value, std::nullopt, 0.0, is_causal(options),
                                   grouped};
  bool usable = false;
  switch (kernel) {
    case Kernel::kCudnn:
      usable = at::globalContext().userEnabledCuDNNSDP() &&
               sdp::can_use_cudnn_attention(parameters, /*debug=*/false);
      break;
    case Kernel::kFlash:
      usable = at::globalContext().userEnabledFlashSDP() && t.query.size(3) % 8 == 0 &&
               sdp::can_use_flash_attention(parameters, /*debug=*/false);
      break;
    case Kernel::kEfficient:
      usable = at::globalContext().userEnabledMemEfficientSDP() &&
               sdp::can_use_mem_efficient_attention(parameters, /*debug=*/false);
      break;
  }
  return usable ? nullptr
                : "PyTorch refuses it for this dtype, head dim or GPU, or it is turned off";
}

const char* backward_not_supported(Kernel kernel, const BackwardRequest& request) {
  if (const char* reason = not_supported(kernel, request.tensors, request.options);
      reason != nullptr) {
    return reason;
  }
  if (request.grad_lse.defined()) return "it takes no gradient of lse";
  return nullptr;
}

// Takes over a result, in the memory order that the operator promises.
void give(Tensor& result, const Tensor& computed) {
  if (computed.strides() == result.strides()) {
    result = computed;
  } else {
    result.copy_(computed);
  }
}

// lse comes as (B, H, Lq), padded at the end, or (B, H, Lq, 1).
void give_lse(Tensor& result, const Tensor& computed) {
  Tensor lse = computed.dim() == 4 ? computed.squeeze(-1) : computed;
  lse = lse.narrow(2, 0, result.size(2));
  if (lse.is_contiguous() && lse.numel() == computed.numel()) {
    result = lse;
  } else {
    result.copy_(lse);
  }
}

Tensor unused_random_state(const Tensor& like) {
  return at::empty({}, like.options().dtype(at::kLong));
}

// The kernels read the gradient as they read the tensors.
Tensor aligned(const Tensor& grad_output) {
  const int64_t vector = 16 / static_cast<int64_t>(grad_output.element_size());
  bool good = grad_output.stride(3) == 1 &&
              reinterpret_cast<uintptr_t>(grad_output.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) {
    good = good && grad_output.stride(d) > 0 && grad_output.stride(d) % vector == 0;
  }
  return good ? grad_output : grad_output.contiguous();
}

}  // namespace

const char* cudnn_not_supported(const ForwardRequest& request) {
  return not_supported(Kernel::kCudnn, request.tensors, request.options);
}

void cudnn_forward(const ForwardRequest& request, ForwardResults& results) {
  const AttentionTensors& t = request.tensors;
  const auto computed = at::_scaled_dot_product_cudnn_attention(
      t.query, t.key, t.value, std::nullopt, /*compute_log_sumexp=*/true, /*dropout_p=*/0.0,
      is_causal(request.options), /*return_debug_mask=*/false, request.prepared.problem.scale);
  give(results.output, std::get<0>(computed));
  give_lse(results.lse, std::get<1>(computed));
}

const char* cudnn_backward_not_supported(const BackwardRequest& request) {
  if (const char* reason = backward_not_supported(Kernel::kCudnn, request); reason != nullptr) {
    return reason;
  }
  if (!is_forced_implementation("cudnn")) {
    return "it is not deterministic: choose it by name";
  }
  return nullptr;
}

void cudnn_backward(const BackwardRequest& request, BackwardResults& results) {
  const AttentionTensors& t = request.tensors;
  const Tensor unused = unused_random_state(t.query);
  const auto computed = at::_scaled_dot_product_cudnn_attention_backward(
      aligned(request.grad_output), t.query, t.key, t.value, request.output,
      request.lse.unsqueeze(-1), unused, unused, /*attn_bias=*/Tensor(), Tensor(), Tensor(),
      t.query.size(2), t.key.size(2), /*dropout_p=*/0.0, is_causal(request.options),
      request.prepared.problem.scale);
  give(results.grad_query, std::get<0>(computed));
  give(results.grad_key, std::get<1>(computed));
  give(results.grad_value, std::get<2>(computed));
}

const char* flash_not_supported(const ForwardRequest& request) {
  return not_supported(Kernel::kFlash, request.tensors, request.options);
}

void flash_forward(const ForwardRequest& request, ForwardResults& results) {
  const AttentionTensors& t = request.tensors;
  const auto computed = at::_scaled_dot_product_flash_attention(
      t.query, t.key, t.value, /*dropout_p=*/0.0, is_causal(request.options),
      /*return_debug_mask=*/false, request.prepared.problem.scale);
  give(results.output, std::get<0>(computed));
  give_lse(results.lse, std::get<1>(computed));
}

const char* flash_backward_not_supported(const BackwardRequest& request) {
  if (const char* reason = backward_not_supported(Kernel::kFlash, request); reason != nullptr) {
    return reason;
  }
  // Its only switch is PyTorch's global one. Setting that for a moment would make the operations of
  // other threads fail that are not deterministic.
  const at::Context& context = at::globalContext();
  const bool deterministic =
      context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
  if (!deterministic && !is_forced_implementation("flash")) {
    return "it is deterministic only under torch.use_deterministic_algorithms(True); otherwise "
           "choose it by name";
  }
  return nullptr;
}

void flash_backward(const BackwardRequest& request, BackwardResults& results) {
  const AttentionTensors& t = request.tensors;
  const Tensor unused = unused_random_state(t.query);
  const auto computed = at::_scaled_dot_product_flash_attention_backward(
      aligned(request.grad_output), t.query, t.key, t.value, request.output, request.lse, Tensor(),
      Tensor(), t.query.size(2), t.key.size(2), /*dropout_p=*/0.0, is_causal(request.options),
      unused, unused, request.prepared.problem.scale);
  give(results.grad_query, std::get<0>(computed));
  give(results.grad_key, std::get<1>(computed));
  give(results.grad_value, std::get<2>(computed));
}

const char* efficient_not_supported(const ForwardRequest& request) {
  return not_supported(Kernel::kEfficient, request.tensors, request.options);
}

void efficient_forward(const ForwardRequest& request, ForwardResults& results) {
  const AttentionTensors& t = request.tensors;
  const auto computed = at::_scaled_dot_product_efficient_attention(
      t.query, t.key, t.value, std::nullopt, /*compute_log_sumexp=*/true, /*dropout_p=*/0.0,
      is_causal(request.options), request.prepared.problem.scale);
  give(results.output, std::get<0>(computed));
  give_lse(results.lse, std::get<1>(computed));
}

const char* efficient_backward_not_supported(const BackwardRequest& request) {
  return backward_not_supported(Kernel::kEfficient, request);
}

void efficient_backward(const BackwardRequest& request, BackwardResults& results) {
  const AttentionTensors& t = request.tensors;
  const auto transposed = [](const Tensor& x) { return x.transpose(1, 2); };  // (B, L, H, D)
  // It takes strides of all tensors but this one, of which it reads rows of H D numbers.
  const Tensor output = transposed(request.output).contiguous();
  // Rows of its lse come in blocks of 32; +inf makes the weights of the others 0.
  const int64_t padding = (32 - request.lse.size(2) % 32) % 32;
  const Tensor lse = padding == 0 ? request.lse
                                  : at::constant_pad_nd(request.lse, {0, padding},
                                                        std::numeric_limits<double>::infinity());
  const Tensor unused = unused_random_state(t.query);
  // One split of the keys: more would add their parts of dq atomically, in any order.
  const auto computed = at::_efficient_attention_backward(
      transposed(aligned(request.grad_output)), transposed(t.query), transposed(t.key),
      transposed(t.value), /*bias=*/std::nullopt, output,
      /*cu_seqlens_q=*/std::nullopt, /*cu_seqlens_k=*/std::nullopt, t.query.size(2), t.key.size(2),
      lse, /*dropout_p=*/0.0, unused, unused,
      /*custom_mask_type=*/is_causal(request.options) ? 1 : 0, /*bias_requires_grad=*/false,
      request.prepared.problem.scale, /*num_splits_key=*/1);
  give(results.grad_query, transposed(std::get<0>(computed)));
  give(results.grad_key, transposed(std::get<1>(computed)));
  give(results.grad_value, transposed(std::get<2>(computed)));
}

}  // namespace torch_selfattn::ops::cuda
