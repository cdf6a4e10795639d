#include <torch/nn/init.h>
#include <torch_selfattn/nn/multi_head_attention.h>
#include <torch_selfattn/ops.h>

#include <cmath>
#include <limits>

#include "nn/common.h"
#include "nn/masks.h"

namespace torch_selfattn::nn {

using torch::Tensor;

struct MultiHeadAttentionImpl::Keys {
  Tensor mask;  // as the operators take it: true = attend
  int64_t left = -1;
  int64_t right = -1;
  Tensor lengths;
  Tensor starts;
  int64_t offset = 0;
  Tensor offsets;
};

MultiHeadAttentionImpl::MultiHeadAttentionImpl(MultiHeadAttentionOptions options_)
    : options(std::move(options_)) {
  MultiHeadAttentionImpl::reset();
}

void MultiHeadAttentionImpl::check_options() const {
  constexpr const char* name = "MultiHeadAttention";
  check_score(name, options.score());
  check_activation(name, options.score(), options.activation());
  check_dropout(name, options.dropout());
  const int64_t embed_dim = options.embed_dim();
  const int64_t num_heads = options.num_heads();
  const int64_t kv_heads = options.num_kv_heads().value_or(num_heads);
  TORCH_CHECK_VALUE(embed_dim > 0 && num_heads > 0, name,
                    ": embed_dim and num_heads must be greater than 0, got embed_dim=", embed_dim,
                    " and num_heads=", num_heads, " instead (got embed_dim=", embed_dim,
                    ", num_heads=", num_heads, ")");
  TORCH_CHECK_VALUE(embed_dim % num_heads == 0, name,
                    ": embed_dim must be divisible by num_heads (got embed_dim=", embed_dim,
                    ", num_heads=", num_heads, ")");
  TORCH_CHECK_VALUE(kv_heads > 0 && num_heads % kv_heads == 0, name,
                    ": num_heads must be divisible by num_kv_heads (got num_heads=", num_heads,
                    ", num_kv_heads=", kv_heads, ")");
  if (options.rotary()) {
    const int64_t dim = options.rotary()->options.dim();
    TORCH_CHECK_VALUE(dim <= embed_dim / num_heads, name,
                      ": rotary.dim must not exceed the head dim (got rotary.dim=", dim,
                      ", head dim=", embed_dim / num_heads, ")");
  }
  TORCH_CHECK_VALUE(!options.alibi() || !(options.add_bias_kv() || options.add_zero_attn()), name,
                    ": alibi does not go with add_bias_kv and add_zero_attn (got add_bias_kv=",
                    text(options.add_bias_kv()), ", add_zero_attn=", text(options.add_zero_attn()),
                    ")");
}

void MultiHeadAttentionImpl::reset() {
  check_options();
  const int64_t embed_dim = options.embed_dim();
  const int64_t kdim = options.kdim().value_or(embed_dim);
  const int64_t vdim = options.vdim().value_or(embed_dim);
  const bool additive = options.score() == "additive";
  num_kv_heads = options.num_kv_heads().value_or(options.num_heads());
  head_dim = embed_dim / options.num_heads();
  kv_embed_dim = num_kv_heads * head_dim;
  scale = options.scale().value_or(additive ? 1.0 : 1 / std::sqrt(static_cast<double>(head_dim)));

  // A clone starts with the members of the original. The given module is shared, as in Python; a
  // clone has one of its own, on its own device.
  if (rotary) {
    rotary = RotaryEmbedding(std::make_shared<RotaryEmbeddingImpl>(*rotary));
  } else {
    rotary = options.rotary();
  }
  if (rotary) register_module("rotary", rotary);
  if (options.alibi()) alibi = register_module("alibi", AlibiSlopes(options.num_heads()));

  // In the order of torch.nn.MultiheadAttention, so that parameters() of both can be zipped.
  const auto parameter = [&](const char* name, std::vector<int64_t> shape) {
    return register_parameter(name, torch::empty(shape));
  };
  const int64_t total = embed_dim + 2 * kv_embed_dim;
  if (kdim == embed_dim && vdim == embed_dim) {
    in_proj_weight = parameter("in_proj_weight", {total, embed_dim});
  } else {
    q_proj_weight = parameter("q_proj_weight", {embed_dim, embed_dim});
    k_proj_weight = parameter("k_proj_weight", {kv_embed_dim, kdim});
    v_proj_weight = parameter("v_proj_weight", {kv_embed_dim, vdim});
  }
  if (options.bias()) in_proj_bias = parameter("in_proj_bias", {total});
  out_proj = register_module(
      "out_proj",
      torch::nn::Linear(torch::nn::LinearOptions(embed_dim, embed_dim).bias(options.bias())));
  if (options.add_bias_kv()) {
    bias_k = parameter("bias_k", {1, 1, kv_embed_dim});
    bias_v = parameter("bias_v", {1, 1, kv_embed_dim});
  }
  if (additive) score_weight = parameter("score_weight", {options.num_heads(), head_dim});
  reset_in_projection();
}

void MultiHeadAttentionImpl::reset_parameters() {
  out_proj->reset_parameters();
  reset_in_projection();
}

void MultiHeadAttentionImpl::reset_in_projection() {
  namespace init = torch::nn::init;
  for (const auto& weight : {in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight}) {
    if (weight.defined()) init::xavier_uniform_(weight);
  }
  if (in_proj_bias.defined()) {
    init::zeros_(in_proj_bias);
    init::zeros_(out_proj->bias);
  }
  if (bias_k.defined()) {
    init::xavier_normal_(bias_k);
    init::xavier_normal_(bias_v);
  }
  if (score_weight.defined()) init_score_weight(score_weight);
}

void MultiHeadAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::MultiHeadAttention(" << options.embed_dim() << ", "
         << options.num_heads() << ", score='" << options.score() << '\''
         << activation_text(options.activation(), options.negative_slope());
  if (num_kv_heads != options.num_heads()) stream << ", num_kv_heads=" << num_kv_heads;
  const auto [left, right] = options.window();
  if (left >= 0 || right >= 0) stream << ", window=(" << left << ", " << right << ')';
  if (options.dropout() > 0) stream << ", dropout=" << options.dropout();
  stream << ", batch_first=" << text(options.batch_first()) << ')';
}

std::vector<Tensor> MultiHeadAttentionImpl::split_weights() const {
  if (in_proj_weight.defined()) {
    return in_proj_weight.split_with_sizes({options.embed_dim(), kv_embed_dim, kv_embed_dim});
  }
  return {q_proj_weight, k_proj_weight, v_proj_weight};
}

// (B, L, count * E) -> (B, count, L, E), a view.
Tensor MultiHeadAttentionImpl::heads(const Tensor& x, int64_t count) const {
  return x.unflatten(-1, torch::IntArrayRef{count, head_dim}).transpose(1, 2);
}

namespace {

// (B, L): the positions of rows whose sample b starts at offset + offsets[b].
Tensor positions_of(int64_t length, int64_t offset, const Tensor& offsets) {
  return torch::arange(length, offsets.device()) + (offsets.unsqueeze(1) + offset);
}

Tensor part(const Tensor& bias, int64_t begin, int64_t end) {
  return bias.defined() ? bias.slice(0, begin, end) : bias;
}

// x (B, L, D). Without batch_first the length is outside in memory, and linear() would copy an
// input that is not contiguous.
Tensor project(const Tensor& x, const Tensor& weight, const Tensor& bias, bool batch_first) {
  if (batch_first) return torch::linear(x, weight, given(bias));
  return torch::linear(x.transpose(0, 1), weight, given(bias)).transpose(0, 1);
}

}  // namespace

Tensor MultiHeadAttentionImpl::project_query(const Tensor& query, int64_t query_offset,
                                             const Tensor& query_offsets) {
  const int64_t e = options.embed_dim();
  const Tensor weight = in_proj_weight.defined() ? in_proj_weight.slice(0, 0, e) : q_proj_weight;
  const Tensor q = heads(project(query, weight, part(in_proj_bias, 0, e), options.batch_first()),
                         options.num_heads());
  if (!rotary) return q;
  if (!query_offsets.defined()) return rotary->forward(q, query_offset);
  return rotary->forward(q, 0, positions_of(q.size(2), query_offset, query_offsets));
}

std::tuple<Tensor, Tensor> MultiHeadAttentionImpl::project_key_value(const Tensor& key,
                                                                     const Tensor& value,
                                                                     const Tensor& key_offsets) {
  const int64_t e = options.embed_dim();
  const int64_t kv = kv_embed_dim;
  Tensor k;
  Tensor v;
  if (in_proj_weight.defined() && value.is_same(key)) {
    const Tensor both = project(key, in_proj_weight.slice(0, e), part(in_proj_bias, e, e + 2 * kv),
                                options.batch_first());
    // One split, whose backward joins the two gradients; that of two slices adds them up.
    const auto halves = both.chunk(2, -1);
    k = halves[0];
    v = halves[1];
  } else {
    const auto weights = split_weights();
    k = project(key, weights[1], part(in_proj_bias, e, e + kv), options.batch_first());
    v = project(value, weights[2], part(in_proj_bias, e + kv, e + 2 * kv), options.batch_first());
  }
  k = heads(k, num_kv_heads);
  v = heads(v, num_kv_heads);
  if (rotary) {
    k = key_offsets.defined() ? rotary->forward(k, 0, positions_of(k.size(2), 0, key_offsets))
                              : rotary->forward(k);
  }
  return {k, v};
}

std::tuple<Tensor, Tensor> MultiHeadAttentionImpl::attend(
    const Tensor& query, const Tensor& key, const Tensor& value, bool need_weights,
    const Tensor& attn_mask, bool is_causal, const Tensor& key_lengths, const Tensor& key_starts,
    int64_t query_offset, const Tensor& query_offsets, bool average_weights) {
  const auto [left, right] = options.window();
  const Keys keys{attn_mask,  left,         is_causal ? 0 : right, key_lengths,
                  key_starts, query_offset, query_offsets};
  return attend(query, key, value, keys, need_weights, average_weights);
}

std::tuple<Tensor, Tensor> MultiHeadAttentionImpl::attend(const Tensor& query, const Tensor& key,
                                                          const Tensor& value, const Keys& keys,
                                                          bool need_weights, bool average_weights) {
  const double dropout_p = is_training() ? options.dropout() : 0.0;
  const auto slopes = alibi ? given(alibi->slopes) : std::nullopt;
  const auto mask = given(keys.mask);
  const auto lengths = given(keys.lengths);
  const auto starts = given(keys.starts);
  const auto offsets = given(keys.offsets);
  const Tensor attended =
      score_weight.defined()
          ? additive_attention(query, key, value, score_weight, mask, dropout_p, false, scale, true,
                               lengths, starts, keys.left, keys.right, keys.offset, offsets, slopes,
                               options.activation(), options.negative_slope())
          : dot_product_attention(query, key, value, mask, dropout_p, false, scale, true, lengths,
                                  starts, keys.left, keys.right, keys.offset, offsets, slopes);
  Tensor weights;
  if (need_weights) {
    weights =
        attention_weights(query, key, given(score_weight), std::nullopt, std::nullopt, mask, false,
                          scale, true, lengths, starts, keys.left, keys.right, keys.offset, offsets,
                          slopes, average_weights, options.activation(), options.negative_slope());
  }
  return {out_proj->forward(attended.transpose(1, 2).flatten(2)), weights};
}

// The whole of it as one operator.
Tensor MultiHeadAttentionImpl::fused(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Keys& keys) {
  std::vector<Tensor> weights{in_proj_weight};
  std::vector<Tensor> biases;
  if (in_proj_bias.defined()) biases = {in_proj_bias};
  if (!in_proj_weight.defined()) {
    weights = split_weights();
    if (in_proj_bias.defined()) {
      biases = in_proj_bias.split_with_sizes({options.embed_dim(), kv_embed_dim, kv_embed_dim});
    }
  }
  return multi_head_attention(
      query, key, value, options.num_heads(), weights, biases, out_proj->weight,
      given(out_proj->bias), given(score_weight), num_kv_heads, given(keys.mask),
      is_training() ? options.dropout() : 0.0, false, scale, given(keys.lengths),
      given(keys.starts), keys.left, keys.right, keys.offset, given(keys.offsets),
      alibi ? given(alibi->slopes) : std::nullopt, options.activation(), options.negative_slope());
}

// add_bias_kv and add_zero_attn: more keys behind the sequence, which all queries see. They lie
// outside of every bound, so the bounds become a mask.
MultiHeadAttentionImpl::Keys MultiHeadAttentionImpl::with_appended_keys(
    Tensor& key, Tensor& value, const Keys& keys, int64_t query_length) const {
  const int64_t length = key.size(2);
  Tensor mask = keys.mask;
  if (keys.left >= 0 || keys.right >= 0 || keys.lengths.defined() || keys.starts.defined()) {
    const Tensor seen = window_mask(query_length, length, key.device(), keys.lengths, keys.starts,
                                    keys.left, keys.right, keys.offset, keys.offsets);
    if (!mask.defined()) {
      mask = seen;
    } else if (mask.scalar_type() == torch::kBool) {
      mask = mask.logical_and(seen);
    } else {
      mask = mask.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity());
    }
  }
  if (bias_k.defined()) {
    const std::vector<int64_t> shape{key.size(0), num_kv_heads, 1, head_dim};
    key = torch::cat({key, heads(bias_k, num_kv_heads).expand(shape)}, 2);
    value = torch::cat({value, heads(bias_v, num_kv_heads).expand(shape)}, 2);
  }
  if (options.add_zero_attn()) {
    key = torch::constant_pad_nd(key, {0, 0, 0, 1});
    value = torch::constant_pad_nd(value, {0, 0, 0, 1});
  }
  if (mask.defined()) {
    if (mask.size(-1) == 1 && length != 1) {
      auto shape = mask.sizes().vec();
      shape.back() = length;
      mask = mask.expand(shape);
    }
    const int fill = mask.scalar_type() == torch::kBool ? 1 : 0;
    mask = torch::constant_pad_nd(mask, {0, key.size(2) - length}, fill);
  }
  Keys all;
  all.mask = mask;
  return all;
}

