// checkpoints <folder>: the C++ side of tests/python/test_cpp_modules.py, which has the same cases
// under the same names. Of each case the folder holds <name>.state.pt, a state dict that Python
// saved, and <name>.inputs.pt, a dict of tensors; this program writes
//   <name>.started.pt  the state dict of the module as it starts after manual_seed(5)
//   <name>.back.pt     what it has after loading the state, saved again
//   <name>.outputs.pt  out.0, out.1, ... of a call, in float64, and grad.<parameter> of their sum
//   of squares
// and <name>.txt for each case of errors.pt: the error that MultiHeadAttention throws.
#include <torch/torch.h>
#include <torch_selfattn/nn.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace nn = torch_selfattn::nn;
using torch::Tensor;
using Outputs = std::vector<Tensor>;
using Inputs = nn::StateDict;

std::string folder;

Outputs outputs(const std::tuple<Tensor, Tensor>& both) {
  return {std::get<0>(both), std::get<1>(both)};
}

template <typename Module, typename Call>
void check(const std::string& name, const std::function<Module()>& make, Call&& call) {
  const std::string path = folder + '/' + name;
  torch::manual_seed(5);
  Module module = make();
  nn::save_state_dict(*module, path + ".started.pt");
  module->to(torch::kDouble);
  nn::load_state_dict(*module, path + ".state.pt");
  nn::save_state_dict(*module, path + ".back.pt");
  module->eval();

  const Inputs inputs = nn::read_state_dict(path + ".inputs.pt");
  nn::StateDict results;
  Tensor loss = torch::zeros({}, torch::kDouble);
  for (const auto& output : call(*module, inputs)) {
    if (!output.defined()) continue;
    results.insert("out." + std::to_string(results.size()), output);
    loss = loss + output.square().sum();
  }
  if (loss.requires_grad()) {
    loss.backward();
    for (const auto& parameter : module->named_parameters()) {
      const Tensor grad = parameter.value().grad();
      if (grad.defined()) results.insert("grad." + parameter.key(), grad);
    }
  }
  nn::write_state_dict(results, path + ".outputs.pt");
  std::printf("%s\n", name.c_str());
}

nn::RotaryEmbedding rotary() {
  return nn::RotaryEmbedding(nn::RotaryEmbeddingOptions(4).max_length(32).base(100.0));
}

void one_head() {
  using nn::AdditiveAttention;
  using nn::SelfAttention;
  check<SelfAttention>(
      "self_attention", [] { return SelfAttention(8); },
      [](auto& m, const Inputs& in) { return outputs(m.forward(in["x"])); });
  check<SelfAttention>(
      "self_attention_options",
      [] {
        return SelfAttention(nn::SelfAttentionOptions(8)
                                 .score("additive")
                                 .key_dim(5)
                                 .value_dim(3)
                                 .bias(false)
                                 .dropout(0.5)
                                 .is_causal(true)
                                 .window({2, 1})
                                 .scale(0.7)
                                 .alibi(true)
                                 .activation("leaky_relu")
                                 .negative_slope(0.3));
      },
      [](auto& m, const Inputs& in) {
        return outputs(m.forward(in["x"], in["score_mask"], in["lengths"], true));
      });
  check<AdditiveAttention>(
      "additive_attention", [] { return AdditiveAttention(8, 3, 5); },
      [](auto& m, const Inputs& in) { return outputs(m.forward(in["x"], in["memory3"])); });
  check<AdditiveAttention>(
      "additive_attention_options",
      [] {
        return AdditiveAttention(
            nn::AdditiveAttentionOptions(8, 3, 5).bias(false).dropout(0.5).activation("relu"));
      },
      [](auto& m, const Inputs& in) {
        return outputs(
            m.forward(in["x"], in["memory3"], in["memory"], {}, in["memory_lengths"], true));
      });
}

