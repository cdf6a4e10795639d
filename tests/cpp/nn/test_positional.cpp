#include "module_checks.h"

namespace {

using namespace module_checks;

template <typename Encoding>
void check_positions(Encoding& encoding, const Tensor& x) {
  const int64_t length = x.size(-2);
  const Tensor positions = torch::arange(3, 3 + length).expand({x.size(0), length});
  REQUIRE(close(encoding(x, 3), encoding(x, 0, positions)));
  REQUIRE_FALSE(close(encoding(x, 3), encoding(x)));
}

}  // namespace

TEST_CASE("sinusoidal encoding adds sines and cosines", "[nn]") {
  torch::manual_seed(1);
  const Tensor x = torch::randn({2, 5, 6});
  nn::SinusoidalPositionalEncoding encoding;
  REQUIRE(keys_of(*encoding).empty());
  REQUIRE(close(encoding(x), x + torch_selfattn::sinusoidal_encoding(5, 6)));
  check_positions(encoding, x);

  nn::SinusoidalPositionalEncoding scaled(
      nn::SinusoidalPositionalEncodingOptions().scale(2.0).base(50.0));
  REQUIRE(close(scaled(x), x + 2.0 * torch_selfattn::sinusoidal_encoding(5, 6, 50.0)));
}

TEST_CASE("encodings drop out in training only", "[nn]") {
  torch::manual_seed(1);
  const Tensor x = torch::ones({2, 5, 6});
  nn::SinusoidalPositionalEncoding sines(nn::SinusoidalPositionalEncodingOptions().dropout(0.5));
  nn::LearnedPositionalEncoding learned(nn::LearnedPositionalEncodingOptions(9, 6).dropout(0.5));
  REQUIRE((sines(x) == 0).any().item<bool>());
  REQUIRE((learned(x) == 0).any().item<bool>());
  sines->eval();
  learned->eval();
  REQUIRE(close(sines(x), x + torch_selfattn::sinusoidal_encoding(5, 6)));
  REQUIRE(close(learned(x), x + learned->weight.slice(0, 0, 5)));
}

TEST_CASE("learned encoding adds rows of its table and learns them", "[nn]") {
  torch::manual_seed(1);
  const Tensor x = torch::randn({2, 5, 6});
  nn::LearnedPositionalEncoding encoding(9, 6);
  REQUIRE(keys_of(*encoding) == std::vector<std::string>{"weight"});
  REQUIRE(encoding->weight.std().item<double>() == Approx(0.02).epsilon(0.3));
  check_positions(encoding, x);
  check_clone(encoding, [&](auto& m) { return m(x); });
  check_training(encoding, x + torch::randn({5, 6}), [&](auto& m) { return m(x); });
  REQUIRE_THROWS_AS(encoding(x, 5), c10::ValueError);
}

TEST_CASE("rotary embedding makes scores depend on distances", "[nn]") {
  torch::manual_seed(1);
  const Tensor q = torch::randn({2, 3, 5, 8});
  const Tensor k = torch::randn({2, 3, 5, 8});
  nn::RotaryEmbedding rotary(nn::RotaryEmbeddingOptions(6).max_length(32).interleaved(true));
  REQUIRE(keys_of(*rotary).empty());
  const auto scores = [&](int64_t offset) {
    return torch::matmul(rotary(q, offset), rotary(k, offset).transpose(-2, -1));
  };
  REQUIRE(close(scores(0), scores(7), 1e-4));
  REQUIRE(close(scores(0), scores(40), 1e-4));  // beyond the tables
  REQUIRE_FALSE(close(rotary(q), q));
  REQUIRE(same(rotary(q).slice(-1, 6), q.slice(-1, 6)));
  check_positions(rotary, q);
}

TEST_CASE("rotary tables are float32 or float64, whatever the module is cast to", "[nn]") {
  nn::RotaryEmbedding rotary(nn::RotaryEmbeddingOptions(6).max_length(32));
  const Tensor cos = rotary->cos;
  rotary->to(torch::kHalf);
  REQUIRE(same(rotary->cos, cos));
  REQUIRE(rotary(torch::ones({1, 1, 4, 6}, torch::kHalf)).dtype() == torch::kHalf);

  const Tensor exact =
      std::get<0>(torch_selfattn::rotary_tables(32, 6, 10000.0, 0, 1.0, torch::kDouble));
  const auto copy = std::dynamic_pointer_cast<nn::RotaryEmbeddingImpl>(rotary->clone());
  rotary->to(torch::kDouble);
  REQUIRE(same(rotary->cos, exact));
  REQUIRE(same(copy->cos, cos));
}

TEST_CASE("ALiBi slopes are those of the paper and of Python", "[nn]") {
  const Tensor eight = torch_selfattn::alibi_slopes(8);
  REQUIRE(close(eight, torch::pow(2.0, -torch::arange(1, 9).to(torch::kFloat))));
  const Tensor six = torch_selfattn::alibi_slopes(6, torch::kDouble);
  const auto double_options = torch::dtype(torch::kDouble);
  REQUIRE(
      close(six, torch::tensor({0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125}, double_options)));
  REQUIRE_THROWS_AS(torch_selfattn::alibi_slopes(0), c10::ValueError);
}

TEST_CASE("errors of positional modules are those of Python", "[nn]") {
  REQUIRE(message_of<c10::ValueError>([] { nn::RotaryEmbedding(5); }) ==
          "RotaryEmbedding: dim must be even and positive (got dim=5)");
}

TEST_CASE("encodings go into a torch::nn::Sequential", "[nn]") {
  torch::manual_seed(1);
  torch::nn::Sequential model(
      torch::nn::Linear(3, 6), nn::SinusoidalPositionalEncoding(),
      nn::LearnedPositionalEncoding(9, 6),
      nn::TransformerEncoderLayer(
          nn::TransformerEncoderLayerOptions(6, 2).dim_feedforward(8).batch_first(true)));
  REQUIRE(model->forward(torch::randn({2, 5, 3})).sizes() == torch::IntArrayRef({2, 5, 6}));
}
