#pragma once

#include <torch_selfattn/nn/transformer.h>

// What encoder and decoder share.
namespace torch_selfattn::nn {

void check_activation(const Activation& activation);
torch::Tensor activate(const Activation& activation, const torch::Tensor& x);

// `count` layers like this one, each started anew, in its mode, dtype and on its device, which
// share its rotary tables.
template <typename Layer>
torch::nn::ModuleList copies(const Layer& layer, int64_t count) {
  auto options = layer->options;
  options.rotary(layer->self_attn->rotary);
  const auto& like = layer->linear1->weight;
  torch::nn::ModuleList made;
  for (int64_t i = 0; i < count; ++i) {
    Layer copy(options);
    copy->to(like.device(), like.scalar_type());
    copy->train(layer->is_training());
    made->push_back(copy);
  }
  return made;
}

}  // namespace torch_selfattn::nn
