#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch_selfattn/export.h>
#include <torch_selfattn/nn/multi_head_attention.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

// Transformer layers and stacks, with a key-value cache for decoding step by step. Arguments, state
// dicts and conventions are those of Python's torch.nn.Transformer*, and more after them; masks and
// lengths as in MultiHeadAttention::forward (true = ignore). Sources: Vaswani et al., 2017; Xiong
// et al., 2020 (norm_first).
namespace torch_selfattn::nn {

// "relu", "gelu", "silu", or any function of the hidden layer. Parameters that it holds are none of
// the module's.
using Activation = std::variant<std::string, std::function<torch::Tensor(const torch::Tensor&)>>;

struct TORCH_SELFATTN_API LayerNormOptions {
  LayerNormOptions(int64_t normalized_shape)  // NOLINT(google-explicit-constructor)
      : normalized_shape_(normalized_shape) {}
  TORCH_ARG(int64_t, normalized_shape);  // size of the last dimension
  TORCH_ARG(double, eps) = 1e-5;
  TORCH_ARG(bool, bias) = true;
};

// Python's torch.nn.LayerNorm over the last dimension; torch::nn::LayerNorm has no option bias.
// State-dict keys: weight, with bias also bias.
class TORCH_SELFATTN_API LayerNormImpl : public torch::nn::Cloneable<LayerNormImpl> {
 public:
  explicit LayerNormImpl(int64_t normalized_shape)
      : LayerNormImpl(LayerNormOptions(normalized_shape)) {}
  explicit LayerNormImpl(LayerNormOptions options_);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  LayerNormOptions options;
  torch::Tensor weight;
  torch::Tensor bias;
};
TORCH_MODULE(LayerNorm);

struct TORCH_SELFATTN_API TransformerEncoderLayerOptions {
  TransformerEncoderLayerOptions(int64_t d_model, int64_t nhead)
      : d_model_(d_model), nhead_(nhead) {}
  TORCH_ARG(int64_t, d_model);                 // size of the input and output
  TORCH_ARG(int64_t, nhead);                   // number of query heads
  TORCH_ARG(int64_t, dim_feedforward) = 2048;  // size of the hidden layer
  // For attention weights, hidden layer and both residual branches.
  TORCH_ARG(double, dropout) = 0.1;
  TORCH_ARG(Activation, activation) = "relu";
  TORCH_ARG(double, layer_norm_eps) = 1e-5;
  TORCH_ARG(bool, batch_first) = false;  // (B, L, D) instead of (L, B, D)
  TORCH_ARG(bool, norm_first) = false;   // norm before each branch instead of after the sum
  TORCH_ARG(bool, bias) = true;          // whether linear layers and norms have one
  TORCH_ARG(std::string, score) = "dot";
  TORCH_ARG(std::optional<int64_t>, num_kv_heads) = std::nullopt;  // nhead by default
  TORCH_ARG(Window, window) = Window(-1, -1);
  TORCH_ARG(RotaryEmbedding, rotary) = nullptr;
  TORCH_ARG(bool, alibi) = false;
};

// Self-attention and a two-layer feed-forward network, each with a residual and a norm.
// State-dict keys: self_attn.* (MultiHeadAttention), linear1.weight (dim_feedforward, d_model),
// linear2.weight (d_model, dim_feedforward), norm1.weight, norm2.weight (d_model), each with a
// .bias if bias.
class TORCH_SELFATTN_API TransformerEncoderLayerImpl
    : public torch::nn::Cloneable<TransformerEncoderLayerImpl> {
 public:
  TransformerEncoderLayerImpl(int64_t d_model, int64_t nhead)
      : TransformerEncoderLayerImpl(TransformerEncoderLayerOptions(d_model, nhead)) {}
  explicit TransformerEncoderLayerImpl(TransformerEncoderLayerOptions options_);
  void reset() override;
  void reset_parameters();

  // src (L, B, D), or (B, L, D) with batch_first, or (L, D) -> the same shape.
  torch::Tensor forward(const torch::Tensor& src, const torch::Tensor& src_mask = {},
                        const torch::Tensor& src_key_padding_mask = {}, bool is_causal = false,
                        const torch::Tensor& key_lengths = {});

  TransformerEncoderLayerOptions options;
  MultiHeadAttention self_attn{nullptr};
  torch::nn::Linear linear1{nullptr};
  torch::nn::Dropout dropout{nullptr};
  torch::nn::Linear linear2{nullptr};
  LayerNorm norm1{nullptr};
  LayerNorm norm2{nullptr};
  torch::nn::Dropout dropout1{nullptr};
  torch::nn::Dropout dropout2{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())},
                           {2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(false)},
                           {4, torch::nn::AnyValue(torch::Tensor())})

 private:
  torch::Tensor feed_forward(const torch::Tensor& x);
};
TORCH_MODULE(TransformerEncoderLayer);

