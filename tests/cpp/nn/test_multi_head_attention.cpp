#include <limits>

#include "module_checks.h"

namespace {

using namespace module_checks;

Tensor first(const std::tuple<Tensor, Tensor>& result) { return std::get<0>(result); }

// need_weights=false
Tensor output_of(nn::MultiHeadAttention& module, const Tensor& x, const Tensor& padding = {},
                 const Tensor& mask = {}) {
  return first(module(x, x, x, padding, false, mask));
}

}  // namespace

TEST_CASE("MultiHeadAttention starts and computes as torch's", "[nn]") {
  const bool extra = GENERATE(false, true);
  const bool other_dims = GENERATE(false, true);
  torch::manual_seed(3);
  auto theirs_options =
      torch::nn::MultiheadAttentionOptions(8, 4).add_bias_kv(extra).add_zero_attn(extra);
  auto options = nn::MultiHeadAttentionOptions(8, 4).add_bias_kv(extra).add_zero_attn(extra);
  if (other_dims) {
    theirs_options.kdim(3).vdim(3);
    options.kdim(3).vdim(3);
  }
  torch::nn::MultiheadAttention theirs(theirs_options);
  torch::manual_seed(3);
  nn::MultiHeadAttention ours(options);
  const auto expected = nn::state_dict(*theirs);
  REQUIRE(keys_of(*ours) == expected.keys());
  for (const auto& item : nn::state_dict(*ours)) REQUIRE(same(item.value(), expected[item.key()]));

  randomize(*theirs);
  nn::load_state_dict(*ours, nn::state_dict(*theirs));
  const Tensor query = torch::randn({5, 2, 8});
  const Tensor key = torch::randn({7, 2, other_dims ? 3 : 8});
  const Tensor value = torch::randn_like(key);
  const Tensor padding = torch::arange(7) >= torch::tensor({7, 4}).unsqueeze(1);
  const Tensor mask = torch::randn({5, 7});  // torch's C++ module adds a boolean mask, too
  const auto [output, weights] = ours(query, key, value, padding, true, mask);
  const auto [their_output, their_weights] = theirs(query, key, value, padding, true, mask);
  REQUIRE(close(output, their_output));
  REQUIRE(close(weights, their_weights));
  REQUIRE(close(first(ours(query, key, value, padding, false, mask)), their_output));
}

TEST_CASE("MultiHeadAttention is sequence first unless told otherwise", "[nn]") {
  torch::manual_seed(3);
  const Tensor x = torch::randn({2, 5, 8});
  nn::MultiHeadAttention sequence_first(8, 2);
  nn::MultiHeadAttention batch_first(nn::MultiHeadAttentionOptions(8, 2).batch_first(true));
  nn::load_state_dict(*batch_first, nn::state_dict(*sequence_first));
  const Tensor y = output_of(batch_first, x);
  REQUIRE(close(output_of(sequence_first, x.transpose(0, 1)).transpose(0, 1), y));
  REQUIRE(close(output_of(sequence_first, x[1]), y[1]));
  const auto [output, weights] = batch_first(x[0], x[0], x[0]);
  REQUIRE(output.sizes() == torch::IntArrayRef({5, 8}));
  REQUIRE(weights.sizes() == torch::IntArrayRef({5, 5}));
  const auto per_head = std::get<1>(batch_first(x, x, x, Tensor(), true, Tensor(), false));
  REQUIRE(per_head.sizes() == torch::IntArrayRef({2, 2, 5, 5}));
  REQUIRE(close(std::get<1>(batch_first(x, x, x)), per_head.mean(1)));
}

TEST_CASE("bounds of keys, with and without appended ones", "[nn]") {
  torch::manual_seed(3);
  const bool appended = GENERATE(false, true);
  nn::MultiHeadAttention module(nn::MultiHeadAttentionOptions(8, 2)
                                    .batch_first(true)
                                    .window({2, 1})
                                    .add_bias_kv(appended)
                                    .add_zero_attn(appended));
  const Tensor x = torch::randn({2, 6, 8});
  const Tensor lengths = torch::tensor({6, 4});
  const Tensor starts = torch::tensor({0, 1});
  const auto weights = std::get<1>(
      module(x, x, x, Tensor(), true, Tensor(), true, /*is_causal=*/true, lengths, starts));
  const Tensor j = torch::arange(6);
  const Tensor distance = j.unsqueeze(1) - j;
  const auto column = [](const Tensor& t) { return t.unsqueeze(1).unsqueeze(1); };
  const Tensor seen =
      (distance >= 0) & (distance <= 2) & (j < column(lengths)) & (j >= column(starts));
  REQUIRE(torch::equal(weights.slice(-1, 0, 6) > 0, seen));
  REQUIRE(weights.size(-1) == (appended ? 8 : 6));
  if (appended) REQUIRE((weights.slice(-1, 6) > 0).all().item<bool>());
}

TEST_CASE("a sample without keys, and NaN in the padding", "[nn]") {
  torch::manual_seed(3);
  nn::MultiHeadAttention module(nn::MultiHeadAttentionOptions(8, 2).batch_first(true));
  randomize(*module);
  Tensor x = torch::randn({2, 5, 8});
  const Tensor padding = torch::arange(5) >= torch::tensor({4, 0}).unsqueeze(1);
  const Tensor expected = output_of(module, x, padding);
  x.index_put_({0, 4}, std::numeric_limits<float>::quiet_NaN());
  const Tensor y = output_of(module, x, padding);
  REQUIRE(close(y[0].slice(0, 0, 4), expected[0].slice(0, 0, 4)));
  REQUIRE(close(y[1], module->out_proj->bias.expand({5, 8})));
}

