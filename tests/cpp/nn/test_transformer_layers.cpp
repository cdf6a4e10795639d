#include "module_checks.h"

namespace {

using namespace module_checks;
using EncoderOptions = nn::TransformerEncoderLayerOptions;
using DecoderOptions = nn::TransformerDecoderLayerOptions;

Tensor feed_forward(const Tensor& x, const torch::nn::Linear& linear1,
                    const torch::nn::Linear& linear2) {
  return torch::linear(torch::relu(torch::linear(x, linear1->weight, linear1->bias)),
                       linear2->weight, linear2->bias);
}

}  // namespace

TEST_CASE("encoder layer: order of norms, masks, keys", "[nn]") {
  torch::manual_seed(4);
  const bool norm_first = GENERATE(false, true);
  nn::TransformerEncoderLayer layer(
      EncoderOptions(8, 2).dim_feedforward(12).dropout(0.0).batch_first(true).norm_first(
          norm_first));
  REQUIRE(keys_of(*layer) == std::vector<std::string>{
                                 "self_attn.in_proj_weight", "self_attn.in_proj_bias",
                                 "self_attn.out_proj.weight", "self_attn.out_proj.bias",
                                 "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
                                 "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"});
  randomize(*layer);
  const Tensor x = torch::randn({2, 5, 8});
  const Tensor lengths = torch::tensor({5, 3});
  const auto attend = [&](const Tensor& y) {
    return std::get<0>(layer->self_attn(y, y, y, Tensor(), false, Tensor(), true, true, lengths));
  };
  Tensor expected;
  if (norm_first) {
    expected = x + attend(layer->norm1(x));
    expected = expected + feed_forward(layer->norm2(expected), layer->linear1, layer->linear2);
  } else {
    expected = layer->norm1(x + attend(x));
    expected = layer->norm2(expected + feed_forward(expected, layer->linear1, layer->linear2));
  }
  REQUIRE(close(layer(x, Tensor(), Tensor(), true, lengths), expected));
  const Tensor padding = torch::arange(5) >= lengths.unsqueeze(1);
  const Tensor causal = torch::ones({5, 5}, torch::kBool).triu(1);
  REQUIRE(close(layer(x, causal, padding), expected));
}

TEST_CASE("encoder layer with every option", "[nn]") {
  torch::manual_seed(4);
  nn::RotaryEmbedding rotary(nn::RotaryEmbeddingOptions(4).max_length(16));
  nn::TransformerEncoderLayer layer(EncoderOptions(8, 2)
                                        .dim_feedforward(12)
                                        .dropout(0.0)
                                        .activation("silu")
                                        .layer_norm_eps(0.1)
                                        .batch_first(true)
                                        .norm_first(true)
                                        .bias(false)
                                        .score("additive")
                                        .num_kv_heads(1)
                                        .window({2, 2})
                                        .rotary(rotary));
  REQUIRE(keys_of(*layer) ==
          std::vector<std::string>{"self_attn.in_proj_weight", "self_attn.score_weight",
                                   "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
                                   "norm1.weight", "norm2.weight"});
  const Tensor x = torch::randn({2, 5, 8});
  const auto call = [&](nn::TransformerEncoderLayer& m) { return m(x); };
  check_clone(layer, call);
  layer->reset_parameters();
  check_training(layer, torch::randn({8}), call);
}

TEST_CASE("activations", "[nn]") {
  torch::manual_seed(4);
  const Tensor x = torch::randn({5, 2, 8});
  const auto with = [&](const nn::Activation& activation) {
    torch::manual_seed(4);
    return nn::TransformerEncoderLayer(
        EncoderOptions(8, 2).dim_feedforward(12).dropout(0.0).activation(activation))(x);
  };
  REQUIRE(same(with([](const Tensor& h) { return torch::relu(h); }), with("relu")));
  REQUIRE(same(with([](const Tensor& h) { return torch::gelu(h); }), with("gelu")));
  REQUIRE(same(with([](const Tensor& h) { return torch::silu(h); }), with("silu")));
  REQUIRE_FALSE(close(with("silu"), with("gelu")));
  REQUIRE(message_of<c10::ValueError>([&] { with("tanh"); }) ==
          "activation should be relu/gelu, not tanh; also silu or a callable (got 'tanh')");
}

