#include "module_checks.h"

using namespace module_checks;

TEST_CASE("SelfAttention computes its formula", "[nn]") {
  torch::manual_seed(2);
  const Tensor x = torch::randn({2, 5, 6});
  nn::SelfAttention attention(6);
  REQUIRE(keys_of(*attention) == std::vector<std::string>{"q_proj.weight", "q_proj.bias",
                                                          "k_proj.weight", "k_proj.bias",
                                                          "v_proj.weight", "v_proj.bias"});
  REQUIRE_FALSE(attention->q_proj->bias.any().item<bool>());
  const auto [output, none] = attention(x);
  const Tensor scores =
      torch::matmul(attention->q_proj(x), attention->k_proj(x).transpose(-2, -1)) / std::sqrt(6.0);
  REQUIRE(close(output, torch::matmul(scores.softmax(-1), attention->v_proj(x))));
  REQUIRE_FALSE(none.defined());

  const auto [again, weights] = attention(x, Tensor(), Tensor(), true);
  REQUIRE(same(again, output));
  REQUIRE(close(weights, scores.softmax(-1)));
  REQUIRE(std::get<0>(attention(x[0])).sizes() == torch::IntArrayRef({5, 6}));
}

TEST_CASE("SelfAttention with every option", "[nn]") {
  torch::manual_seed(2);
  const Tensor x = torch::randn({2, 7, 6});
  nn::SelfAttention attention(nn::SelfAttentionOptions(6)
                                  .score("additive")
                                  .key_dim(4)
                                  .value_dim(3)
                                  .bias(false)
                                  .is_causal(true)
                                  .window({2, 5})
                                  .scale(0.7)
                                  .alibi(true));
  REQUIRE(keys_of(*attention) == std::vector<std::string>{"score_weight", "q_proj.weight",
                                                          "k_proj.weight", "v_proj.weight"});
  REQUIRE(attention->score_weight.abs().max().item<double>() <= 0.5);
  const Tensor lengths = torch::tensor({7, 3});
  const auto [output, weights] = attention(x, Tensor(), lengths, true);
  REQUIRE(output.sizes() == torch::IntArrayRef({2, 7, 3}));
  const Tensor distance = torch::arange(7).unsqueeze(1) - torch::arange(7);
  const Tensor seen =
      (distance >= 0) & (distance <= 2) & (torch::arange(7) < lengths.unsqueeze(1).unsqueeze(1));
  REQUIRE_FALSE(weights.masked_select(seen.logical_not()).any().item<bool>());
  REQUIRE(close(output, torch::matmul(weights, attention->v_proj(x))));
  check_clone(attention, [&](auto& m) { return std::get<0>(m(x)); });
  check_training(attention, torch::zeros({2, 7, 3}), [&](auto& m) { return std::get<0>(m(x)); });
}

TEST_CASE("one-head modules drop out in training only", "[nn]") {
  torch::manual_seed(2);
  const Tensor x = torch::randn({2, 9, 6});
  nn::SelfAttention self(nn::SelfAttentionOptions(6).dropout(0.5));
  nn::AdditiveAttention additive(nn::AdditiveAttentionOptions(6, 6, 4).dropout(0.5));
  const auto of_self = [&] { return std::get<0>(self(x)); };
  const auto of_additive = [&] { return std::get<0>(additive(x, x)); };
  REQUIRE_FALSE(same(of_self(), of_self()));
  REQUIRE_FALSE(same(of_additive(), of_additive()));
  self->eval();
  additive->eval();
  REQUIRE(same(of_self(), of_self()));
  REQUIRE(same(of_additive(), of_additive()));
}

TEST_CASE("AdditiveAttention computes its formula", "[nn]") {
  torch::manual_seed(2);
  const Tensor query = torch::randn({2, 4, 3});
  const Tensor key = torch::randn({2, 5, 6});
  nn::AdditiveAttention attention(3, 6, 8);
  REQUIRE(keys_of(*attention) == std::vector<std::string>{"score_weight", "q_proj.weight",
                                                          "q_proj.bias", "k_proj.weight"});
  randomize(*attention);
  const auto [context, weights] = attention(query, key, Tensor(), Tensor(), Tensor(), true);
  const Tensor hidden =
      torch::tanh(attention->q_proj(query).unsqueeze(2) + attention->k_proj(key).unsqueeze(1));
  const Tensor expected = torch::matmul(hidden, attention->score_weight).softmax(-1);
  REQUIRE(close(weights, expected));
  REQUIRE(close(context, torch::matmul(expected, key)));

  const Tensor value = torch::randn({2, 5, 2});
  const Tensor lengths = torch::tensor({5, 2});
  const auto [a, none] = attention(query, key, value, Tensor(), lengths);
  const auto b =
      std::get<0>(attention->attend(query, attention->project_key(key), value,
                                    torch::arange(5) < lengths.unsqueeze(1).unsqueeze(1)));
  REQUIRE(close(a, b));
  REQUIRE_FALSE(none.defined());
  check_clone(attention, [&](auto& m) { return std::get<0>(m(query, key)); });
}

TEST_CASE("errors of one-head modules are those of Python", "[nn]") {
  REQUIRE(message_of<c10::ValueError>([] {
            nn::SelfAttention(nn::SelfAttentionOptions(6).score("cosine"));
          }) == "SelfAttention: score must be 'dot' or 'additive' (got score='cosine')");
  REQUIRE(message_of<c10::ValueError>([] {
            nn::AdditiveAttention(nn::AdditiveAttentionOptions(6, 6, 6).dropout(1.5));
          }) == "AdditiveAttention: dropout must be between 0 and 1 (got dropout=1.5)");
  REQUIRE(message_of<c10::ValueError>([] {
            nn::AdditiveAttention(nn::AdditiveAttentionOptions(6, 6, 6).activation("gelu"));
          }) ==
          "AdditiveAttention: activation must be 'tanh', 'leaky_relu' or 'relu' (got "
          "activation='gelu')");
  REQUIRE(message_of<c10::ValueError>(
              [] { nn::SelfAttention(nn::SelfAttentionOptions(6).activation("relu")); }) ==
          "SelfAttention: activation belongs to the additive score (got score='dot', "
          "activation='relu')");
}
