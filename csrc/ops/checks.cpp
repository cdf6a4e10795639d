#include "ops/checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "ops/known_equal.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

void check_index_tensor(const char* op, const char* name, const Tensor& query,
                        const OptionalTensor& index) {
  if (!index.has_value()) return;
  TORCH_CHECK(index->scalar_type() == at::kLong || index->scalar_type() == at::kInt, op, ": ", name,
              " must be int64 or int32 (got ", name, ".dtype=", index->dtype(), ")");
  TORCH_CHECK(index->device() == query.device(), op, ": ", name,
              " must be on the device of query (got query=", query.device(), ", ", name, "=",
              index->device(), ")");
}

void check_shape(const char* op, const char* name, const Tensor& tensor,
                 c10::SymIntArrayRef expected) {
  const c10::SymIntArrayRef sizes = tensor.sym_sizes();
  bool same = sizes.size() == expected.size();
  for (size_t d = 0; same && d < expected.size(); ++d) same = known_equal(sizes[d], expected[d]);
  TORCH_CHECK(same, op, ": ", name, " must have the shape ", expected, " (got ", name, "=",
              tensor.sym_sizes(), ")");
}

void check_broadcastable(const char* op, const char* name, const Tensor& tensor,
                         c10::SymIntArrayRef full) {
  const c10::SymIntArrayRef sizes = tensor.sym_sizes();
  bool fits = sizes.size() == full.size();
  for (size_t d = 0; fits && d < full.size(); ++d) {
    fits = known_equal(sizes[d], 1) || known_equal(sizes[d], full[d]);
  }
  TORCH_CHECK(fits, op, ": ", name, " must be broadcastable to ", full, " (got ", name, "=",
              tensor.sym_sizes(), ")");
}

}  // namespace

void check_attention_arguments(const char* op, const AttentionTensors& t,
                               const AttentionOptions<SymInt>& options, bool will_be_cast) {
  const Tensor& q = t.query;
  const Tensor& k = t.key;
  const Tensor& v = t.value;
  TORCH_CHECK(q.dim() >= 2 && k.dim() >= 2 && v.dim() >= 2, op,
              ": Expected query, key, and value to all be  at least 2 dimensional (got query=",
              q.sym_sizes(), ", key=", k.sym_sizes(), ", value=", v.sym_sizes(), ")");
  TORCH_CHECK(q.device() == k.device() && q.device() == v.device(), op,
              ": Expected query, key, and value to have the same device type (got query=",
              q.device(), ", key=", k.device(), ", value=", v.device(), ")");
  TORCH_CHECK(
      will_be_cast || (q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type()),
      op, ": Expected query, key, and value to have the same dtype (got query=", q.dtype(),
      ", key=", k.dtype(), ", value=", v.dtype(), ")");
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported_dtype(q.scalar_type()), op,
                              ": query must be float64, float32, float16 or bfloat16 (got ",
                              "query.dtype=", q.dtype(), ")");
  const c10::SymIntArrayRef q_sizes = q.sym_sizes();
  const c10::SymIntArrayRef k_sizes = k.sym_sizes();
  const c10::SymIntArrayRef v_sizes = v.sym_sizes();
  TORCH_SYM_CHECK(q_sizes.back().sym_eq(k_sizes.back()), op,
                  ": query and key must have the same head dim (got query=", q.sym_sizes(),
                  ", key=", k.sym_sizes(), ")");
  TORCH_SYM_CHECK(k_sizes[k_sizes.size() - 2].sym_eq(v_sizes[v_sizes.size() - 2]), op,
                  ": key and value must have the same length (got key=", k.sym_sizes(),
                  ", value=", v.sym_sizes(), ")");
  if (t.weight.has_value()) {
    const Tensor& w = *t.weight;
    TORCH_CHECK(w.device() == q.device(), op,
                ": weight must be on the device of query (got query=", q.device(),
                ", weight=", w.device(), ")");
    TORCH_CHECK(will_be_cast || w.scalar_type() == q.scalar_type(), op,
                ": weight must have the dtype of query (got query=", q.dtype(),
                ", weight=", w.dtype(), ")");
    TORCH_CHECK(w.dim() >= 1 && known_equal(w.sym_sizes().back(), q_sizes.back()), op,
                ": weight must have as many columns as query (got query=", q.sym_sizes(),
                ", weight=", w.sym_sizes(), ")");
  }
  if (t.attn_mask.has_value()) {
    const Tensor& mask = *t.attn_mask;
    TORCH_CHECK(mask.device() == q.device(), op,
                ": attn_mask must be on the device of query (got query=", q.device(),
                ", attn_mask=", mask.device(), ")");
    TORCH_CHECK(mask.scalar_type() == at::kBool || mask.scalar_type() == at::kFloat ||
                    mask.scalar_type() == q.scalar_type() || will_be_cast,
                op,
                ": Expected attn_mask dtype to be bool or float or to match query dtype (got "
                "attn_mask=",
                mask.dtype(), ", query=", q.dtype(), ")");
  }
  if (t.alibi_slopes.has_value()) {
    const Tensor& slopes = *t.alibi_slopes;
    TORCH_CHECK(slopes.device() == q.device(), op,
                ": alibi_slopes must be on the device of query (got query=", q.device(),
                ", alibi_slopes=", slopes.device(), ")");
    TORCH_CHECK(slopes.scalar_type() == at::kFloat || slopes.scalar_type() == q.scalar_type() ||
                    (will_be_cast && slopes.is_floating_point()),
                op,
                ": alibi_slopes must be float32 or have the dtype of query (got query=", q.dtype(),
                ", alibi_slopes=", slopes.dtype(), ")");
  }
  check_index_tensor(op, "key_lengths", q, t.key_lengths);
  check_index_tensor(op, "key_starts", q, t.key_starts);
  check_index_tensor(op, "query_offsets", q, t.query_offsets);
  TORCH_CHECK_VALUE(options.dropout_p >= 0.0 && options.dropout_p <= 1.0, op,
                    ": dropout_p must be between 0 and 1 (got dropout_p=", options.dropout_p, ")");
  TORCH_CHECK_VALUE(!options.negative_slope.has_value() ||
                        (t.weight.has_value() && std::isfinite(*options.negative_slope)),
                    op, ": negative_slope must be finite, and of an additive score (got ",
                    "negative_slope=", *options.negative_slope,
                    ", weight=", t.weight.has_value() ? "a tensor" : "None", ")");
  TORCH_CHECK_VALUE(
      options.window_left >= -1, op,
      ": window_left must be -1 (open) or more (got window_left=", options.window_left, ")");
  TORCH_CHECK_VALUE(
      options.window_right >= -1, op,
      ": window_right must be -1 (open) or more (got window_right=", options.window_right, ")");
}