TEST_CASE("layers drop out in training only", "[nn]") {
  torch::manual_seed(4);
  const Tensor x = torch::randn({5, 2, 8});
  nn::TransformerEncoderLayer encoder(8, 2);
  nn::TransformerDecoderLayer decoder(8, 2);
  REQUIRE_FALSE(same(encoder(x), encoder(x)));
  REQUIRE_FALSE(same(decoder(x, x), decoder(x, x)));
  encoder->eval();
  decoder->eval();
  REQUIRE(same(encoder(x), encoder(x)));
  REQUIRE(same(decoder(x, x), decoder(x, x)));
}

TEST_CASE("decoder layer: order of norms, weights of the attention to the memory", "[nn]") {
  torch::manual_seed(4);
  const bool norm_first = GENERATE(false, true);
  nn::TransformerDecoderLayer layer(DecoderOptions(8, 2)
                                        .dim_feedforward(12)
                                        .dropout(0.0)
                                        .batch_first(true)
                                        .norm_first(norm_first)
                                        .cross_score("additive")
                                        .cross_nhead(1)
                                        .memory_dim(3));
  randomize(*layer);
  const Tensor x = torch::randn({2, 4, 8});
  const Tensor memory = torch::randn({2, 6, 3});
  const Tensor memory_lengths = torch::tensor({6, 2});
  const auto attend = [&](const Tensor& y) {
    return std::get<0>(layer->self_attn(y, y, y, Tensor(), false, Tensor(), true, true));
  };
  const auto look = [&](const Tensor& y) {
    return layer->multihead_attn(y, memory, memory, Tensor(), true, Tensor(), false, false,
                                 memory_lengths);
  };
  Tensor expected;
  Tensor expected_weights;
  if (norm_first) {
    expected = x + attend(layer->norm1(x));
    const auto [looked, weights] = look(layer->norm2(expected));
    expected = expected + looked;
    expected = expected + feed_forward(layer->norm3(expected), layer->linear1, layer->linear2);
    expected_weights = weights;
  } else {
    expected = layer->norm1(x + attend(x));
    const auto [looked, weights] = look(expected);
    expected = layer->norm2(expected + looked);
    expected = layer->norm3(expected + feed_forward(expected, layer->linear1, layer->linear2));
    expected_weights = weights;
  }
  const auto [output, weights] =
      layer->forward_with_weights(x, memory, {}, {}, {}, {}, true, false, {}, memory_lengths);
  REQUIRE(close(output, expected));
  REQUIRE(weights.sizes() == torch::IntArrayRef({2, 1, 4, 6}));
  REQUIRE(close(weights, expected_weights));
  const Tensor padding = torch::arange(6) >= memory_lengths.unsqueeze(1);
  REQUIRE(close(layer->forward(x, memory, {}, {}, {}, padding, true), expected));
}

