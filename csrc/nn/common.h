#pragma once

#include <torch/types.h>

#include <optional>
#include <string>

// What the modules share: checks, texts of errors.
namespace torch_selfattn::nn {

void check_score(const char* module, const std::string& score);
void check_activation(const char* module, const std::string& score, const std::string& activation);
// What a module prints of it: nothing for tanh.
std::string activation_text(const std::string& activation, double negative_slope);
void check_dropout(const char* module, double dropout);

// As torch::nn::Linear(head_dim, 1) starts: uniform within 1 / sqrt(head dim).
void init_score_weight(torch::Tensor& score_weight);

// An undefined tensor is one that was not given.
inline std::optional<torch::Tensor> given(const torch::Tensor& tensor) {
  return tensor.defined() ? std::optional<torch::Tensor>(tensor) : std::nullopt;
}

// A shape and a truth value as Python prints them, so that errors read alike.
std::string shape(torch::IntArrayRef sizes);
inline std::string shape(const torch::Tensor& tensor) { return shape(tensor.sizes()); }
inline const char* text(bool value) { return value ? "True" : "False"; }

}  // namespace torch_selfattn::nn