// What one decoder layer keeps between steps. C is the capacity. key and value are written in place
// at the positions after `lengths`; what stands behind is never read. To reorder or drop samples
// (beam search), index_select all four along dimension 0, and `lengths` with them.
struct TORCH_SELFATTN_API KVCache {
  torch::Tensor key;           // (B, Hk, C, E)
  torch::Tensor value;         // (B, Hk, C, E)
  torch::Tensor memory_key;    // (B, Hk of the cross attention, Lm, E)
  torch::Tensor memory_value;  // (B, Hk of the cross attention, Lm, E)
};

struct TORCH_SELFATTN_API TransformerDecoderLayerOptions {
  TransformerDecoderLayerOptions(int64_t d_model, int64_t nhead)
      : d_model_(d_model), nhead_(nhead) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, nhead);
  TORCH_ARG(int64_t, dim_feedforward) = 2048;
  TORCH_ARG(double, dropout) = 0.1;
  TORCH_ARG(Activation, activation) = "relu";
  TORCH_ARG(double, layer_norm_eps) = 1e-5;
  TORCH_ARG(bool, batch_first) = false;
  TORCH_ARG(bool, norm_first) = false;
  TORCH_ARG(bool, bias) = true;
  // Of the self-attention.
  TORCH_ARG(std::string, score) = "dot";
  TORCH_ARG(std::optional<int64_t>, num_kv_heads) = std::nullopt;
  TORCH_ARG(Window, window) = Window(-1, -1);
  TORCH_ARG(RotaryEmbedding, rotary) = nullptr;
  TORCH_ARG(bool, alibi) = false;
  // Of the attention to the memory.
  TORCH_ARG(std::string, cross_score) = "dot";
  TORCH_ARG(std::optional<int64_t>, cross_nhead) = std::nullopt;         // nhead by default
  TORCH_ARG(std::optional<int64_t>, cross_num_kv_heads) = std::nullopt;  // cross_nhead by default
  TORCH_ARG(std::optional<int64_t>, memory_dim) = std::nullopt;          // d_model by default
};