Tensor MultiHeadAttentionImpl::to_batch_first(const Tensor& x) const {
  if (x.dim() == 2) return x.unsqueeze(0);
  return options.batch_first() ? x : x.transpose(0, 1);
}

std::tuple<Tensor, Tensor> MultiHeadAttentionImpl::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_padding_mask,
    bool need_weights, const Tensor& attn_mask, bool average_attn_weights, bool is_causal,
    const Tensor& key_lengths, const Tensor& key_starts, int64_t query_offset,
    const Tensor& query_offsets) {
  check_inputs(query, key, value, key_padding_mask, attn_mask, options.embed_dim(),
               options.num_heads(), in_proj_weight.defined(), options.batch_first());
  const bool is_batched = query.dim() == 3;
  const Tensor padding =
      key_padding_mask.defined() && !is_batched ? key_padding_mask.unsqueeze(0) : key_padding_mask;
  // One tensor given twice stays one, so that it is projected by one matrix product.
  const Tensor query_rows = to_batch_first(query);
  const Tensor key_rows = key.is_same(query) ? query_rows : to_batch_first(key);
  const Tensor value_rows = value.is_same(key) ? key_rows : to_batch_first(value);

  Keys keys;
  keys.mask = merge_masks(attn_mask, padding, query_rows.size(0));
  keys.left = options.window().first;
  keys.right = is_causal ? 0 : options.window().second;
  keys.lengths = key_lengths;
  keys.starts = key_starts;
  keys.offset = query_offset;
  keys.offsets = query_offsets;

  Tensor output;
  Tensor weights;
  const bool appends = bias_k.defined() || options.add_zero_attn();
  if (!rotary && !appends && !need_weights) {
    output = fused(query_rows, key_rows, value_rows, keys);
  } else {
    const Tensor q = project_query(query_rows, query_offset, query_offsets);
    auto [k, v] = project_key_value(key_rows, value_rows);
    if (appends) keys = with_appended_keys(k, v, keys, q.size(2));
    std::tie(output, weights) = attend(q, k, v, keys, need_weights, average_attn_weights);
  }
  if (!is_batched) return {output[0], weights.defined() ? weights[0] : weights};
  return {options.batch_first() ? output : output.transpose(0, 1), weights};
}

}  // namespace torch_selfattn::nn
