#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch_selfattn/export.h>
#include <torch_selfattn/nn/attention.h>
#include <torch_selfattn/nn/positional.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torch_selfattn::nn {

struct TORCH_SELFATTN_API MultiHeadAttentionOptions {
  MultiHeadAttentionOptions(int64_t embed_dim, int64_t num_heads)
      : embed_dim_(embed_dim), num_heads_(num_heads) {}
  TORCH_ARG(int64_t, embed_dim);           // size of the queries and of the output
  TORCH_ARG(int64_t, num_heads);           // query heads; head dim = embed_dim / num_heads
  TORCH_ARG(double, dropout) = 0.0;        // probability of dropping a weight in training
  TORCH_ARG(bool, bias) = true;            // whether the projections have one
  TORCH_ARG(bool, add_bias_kv) = false;    // append one trained key and value to each sequence
  TORCH_ARG(bool, add_zero_attn) = false;  // append a key and value of zeros to each sequence
  TORCH_ARG(std::optional<int64_t>, kdim) = std::nullopt;          // embed_dim by default
  TORCH_ARG(std::optional<int64_t>, vdim) = std::nullopt;          // embed_dim by default
  TORCH_ARG(bool, batch_first) = false;                            // (B, L, D) instead of (L, B, D)
  TORCH_ARG(std::string, score) = "dot";                           // "dot" or "additive"
  TORCH_ARG(std::optional<int64_t>, num_kv_heads) = std::nullopt;  // num_heads by default
  TORCH_ARG(Window, window) = Window(-1, -1);                      // appended keys are seen by all
  // Rotates queries and keys (not the appended ones) by their position.
  TORCH_ARG(RotaryEmbedding, rotary) = nullptr;
  // Factor of the score; by default 1 / sqrt(head dim) for the dot product, 1 for the additive.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  // Lowers the score by the distance of query and key times a slope of the head. Not with
  // add_bias_kv and add_zero_attn.
  TORCH_ARG(bool, alibi) = false;
  // Of the additive score: "tanh", "relu", or "leaky_relu" with this slope below 0.
  TORCH_ARG(std::string, activation) = "tanh";
  TORCH_ARG(double, negative_slope) = 0.2;
};

