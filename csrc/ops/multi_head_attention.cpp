#include <ATen/ops/linear.h>
#include <torch_selfattn/ops.h>

#include <array>
#include <vector>

#include "ops/canonical.h"
#include "ops/checks.h"
#include "ops/operator_handle.h"
#include "ops/packed_attention.h"
#include "ops/registration.h"

// multi_head_attention: in-projection, attention, out-projection. The heads are views of the
// projections, and the attention operator returns its output in the same memory order, so nothing
// is copied between them, nor their gradients.
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
                            const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
                            std::string_view activation, double negative_slope) {
  static const auto op =
      ops::operator_handle<decltype(multi_head_attention)>("multi_head_attention");
  return op.call(query, key, value, std::move(num_heads), in_proj_weight, in_proj_bias,
                 out_proj_weight, out_proj_bias, score_weight, std::move(num_kv_heads), attn_mask,
                 dropout_p, is_causal, scale, key_lengths, key_starts, std::move(window_left),
                 std::move(window_right), std::move(query_offset), query_offsets, alibi_slopes,
                 activation, negative_slope);
}

namespace ops {

namespace {

// The rows of the query, key and value projections in a packed or split in-projection.
struct InProjection {
  bool packed;
  std::array<SymInt, 4> begin;  // of each one's rows in the packed weight, and their end

