#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

// What an Autograd kernel must know before it builds a node. Every operator's kernel takes one of
// three roads:
//   composed:  torch.func transforms (grad, vjp, jacrev, jvp) refuse a C++ autograd Function, and
//              forward-mode AD is not implemented for one, so there the operator is composed of
//              differentiable ATen operators;
//   no graph:  Function::apply costs about a microsecond even when nothing needs a gradient;
//   node:      the C++ autograd Function.
namespace torch_selfattn::ops {

inline bool in_torch_func_transform() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

inline bool has_tangent(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& t) {
  return t.has_value() && has_tangent(*t);
}

inline bool requires_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const std::optional<at::Tensor>& t) {
  return t.has_value() && requires_grad(*t);
}

template <typename... Tensors>
bool must_compose(const Tensors&... tensors) {
  return in_torch_func_transform() || (has_tangent(tensors) || ...);
}

template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// AutogradContext::needs_input_grad counts the tensors that are present, not the arguments of
// forward: this numbers the arguments' edges. Call add() once per tensor argument, in order.
class EdgeCounter {
 public:
  // The edge of a tensor argument, -1 if it is absent.
  int add(bool present) { return present ? next_++ : -1; }

 private:
  int next_ = 0;
};

}  // namespace torch_selfattn::ops
