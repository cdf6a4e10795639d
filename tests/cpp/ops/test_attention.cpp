#include <torch/torch.h>
#include <torch_selfattn/ops.h>

#include <cmath>
#include <string>
#include <vector>

#include "catch2_any.h"

namespace {

using torch::Tensor;

torch::TensorOptions doubles() { return torch::dtype(torch::kFloat64); }

Tensor leaf(at::IntArrayRef shape) { return torch::randn(shape, doubles()).requires_grad_(true); }

// w . tanh(q_i + k_j), softmax, values: with the tensor that the operator never makes.
Tensor additive_composition(const Tensor& query, const Tensor& key, const Tensor& value,
                            const Tensor& weight) {
  const Tensor features = torch::tanh(query.unsqueeze(-2) + key.unsqueeze(-3));
  const Tensor scores = (features * weight.unsqueeze(-2).unsqueeze(-2)).sum(-1);
  return torch::matmul(torch::softmax(scores, -1), value);
}

void require_same_gradients(const Tensor& got, const Tensor& want,
                            const std::vector<Tensor>& inputs) {
  REQUIRE(torch::allclose(got, want));
  const Tensor upstream = torch::randn_like(want);
  const auto got_grads = torch::autograd::grad({got}, inputs, {upstream});
  const auto want_grads = torch::autograd::grad({want}, inputs, {upstream});
  for (size_t i = 0; i < inputs.size(); ++i) {
    INFO("gradient " << i);
    REQUIRE(torch::allclose(got_grads[i], want_grads[i]));
  }
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
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

}  // namespace

TEST_CASE("dot-product attention agrees with ATen", "[ops]") {
  torch::manual_seed(1);
  const Tensor q = leaf({2, 4, 7, 8});
  const Tensor k = leaf({2, 4, 9, 8});
  const Tensor v = leaf({2, 4, 9, 5});
  const bool causal = GENERATE(false, true);
  require_same_gradients(torch_selfattn::dot_product_attention(q, k, v, std::nullopt, 0.0, causal),
                         at::scaled_dot_product_attention(q, k, v, std::nullopt, 0.0, causal),
                         {q, k, v});
}

TEST_CASE("additive attention agrees with its composition", "[ops]") {
  torch::manual_seed(2);
  const Tensor q = leaf({2, 3, 7, 6});
  const Tensor k = leaf({2, 3, 5, 6});
  const Tensor v = leaf({2, 3, 5, 4});
  const Tensor w = leaf({3, 6});
  require_same_gradients(torch_selfattn::additive_attention(q, k, v, w),
                         additive_composition(q, k, v, w), {q, k, v, w});
}

TEST_CASE("ALiBi slopes agree with a mask of the same numbers", "[ops]") {
  torch::manual_seed(7);
  const Tensor q = leaf({2, 4, 7, 8});
  const Tensor k = leaf({2, 4, 9, 8});
  const Tensor slopes = leaf({4});
  const Tensor distance =
      torch::abs(torch::arange(7).unsqueeze(-1) + 2 - torch::arange(9)).to(torch::kFloat64);
  const Tensor bias = -slopes.unsqueeze(-1).unsqueeze(-1) * distance;
  require_same_gradients(torch_selfattn::dot_product_attention(
                             q, k, k, std::nullopt, 0.0, false, std::nullopt, false, std::nullopt,
                             std::nullopt, -1, -1, /*query_offset=*/2, std::nullopt, slopes),
                         torch_selfattn::dot_product_attention(q, k, k, bias), {q, k, slopes});
}

TEST_CASE("the log-sum-exp is differentiable", "[ops]") {
  torch::manual_seed(3);
  const Tensor q = leaf({1, 2, 4, 8});
  const Tensor k = leaf({1, 2, 6, 8});
  const Tensor v = leaf({1, 2, 6, 8});
  const auto [output, lse] = torch_selfattn::dot_product_attention_with_lse(q, k, v);
  const Tensor scores = torch::matmul(q, k.transpose(-2, -1)) / std::sqrt(8.0);
  require_same_gradients(lse, torch::logsumexp(scores, {-1}), {q, k});
}

TEST_CASE("multi-head attention agrees with torch::nn::MultiheadAttention", "[ops]") {
  torch::manual_seed(4);
  torch::nn::MultiheadAttention module(torch::nn::MultiheadAttentionOptions(12, 3));
  module->to(torch::kFloat64);
  const Tensor x = leaf({5, 2, 12});  // that module takes (L, B, D)
  const Tensor want = std::get<0>(module->forward(x, x, x));
  const Tensor batch_first = x.transpose(0, 1);
  const Tensor got = torch_selfattn::multi_head_attention(
                         batch_first, batch_first, batch_first, 3, {module->in_proj_weight},
                         {module->in_proj_bias}, module->out_proj->weight, module->out_proj->bias)
                         .transpose(0, 1);
  std::vector<Tensor> inputs = module->parameters();
  inputs.push_back(x);
  require_same_gradients(got, want, inputs);
}

TEST_CASE("weights of chosen rows, and their mean over the heads", "[ops]") {
  torch::manual_seed(6);
  const Tensor q = leaf({2, 3, 5, 8});
  const Tensor k = leaf({2, 3, 7, 8});
  const Tensor rows = torch::tensor({4, 0, 4});
  const auto want = [&] {
    const Tensor scores = q.matmul(k.transpose(-2, -1)) / std::sqrt(8.0);
    return torch::softmax(scores, -1).index_select(2, rows);
  };
  require_same_gradients(torch_selfattn::attention_weights(q, k, std::nullopt, rows), want(),
                         {q, k});
  const Tensor mean = torch_selfattn::attention_weights(
      q, k, std::nullopt, rows, std::nullopt, std::nullopt, /*is_causal=*/false, std::nullopt,
      /*enable_gqa=*/false, std::nullopt, std::nullopt, -1, -1, 0, std::nullopt, std::nullopt,
      /*average_heads=*/true);
  require_same_gradients(mean, want().mean(1), {q, k});
}

TEST_CASE("every implementation can be forced, and says why it cannot run", "[ops]") {
  torch::manual_seed(5);
  const Tensor q = torch::randn({1, 2, 5, 8});
  const Tensor want = torch_selfattn::dot_product_attention(q, q, q);
  REQUIRE(contains(torch_selfattn::explain(q, q, q), "\n  reference: "));
  {
    const torch_selfattn::ImplementationGuard guard("reference");
    REQUIRE(torch_selfattn::forced_implementation() == "reference");
    REQUIRE(contains(torch_selfattn::explain(q, q, q), "reference: runs (forced)"));
    REQUIRE(torch::allclose(torch_selfattn::dot_product_attention(q, q, q), want, 1e-5, 1e-6));
    const torch_selfattn::ImplementationGuard inner("no such name");
    REQUIRE(contains(
        message_of<c10::ValueError>([&] { torch_selfattn::dot_product_attention(q, q, q); }),
        "there is no implementation of the forced name (got no such name"));
  }
  REQUIRE(torch_selfattn::forced_implementation().empty());
}

TEST_CASE("errors name the rule and the values, on CPU and Meta alike", "[ops]") {
  const auto device = GENERATE(torch::kCPU, torch::kMeta);
  const auto tensor = [&](at::IntArrayRef shape) { return torch::ones(shape, device); };
  REQUIRE(message_of<c10::Error>([&] {
            torch_selfattn::dot_product_attention(tensor({2, 4, 9, 64}), tensor({2, 4, 9, 64}),
                                                  tensor({2, 4, 8, 64}));
          }) ==
          "dot_product_attention: key and value must have the same length "
          "(got key=[2, 4, 9, 64], value=[2, 4, 8, 64])");
  REQUIRE(message_of<c10::ValueError>([&] {
            const Tensor q = tensor({2, 3, 4});
            torch_selfattn::additive_attention(q, q, q, tensor({4}), std::nullopt, 1.5);
          }) == "additive_attention: dropout_p must be between 0 and 1 (got dropout_p=1.5)");
}

TEST_CASE("a model trains in C++", "[ops]") {
  // Find the one marked token of a sequence: the query must learn to attend to it.
  torch::manual_seed(6);
  constexpr int64_t kLength = 12;
  constexpr int64_t kDim = 8;
  torch::nn::Linear key_projection(kDim, kDim);
  const Tensor query = (torch::randn({1, 1, 1, kDim}) * 0.1).requires_grad_(true);
  const Tensor weight = torch::randn({kDim}).requires_grad_(true);
  std::vector<Tensor> parameters = key_projection->parameters();
  parameters.insert(parameters.end(), {query, weight});
  torch::optim::Adam optimizer(parameters, torch::optim::AdamOptions(0.02));
  const auto loss_of_batch = [&] {
    const Tensor marked = torch::randint(kLength, {32});
    Tensor tokens = torch::randn({32, kLength, kDim}) * 0.5;
    tokens.index_put_({torch::arange(32), marked, 0}, 3.0);
    const Tensor keys = key_projection(tokens).unsqueeze(1);
    const Tensor values = torch::eye(kLength).expand({32, 1, kLength, kLength});
    const Tensor weights =
        torch_selfattn::additive_attention(query.expand({32, 1, 1, kDim}), keys, values, weight);
    return -torch::log(weights.squeeze(1).squeeze(1).gather(1, marked.unsqueeze(1)) + 1e-9).mean();
  };
  const double before = loss_of_batch().item<double>();
  for (int step = 0; step < 150; ++step) {
    optimizer.zero_grad();
    loss_of_batch().backward();
    optimizer.step();
  }
  const double after = loss_of_batch().item<double>();
  REQUIRE(before > 2.0);
  REQUIRE(after < 0.5);
}
