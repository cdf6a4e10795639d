// Trains one attention layer by gradient descent without Python: the target is the output for other
// projections, so the loss must fall to almost nothing. Also reaches an operator by its name only.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>
#include <torch_selfattn/ops.h>

#include <cstdio>

int main() {
  torch::manual_seed(0);
  const auto x = torch::randn({4, 2, 9, 8});
  const auto target = torch_selfattn::dot_product_attention(x, x, x.flip(-1));

  auto value = torch::zeros_like(x).requires_grad_();
  torch::optim::Adam optimizer({value}, torch::optim::AdamOptions(0.1));
  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 300; ++step) {
    optimizer.zero_grad();
    const auto loss = (torch_selfattn::dot_product_attention(x, x, value) - target).square().mean();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }

  const bool registered = c10::Dispatcher::singleton()
                              .findSchema({"torch_selfattn::additive_attention", ""})
                              .has_value();
  const auto info = torch_selfattn::build_info();
  std::printf("version %s torch %s loss %.6f -> %.6f registered %d\n", info.version,
              info.torch_version, first, last, registered);
  return last < 1e-3 * first && registered ? 0 : 1;
}
