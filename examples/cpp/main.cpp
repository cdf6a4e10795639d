// Learns to reverse sequences of digits, and saves the weights for Python and C++.
#include <torch/torch.h>
#include <torch_selfattn/nn.h>

#include <iostream>

namespace nn = torch_selfattn::nn;

struct ReverserImpl : torch::nn::Module {
  ReverserImpl() {
    register_module("embedding", embedding);
    register_module("positions", positions);
    register_module("encoder", encoder);
    register_module("output", output);
  }

  torch::Tensor forward(const torch::Tensor& digits) {  // (B, L) -> (B, L, 10)
    return output(encoder(positions(embedding(digits))));
  }

  torch::nn::Embedding embedding{10, 32};
  nn::SinusoidalPositionalEncoding positions;
  nn::TransformerEncoder encoder{
      nn::TransformerEncoderLayer(
          nn::TransformerEncoderLayerOptions(32, 4).dim_feedforward(64).dropout(0.0).batch_first(
              true)),
      2};
  torch::nn::Linear output{32, 10};
};
TORCH_MODULE(Reverser);

int main() {
  torch::manual_seed(0);
  Reverser model;
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(3e-3));
  for (int step = 0; step <= 200; ++step) {
    const auto digits = torch::randint(10, {32, 8}, torch::kLong);
    const auto loss = torch::cross_entropy_loss(model(digits).flatten(0, 1),  //
                                                digits.flip(1).flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 100 == 0) std::cout << "step " << step << ": loss " << loss.item<float>() << '\n';
  }

  nn::save_state_dict(*model, "reverser.pt");  // torch.load("reverser.pt") in Python
  Reverser loaded;
  nn::load_state_dict(*loaded, "reverser.pt");
  loaded->eval();
  const auto digits = torch::randint(10, {1, 8}, torch::kLong);
  std::cout << digits << '\n' << loaded(digits).argmax(-1) << '\n';
}
