#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch_selfattn/export.h>
#include <torch_selfattn/nn/positional.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

// One-head attention: the textbook blocks. Masks are those of the operators: true = attend.
namespace torch_selfattn::nn {

// (left, right): how many positions before and after its own each one sees, -1 = all.
using Window = std::pair<int64_t, int64_t>;

struct TORCH_SELFATTN_API SelfAttentionOptions {
  SelfAttentionOptions(int64_t embed_dim)  // NOLINT(google-explicit-constructor)
      : embed_dim_(embed_dim) {}
  TORCH_ARG(int64_t, embed_dim);                              // size of the input's last dimension
  TORCH_ARG(std::string, score) = "dot";                      // "dot" or "additive"
  TORCH_ARG(std::optional<int64_t>, key_dim) = std::nullopt;  // embed_dim by default
  TORCH_ARG(std::optional<int64_t>, value_dim) = std::nullopt;  // embed_dim by default
  TORCH_ARG(bool, bias) = true;                                 // whether the projections have one
  TORCH_ARG(double, dropout) = 0.0;    // probability of dropping an attention weight in training
  TORCH_ARG(bool, is_causal) = false;  // position i attends to positions j <= i only
  TORCH_ARG(Window, window) = Window(-1, -1);
  // Factor of the score; by default 1 / sqrt(key_dim) for the dot product, 1 for the additive.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  TORCH_ARG(bool, alibi) = false;  // lowers the score by the distance of two positions / 256
  // Of the additive score: "tanh", "relu", or "leaky_relu" with this slope below 0.
  TORCH_ARG(std::string, activation) = "tanh";
  TORCH_ARG(double, negative_slope) = 0.2;
};

// One head of self-attention (Vaswani et al., 2017; additive: Bahdanau et al., 2015).
//   y_i = sum_j softmax_j(score(q_i, k_j)) v_j,  q = W_q x + b_q, k = ..., v = ...
// State-dict keys: q_proj.weight (key_dim, embed_dim), k_proj.weight (key_dim, embed_dim),
// v_proj.weight (value_dim, embed_dim), with bias also q_proj.bias, k_proj.bias, v_proj.bias;
// additive: score_weight (key_dim).
class TORCH_SELFATTN_API SelfAttentionImpl : public torch::nn::Cloneable<SelfAttentionImpl> {
 public:
  explicit SelfAttentionImpl(int64_t embed_dim)
      : SelfAttentionImpl(SelfAttentionOptions(embed_dim)) {}
  explicit SelfAttentionImpl(SelfAttentionOptions options_);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // x (B, L, embed_dim) or (L, embed_dim) -> (output (..., L, value_dim), weights or undefined).
  // attn_mask: broadcastable to (B, L, L). key_lengths (B): sample b is padding from
  // key_lengths[b] on. need_weights: also return the weights (B, L, L), before dropout.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x,
                                                   const torch::Tensor& attn_mask = {},
                                                   const torch::Tensor& key_lengths = {},
                                                   bool need_weights = false);

  SelfAttentionOptions options;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double scale = 1.0;
  AlibiSlopes alibi{nullptr};
  torch::nn::Linear q_proj{nullptr};
  torch::nn::Linear k_proj{nullptr};
  torch::nn::Linear v_proj{nullptr};
  torch::Tensor score_weight;  // undefined for the dot product

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())},
                           {2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(false)})
};
TORCH_MODULE(SelfAttention);

struct TORCH_SELFATTN_API AdditiveAttentionOptions {
  AdditiveAttentionOptions(int64_t query_dim, int64_t key_dim, int64_t hidden_dim)
      : query_dim_(query_dim), key_dim_(key_dim), hidden_dim_(hidden_dim) {}
  TORCH_ARG(int64_t, query_dim);
  TORCH_ARG(int64_t, key_dim);
  TORCH_ARG(int64_t, hidden_dim);
  TORCH_ARG(bool, bias) = true;      // whether the hidden layer has one
  TORCH_ARG(double, dropout) = 0.0;  // probability of dropping an attention weight in training
  // Of the hidden layer: "tanh", "relu", or "leaky_relu" with this slope below 0 (GATv2).
  TORCH_ARG(std::string, activation) = "tanh";
  TORCH_ARG(double, negative_slope) = 0.2;
};

// Bahdanau's attention (2015): score_ij = w . tanh(W_q q_i + W_k k_j + b). The values are not
// projected. The hidden layer of all pairs, (Lq, Lk, hidden_dim), is never formed.
// State-dict keys: q_proj.weight (hidden_dim, query_dim), with bias q_proj.bias (hidden_dim),
// k_proj.weight (hidden_dim, key_dim), score_weight (hidden_dim).
class TORCH_SELFATTN_API AdditiveAttentionImpl
    : public torch::nn::Cloneable<AdditiveAttentionImpl> {
 public:
  AdditiveAttentionImpl(int64_t query_dim, int64_t key_dim, int64_t hidden_dim)
      : AdditiveAttentionImpl(AdditiveAttentionOptions(query_dim, key_dim, hidden_dim)) {}
  explicit AdditiveAttentionImpl(AdditiveAttentionOptions options_);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // key (..., Lk, key_dim) -> (..., Lk, hidden_dim), to be used again for every step of a decoder
  // by `attend`.
  torch::Tensor project_key(const torch::Tensor& key);

  // `forward` with keys that `project_key` has projected.
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query,
                                                  const torch::Tensor& projected_key,
                                                  const torch::Tensor& value,
                                                  const torch::Tensor& attn_mask = {},
                                                  const torch::Tensor& key_lengths = {},
                                                  bool need_weights = false);

  // query (B, Lq, query_dim), key (B, Lk, key_dim), value (B, Lk, Dv), by default the key ->
  // (context (B, Lq, Dv), weights (B, Lq, Lk) or undefined); or all without B. attn_mask:
  // broadcastable to (B, Lq, Lk). key_lengths (B): keys are padding from key_lengths[b] on.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query,
                                                   const torch::Tensor& key,
                                                   const torch::Tensor& value = {},
                                                   const torch::Tensor& attn_mask = {},
                                                   const torch::Tensor& key_lengths = {},
                                                   bool need_weights = false);

  AdditiveAttentionOptions options;
  torch::nn::Linear q_proj{nullptr};
  torch::nn::Linear k_proj{nullptr};
  torch::Tensor score_weight;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(torch::Tensor())},
                           {4, torch::nn::AnyValue(torch::Tensor())},
                           {5, torch::nn::AnyValue(false)})
};
TORCH_MODULE(AdditiveAttention);

}  // namespace torch_selfattn::nn
