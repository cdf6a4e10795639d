// foreign [scripted.pt exported.pt2]
//
// Trains a small encoder without Python, saves it to trained.pt and loads it again. The files hold
// one module, (x (B, L, 16), lengths (B)) -> (B, L, 16): scripted, it runs forward and backward;
// compiled by AOTInductor, it gives the same.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <torch_selfattn/nn.h>

#include <cstdio>
#include <vector>

namespace {

namespace nn = torch_selfattn::nn;

nn::TransformerEncoder make_encoder() {
  return nn::TransformerEncoder(
      nn::TransformerEncoderLayer(
          nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(16).dropout(0.0).batch_first(
              true)),
      2);
}

// Learns to give, at each place of a sequence, the mean of what has come so far.
bool trains(const char* path) {
  torch::manual_seed(0);
  torch::nn::Linear head(8, 8);
  auto encoder = make_encoder();
  std::vector<torch::Tensor> parameters = encoder->parameters();
  for (const auto& parameter : head->parameters()) parameters.push_back(parameter);
  torch::optim::Adam optimizer(parameters, torch::optim::AdamOptions(0.01));
  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 150; ++step) {
    const auto x = torch::randn({8, 6, 8});
    optimizer.zero_grad();
    const auto mean = x.cumsum(1) / torch::arange(1, 7).unsqueeze(1);
    const auto y = encoder->forward(x, {}, {}, /*is_causal=*/true);
    const auto loss = (head(y) - mean).square().mean();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  nn::save_state_dict(*encoder, path);
  auto other = make_encoder();
  nn::load_state_dict(*other, path);
  const auto x = torch::randn({2, 6, 8});
  std::printf("loss %.4f -> %.4f\n", first, last);
  return last < 0.5 * first && torch::equal(other(x), encoder(x));
}

bool runs(const char* scripted_path, const char* exported_path) {
  const auto x = torch::randn({3, 11, 16});
  const auto lengths = torch::tensor({11, 4, 1}, torch::kLong);
  auto scripted = torch::jit::load(scripted_path);
  const auto expected = scripted.forward({x, lengths}).toTensor();
  expected.square().sum().backward();
  for (const auto& parameter : scripted.parameters()) {
    if (!parameter.grad().defined() || !parameter.grad().abs().sum().is_nonzero()) return false;
  }
  const torch::NoGradGuard no_grad;
  torch::inductor::AOTIModelPackageLoader exported(exported_path);
  const bool agree = torch::allclose(exported.run({x, lengths})[0], expected, 1e-4, 1e-5);
  if (agree) std::puts("scripted and exported agree");
  return agree;
}

}  // namespace

int main(int argc, char** argv) {
  const auto info = torch_selfattn::build_info();
  std::printf("version %s torch %s\n", info.version, info.torch_version);
  if (!trains("trained.pt")) return 1;
  return argc != 3 || runs(argv[1], argv[2]) ? 0 : 1;
}