std::optional<double> check_activation(const char* op, bool additive, std::string_view activation,
                                       double negative_slope) {
  TORCH_CHECK_VALUE(activation == "tanh" || activation == "leaky_relu" || activation == "relu", op,
                    ": activation must be tanh, leaky_relu or relu (got activation=", activation,
                    ")");
  TORCH_CHECK_VALUE(additive || activation == "tanh", op,
                    ": activation belongs to the additive score, which needs a weight (got "
                    "activation=",
                    activation, ")");
  if (activation == "tanh") return std::nullopt;
  if (activation == "relu") return 0.0;
  TORCH_CHECK_VALUE(std::isfinite(negative_slope), op,
                    ": negative_slope must be finite (got negative_slope=", negative_slope, ")");
  return negative_slope;
}

void check_attention_forward(const AttentionTensors& t, const AttentionOptions<SymInt>& options) {
  check_attention_forward(t.name(), t, options);
}

void check_attention_forward(const char* op, const AttentionTensors& t,
                             const AttentionOptions<SymInt>& options) {
  check_attention_arguments(op, t, options, /*will_be_cast=*/false);
  TORCH_CHECK(
      t.query.dim() == 4 && t.key.dim() == 4 && t.value.dim() == 4, op,
      ": the inner operator takes tensors of four dimensions (got query=", t.query.sym_sizes(),
      ", key=", t.key.sym_sizes(), ", value=", t.value.sym_sizes(), ")");
  const c10::SymIntArrayRef q_sizes = t.query.sym_sizes();
  const c10::SymIntArrayRef k_sizes = t.key.sym_sizes();
  const c10::SymIntArrayRef v_sizes = t.value.sym_sizes();
  const SymInt& batch = q_sizes[0];
  const SymInt& heads = q_sizes[1];
  const SymInt& kv_heads = k_sizes[1];
  TORCH_CHECK(
      known_equal(k_sizes[0], batch) && known_equal(v_sizes[0], batch) &&
          known_equal(v_sizes[1], kv_heads),
      op, ": the inner operator takes key and value of one batch and head count (got query=",
      t.query.sym_sizes(), ", key=", t.key.sym_sizes(), ", value=", t.value.sym_sizes(), ")");
  // Zero heads of keys are fine only for zero heads of queries.
  TORCH_CHECK(known_equal(kv_heads, heads) || (kv_heads > 0 && known_equal(heads % kv_heads, 0)),
              op,
              ": Number of heads in key and value must divide the number of heads in query (got ",
              "query=", t.query.sym_sizes(), ", key=", t.key.sym_sizes(), ")");
  if (t.weight.has_value()) {
    const std::array<SymInt, 3> full = {batch, heads, q_sizes[3]};
    const size_t missing = 3 - std::min<size_t>(t.weight->sym_sizes().size(), 3);
    check_broadcastable(op, "weight", *t.weight, c10::SymIntArrayRef(full).slice(missing));
  }
  if (t.attn_mask.has_value()) {
    check_broadcastable(op, "attn_mask", *t.attn_mask, {batch, heads, q_sizes[2], k_sizes[2]});
  }
  if (t.key_lengths.has_value()) check_shape(op, "key_lengths", *t.key_lengths, {batch});
  if (t.key_starts.has_value()) check_shape(op, "key_starts", *t.key_starts, {batch});
  if (t.query_offsets.has_value()) check_shape(op, "query_offsets", *t.query_offsets, {batch});
  if (t.alibi_slopes.has_value()) {
    check_broadcastable(op, "alibi_slopes", *t.alibi_slopes, {batch, heads});
  }
}