TEST_CASE("MultiHeadAttention decodes what it computes at once", "[nn]") {
  torch::manual_seed(3);
  nn::RotaryEmbedding rotary(nn::RotaryEmbeddingOptions(4).max_length(16));
  nn::MultiHeadAttention module(nn::MultiHeadAttentionOptions(8, 2)
                                    .batch_first(true)
                                    .score("additive")
                                    .num_kv_heads(1)
                                    .window({3, -1})
                                    .rotary(rotary));
  randomize(*module);
  const Tensor x = torch::randn({2, 6, 8});
  const Tensor expected =
      first(module(x, x, x, Tensor(), false, Tensor(), true, /*is_causal=*/true));
  const auto [key, value] = module->project_key_value(x, x);
  for (int64_t t = 0; t < 6; ++t) {
    const Tensor row = x.slice(1, t, t + 1);
    const Tensor offsets = torch::full({2}, t);
    const Tensor query = module->project_query(row, 0, offsets);
    const Tensor y = first(module->attend(query, key, value, false, {}, true, {}, {}, 0, offsets));
    REQUIRE(close(y, expected.slice(1, t, t + 1)));
    REQUIRE(close(module->project_query(row, t), query));
  }
}

TEST_CASE("MultiHeadAttention with every option: keys, clone, training", "[nn]") {
  torch::manual_seed(3);
  nn::RotaryEmbedding rotary(nn::RotaryEmbeddingOptions(2).max_length(16));
  const auto options = nn::MultiHeadAttentionOptions(8, 4)
                           .batch_first(true)
                           .bias(false)
                           .kdim(8)
                           .vdim(5)
                           .score("additive")
                           .num_kv_heads(2)
                           .rotary(rotary)
                           .scale(0.8)
                           .add_bias_kv(true);
  nn::MultiHeadAttention module(options);
  REQUIRE(keys_of(*module) == std::vector<std::string>{"q_proj_weight", "k_proj_weight",
                                                       "v_proj_weight", "bias_k", "bias_v",
                                                       "score_weight", "out_proj.weight"});
  REQUIRE(module->rotary.ptr() == rotary.ptr());
  const Tensor x = torch::randn({2, 6, 8});
  const Tensor value = torch::randn({2, 6, 5});
  const auto call = [&](nn::MultiHeadAttention& m) { return first(m(x, x, value)); };
  check_clone(module, call);
  module->reset_parameters();
  check_training(module, torch::zeros({2, 6, 8}), call);

  const auto copy = std::dynamic_pointer_cast<nn::MultiHeadAttentionImpl>(module->clone());
  copy->to(torch::kDouble);  // leaves the original alone
  REQUIRE(copy->rotary->cos.dtype() == torch::kDouble);
  REQUIRE(rotary->cos.dtype() == torch::kFloat);
}

TEST_CASE("ALiBi lowers the score by the distance", "[nn]") {
  torch::manual_seed(3);
  nn::MultiHeadAttention module(nn::MultiHeadAttentionOptions(8, 2).batch_first(true).alibi(true));
  nn::MultiHeadAttention plain(nn::MultiHeadAttentionOptions(8, 2).batch_first(true));
  nn::load_state_dict(*plain, nn::state_dict(*module));
  const Tensor x = torch::randn({1, 5, 8});
  const Tensor j = torch::arange(5);
  const Tensor mask =
      -(j.unsqueeze(1) - j).abs() * torch_selfattn::alibi_slopes(2).unsqueeze(1).unsqueeze(1);
  REQUIRE(close(output_of(module, x), output_of(plain, x, {}, mask)));
}

TEST_CASE("MultiHeadAttention drops out in training only", "[nn]") {
  torch::manual_seed(3);
  nn::MultiHeadAttention module(nn::MultiHeadAttentionOptions(8, 2).batch_first(true).dropout(0.5));
  const Tensor x = torch::randn({2, 6, 8});
  REQUIRE_FALSE(same(output_of(module, x), output_of(module, x)));
  module->eval();
  REQUIRE(same(output_of(module, x), output_of(module, x)));
}

// That the texts are Python's: tests/python/test_cpp_modules.py.
TEST_CASE("MultiHeadAttention refuses options and inputs that do not fit", "[nn]") {
  using Options = nn::MultiHeadAttentionOptions;
  const auto refused = [](const Options& options) {
    return message_of<c10::ValueError>([&] { nn::MultiHeadAttention{options}; });
  };
  REQUIRE(refused(Options(8, 3)) ==
          "MultiHeadAttention: embed_dim must be divisible by num_heads (got embed_dim=8, "
          "num_heads=3)");
  REQUIRE(refused(Options(8, 4).alibi(true).add_zero_attn(true)) ==
          "MultiHeadAttention: alibi does not go with add_bias_kv and add_zero_attn (got "
          "add_bias_kv=False, add_zero_attn=True)");

  nn::MultiHeadAttention module(8, 4);
  const Tensor x = torch::zeros({3, 2, 8});
  REQUIRE(message_of<c10::Error>([&] { module(x, x, x[0]); }) ==
          "MultiHeadAttention: For batched (3-D) `query`, expected `key` and `value` to be 3-D but "
          "found 3-D and 2-D tensors respectively (got query=torch.Size([3, 2, 8]), "
          "key=torch.Size([3, 2, 8]), value=torch.Size([2, 8]))");
}
