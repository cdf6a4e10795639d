#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>

#include "ops/autograd/graph.h"

// The derivative of a backward operator, taken of the same gradients composed of differentiable
// operators: O(Lq Lk) memory.
namespace torch_selfattn::ops {

// The node's saved tensors as inputs of the composition. With create_graph they keep their history,
// and the third derivative with them. Each is a variable of its own even where the user gave one
// tensor twice, since the node returns partial derivatives.
inline torch::autograd::variable_list composition_inputs(
    const torch::autograd::variable_list& saved, bool create_graph) {
  torch::autograd::variable_list inputs;
  for (const at::Tensor& t : saved) {
    if (!t.defined() || !t.is_floating_point()) {
      inputs.push_back(t);
    } else if (create_graph && t.requires_grad()) {
      inputs.push_back(t.view_as(t));
    } else {
      inputs.push_back(t.detach().requires_grad_(t.requires_grad()));
    }
  }
  return inputs;
}

// Derivatives of `outputs` with the given gradients with respect to the inputs that require one; as
// many as inputs, undefined for the others.
template <size_t count>
torch::autograd::variable_list derivatives_of(const std::array<at::Tensor, count>& outputs,
                                              const torch::autograd::variable_list& grads,
                                              const torch::autograd::variable_list& inputs,
                                              bool create_graph) {
  torch::autograd::variable_list given_outputs;
  torch::autograd::variable_list given_grads;
  for (size_t i = 0; i < count; ++i) {
    if (!grads[i].defined() || !requires_grad(outputs[i])) continue;
    given_outputs.push_back(outputs[i]);
    given_grads.push_back(grads[i]);
  }
  torch::autograd::variable_list wanted;
  for (const at::Tensor& input : inputs) {
    if (requires_grad(input)) wanted.push_back(input);
  }
  torch::autograd::variable_list results(inputs.size());
  if (given_outputs.empty() || wanted.empty()) return results;
  const torch::autograd::variable_list derivatives =
      torch::autograd::grad(given_outputs, wanted, given_grads, /*retain_graph=*/std::nullopt,
                            create_graph, /*allow_unused=*/true);
  for (size_t i = 0, next = 0; i < inputs.size(); ++i) {
    if (requires_grad(inputs[i])) results[i] = derivatives[next++];
  }
  return results;
}

}  // namespace torch_selfattn::ops