  // What belongs to the projections cuts[i] ... cuts[i + 1] - 1, neighbours in the packed tensor;
  // nothing where there is no bias. One split, so that backward joins its gradients in one piece.
  std::vector<OptionalTensor> parts(at::TensorList list, const std::vector<size_t>& cuts) const {
    const size_t count = cuts.size() - 1;
    if (list.empty()) return std::vector<OptionalTensor>(count);
    if (!packed) return std::vector<OptionalTensor>(list.begin(), list.end());
    std::vector<SymInt> sizes;
    for (size_t i = 0; i < count; ++i) sizes.push_back(begin[cuts[i + 1]] - begin[cuts[i]]);
    const std::vector<Tensor> tensors = list[0].split_with_sizes_symint(sizes, 0);
    return std::vector<OptionalTensor>(tensors.begin(), tensors.end());
  }
};

// A projection of (B, L, D). Where the length is outside in memory, as without batch_first, that of
// the transposed input: linear() would copy an input that is not contiguous.
Tensor project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const bool length_outside =
      x.dim() == 3 && TORCH_GUARD_OR_FALSE(x.sym_stride(0).sym_lt(x.sym_stride(1)));
  if (!length_outside) return at::linear(x, weight, bias);
  return at::linear(x.transpose(0, 1), weight, bias).transpose(0, 1);
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
  return {weight.size() == 1, begin};
}

Tensor multi_head_attention_composite(
    const Tensor& query, const Tensor& key, const Tensor& value, SymInt num_heads,
    at::TensorList in_proj_weight, at::TensorList in_proj_bias, const Tensor& out_proj_weight,
    const OptionalTensor& out_proj_bias, const OptionalTensor& score_weight,
    std::optional<SymInt> num_kv_heads, const OptionalTensor& attn_mask, double dropout_p,
    bool is_causal, std::optional<double> scale, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, SymInt window_left, SymInt window_right, SymInt query_offset,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes,
    std::string_view activation, double negative_slope) {
  TORCH_CHECK((query.dim() == 2 || query.dim() == 3) && key.dim() == query.dim() &&
                  value.dim() == query.dim(),
              "multi_head_attention: query, key and value must be (B, L, D) or (L, D) (got query=",
              query.sym_sizes(), ", key=", key.sym_sizes(), ", value=", value.sym_sizes(), ")");
  const SymInt kv_heads = num_kv_heads.value_or(num_heads);
  TORCH_CHECK_VALUE(num_heads > 0 && kv_heads > 0 && num_heads % kv_heads == 0,
                    "multi_head_attention: num_heads must be a multiple of num_kv_heads (got "
                    "num_heads=",
                    num_heads, ", num_kv_heads=", kv_heads, ")");
  const std::optional<double> slope = check_activation(
      "multi_head_attention", score_weight.has_value(), activation, negative_slope);
  const InProjection projection =
      make_in_projection(query, key, value, in_proj_weight, in_proj_bias, num_heads, kv_heads);

  const auto batched = [](const Tensor& x) { return x.dim() == 2 ? x.unsqueeze(0) : x; };
  const bool grouped = num_heads != kv_heads;
  const bool is_self = query.is_same(key) && key.is_same(value);
  const bool same_batch =
      query.dim() == 2 || TORCH_GUARD_OR_FALSE(query.sym_size(0).sym_eq(key.sym_size(0)));
  Tensor joined;  // (B, Lq, H Ev)
  if (projection.packed && key.is_same(value) && same_batch) {
    // One matrix product for what has one input, and the attention on its output as it is.
    Tensor packed;
    OptionalTensor separate;
    if (is_self) {
      const OptionalTensor bias = in_proj_bias.empty() ? OptionalTensor() : in_proj_bias[0];
      packed = batched(project(query, in_proj_weight[0], bias));
    } else {
      const auto weights = projection.parts(in_proj_weight, {0, 1, 3});
      const auto biases = projection.parts(in_proj_bias, {0, 1, 3});
      separate = batched(project(query, *weights[0], biases[0]));
      packed = batched(project(key, *weights[1], biases[1]));
    }
    const HeadCounts<SymInt> counts{num_heads, kv_heads};
    HeadViews views;  // for the rules of the other arguments only, so no part of a graph
    {
      const at::NoGradGuard no_grad;
      views = split_packed(packed, separate, counts);
    }
    const AttentionTensors tensors =
        views.with({packed, separate, score_weight, attn_mask, key_lengths, key_starts,
                    query_offsets, alibi_slopes});
    const CanonicalProblem c = canonicalize(tensors.name(), tensors,
                                            {scale, slope, dropout_p, std::move(window_left),
                                             std::move(window_right), std::move(query_offset)},
                                            is_causal, grouped);
    joined = packed_attention_forward({packed, separate, c.weight, c.attn_mask, c.key_lengths,
                                       c.key_starts, c.query_offsets, c.alibi_slopes},
                                      counts, c.options)
                 .output;
  } else {
    const auto weights = projection.parts(in_proj_weight, {0, 1, 2, 3});
    const auto biases = projection.parts(in_proj_bias, {0, 1, 2, 3});
    const auto heads = [&](const Tensor& x, size_t i, const SymInt& count) {
      return split_heads(batched(project(x, *weights[i], biases[i])), count);
    };
    const Tensor q = heads(query, 0, num_heads);
    const Tensor k = heads(key, 1, kv_heads);
    const Tensor v = heads(value, 2, kv_heads);
    const Tensor attended =
        score_weight.has_value()
            ? additive_attention(q, k, v, *score_weight, attn_mask, dropout_p, is_causal, scale,
                                 grouped, key_lengths, key_starts, std::move(window_left),
                                 std::move(window_right), std::move(query_offset), query_offsets,
                                 alibi_slopes, activation, negative_slope)
            : dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale, grouped,
                                    key_lengths, key_starts, std::move(window_left),
                                    std::move(window_right), std::move(query_offset), query_offsets,
                                    alibi_slopes);
    joined = join_heads(attended);
  }
  const Tensor output = at::linear(joined, out_proj_weight, out_proj_bias);
  return query.dim() == 2 ? output.squeeze(0) : output;
}

}  // namespace

TORCH_SELFATTN_IMPL(CompositeImplicitAutograd, m) {
  m.impl("multi_head_attention", TORCH_FN(multi_head_attention_composite));
}

TORCH_SELFATTN_IMPL(FuncTorchBatchedDecomposition, m) {
  m.impl("multi_head_attention", TORCH_FN(multi_head_attention_composite));
}

}  // namespace ops
}  // namespace torch_selfattn