void multi_head() {
  using nn::MultiHeadAttention;
  using Options = nn::MultiHeadAttentionOptions;
  check<MultiHeadAttention>(
      "multi_head_attention", [] { return MultiHeadAttention(8, 2); },
      [](auto& m, const Inputs& in) {
        const Tensor x = in["x"].transpose(0, 1);
        return outputs(m.forward(x, x, x, in["padding"]));
      });
  check<MultiHeadAttention>(
      "multi_head_attention_fused",
      [] {
        return MultiHeadAttention(Options(8, 2).batch_first(true).dropout(0.5).window({3, -1}));
      },
      [](auto& m, const Inputs& in) {
        return outputs(m.forward(in["x"], in["x"], in["x"], {}, false, in["causal"], true, true,
                                 in["lengths"]));
      });
  check<MultiHeadAttention>(
      "multi_head_attention_appended",
      [] {
        return MultiHeadAttention(Options(8, 4)
                                      .batch_first(true)
                                      .add_bias_kv(true)
                                      .add_zero_attn(true)
                                      .kdim(3)
                                      .num_kv_heads(2)
                                      .window({-1, 2})
                                      .scale(0.9));
      },
      [](auto& m, const Inputs& in) {
        return outputs(m.forward(in["x"], in["memory3"], in["memory"], in["memory_padding"], true,
                                 in["float_mask"], false, false, in["memory_lengths"], in["starts"],
                                 1, in["offsets"]));
      });
  check<MultiHeadAttention>(
      "multi_head_attention_options",
      [] {
        return MultiHeadAttention(Options(8, 2)
                                      .batch_first(true)
                                      .bias(false)
                                      .score("additive")
                                      .num_kv_heads(1)
                                      .window({4, 3})
                                      .rotary(rotary())
                                      .activation("leaky_relu"));
      },
      [](auto& m, const Inputs& in) {
        return outputs(m.forward(in["x"], in["x"], in["x"], in["padding"], true, in["causal"], true,
                                 false, {}, in["starts"], 2, in["offsets"]));
      });
  check<MultiHeadAttention>(
      "multi_head_attention_alibi",
      [] { return MultiHeadAttention(Options(8, 2).batch_first(true).vdim(3).alibi(true)); },
      [](auto& m, const Inputs& in) {
        return outputs(m.forward(in["x"][0], in["memory"][0], in["memory3"][0],
                                 in["memory_padding"][0], true, in["mask_per_head"]));
      });
}

void positional() {
  check<nn::SinusoidalPositionalEncoding>(
      "sinusoidal", [] { return nn::SinusoidalPositionalEncoding(); },
      [](auto& m, const Inputs& in) { return Outputs{m.forward(in["x"])}; });
  check<nn::SinusoidalPositionalEncoding>(
      "sinusoidal_options",
      [] {
        return nn::SinusoidalPositionalEncoding(
            nn::SinusoidalPositionalEncodingOptions().scale(0.5).base(50.0).dropout(0.5));
      },
      [](auto& m, const Inputs& in) { return Outputs{m.forward(in["x"], 2, in["positions"])}; });
  check<nn::LearnedPositionalEncoding>(
      "learned",
      [] {
        return nn::LearnedPositionalEncoding(
            nn::LearnedPositionalEncodingOptions(16, 8).dropout(0.5));
      },
      [](auto& m, const Inputs& in) {
        return Outputs{m.forward(in["x"], 2), m.forward(in["x"], 1, in["positions"])};
      });
  check<nn::RotaryEmbedding>(
      "rotary", [] { return rotary(); },
      [](auto& m, const Inputs& in) {
        return Outputs{m.forward(in["heads"], 3), m.forward(in["heads"], 40),
                       m.forward(in["heads"], 0, in["positions"])};
      });
  check<nn::RotaryEmbedding>(
      "rotary_options",
      [] {
        return nn::RotaryEmbedding(
            nn::RotaryEmbeddingOptions(2).max_length(16).interleaved(true).scaling(2.0));
      },
      [](auto& m, const Inputs& in) { return Outputs{m.forward(in["heads"])}; });
}

nn::TransformerEncoderLayerOptions encoder_options() {
  return nn::TransformerEncoderLayerOptions(8, 2)
      .dim_feedforward(12)
      .activation("gelu")
      .layer_norm_eps(0.01)
      .batch_first(true)
      .norm_first(true)
      .bias(false)
      .score("additive")
      .num_kv_heads(1)
      .window({2, 2})
      .rotary(rotary());
}

nn::TransformerDecoderLayerOptions decoder_options() {
  return nn::TransformerDecoderLayerOptions(8, 2)
      .dim_feedforward(12)
      .activation("silu")
      .layer_norm_eps(0.01)
      .batch_first(true)
      .norm_first(true)
      .bias(false)
      .score("additive")
      .num_kv_heads(1)
      .window({3, -1})
      .rotary(rotary())
      .cross_score("additive")
      .cross_nhead(4)
      .cross_num_kv_heads(2)
      .memory_dim(3);
}

void encoders() {
  using nn::TransformerEncoder;
  using nn::TransformerEncoderLayer;
  check<TransformerEncoderLayer>(
      "encoder_layer",
      [] {
        return TransformerEncoderLayer(
            nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(12).alibi(true));
      },
      [](auto& m, const Inputs& in) {
        return Outputs{m.forward(in["x"].transpose(0, 1), in["causal"], in["padding"])};
      });
  check<TransformerEncoderLayer>(
      "encoder_layer_options", [] { return TransformerEncoderLayer(encoder_options()); },
      [](auto& m, const Inputs& in) {
        return Outputs{m.forward(in["x"], {}, {}, true, in["lengths"])};
      });
  check<TransformerEncoder>(
      "encoder",
      [] {
        return TransformerEncoder(
            nn::TransformerEncoderOptions(TransformerEncoderLayer(encoder_options()), 2)
                .norm(torch::nn::AnyModule(nn::LayerNorm(8))));
      },
      [](auto& m, const Inputs& in) {
        return Outputs{m.forward(in["x"], in["causal"], in["padding"])};
      });
}