void check_attention_backward(const BackwardInputs& inputs, const AttentionTensors& t,
                              const AttentionOptions<SymInt>& options) {
  const Tensor& output = inputs.output;
  const Tensor& lse = inputs.lse;
  const Tensor& philox_state = inputs.philox_state;
  check_attention_forward(t, options);
  const char* op = t.name();
  const c10::SymIntArrayRef q_sizes = t.query.sym_sizes();
  const std::array<SymInt, 4> output_shape = {q_sizes[0], q_sizes[1], q_sizes[2],
                                              t.value.sym_sizes()[3]};
  const c10::SymIntArrayRef lse_shape = c10::SymIntArrayRef(output_shape).slice(0, 3);
  check_shape(op, "output", output, output_shape);
  check_shape(op, "the gradient of the output", inputs.grad_output, output_shape);
  check_shape(op, "lse", lse, lse_shape);
  if (inputs.grad_lse.has_value()) {
    check_shape(op, "the gradient of lse", *inputs.grad_lse, lse_shape);
  }
  for (const Tensor* tensor : {&output, &inputs.grad_output}) {
    TORCH_CHECK(
        tensor->scalar_type() == t.query.scalar_type() && tensor->device() == t.query.device(), op,
        ": the output and its gradient must have dtype and device of query (got query=",
        t.query.dtype(), " ", t.query.device(), ", the other=", tensor->dtype(), " ",
        tensor->device(), ")");
  }
  TORCH_CHECK(
      lse.scalar_type() == (t.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat), op,
      ": lse must be float64 for float64 inputs and float32 otherwise (got lse.dtype=", lse.dtype(),
      ")");
  TORCH_CHECK(philox_state.scalar_type() == at::kLong && philox_state.dim() == 1 &&
                  known_equal(philox_state.sym_sizes()[0], options.dropout_p > 0 ? 2 : 0),
              op,
              ": philox_state must be int64, (2) with dropout and (0) without (got philox_state=",
              philox_state.sym_sizes(), ")");
}

void check_attention_weights(const AttentionTensors& t, const OptionalTensor& query_indices,
                             const AttentionOptions<SymInt>& options) {
  const char* op = "attention_weights";
  check_attention_forward(op, t, options);
  if (!query_indices.has_value()) return;
  const SymInt& batch = t.query.sym_sizes()[0];
  const SymInt& length = t.query.sym_sizes()[2];
  check_index_tensor(op, "query_indices", t.query, query_indices);
  check_broadcastable(op, "query_indices", *query_indices, {batch, length});
  TORCH_CHECK(known_equal(query_indices->sym_sizes()[1], length), op,
              ": query_indices must have one element per query (got query_indices=",
              query_indices->sym_sizes(), ", query=", t.query.sym_sizes(), ")");
}

void check_attention_weights_backward(const Tensor& grad, const AttentionTensors& t,
                                      const OptionalTensor& query_indices,
                                      const AttentionOptions<SymInt>& options, bool average_heads) {
  check_attention_weights(t, query_indices, options);
  const char* op = "attention_weights";
  const c10::SymIntArrayRef sizes = t.query.sym_sizes();
  check_shape(op, "the gradient of the weights", grad,
              {sizes[0], average_heads ? SymInt(1) : sizes[1], sizes[2], t.key.sym_sizes()[2]});
  TORCH_CHECK(grad.scalar_type() == t.query.scalar_type() && grad.device() == t.query.device(), op,
              ": the gradient of the weights must have dtype and device of query (got query=",
              t.query.dtype(), " ", t.query.device(), ", the gradient=", grad.dtype(), " ",
              grad.device(), ")");
}

void check_dropout_factors(const Tensor& philox_state, double dropout_p) {
  TORCH_CHECK(philox_state.scalar_type() == at::kLong && philox_state.dim() == 1 &&
                  known_equal(philox_state.sym_sizes()[0], 2),
              "_attention_dropout_factors: philox_state must be int64, (2) (got philox_state=",
              philox_state.sym_sizes(), ")");
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0,
                    "_attention_dropout_factors: dropout_p must be between 0 and 1 (got dropout_p=",
                    dropout_p, ")");
}

void check_key_bounds_on_cpu(const char* op, const char* name, const OptionalTensor& bounds,
                             int64_t key_length) {
  if (!bounds.has_value()) return;
  const Tensor values = bounds->to(at::kLong).contiguous();
  const int64_t* value = values.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < values.numel(); ++b) {
    TORCH_CHECK_VALUE(value[b] >= 0 && value[b] <= key_length, op, ": ", name,
                      " must be between 0 and the key length (got ", name, "[", b, "]=", value[b],
                      ", key length ", key_length, ")");
  }
}

}  // namespace torch_selfattn::ops
