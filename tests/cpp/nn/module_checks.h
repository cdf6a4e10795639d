#pragma once

#include <torch/torch.h>
#include <torch_selfattn/nn.h>

#include <string>
#include <vector>

#include "catch2_any.h"

// What every module is checked for, whatever it computes.
namespace module_checks {

namespace nn = torch_selfattn::nn;
using torch::Tensor;

inline std::vector<std::string> keys_of(const torch::nn::Module& module) {
  return nn::state_dict(module).keys();
}

// The message of the exception that f throws, without the backtrace.
template <typename Exception, typename F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "nothing was thrown";
}

inline bool same(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && torch::equal(a, b);
}

inline bool close(const Tensor& a, const Tensor& b, double tolerance = 1e-5) {
  return a.sizes() == b.sizes() && torch::allclose(a, b, tolerance, tolerance);
}

// Biases start at 0 and norms at 1, which hides mistakes.
inline void randomize(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  for (auto& parameter : module.parameters()) parameter.normal_(0.0, 0.4);
}

// A clone computes the same from numbers of its own, in training mode too.
template <typename Module, typename Call>
void check_clone(Module& module, Call&& call) {
  randomize(*module);
  const Tensor expected = call(module);
  Module copy(std::dynamic_pointer_cast<typename Module::Impl>(module->clone()));
  REQUIRE(keys_of(*copy) == keys_of(*module));
  REQUIRE(same(call(copy), expected));
  randomize(*copy);
  REQUIRE_FALSE(close(call(copy), expected));
  REQUIRE(same(call(module), expected));
}

// Some steps of Adam bring the output closer to a target that it can reach.
template <typename Module, typename Call>
void check_training(Module& module, const Tensor& target, Call&& call, double share = 0.5) {
  torch::optim::Adam optimizer(module->parameters(), torch::optim::AdamOptions(0.02));
  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const Tensor loss = (call(module) - target).square().mean();
    loss.backward();
    optimizer.step();
    last = loss.template item<double>();
    if (step == 0) first = last;
  }
  INFO("loss " << first << " -> " << last);
  REQUIRE(last < share * first);
}

}  // namespace module_checks