// Self-attention, attention to a memory, and a feed-forward network. `forward` computes all
// positions at once; `decode` computes the next positions from a cache and gives the same numbers,
// to rounding, as `forward` with tgt_is_causal:
//
//   auto cache = layer->new_cache(memory, capacity);         // projects the memory once
//   auto lengths = torch::zeros({batch}, torch::kLong);      // tokens in the cache, by sample
//   for (...) {
//     y = layer->decode(x, cache, lengths, memory_lengths);  // x: embeddings of the new token(s)
//     lengths += x.size(1);                                  // batch_first; else x.size(0)
//   }
//
// State-dict keys: self_attn.*, multihead_attn.* (the attention to the memory; both
// MultiHeadAttention), linear1.*, linear2.*, norm1.*, norm2.*, norm3.*.
class TORCH_SELFATTN_API TransformerDecoderLayerImpl
    : public torch::nn::Cloneable<TransformerDecoderLayerImpl> {
 public:
  TransformerDecoderLayerImpl(int64_t d_model, int64_t nhead)
      : TransformerDecoderLayerImpl(TransformerDecoderLayerOptions(d_model, nhead)) {}
  explicit TransformerDecoderLayerImpl(TransformerDecoderLayerOptions options_);
  void reset() override;
  void reset_parameters();

  // tgt (Lt, B, D), memory (Lm, B, memory_dim), or batch first, or without B -> as tgt.
  torch::Tensor forward(const torch::Tensor& tgt, const torch::Tensor& memory,
                        const torch::Tensor& tgt_mask = {}, const torch::Tensor& memory_mask = {},
                        const torch::Tensor& tgt_key_padding_mask = {},
                        const torch::Tensor& memory_key_padding_mask = {},
                        bool tgt_is_causal = false, bool memory_is_causal = false,
                        const torch::Tensor& tgt_lengths = {},
                        const torch::Tensor& memory_lengths = {});

  // `forward` and the weights of the attention to the memory, (B, cross_nhead, Lt, Lm).
  std::tuple<torch::Tensor, torch::Tensor> forward_with_weights(
      const torch::Tensor& tgt, const torch::Tensor& memory, const torch::Tensor& tgt_mask = {},
      const torch::Tensor& memory_mask = {}, const torch::Tensor& tgt_key_padding_mask = {},
      const torch::Tensor& memory_key_padding_mask = {}, bool tgt_is_causal = false,
      bool memory_is_causal = false, const torch::Tensor& tgt_lengths = {},
      const torch::Tensor& memory_lengths = {});

  // An empty cache for `capacity` positions. memory: (Lm, B, memory_dim), or batch first.
  KVCache new_cache(const torch::Tensor& memory, int64_t capacity);

  // The next T positions, causal, with what the cache holds of the ones before. For inference,
  // under torch::NoGradGuard: writes into the cache. The caller advances lengths by T after all
  // layers have run.
  //   tgt      (T, B, D), or (B, T, D) with batch_first
  //   lengths  (B) integer, how many positions of each sample the cache holds
  torch::Tensor decode(const torch::Tensor& tgt, KVCache& cache, const torch::Tensor& lengths,
                       const torch::Tensor& memory_lengths = {},
                       const torch::Tensor& memory_key_padding_mask = {});

  // `decode` and the weights of the attention to the memory, (B, cross_nhead, T, Lm).
  std::tuple<torch::Tensor, torch::Tensor> decode_with_weights(
      const torch::Tensor& tgt, KVCache& cache, const torch::Tensor& lengths,
      const torch::Tensor& memory_lengths = {}, const torch::Tensor& memory_key_padding_mask = {});

  TransformerDecoderLayerOptions options;
  MultiHeadAttention self_attn{nullptr};
  MultiHeadAttention multihead_attn{nullptr};
  torch::nn::Linear linear1{nullptr};
  torch::nn::Dropout dropout{nullptr};
  torch::nn::Linear linear2{nullptr};
  LayerNorm norm1{nullptr};
  LayerNorm norm2{nullptr};
  LayerNorm norm3{nullptr};
  torch::nn::Dropout dropout1{nullptr};
  torch::nn::Dropout dropout2{nullptr};
  torch::nn::Dropout dropout3{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(torch::Tensor())},
                           {4, torch::nn::AnyValue(torch::Tensor())},
                           {5, torch::nn::AnyValue(torch::Tensor())},
                           {6, torch::nn::AnyValue(false)}, {7, torch::nn::AnyValue(false)},
                           {8, torch::nn::AnyValue(torch::Tensor())},
                           {9, torch::nn::AnyValue(torch::Tensor())})

 private:
  torch::Tensor feed_forward(const torch::Tensor& x);
  torch::Tensor finish(const torch::Tensor& tgt, const torch::Tensor& attended);
  std::tuple<torch::Tensor, torch::Tensor> run(
      bool need_weights, const torch::Tensor& tgt, const torch::Tensor& memory,
      const torch::Tensor& tgt_mask, const torch::Tensor& memory_mask,
      const torch::Tensor& tgt_key_padding_mask, const torch::Tensor& memory_key_padding_mask,
      bool tgt_is_causal, bool memory_is_causal, const torch::Tensor& tgt_lengths,
      const torch::Tensor& memory_lengths);
  std::tuple<torch::Tensor, torch::Tensor> step(bool need_weights, torch::Tensor tgt,
                                                KVCache& cache, const torch::Tensor& lengths,
                                                const torch::Tensor& memory_lengths,
                                                const torch::Tensor& memory_key_padding_mask);
};
TORCH_MODULE(TransformerDecoderLayer);

// num_layers layers like the given one, each started anew, which share its rotary tables, and an
// optional last norm: TransformerEncoderOptions(layer, 6).norm(torch::nn::AnyModule(LayerNorm(64)))
struct TORCH_SELFATTN_API TransformerEncoderOptions {
  TransformerEncoderOptions(TransformerEncoderLayer encoder_layer, int64_t num_layers)
      : encoder_layer_(std::move(encoder_layer)), num_layers_(num_layers) {}
  TORCH_ARG(TransformerEncoderLayer, encoder_layer);
  TORCH_ARG(int64_t, num_layers);
  TORCH_ARG(torch::nn::AnyModule, norm);  // give one with norm_first
};

