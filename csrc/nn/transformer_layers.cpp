#include <torch/nn/init.h>

#include "nn/common.h"
#include "nn/masks.h"
#include "nn/transformer_common.h"

namespace torch_selfattn::nn {

using torch::Tensor;
using torch::nn::Dropout;
using torch::nn::Linear;
using torch::nn::LinearOptions;

void check_activation(const Activation& activation) {
  if (const auto* name = std::get_if<std::string>(&activation)) {
    TORCH_CHECK_VALUE(*name == "relu" || *name == "gelu" || *name == "silu",
                      "activation should be relu/gelu, not ", *name,
                      "; also silu or a callable (got '", *name, "')");
  }
}

Tensor activate(const Activation& activation, const Tensor& x) {
  if (const auto* function = std::get_if<1>(&activation)) return (*function)(x);
  const auto& name = std::get<std::string>(activation);
  if (name == "relu") return torch::relu(x);
  return name == "gelu" ? torch::gelu(x) : torch::silu(x);
}

LayerNormImpl::LayerNormImpl(LayerNormOptions options_) : options(std::move(options_)) {
  LayerNormImpl::reset();
}

void LayerNormImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.normalized_shape()}));
  if (options.bias()) {
    bias = register_parameter("bias", torch::empty({options.normalized_shape()}));
  }
  reset_parameters();
}

void LayerNormImpl::reset_parameters() {
  torch::nn::init::ones_(weight);
  if (bias.defined()) torch::nn::init::zeros_(bias);
}

void LayerNormImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::LayerNorm(" << options.normalized_shape()
         << ", eps=" << options.eps() << ", bias=" << text(options.bias()) << ')';
}

Tensor LayerNormImpl::forward(const Tensor& x) {
  return torch::layer_norm(x, {options.normalized_shape()}, given(weight), given(bias),
                           options.eps());
}

namespace {

// The self-attention of both layers.
template <typename Options>
MultiHeadAttentionOptions self_attention(const Options& options) {
  return MultiHeadAttentionOptions(options.d_model(), options.nhead())
      .dropout(options.dropout())
      .bias(options.bias())
      .batch_first(options.batch_first())
      .score(options.score())
      .num_kv_heads(options.num_kv_heads())
      .window(options.window())
      .rotary(options.rotary())
      .alibi(options.alibi());
}

template <typename Options>
Linear linear(const Options& options, int64_t in, int64_t out) {
  return Linear(LinearOptions(in, out).bias(options.bias()));
}

template <typename Options>
LayerNorm layer_norm(const Options& options) {
  return LayerNorm(
      LayerNormOptions(options.d_model()).eps(options.layer_norm_eps()).bias(options.bias()));
}

}  // namespace

TransformerEncoderLayerImpl::TransformerEncoderLayerImpl(TransformerEncoderLayerOptions options_)
    : options(std::move(options_)) {
  TransformerEncoderLayerImpl::reset();
}

void TransformerEncoderLayerImpl::reset() {
  check_activation(options.activation());
  const int64_t hidden = options.dim_feedforward();
  self_attn = register_module("self_attn", MultiHeadAttention(self_attention(options)));
  linear1 = register_module("linear1", linear(options, options.d_model(), hidden));
  dropout = register_module("dropout", Dropout(options.dropout()));
  linear2 = register_module("linear2", linear(options, hidden, options.d_model()));
  norm1 = register_module("norm1", layer_norm(options));
  norm2 = register_module("norm2", layer_norm(options));
  dropout1 = register_module("dropout1", Dropout(options.dropout()));
  dropout2 = register_module("dropout2", Dropout(options.dropout()));
}

void TransformerEncoderLayerImpl::reset_parameters() {
  self_attn->reset_parameters();
  linear1->reset_parameters();
  linear2->reset_parameters();
  for (auto norm : {norm1, norm2}) norm->reset_parameters();
}

Tensor TransformerEncoderLayerImpl::feed_forward(const Tensor& x) {
  const Tensor hidden = activate(options.activation(), linear1->forward(x));
  return dropout2->forward(linear2->forward(dropout->forward(hidden)));
}

