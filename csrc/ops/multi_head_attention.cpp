#include <ATen/ops/linear.h>
#include <torch/library.h>
#include <torch_selfattn/ops.h>

#include <array>

#include "ops/operator_handle.h"

// multi_head_attention: in-projection, attention, out-projection. The heads are views of the
// projections, and the attention operator returns its output in the same memory order, so nothing
// is copied between them.
namespace torch_selfattn {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

Tensor multi_head_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                            SymInt num_heads, at::TensorList in_proj_weight,
                            at::TensorList in_proj_bias, const Tensor& out_proj_weight,
                            const OptionalTensor& out_proj_bias, const OptionalTensor& score_weight,
                            std::optional<SymInt> num_kv_heads, const OptionalTensor& attn_mask,
                            double dropout_p, bool is_causal, std::optional<double> scale,
                            const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                            SymInt window_left, SymInt window_right, SymInt query_offset,
                            const OptionalTensor& query_offsets,
                            const OptionalTensor& alibi_slopes) {
  static const auto op =
      ops::operator_handle<decltype(multi_head_attention)>("multi_head_attention");
  return op.call(query, key, value, std::move(num_heads), in_proj_weight, in_proj_bias,
                 out_proj_weight, out_proj_bias, score_weight, std::move(num_kv_heads), attn_mask,
                 dropout_p, is_causal, scale, key_lengths, key_starts, std::move(window_left),
                 std::move(window_right), std::move(query_offset), query_offsets, alibi_slopes);
}

namespace ops {

namespace {

// The rows of the query, key and value projections in a packed or split in-projection.
struct InProjection {
  at::TensorList weight;
  at::TensorList bias;
  std::array<SymInt, 4> begin;  // of each one's rows in the packed weight, and their end

  bool packed() const { return weight.size() == 1; }