TEST_CASE("decoding step by step gives what forward gives", "[nn]") {
  torch::manual_seed(4);
  const bool batch_first = GENERATE(false, true);
  const bool with_options = GENERATE(false, true);
  auto options = DecoderOptions(8, 2).dim_feedforward(12).dropout(0.0).batch_first(batch_first);
  if (with_options) {
    options.norm_first(true)
        .score("additive")
        .num_kv_heads(1)
        .window({2, -1})
        .rotary(nn::RotaryEmbedding(nn::RotaryEmbeddingOptions(4).max_length(16)))
        .cross_num_kv_heads(1);
  }
  nn::TransformerDecoderLayer layer(options);
  randomize(*layer);
  const torch::NoGradGuard no_grad;
  const int64_t axis = batch_first ? 1 : 0;
  const auto arrange = [&](const Tensor& t) { return batch_first ? t : t.transpose(0, 1); };
  const Tensor x = arrange(torch::randn({2, 5, 8}));
  const Tensor memory = arrange(torch::randn({2, 6, 8}));
  const Tensor memory_lengths = torch::tensor({6, 2});
  const auto [expected, expected_weights] =
      layer->forward_with_weights(x, memory, {}, {}, {}, {}, true, false, {}, memory_lengths);

  auto cache = layer->new_cache(memory, 7);
  Tensor lengths = torch::zeros({2}, torch::kLong);
  // A prompt of two tokens, then one at a time.
  for (const auto& [begin, end] : {std::pair{0, 2}, {2, 3}, {3, 4}, {4, 5}}) {
    const auto [y, weights] =
        layer->decode_with_weights(x.slice(axis, begin, end), cache, lengths, memory_lengths);
    REQUIRE(close(y, expected.slice(axis, begin, end)));
    REQUIRE(close(weights, expected_weights.slice(2, begin, end)));
    // The lengths are not advanced yet: the same positions again.
    REQUIRE(close(layer->decode(x.slice(axis, begin, end), cache, lengths, memory_lengths), y));
    lengths = lengths + (end - begin);
  }
}

TEST_CASE("samples of different lengths decode side by side", "[nn]") {
  torch::manual_seed(4);
  nn::TransformerDecoderLayer layer(
      DecoderOptions(8, 2).dim_feedforward(12).dropout(0.0).batch_first(true).alibi(true));
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({2, 5, 8});
  const Tensor memory = torch::randn({2, 6, 8});
  const Tensor expected = layer->forward(x, memory, {}, {}, {}, {}, true);
  auto cache = layer->new_cache(memory, 5);
  layer->decode(x.slice(1, 0, 4), cache, torch::zeros({2}, torch::kLong));
  const Tensor lengths = torch::tensor({4, 1});  // the second sample goes on from its second token
  const Tensor next = torch::stack({x[0][4], x[1][1]}).unsqueeze(1);
  const Tensor y = layer->decode(next, cache, lengths);
  REQUIRE(close(y[0][0], expected[0][4]));
  REQUIRE(close(y[1][0], expected[1][1]));
}

TEST_CASE("decoder layer: clone and training", "[nn]") {
  torch::manual_seed(4);
  nn::TransformerDecoderLayer layer(
      DecoderOptions(8, 2).dim_feedforward(12).dropout(0.0).norm_first(true));
  const Tensor x = torch::randn({4, 2, 8});
  const auto call = [&](nn::TransformerDecoderLayer& m) { return m(x, x); };
  check_clone(layer, call);
  layer->reset_parameters();
  check_training(layer, torch::randn({8}), call);
}

TEST_CASE("errors of the decoder layer are those of Python", "[nn]") {
  nn::TransformerDecoderLayer layer(8, 2);
  const Tensor x = torch::zeros({4, 2, 8});
  REQUIRE(message_of<c10::Error>([&] { layer->new_cache(x[0], 3); }) ==
          "TransformerDecoderLayer: memory must have 3 dimensions (got memory=torch.Size([2, 8]))");
  auto cache = layer->new_cache(x, 3);
  REQUIRE(message_of<c10::Error>([&] { layer->decode(x[0], cache, torch::tensor({0, 0})); }) ==
          "TransformerDecoderLayer: tgt must have 3 dimensions (got tgt=torch.Size([2, 8]))");
}

TEST_CASE("LayerNorm without a bias", "[nn]") {
  torch::manual_seed(4);
  const Tensor x = torch::randn({3, 8});
  nn::LayerNorm norm(nn::LayerNormOptions(8).eps(0.1).bias(false));
  REQUIRE(keys_of(*norm) == std::vector<std::string>{"weight"});
  REQUIRE(close(norm(x), torch::layer_norm(x, {8}, {}, {}, 0.1)));
}
