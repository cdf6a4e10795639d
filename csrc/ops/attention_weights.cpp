#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>
#include <torch_selfattn/ops.h>

#include <cmath>
#include <limits>

#include "ops/autograd/composed_attention.h"
#include "ops/canonical.h"
#include "ops/operator_handle.h"

// attention_weights: chosen rows of the weight matrix, composed of differentiable operators. Memory
// is that of the rows asked for; the additive score makes no tensor of Lq * Lk * E elements either.
namespace torch_selfattn {

using at::Tensor;
using c10::SymInt;
using ops::OptionalTensor;

Tensor attention_weights(const Tensor& query, const Tensor& key, const OptionalTensor& weight,
                         const OptionalTensor& rows, const OptionalTensor& heads,
                         const OptionalTensor& attn_mask, bool is_causal,
                         std::optional<double> scale, bool enable_gqa,
                         const OptionalTensor& key_lengths, const OptionalTensor& key_starts,
                         SymInt window_left, SymInt window_right, SymInt query_offset,
                         const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes) {
  static const auto op = ops::operator_handle<decltype(attention_weights)>("attention_weights");
  return op.call(query, key, weight, rows, heads, attn_mask, is_causal, scale, enable_gqa,
                 key_lengths, key_starts, std::move(window_left), std::move(window_right),
                 std::move(query_offset), query_offsets, alibi_slopes);
}

namespace ops {

namespace {

void check_selection(const char* name, const Tensor& query, const OptionalTensor& selection) {
  if (!selection.has_value()) return;
  TORCH_CHECK(selection->dim() == 1 &&
                  (selection->scalar_type() == at::kLong || selection->scalar_type() == at::kInt),
              "attention_weights: ", name, " must be int64 or int32, one dimension (got ", name,
              "=", selection->sym_sizes(), " ", selection->dtype(), ")");
  TORCH_CHECK(selection->device() == query.device(), "attention_weights: ", name,
              " must be on the device of query (got query=", query.device(), ", ", name, "=",
              selection->device(), ")");
}

Tensor select(const Tensor& t, int64_t dim, const OptionalTensor& selection) {
  return selection.has_value() ? at::index_select(t, dim, *selection) : t;
}

// A mask or slopes, whose broadcast dimensions stay.
Tensor select_unless_broadcast(const Tensor& t, int64_t dim, const OptionalTensor& selection) {
  return TORCH_GUARD_OR_FALSE(t.sym_size(dim).sym_eq(1)) ? t : select(t, dim, selection);
}

Tensor dot_scores(const Tensor& query, const Tensor& key, std::optional<double> scale) {
  const bool narrow = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  const at::ScalarType dtype = narrow ? at::kFloat : query.scalar_type();
  const double head_dim = static_cast<double>(query.sym_size(3).guard_int(__FILE__, __LINE__));
  const double factor = scale.value_or(1.0 / std::sqrt(std::max(head_dim, 1.0)));
  // Scores stay float32: autocast would round them to its dtype.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return at::matmul(query.to(dtype) * factor, key.to(dtype).transpose(-2, -1));
}

// The log-sum-exp over a single key is its score. So with the keys in the role of queries and one
// row in the role of the key, the attention operator gives a row of scores: tanh(q + k) is
// symmetric.
Tensor additive_scores(const Tensor& query, const Tensor& key, const Tensor& weight,
                       std::optional<double> scale) {
  const int64_t rows = query.sym_size(2).guard_int(__FILE__, __LINE__);
  if (rows == 0) {  // no scores, but a gradient (zero) for everything
    return dot_scores(query * weight.unsqueeze(-2), key, 1.0);
  }
  const OptionalTensor some_weight = weight;
  const OptionalTensor none;
  const AttentionOptions<SymInt> options{scale, 0.0, -1, -1, 0};
  std::vector<Tensor> scores;
  for (int64_t row = 0; row < rows; ++row) {
    const Tensor one = query.narrow(2, row, 1);
    scores.push_back(
        attention_forward({key, one, one, some_weight, none, none, none, none, none}, options).lse);
  }
  return at::stack(scores, 2);  // (B, H, R, Lk)
}

Tensor attention_weights_composite(
    const Tensor& query, const Tensor& key, const OptionalTensor& weight,
    const OptionalTensor& rows, const OptionalTensor& heads, const OptionalTensor& attn_mask,
    bool is_causal, std::optional<double> scale, bool enable_gqa, const OptionalTensor& key_lengths,
    const OptionalTensor& key_starts, SymInt window_left, SymInt window_right, SymInt query_offset,
    const OptionalTensor& query_offsets, const OptionalTensor& alibi_slopes) {
  const char* op = "attention_weights";
  check_selection("rows", query, rows);
  check_selection("heads", query, heads);
  const AttentionTensors given{query,       key,        key,           weight,      attn_mask,
                               key_lengths, key_starts, query_offsets, alibi_slopes};
  const CanonicalProblem c = canonicalize(
      op, given,
      {scale, 0.0, std::move(window_left), std::move(window_right), std::move(query_offset)},
      is_causal, enable_gqa);

  // Only the rows and heads asked for.
  const SymInt query_heads = c.query->sym_size(1);
  const SymInt key_heads = c.key->sym_size(1);
  const SymInt group = key_heads == 0 ? SymInt(1) : query_heads / key_heads;
  const Tensor chosen_query = select(select(*c.query, 1, heads), 2, rows);
  Tensor chosen_key = *c.key;
  if (heads.has_value() && group == 1) {
    chosen_key = select(*c.key, 1, heads);
  } else if (heads.has_value()) {
    chosen_key =
        at::index_select(*c.key, 1, heads->div(group.guard_int(__FILE__, __LINE__), "floor"));
  } else {
    chosen_key = repeat_heads(*c.key, query_heads);
  }

  Tensor scores;
  if (c.weight.has_value()) {
    const bool per_head = c.weight->dim() == 2;
    const Tensor chosen_weight = per_head ? select(*c.weight, 0, heads) : *c.weight;
    scores = additive_scores(chosen_query, chosen_key, chosen_weight, scale);
  } else {
    scores = dot_scores(chosen_query, chosen_key, scale);
  }
  Tensor allowed = allowed_pairs(c.tensors(), c.options, rows.value_or(Tensor()));
  if (c.alibi_slopes.has_value()) {
    const Tensor slopes = select_unless_broadcast(*c.alibi_slopes, 1, heads);
    const Tensor distances =
        key_distances(c.tensors(), c.options, rows.value_or(Tensor()), scores.scalar_type());
    scores = scores - slopes.to(scores.scalar_type()).unsqueeze(-1).unsqueeze(-1) * distances;
  }
  if (c.attn_mask.has_value()) {
    const Tensor mask =
        select_unless_broadcast(select_unless_broadcast(*c.attn_mask, 1, heads), 2, rows);
    const bool is_bool = mask.scalar_type() == at::kBool;
    const Tensor open = is_bool ? mask : mask.ne(-std::numeric_limits<double>::infinity());
    if (!is_bool) scores = scores + mask.masked_fill(open.logical_not(), 0.0);
    allowed = allowed.defined() ? at::logical_and(allowed, open) : open;
  }
  return c.restore(masked_softmax(scores, allowed).weights).to(query.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_selfattn, CompositeImplicitAutograd, m) {
  m.impl("attention_weights", TORCH_FN(attention_weights_composite));
}

TORCH_LIBRARY_IMPL(torch_selfattn, FuncTorchBatchedDecomposition, m) {
  m.impl("attention_weights", TORCH_FN(attention_weights_composite));
}

}  // namespace ops
}  // namespace torch_selfattn
