#include "nn/transformer_common.h"

namespace torch_selfattn::nn {

using torch::Tensor;
using torch::nn::AnyModule;

namespace {

// The given norm, as in Python; a clone, which starts with the members of the original, has a clone
// of it.
AnyModule own_norm(const AnyModule& member, const AnyModule& option) {
  return member.is_empty() ? option : member.clone();
}

}  // namespace

TransformerEncoderImpl::TransformerEncoderImpl(TransformerEncoderOptions options_)
    : options(std::move(options_)) {
  TransformerEncoderImpl::reset();
}

void TransformerEncoderImpl::reset() {
  layers = register_module("layers", copies(options.encoder_layer(), options.num_layers()));
  norm = own_norm(norm, options.norm());
  if (!norm.is_empty()) register_module("norm", norm.ptr());
}

void TransformerEncoderImpl::reset_parameters() {
  for (const auto& layer : *layers) layer->as<TransformerEncoderLayer>()->reset_parameters();
}

Tensor TransformerEncoderImpl::forward(const Tensor& src, const Tensor& mask,
                                       const Tensor& src_key_padding_mask, bool is_causal,
                                       const Tensor& key_lengths) {
  Tensor x = src;
  for (const auto& layer : *layers) {
    x = layer->as<TransformerEncoderLayer>()->forward(x, mask, src_key_padding_mask, is_causal,
                                                      key_lengths);
  }
  return norm.is_empty() ? x : norm.forward(x);
}

TransformerDecoderImpl::TransformerDecoderImpl(TransformerDecoderOptions options_)
    : options(std::move(options_)) {
  TransformerDecoderImpl::reset();
}

void TransformerDecoderImpl::reset() {
  layers = register_module("layers", copies(options.decoder_layer(), options.num_layers()));
  norm = own_norm(norm, options.norm());
  if (!norm.is_empty()) register_module("norm", norm.ptr());
}

void TransformerDecoderImpl::reset_parameters() {
  for (const auto& layer : *layers) layer->as<TransformerDecoderLayer>()->reset_parameters();
}

Tensor TransformerDecoderImpl::forward(const Tensor& tgt, const Tensor& memory,
                                       const Tensor& tgt_mask, const Tensor& memory_mask,
                                       const Tensor& tgt_key_padding_mask,
                                       const Tensor& memory_key_padding_mask, bool tgt_is_causal,
                                       bool memory_is_causal, const Tensor& tgt_lengths,
                                       const Tensor& memory_lengths) {
  Tensor x = tgt;
  for (const auto& layer : *layers) {
    x = layer->as<TransformerDecoderLayer>()->forward(
        x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
        tgt_is_causal, memory_is_causal, tgt_lengths, memory_lengths);
  }
  return norm.is_empty() ? x : norm.forward(x);
}

std::tuple<Tensor, Tensor> TransformerDecoderImpl::forward_with_weights(
    const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask, const Tensor& memory_mask,
    const Tensor& tgt_key_padding_mask, const Tensor& memory_key_padding_mask, bool tgt_is_causal,
    bool memory_is_causal, const Tensor& tgt_lengths, const Tensor& memory_lengths) {
  Tensor x = tgt;
  std::vector<Tensor> all_weights;
  for (const auto& layer : *layers) {
    Tensor weights;
    std::tie(x, weights) = layer->as<TransformerDecoderLayer>()->forward_with_weights(
        x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
        tgt_is_causal, memory_is_causal, tgt_lengths, memory_lengths);
    all_weights.push_back(weights);
  }
  return {norm.is_empty() ? x : norm.forward(x), torch::stack(all_weights)};
}

std::vector<KVCache> TransformerDecoderImpl::new_cache(const Tensor& memory, int64_t capacity) {
  std::vector<KVCache> caches;
  for (const auto& layer : *layers) {
    caches.push_back(layer->as<TransformerDecoderLayer>()->new_cache(memory, capacity));
  }
  return caches;
}

Tensor TransformerDecoderImpl::decode(const Tensor& tgt, std::vector<KVCache>& caches,
                                      const Tensor& lengths, const Tensor& memory_lengths,
                                      const Tensor& memory_key_padding_mask) {
  Tensor x = tgt;
  auto cache = caches.begin();
  for (const auto& layer : *layers) {
    x = layer->as<TransformerDecoderLayer>()->decode(x, *cache++, lengths, memory_lengths,
                                                     memory_key_padding_mask);
  }
  return norm.is_empty() ? x : norm.forward(x);
}

std::tuple<Tensor, Tensor> TransformerDecoderImpl::decode_with_weights(
    const Tensor& tgt, std::vector<KVCache>& caches, const Tensor& lengths,
    const Tensor& memory_lengths, const Tensor& memory_key_padding_mask) {
  Tensor x = tgt;
  std::vector<Tensor> all_weights;
  auto cache = caches.begin();
  for (const auto& layer : *layers) {
    Tensor weights;
    std::tie(x, weights) = layer->as<TransformerDecoderLayer>()->decode_with_weights(
        x, *cache++, lengths, memory_lengths, memory_key_padding_mask);
    all_weights.push_back(weights);
  }
  return {norm.is_empty() ? x : norm.forward(x), torch::stack(all_weights)};
}

}  // namespace torch_selfattn::nn
