#include <torch/nn/init.h>
#include <torch_selfattn/nn/attention.h>
#include <torch_selfattn/ops.h>

#include <cmath>

#include "nn/common.h"

namespace torch_selfattn::nn {

using torch::Tensor;

SelfAttentionImpl::SelfAttentionImpl(SelfAttentionOptions options_) : options(std::move(options_)) {
  SelfAttentionImpl::reset();
}

void SelfAttentionImpl::reset() {
  check_score("SelfAttention", options.score());
  check_activation("SelfAttention", options.score(), options.activation());
  check_dropout("SelfAttention", options.dropout());
  const int64_t embed_dim = options.embed_dim();
  const int64_t key_dim = options.key_dim().value_or(embed_dim);
  const bool additive = options.score() == "additive";
  window_left = options.window().first;
  window_right = options.is_causal() ? 0 : options.window().second;
  scale = options.scale().value_or(additive ? 1.0 : 1 / std::sqrt(static_cast<double>(key_dim)));
  const auto project = [&](const char* name, int64_t size) {
    return register_module(
        name, torch::nn::Linear(torch::nn::LinearOptions(embed_dim, size).bias(options.bias())));
  };
  if (options.alibi()) alibi = register_module("alibi", AlibiSlopes(1));
  q_proj = project("q_proj", key_dim);
  k_proj = project("k_proj", key_dim);
  v_proj = project("v_proj", options.value_dim().value_or(embed_dim));
  if (additive) score_weight = register_parameter("score_weight", torch::empty({key_dim}));
  reset_parameters();
}

void SelfAttentionImpl::reset_parameters() {
  for (const auto& projection : {q_proj, k_proj, v_proj}) {
    torch::nn::init::xavier_uniform_(projection->weight);
    if (projection->bias.defined()) torch::nn::init::zeros_(projection->bias);
  }
  if (score_weight.defined()) init_score_weight(score_weight);
}

void SelfAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::SelfAttention(score='" << options.score()
         << "', dropout=" << options.dropout()
         << activation_text(options.activation(), options.negative_slope());
  if (options.is_causal()) stream << ", is_causal=True";
  if (window_left >= 0 || window_right > 0) {
    stream << ", window=(" << window_left << ", " << window_right << ')';
  }
  stream << ')';
}

std::tuple<Tensor, Tensor> SelfAttentionImpl::forward(const Tensor& x, const Tensor& attn_mask,
                                                      const Tensor& key_lengths,
                                                      bool need_weights) {
  const Tensor query = q_proj->forward(x);
  const Tensor key = k_proj->forward(x);
  const Tensor value = v_proj->forward(x);
  const double dropout_p = is_training() ? options.dropout() : 0.0;
  const auto slopes = alibi ? given(alibi->slopes) : std::nullopt;
  const auto mask = given(attn_mask);
  const auto lengths = given(key_lengths);
  const Tensor output =
      score_weight.defined()
          ? additive_attention(query, key, value, score_weight, mask, dropout_p, false, scale,
                               false, lengths, std::nullopt, window_left, window_right, 0,
                               std::nullopt, slopes, options.activation(), options.negative_slope())
          : dot_product_attention(query, key, value, mask, dropout_p, false, scale, false, lengths,
                                  std::nullopt, window_left, window_right, 0, std::nullopt, slopes);
  Tensor weights;
  if (need_weights) {
    weights = attention_weights(query, key, given(score_weight), std::nullopt, std::nullopt, mask,
                                false, scale, false, lengths, std::nullopt, window_left,
                                window_right, 0, std::nullopt, slopes, false, options.activation(),
                                options.negative_slope());
  }
  return {output, weights};
}

AdditiveAttentionImpl::AdditiveAttentionImpl(AdditiveAttentionOptions options_)
    : options(std::move(options_)) {
  AdditiveAttentionImpl::reset();
}

void AdditiveAttentionImpl::reset() {
  check_activation("AdditiveAttention", "additive", options.activation());
  check_dropout("AdditiveAttention", options.dropout());
  const int64_t hidden = options.hidden_dim();
  using torch::nn::Linear;
  using torch::nn::LinearOptions;
  q_proj = register_module("q_proj",
                           Linear(LinearOptions(options.query_dim(), hidden).bias(options.bias())));
  k_proj = register_module("k_proj", Linear(LinearOptions(options.key_dim(), hidden).bias(false)));
  score_weight = register_parameter("score_weight", torch::empty({hidden}));
  reset_parameters();
}

void AdditiveAttentionImpl::reset_parameters() {
  torch::nn::init::xavier_uniform_(q_proj->weight);
  torch::nn::init::xavier_uniform_(k_proj->weight);
  if (q_proj->bias.defined()) torch::nn::init::zeros_(q_proj->bias);
  init_score_weight(score_weight);
}

void AdditiveAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::AdditiveAttention(dropout=" << options.dropout()
         << activation_text(options.activation(), options.negative_slope()) << ')';
}

Tensor AdditiveAttentionImpl::project_key(const Tensor& key) { return k_proj->forward(key); }

std::tuple<Tensor, Tensor> AdditiveAttentionImpl::attend(
    const Tensor& query, const Tensor& projected_key, const Tensor& value, const Tensor& attn_mask,
    const Tensor& key_lengths, bool need_weights) {
  const Tensor hidden = q_proj->forward(query);
  const double dropout_p = is_training() ? options.dropout() : 0.0;
  const Tensor context = additive_attention(
      hidden, projected_key, value, score_weight, given(attn_mask), dropout_p, false, std::nullopt,
      false, given(key_lengths), std::nullopt, -1, -1, 0, std::nullopt, std::nullopt,
      options.activation(), options.negative_slope());
  Tensor weights;
  if (need_weights) {
    weights = attention_weights(hidden, projected_key, score_weight, std::nullopt, std::nullopt,
                                given(attn_mask), false, std::nullopt, false, given(key_lengths),
                                std::nullopt, -1, -1, 0, std::nullopt, std::nullopt, false,
                                options.activation(), options.negative_slope());
  }
  return {context, weights};
}

std::tuple<Tensor, Tensor> AdditiveAttentionImpl::forward(const Tensor& query, const Tensor& key,
                                                          const Tensor& value,
                                                          const Tensor& attn_mask,
                                                          const Tensor& key_lengths,
                                                          bool need_weights) {
  return attend(query, project_key(key), value.defined() ? value : key, attn_mask, key_lengths,
                need_weights);
}

}  // namespace torch_selfattn::nn