  // x through the projections first ... last - 1, which are neighbours in the packed weight.
  Tensor project(const Tensor& x, size_t first, size_t last) const {
    const auto rows = [&](at::TensorList list) -> OptionalTensor {
      if (list.empty()) return std::nullopt;
      if (!packed()) return list[first];
      if (first == 0 && last == 3) return list[0];
      return list[0].narrow_symint(0, begin[first], begin[last] - begin[first]);
    };
    return at::linear(x, *rows(weight), rows(bias));
  }
};

// (B, L, heads * dim) as (B, heads, L, dim), a view.
Tensor split_heads(const Tensor& x, const SymInt& heads) {
  const SymInt dim = x.sym_size(-1) / heads;
  return x.unflatten_symint(-1, {heads, dim}).transpose(-3, -2);
}

InProjection make_in_projection(const Tensor& query, const Tensor& key, const Tensor& value,
                                at::TensorList weight, at::TensorList bias, const SymInt& heads,
                                const SymInt& kv_heads) {
  TORCH_CHECK(weight.size() == 1 || weight.size() == 3,
              "multi_head_attention: in_proj_weight must be one packed weight or three (got ",
              weight.size(), ")");
  TORCH_CHECK(bias.empty() || bias.size() == weight.size(),
              "multi_head_attention: in_proj_bias must be empty or have as many tensors as "
              "in_proj_weight (got ",
              bias.size(), " and ", weight.size(), ")");
  for (size_t i = 0; i < weight.size(); ++i) {
    TORCH_CHECK(weight[i].dim() == 2,
                "multi_head_attention: in_proj_weight must have two "
                "dimensions (got ",
                weight[i].sym_sizes(), ")");
    if (bias.empty()) continue;
    TORCH_CHECK(
        bias[i].dim() == 1 &&
            TORCH_GUARD_OR_FALSE(bias[i].sym_size(0).sym_eq(weight[i].sym_size(0))),
        "multi_head_attention: in_proj_bias must have as many elements as in_proj_weight has "
        "rows (got in_proj_weight=",
        weight[i].sym_sizes(), ", in_proj_bias=", bias[i].sym_sizes(), ")");
  }
  const std::array<const Tensor*, 3> inputs = {&query, &key, &value};
  for (size_t i = 0; i < 3; ++i) {
    const Tensor& w = weight[weight.size() == 1 ? 0 : i];
    TORCH_CHECK(TORCH_GUARD_OR_FALSE(w.sym_size(1).sym_eq(inputs[i]->sym_size(-1))),
                "multi_head_attention: in_proj_weight must have as many columns as its input (got ",
                "input=", inputs[i]->sym_sizes(), ", in_proj_weight=", w.sym_sizes(), ")");
  }
  std::array<SymInt, 4> begin = {0, 0, 0, 0};
  if (weight.size() == 1) {
    const SymInt parts = heads + kv_heads * 2;
    const SymInt rows = weight[0].sym_size(0);
    TORCH_CHECK(TORCH_GUARD_OR_FALSE((rows % parts).sym_eq(0)),
                "multi_head_attention: the rows of the packed in_proj_weight must be a multiple of "
                "num_heads + 2 num_kv_heads (got in_proj_weight=",
                weight[0].sym_sizes(), ", num_heads=", heads, ", num_kv_heads=", kv_heads, ")");
    const SymInt dim = rows / parts;
    begin = {0, heads * dim, (heads + kv_heads) * dim, rows};
  } else {
    const SymInt counts[] = {heads, kv_heads, kv_heads};
    for (size_t i = 0; i < 3; ++i) {
      TORCH_CHECK(
          TORCH_GUARD_OR_FALSE((weight[i].sym_size(0) % counts[i]).sym_eq(0)),
          "multi_head_attention: the rows of in_proj_weight must be a multiple of the heads "
          "(got in_proj_weight=",
          weight[i].sym_sizes(), ", heads=", counts[i], ")");
    }
  }
  return {weight, bias, begin};
}

Tensor multi_head_attention_composite(
    const Tensor& query, const Tensor& key, const Tensor& value, SymInt num_heads,
    at::TensorList in_proj_weight, at::TensorList in_proj_bias, const Tensor& out_proj_weight,
    const OptionalTensor& out_proj_bias, const OptionalTensor& score_weight,
    std::optional<SymInt> num_kv_heads, const OptionalTensor& attn_mask, double dropout_p,
    bool is_causal, std::optional<double> scale, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, SymInt window_left, SymInt window_right, SymInt query_offset,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes) {
  TORCH_CHECK((query.dim() == 2 || query.dim() == 3) && key.dim() == query.dim() &&
                  value.dim() == query.dim(),
              "multi_head_attention: query, key and value must be (B, L, D) or (L, D) (got query=",
              query.sym_sizes(), ", key=", key.sym_sizes(), ", value=", value.sym_sizes(), ")");
  const SymInt kv_heads = num_kv_heads.value_or(num_heads);
  TORCH_CHECK_VALUE(num_heads > 0 && kv_heads > 0 && num_heads % kv_heads == 0,
                    "multi_head_attention: num_heads must be a multiple of num_kv_heads (got "
                    "num_heads=",
                    num_heads, ", num_kv_heads=", kv_heads, ")");
  const InProjection projection =
      make_in_projection(query, key, value, in_proj_weight, in_proj_bias, num_heads, kv_heads);

  // As few matrix products as the inputs allow.
  Tensor q;
  Tensor k;
  Tensor v;
  const auto part = [&](const Tensor& packed, size_t first, size_t i) {
    return packed.narrow_symint(-1, projection.begin[i] - projection.begin[first],
                                projection.begin[i + 1] - projection.begin[i]);
  };
  if (projection.packed() && query.is_same(key) && key.is_same(value)) {
    const Tensor packed = projection.project(query, 0, 3);
    q = part(packed, 0, 0);
    k = part(packed, 0, 1);
    v = part(packed, 0, 2);
  } else {
    q = projection.project(query, 0, 1);
    if (projection.packed() && key.is_same(value)) {
      const Tensor packed = projection.project(key, 1, 3);
      k = part(packed, 1, 1);
      v = part(packed, 1, 2);
    } else {
      k = projection.project(key, 1, 2);
      v = projection.project(value, 2, 3);
    }
  }
  const auto batched = [](const Tensor& x) { return x.dim() == 2 ? x.unsqueeze(0) : x; };
  q = split_heads(batched(q), num_heads);
  k = split_heads(batched(k), kv_heads);
  v = split_heads(batched(v), kv_heads);
  const bool grouped = num_heads != kv_heads;
  const Tensor attended =
      score_weight.has_value()
          ? additive_attention(q, k, v, *score_weight, attn_mask, dropout_p, is_causal, scale,
                               grouped, key_lengths, key_starts, std::move(window_left),
                               std::move(window_right), std::move(query_offset), query_offsets,
                               alibi_slopes)
          : dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale, grouped,
                                  key_lengths, key_starts, std::move(window_left),
                                  std::move(window_right), std::move(query_offset), query_offsets,
                                  alibi_slopes);
  const Tensor joined = attended.transpose(-3, -2).flatten(-2);  // (B, Lq, H Ev)
  const Tensor output = at::linear(joined, out_proj_weight, out_proj_bias);
  return query.dim() == 2 ? output.squeeze(0) : output;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_selfattn, CompositeImplicitAutograd, m) {
  m.impl("multi_head_attention", TORCH_FN(multi_head_attention_composite));
}

TORCH_LIBRARY_IMPL(torch_selfattn, FuncTorchBatchedDecomposition, m) {
  m.impl("multi_head_attention", TORCH_FN(multi_head_attention_composite));
}

}  // namespace ops
}  // namespace torch_selfattn