// A stack of encoder layers. State-dict keys: layers.<n>.*, norm.*.
class TORCH_SELFATTN_API TransformerEncoderImpl
    : public torch::nn::Cloneable<TransformerEncoderImpl> {
 public:
  TransformerEncoderImpl(TransformerEncoderLayer encoder_layer, int64_t num_layers)
      : TransformerEncoderImpl(TransformerEncoderOptions(std::move(encoder_layer), num_layers)) {}
  explicit TransformerEncoderImpl(TransformerEncoderOptions options_);
  void reset() override;
  void reset_parameters();

  // As TransformerEncoderLayer::forward.
  torch::Tensor forward(const torch::Tensor& src, const torch::Tensor& mask = {},
                        const torch::Tensor& src_key_padding_mask = {}, bool is_causal = false,
                        const torch::Tensor& key_lengths = {});

  TransformerEncoderOptions options;
  torch::nn::ModuleList layers{nullptr};
  torch::nn::AnyModule norm;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())},
                           {2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(false)},
                           {4, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(TransformerEncoder);

struct TORCH_SELFATTN_API TransformerDecoderOptions {
  TransformerDecoderOptions(TransformerDecoderLayer decoder_layer, int64_t num_layers)
      : decoder_layer_(std::move(decoder_layer)), num_layers_(num_layers) {}
  TORCH_ARG(TransformerDecoderLayer, decoder_layer);
  TORCH_ARG(int64_t, num_layers);
  TORCH_ARG(torch::nn::AnyModule, norm);
};

// A stack of decoder layers; the methods are those of the layer, with a cache for each layer and
// the weights (num_layers, B, cross_nhead, Lt, Lm). State-dict keys: layers.<n>.*, norm.*.
class TORCH_SELFATTN_API TransformerDecoderImpl
    : public torch::nn::Cloneable<TransformerDecoderImpl> {
 public:
  TransformerDecoderImpl(TransformerDecoderLayer decoder_layer, int64_t num_layers)
      : TransformerDecoderImpl(TransformerDecoderOptions(std::move(decoder_layer), num_layers)) {}
  explicit TransformerDecoderImpl(TransformerDecoderOptions options_);
  void reset() override;
  void reset_parameters();

  torch::Tensor forward(const torch::Tensor& tgt, const torch::Tensor& memory,
                        const torch::Tensor& tgt_mask = {}, const torch::Tensor& memory_mask = {},
                        const torch::Tensor& tgt_key_padding_mask = {},
                        const torch::Tensor& memory_key_padding_mask = {},
                        bool tgt_is_causal = false, bool memory_is_causal = false,
                        const torch::Tensor& tgt_lengths = {},
                        const torch::Tensor& memory_lengths = {});
  std::tuple<torch::Tensor, torch::Tensor> forward_with_weights(
      const torch::Tensor& tgt, const torch::Tensor& memory, const torch::Tensor& tgt_mask = {},
      const torch::Tensor& memory_mask = {}, const torch::Tensor& tgt_key_padding_mask = {},
      const torch::Tensor& memory_key_padding_mask = {}, bool tgt_is_causal = false,
      bool memory_is_causal = false, const torch::Tensor& tgt_lengths = {},
      const torch::Tensor& memory_lengths = {});
  std::vector<KVCache> new_cache(const torch::Tensor& memory, int64_t capacity);
  torch::Tensor decode(const torch::Tensor& tgt, std::vector<KVCache>& caches,
                       const torch::Tensor& lengths, const torch::Tensor& memory_lengths = {},
                       const torch::Tensor& memory_key_padding_mask = {});
  std::tuple<torch::Tensor, torch::Tensor> decode_with_weights(
      const torch::Tensor& tgt, std::vector<KVCache>& caches, const torch::Tensor& lengths,
      const torch::Tensor& memory_lengths = {}, const torch::Tensor& memory_key_padding_mask = {});

  TransformerDecoderOptions options;
  torch::nn::ModuleList layers{nullptr};
  torch::nn::AnyModule norm;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(torch::Tensor())},
                           {4, torch::nn::AnyValue(torch::Tensor())},
                           {5, torch::nn::AnyValue(torch::Tensor())},
                           {6, torch::nn::AnyValue(false)}, {7, torch::nn::AnyValue(false)},
                           {8, torch::nn::AnyValue(torch::Tensor())},
                           {9, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(TransformerDecoder);

}  // namespace torch_selfattn::nn