Tensor TransformerEncoderLayerImpl::forward(const Tensor& src, const Tensor& src_mask,
                                            const Tensor& src_key_padding_mask, bool is_causal,
                                            const Tensor& key_lengths) {
  Tensor x = options.norm_first() ? norm1->forward(src) : src;
  const Tensor attended = std::get<0>(self_attn->forward(x, x, x, src_key_padding_mask, false,
                                                         src_mask, true, is_causal, key_lengths));
  x = src + dropout1->forward(attended);
  if (options.norm_first()) return x + feed_forward(norm2->forward(x));
  x = norm1->forward(x);
  return norm2->forward(x + feed_forward(x));
}

TransformerDecoderLayerImpl::TransformerDecoderLayerImpl(TransformerDecoderLayerOptions options_)
    : options(std::move(options_)) {
  TransformerDecoderLayerImpl::reset();
}

void TransformerDecoderLayerImpl::reset() {
  check_activation(options.activation());
  const int64_t hidden = options.dim_feedforward();
  self_attn = register_module("self_attn", MultiHeadAttention(self_attention(options)));
  multihead_attn = register_module(
      "multihead_attn",
      MultiHeadAttention(MultiHeadAttentionOptions(options.d_model(),
                                                   options.cross_nhead().value_or(options.nhead()))
                             .dropout(options.dropout())
                             .bias(options.bias())
                             .kdim(options.memory_dim())
                             .vdim(options.memory_dim())
                             .batch_first(options.batch_first())
                             .score(options.cross_score())
                             .num_kv_heads(options.cross_num_kv_heads())));
  linear1 = register_module("linear1", linear(options, options.d_model(), hidden));
  dropout = register_module("dropout", Dropout(options.dropout()));
  linear2 = register_module("linear2", linear(options, hidden, options.d_model()));
  norm1 = register_module("norm1", layer_norm(options));
  norm2 = register_module("norm2", layer_norm(options));
  norm3 = register_module("norm3", layer_norm(options));
  dropout1 = register_module("dropout1", Dropout(options.dropout()));
  dropout2 = register_module("dropout2", Dropout(options.dropout()));
  dropout3 = register_module("dropout3", Dropout(options.dropout()));
}

void TransformerDecoderLayerImpl::reset_parameters() {
  self_attn->reset_parameters();
  multihead_attn->reset_parameters();
  linear1->reset_parameters();
  linear2->reset_parameters();
  for (auto norm : {norm1, norm2, norm3}) norm->reset_parameters();
}

Tensor TransformerDecoderLayerImpl::feed_forward(const Tensor& x) {
  const Tensor hidden = activate(options.activation(), linear1->forward(x));
  return dropout3->forward(linear2->forward(dropout->forward(hidden)));
}

// What follows the attention to the memory.
Tensor TransformerDecoderLayerImpl::finish(const Tensor& tgt, const Tensor& attended) {
  Tensor x = tgt + dropout2->forward(attended);
  if (options.norm_first()) return x + feed_forward(norm3->forward(x));
  x = norm2->forward(x);
  return norm3->forward(x + feed_forward(x));
}

std::tuple<Tensor, Tensor> TransformerDecoderLayerImpl::run(
    bool need_weights, const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask,
    const Tensor& memory_mask, const Tensor& tgt_key_padding_mask,
    const Tensor& memory_key_padding_mask, bool tgt_is_causal, bool memory_is_causal,
    const Tensor& tgt_lengths, const Tensor& memory_lengths) {
  Tensor x = options.norm_first() ? norm1->forward(tgt) : tgt;
  x = tgt + dropout1->forward(std::get<0>(self_attn->forward(
                x, x, x, tgt_key_padding_mask, false, tgt_mask, true, tgt_is_causal, tgt_lengths)));
  if (!options.norm_first()) x = norm1->forward(x);
  const auto [attended, weights] = multihead_attn->forward(
      options.norm_first() ? norm2->forward(x) : x, memory, memory, memory_key_padding_mask,
      need_weights, memory_mask, false, memory_is_causal, memory_lengths);
  return {finish(x, attended), weights};
}

