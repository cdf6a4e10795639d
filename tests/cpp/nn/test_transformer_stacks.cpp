#include "module_checks.h"

namespace {

using namespace module_checks;

nn::TransformerEncoderLayer encoder_layer(const nn::RotaryEmbedding& rotary = nullptr) {
  return nn::TransformerEncoderLayer(nn::TransformerEncoderLayerOptions(8, 2)
                                         .dim_feedforward(12)
                                         .dropout(0.0)
                                         .batch_first(true)
                                         .norm_first(true)
                                         .rotary(rotary));
}

nn::TransformerDecoderLayer decoder_layer() {
  return nn::TransformerDecoderLayer(
      nn::TransformerDecoderLayerOptions(8, 2).dim_feedforward(12).dropout(0.0).batch_first(true));
}

torch::nn::AnyModule norm() { return torch::nn::AnyModule(nn::LayerNorm(8)); }

}  // namespace

TEST_CASE("encoder stack runs its layers and its norm in turn", "[nn]") {
  torch::manual_seed(5);
  nn::TransformerEncoder stack(nn::TransformerEncoderOptions(encoder_layer(), 3).norm(norm()));
  const auto keys = keys_of(*stack);
  REQUIRE(keys.size() == 3 * 12 + 2);
  REQUIRE(keys.front() == "layers.0.self_attn.in_proj_weight");
  REQUIRE(keys.back() == "norm.bias");
  randomize(*stack);
  const Tensor x = torch::randn({2, 5, 8});
  const Tensor lengths = torch::tensor({5, 3});
  Tensor expected = x;
  for (const auto& layer : *stack->layers) {
    expected = layer->as<nn::TransformerEncoderLayer>()->forward(expected, {}, {}, true, lengths);
  }
  expected = stack->norm.forward(expected);
  REQUIRE(same(stack(x, Tensor(), Tensor(), true, lengths), expected));
  const Tensor padding = torch::arange(5) >= lengths.unsqueeze(1);
  REQUIRE(close(stack(x, torch::ones({5, 5}, torch::kBool).triu(1), padding), expected));
}

TEST_CASE("layers of a stack start from numbers of their own and share rotary tables", "[nn]") {
  torch::manual_seed(5);
  nn::RotaryEmbedding rotary(nn::RotaryEmbeddingOptions(4).max_length(16));
  auto given = encoder_layer(rotary);
  given->to(torch::kDouble);
  given->eval();
  nn::TransformerEncoder stack(given, 2);
  std::vector<Tensor> first;
  for (const auto& module : *stack->layers) {
    const auto* layer = module->as<nn::TransformerEncoderLayer>();
    REQUIRE(layer != given.get());
    REQUIRE(layer->self_attn->rotary.ptr() == rotary.ptr());
    REQUIRE_FALSE(layer->is_training());
    REQUIRE(layer->linear1->weight.dtype() == torch::kDouble);
    REQUIRE_FALSE(layer->self_attn->out_proj->bias.any().item<bool>());
    first.push_back(layer->linear1->weight);
  }
  REQUIRE_FALSE(torch::equal(first[0], first[1]));
  REQUIRE(stack->forward(torch::randn({2, 5, 8}, torch::kDouble)).dtype() == torch::kDouble);
}

TEST_CASE("stacks: clone, reset and training", "[nn]") {
  torch::manual_seed(5);
  const Tensor x = torch::randn({2, 5, 8});
  nn::TransformerEncoder encoder(
      nn::TransformerEncoderOptions(encoder_layer(nn::RotaryEmbedding(4)), 2).norm(norm()));
  const auto encode = [&](nn::TransformerEncoder& m) { return m(x); };
  check_clone(encoder, encode);
  encoder->reset_parameters();
  check_training(encoder, torch::randn({8}), encode);

  nn::TransformerDecoder decoder(nn::TransformerDecoderOptions(decoder_layer(), 2).norm(norm()));
  const auto decode = [&](nn::TransformerDecoder& m) { return m(x, x); };
  check_clone(decoder, decode);
  decoder->reset_parameters();
  check_training(decoder, torch::randn({8}), decode);
}

TEST_CASE("decoder stack: weights of all layers, decoding step by step", "[nn]") {
  torch::manual_seed(5);
  nn::TransformerDecoder stack(nn::TransformerDecoderOptions(decoder_layer(), 3).norm(norm()));
  randomize(*stack);
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({2, 4, 8});
  const Tensor memory = torch::randn({2, 6, 8});
  const Tensor memory_lengths = torch::tensor({6, 2});
  const auto [expected, expected_weights] =
      stack->forward_with_weights(x, memory, {}, {}, {}, {}, true, false, {}, memory_lengths);
  REQUIRE(expected_weights.sizes() == torch::IntArrayRef({3, 2, 2, 4, 6}));
  REQUIRE(
      close(stack->forward(x, memory, {}, {}, {}, {}, true, false, {}, memory_lengths), expected));

  auto caches = stack->new_cache(memory, 4);
  REQUIRE(caches.size() == 3);
  for (int64_t t = 0; t < 4; ++t) {
    const Tensor lengths = torch::full({2}, t);
    const Tensor row = x.slice(1, t, t + 1);
    const auto [y, weights] = stack->decode_with_weights(row, caches, lengths, memory_lengths);
    REQUIRE(close(y, expected.slice(1, t, t + 1)));
    REQUIRE(close(weights, expected_weights.slice(3, t, t + 1)));
    REQUIRE(close(stack->decode(row, caches, lengths, memory_lengths), y));
  }
}