// Multi-head attention with the arguments, state dict and conventions of Python's
// torch.nn.MultiheadAttention: sequence first unless batch_first, and in boolean masks true = do
// NOT attend. A sample whose keys are all padding gives the out-projection's bias, not NaN;
// is_causal holds by itself and together with a mask; weights are those before dropout.
//
// State-dict keys: in_proj_weight (E + 2 Ekv, E), or, if kdim or vdim differ from embed_dim,
// q_proj_weight (E, E), k_proj_weight (Ekv, kdim), v_proj_weight (Ekv, vdim); out_proj.weight
// (E, E); with bias in_proj_bias (E + 2 Ekv) and out_proj.bias (E); with add_bias_kv bias_k and
// bias_v (1, 1, Ekv); additive score: score_weight (num_heads, head dim). E = embed_dim, Ekv =
// num_kv_heads * head dim.
class TORCH_SELFATTN_API MultiHeadAttentionImpl
    : public torch::nn::Cloneable<MultiHeadAttentionImpl> {
 public:
  MultiHeadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiHeadAttentionImpl(MultiHeadAttentionOptions(embed_dim, num_heads)) {}
  explicit MultiHeadAttentionImpl(MultiHeadAttentionOptions options_);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // query (Lq, B, embed_dim), or (B, Lq, embed_dim) with batch_first, or (Lq, embed_dim); key
  // (..., kdim) and value (..., vdim) likewise -> the output, in the layout of query, and the
  // weights, (B, Lq, Lk') averaged over the heads or (B, num_heads, Lq, Lk'), or undefined. Lk'
  // counts the appended keys.
  //   key_padding_mask        (B, Lk) or (Lk): true = ignore this key, or floating, added
  //   need_weights            false costs memory linear in the lengths
  //   attn_mask               (Lq, Lk) or (B * num_heads, Lq, Lk): true = ignore, or floating
  //   is_causal               query i sees keys j <= i (+ query offset) only
  //   key_lengths, key_starts (B): sample b sees keys key_starts[b] <= j < key_lengths[b]
  //   query_offset(s)         position of the first query on the axis of the keys; query_offsets
  //                           (B) is added to query_offset
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
      const torch::Tensor& key_padding_mask = {}, bool need_weights = true,
      const torch::Tensor& attn_mask = {}, bool average_attn_weights = true, bool is_causal = false,
      const torch::Tensor& key_lengths = {}, const torch::Tensor& key_starts = {},
      int64_t query_offset = 0, const torch::Tensor& query_offsets = {});

  // query (B, Lq, embed_dim) -> (B, H, Lq, head dim), projected and rotated.
  torch::Tensor project_query(const torch::Tensor& query, int64_t query_offset = 0,
                              const torch::Tensor& query_offsets = {});

  // key (B, Lk, kdim), value (B, Lk, vdim) -> both (B, Hk, Lk, head dim), projected, the key
  // rotated; row l stands at position l, or key_offsets[b] + l.
  std::tuple<torch::Tensor, torch::Tensor> project_key_value(const torch::Tensor& key,
                                                             const torch::Tensor& value,
                                                             const torch::Tensor& key_offsets = {});

  // Attention and out-projection for what project_query and project_key_value give. The mask is one
  // of the operators (true = attend), broadcastable to (B, H, Lq, Lk). Returns (B, Lq, embed_dim)
  // and the weights (B, H, Lq, Lk), with average_weights (B, Lq, Lk), or undefined.
  std::tuple<torch::Tensor, torch::Tensor> attend(
      const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
      bool need_weights = false, const torch::Tensor& attn_mask = {}, bool is_causal = false,
      const torch::Tensor& key_lengths = {}, const torch::Tensor& key_starts = {},
      int64_t query_offset = 0, const torch::Tensor& query_offsets = {},
      bool average_weights = false);

  MultiHeadAttentionOptions options;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t kv_embed_dim = 0;
  double scale = 1.0;
  RotaryEmbedding rotary{nullptr};
  AlibiSlopes alibi{nullptr};
  // Those that the options do not ask for are undefined.
  torch::Tensor q_proj_weight;
  torch::Tensor k_proj_weight;
  torch::Tensor v_proj_weight;
  torch::Tensor in_proj_weight;
  torch::Tensor in_proj_bias;
  torch::nn::Linear out_proj{nullptr};
  torch::Tensor bias_k;
  torch::Tensor bias_v;
  torch::Tensor score_weight;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(torch::Tensor())},
                           {4, torch::nn::AnyValue(true)},
                           {5, torch::nn::AnyValue(torch::Tensor())},
                           {6, torch::nn::AnyValue(true)}, {7, torch::nn::AnyValue(false)},
                           {8, torch::nn::AnyValue(torch::Tensor())},
                           {9, torch::nn::AnyValue(torch::Tensor())},
                           {10, torch::nn::AnyValue(int64_t{0})},
                           {11, torch::nn::AnyValue(torch::Tensor())})

 private:
  struct Keys;  // which keys a query may attend to
  void check_options() const;
  void reset_in_projection();
  std::vector<torch::Tensor> split_weights() const;
  torch::Tensor heads(const torch::Tensor& x, int64_t count) const;
  torch::Tensor to_batch_first(const torch::Tensor& x) const;
  Keys with_appended_keys(torch::Tensor& key, torch::Tensor& value, const Keys& keys,
                          int64_t query_length) const;
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query,
                                                  const torch::Tensor& key,
                                                  const torch::Tensor& value, const Keys& keys,
                                                  bool need_weights, bool average_weights);
  torch::Tensor fused(const torch::Tensor& query, const torch::Tensor& key,
                      const torch::Tensor& value, const Keys& keys);
};
TORCH_MODULE(MultiHeadAttention);

}  // namespace torch_selfattn::nn