// One token at a time, each through `decode_with_weights`; `cache` is what new_cache gave.
template <typename Decoder>
Outputs decode(Decoder& m, const Inputs& in, const Tensor& memory) {
  const torch::NoGradGuard no_grad;
  const Tensor x = in["x"];
  auto cache = m.new_cache(memory, 8);
  Outputs results;
  for (int64_t t = 0; t < x.size(1); ++t) {
    const auto [y, weights] =
        m.decode_with_weights(x.slice(1, t, t + 1), cache, torch::full({x.size(0)}, t),
                              in["memory_lengths"], in["memory_padding"]);
    results.insert(results.end(), {y, weights});
  }
  return results;
}

void decoders() {
  using nn::TransformerDecoder;
  using nn::TransformerDecoderLayer;
  check<TransformerDecoderLayer>(
      "decoder_layer",
      [] {
        return TransformerDecoderLayer(
            nn::TransformerDecoderLayerOptions(8, 2).dim_feedforward(12).alibi(true));
      },
      [](auto& m, const Inputs& in) {
        return Outputs{m.forward(in["x"].transpose(0, 1), in["memory"].transpose(0, 1),
                                 in["causal"], in["float_mask"], in["padding"],
                                 in["memory_padding"])};
      });
  check<TransformerDecoderLayer>(
      "decoder_layer_options", [] { return TransformerDecoderLayer(decoder_options()); },
      [](auto& m, const Inputs& in) {
        return outputs(m.forward_with_weights(in["x"], in["memory3"], {}, {}, {}, {}, true, false,
                                              in["lengths"], in["memory_lengths"]));
      });
  check<TransformerDecoderLayer>(
      "decoder_layer_decode", [] { return TransformerDecoderLayer(decoder_options()); },
      [](auto& m, const Inputs& in) { return decode(m, in, in["memory3"]); });
  const auto stack = [] {
    return TransformerDecoder(
        nn::TransformerDecoderOptions(TransformerDecoderLayer(decoder_options()), 2)
            .norm(torch::nn::AnyModule(nn::LayerNorm(nn::LayerNormOptions(8).bias(false)))));
  };
  check<TransformerDecoder>("decoder", stack, [](auto& m, const Inputs& in) {
    return outputs(
        m.forward_with_weights(in["x"], in["memory3"], in["causal"], {}, {}, in["memory_padding"]));
  });
  check<TransformerDecoder>("decoder_decode", stack,
                            [](auto& m, const Inputs& in) { return decode(m, in, in["memory3"]); });
}

template <typename F>
void write_error(const std::string& name, F&& f) {
  std::ofstream file(folder + '/' + name + ".txt");
  try {
    f();
    file << "nothing was thrown";
  } catch (const c10::Error& error) {
    file << error.what_without_backtrace();
  }
}

// errors.pt has, as "<name>/<argument>", the tensors of calls that are refused; "kdim" is one of
// the constructor.
void call_errors() {
  const Inputs all = nn::read_state_dict(folder + "/errors.pt");
  std::map<std::string, std::map<std::string, Tensor>> cases;
  for (const auto& item : all) {
    const auto slash = item.key().find('/');
    cases[item.key().substr(0, slash)][item.key().substr(slash + 1)] = item.value();
  }
  for (auto& [name, in] : cases) {
    nn::MultiHeadAttentionOptions options(8, 4);
    if (in.count("kdim") != 0) options.kdim(in["kdim"].item<int64_t>());
    nn::MultiHeadAttention module(options);
    write_error(name, [&in = in, &module] {
      module(in["query"], in["key"], in["value"], in["key_padding_mask"], true, in["attn_mask"]);
    });
  }
}

void constructor_errors() {
  using Options = nn::MultiHeadAttentionOptions;
  const std::vector<std::pair<std::string, Options>> cases{
      {"heads", Options(8, 3)},
      {"no heads", Options(8, 0)},
      {"kv heads", Options(8, 4).num_kv_heads(3)},
      {"no kv heads", Options(8, 4).num_kv_heads(0)},
      {"score", Options(8, 4).score("cosine")},
      {"dropout", Options(8, 4).dropout(1.5)},
      {"rotary", Options(8, 4).rotary(nn::RotaryEmbedding(4))},
      {"alibi", Options(8, 4).alibi(true).add_zero_attn(true)},
  };
  for (const auto& [name, options] : cases) {
    write_error(name, [&options = options] { nn::MultiHeadAttention{options}; });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  folder = argv[1];
  torch::set_num_threads(1);
  one_head();
  multi_head();
  positional();
  encoders();
  decoders();
  call_errors();
  constructor_errors();
  return 0;
}