Tensor TransformerDecoderLayerImpl::forward(
    const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask, const Tensor& memory_mask,
    const Tensor& tgt_key_padding_mask, const Tensor& memory_key_padding_mask, bool tgt_is_causal,
    bool memory_is_causal, const Tensor& tgt_lengths, const Tensor& memory_lengths) {
  return std::get<0>(run(false, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                         memory_key_padding_mask, tgt_is_causal, memory_is_causal, tgt_lengths,
                         memory_lengths));
}

std::tuple<Tensor, Tensor> TransformerDecoderLayerImpl::forward_with_weights(
    const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask, const Tensor& memory_mask,
    const Tensor& tgt_key_padding_mask, const Tensor& memory_key_padding_mask, bool tgt_is_causal,
    bool memory_is_causal, const Tensor& tgt_lengths, const Tensor& memory_lengths) {
  return run(true, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
             memory_key_padding_mask, tgt_is_causal, memory_is_causal, tgt_lengths, memory_lengths);
}

KVCache TransformerDecoderLayerImpl::new_cache(const Tensor& memory, int64_t capacity) {
  TORCH_CHECK(memory.dim() == 3,
              "TransformerDecoderLayer: memory must have 3 dimensions (got memory=", shape(memory),
              ")");
  const Tensor rows = options.batch_first() ? memory : memory.transpose(0, 1);
  const auto [memory_key, memory_value] = multihead_attn->project_key_value(rows, rows);
  const std::vector<int64_t> size{rows.size(0), self_attn->num_kv_heads, capacity,
                                  self_attn->head_dim};
  return {memory_key.new_zeros(size), memory_key.new_zeros(size), memory_key, memory_value};
}

std::tuple<Tensor, Tensor> TransformerDecoderLayerImpl::step(
    bool need_weights, Tensor tgt, KVCache& cache, const Tensor& lengths,
    const Tensor& memory_lengths, const Tensor& memory_key_padding_mask) {
  TORCH_CHECK(tgt.dim() == 3,
              "TransformerDecoderLayer: tgt must have 3 dimensions (got tgt=", shape(tgt), ")");
  if (!options.batch_first()) tgt = tgt.transpose(0, 1);
  const int64_t steps = tgt.size(1);
  Tensor x = options.norm_first() ? norm1->forward(tgt) : tgt;
  const Tensor query = self_attn->project_query(x, 0, lengths);
  const auto [key, value] = self_attn->project_key_value(x, x, lengths);
  // (B, T) -> (B, Hk, T, E): where the new keys and values go.
  const Tensor rows = (lengths.unsqueeze(1) + torch::arange(steps, tgt.device()))
                          .to(torch::kLong)
                          .unsqueeze(1)
                          .unsqueeze(3)
                          .expand_as(key);
  cache.key.scatter_(2, rows, key.to(cache.key.scalar_type()));
  cache.value.scatter_(2, rows, value.to(cache.value.scalar_type()));
  x = tgt + dropout1->forward(std::get<0>(self_attn->attend(
                query, cache.key, cache.value, false, {}, true, lengths + steps, {}, 0, lengths)));
  if (!options.norm_first()) x = norm1->forward(x);
  const auto [attended, weights] = multihead_attn->attend(
      multihead_attn->project_query(options.norm_first() ? norm2->forward(x) : x), cache.memory_key,
      cache.memory_value, need_weights, merge_masks({}, memory_key_padding_mask, x.size(0)), false,
      memory_lengths);
  const Tensor output = finish(x, attended);
  return {options.batch_first() ? output : output.transpose(0, 1), weights};
}

Tensor TransformerDecoderLayerImpl::decode(const Tensor& tgt, KVCache& cache, const Tensor& lengths,
                                           const Tensor& memory_lengths,
                                           const Tensor& memory_key_padding_mask) {
  return std::get<0>(step(false, tgt, cache, lengths, memory_lengths, memory_key_padding_mask));
}

std::tuple<Tensor, Tensor> TransformerDecoderLayerImpl::decode_with_weights(
    const Tensor& tgt, KVCache& cache, const Tensor& lengths, const Tensor& memory_lengths,
    const Tensor& memory_key_padding_mask) {
  return step(true, tgt, cache, lengths, memory_lengths, memory_key_padding_mask);
}

}  // namespace torch_selfattn::nn
