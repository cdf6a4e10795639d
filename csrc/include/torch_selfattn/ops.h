#pragma once

#include <ATen/core/Tensor.h>
#include <torch_selfattn/export.h>
#include <torch_selfattn/positional.h>
#include <torch_selfattn/version.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

// The operators of torch_selfattn as C++ functions; each is a call of torch.ops.torch_selfattn.*
// through the dispatcher, so autograd, autocast and tracing work as for ATen's own operators.
// Shapes and letters: docs/notation.md. Formulas: docs/formulas.md.
namespace torch_selfattn {

// softmax_j(scale * q_i . k_j + mask) v_j.
//   query (..., H, Lq, E), key (..., H, Lk, E), value (..., H, Lk, Ev) -> (..., H, Lq, Ev)
// The first eight arguments mean what they mean in F.scaled_dot_product_attention. A row that may
// attend to no key gives 0. attn_mask: boolean (true = attend) or floating (added, differentiable),
// broadcastable to (..., H, Lq, Lk). key_starts[b] <= j < key_lengths[b]: integer tensors (B).
// window_left, window_right: how many keys before and after its own position a query sees, -1 =
// all; the position of query i is i + query_offset + query_offsets[b].
// alibi_slopes: (H) or (..., H), float32 or of the dtype of query, differentiable: adds
// -slope * |position of the query - j| to the score (Press et al., 2022).
TORCH_SELFATTN_API at::Tensor dot_product_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& attn_mask = std::nullopt, double dropout_p = 0.0,
    bool is_causal = false, std::optional<double> scale = std::nullopt, bool enable_gqa = false,
    const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt);

// Also the log-sum-exp of the scores of each row, (..., H, Lq), float32 (float64 for float64
// inputs), differentiable; -inf for a row without a key.
TORCH_SELFATTN_API std::tuple<at::Tensor, at::Tensor> dot_product_attention_with_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& attn_mask = std::nullopt, double dropout_p = 0.0,
    bool is_causal = false, std::optional<double> scale = std::nullopt, bool enable_gqa = false,
    const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt);

// Score scale * sum_d weight[h, d] * f(query[i, d] + key[j, d]), scale 1 by default;
// weight (E) or (H, E), with gradient. activation: f is "tanh" (Bahdanau et al., 2015), "relu", or
// "leaky_relu", x where x > 0 and negative_slope * x elsewhere (GATv2: Brody et al., 2022); the
// others do not read negative_slope.
TORCH_SELFATTN_API at::Tensor additive_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& weight, const std::optional<at::Tensor>& attn_mask = std::nullopt,
    double dropout_p = 0.0, bool is_causal = false, std::optional<double> scale = std::nullopt,
    bool enable_gqa = false, const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
    std::string_view activation = "tanh", double negative_slope = 0.2);

TORCH_SELFATTN_API std::tuple<at::Tensor, at::Tensor> additive_attention_with_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& weight, const std::optional<at::Tensor>& attn_mask = std::nullopt,
    double dropout_p = 0.0, bool is_causal = false, std::optional<double> scale = std::nullopt,
    bool enable_gqa = false, const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
    std::string_view activation = "tanh", double negative_slope = 0.2);

// Chosen rows of the weight matrix softmax(...), without forming the others: (..., heads, rows,
// Lk), or, with average_heads, their mean over the heads (..., rows, Lk), without forming those of
// single heads. weight: None for the dot-product score, (E) or (H, E) for the additive one. rows:
// int64 (R) query indices, all by default; heads: int64 query heads, all by default.
TORCH_SELFATTN_API at::Tensor attention_weights(
    const at::Tensor& query, const at::Tensor& key,
    const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& rows = std::nullopt,
    const std::optional<at::Tensor>& heads = std::nullopt,
    const std::optional<at::Tensor>& attn_mask = std::nullopt, bool is_causal = false,
    std::optional<double> scale = std::nullopt, bool enable_gqa = false,
    const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt, bool average_heads = false,
    std::string_view activation = "tanh", double negative_slope = 0.2);

// In-projection, attention, out-projection.
//   query (B, Lq, Dq), key (B, Lk, Dk), value (B, Lk, Dv), or without B -> (B, Lq, Do)
// in_proj_weight: {packed (E + 2 Ekv, D)} with the rows of the query, key and value projections
// behind each other, or {(E, Dq), (Ekv, Dk), (Ekv, Dv)}; in_proj_bias: {}, {packed} or three.
// E = num_heads * head dim, Ekv = num_kv_heads * head dim (num_kv_heads = num_heads by default).
// out_proj_weight (Do, E). score_weight (head dim) or (num_heads, head dim): additive score.
TORCH_SELFATTN_API at::Tensor multi_head_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, c10::SymInt num_heads,
    at::TensorList in_proj_weight, at::TensorList in_proj_bias, const at::Tensor& out_proj_weight,
    const std::optional<at::Tensor>& out_proj_bias = std::nullopt,
    const std::optional<at::Tensor>& score_weight = std::nullopt,
    std::optional<c10::SymInt> num_kv_heads = std::nullopt,
    const std::optional<at::Tensor>& attn_mask = std::nullopt, double dropout_p = 0.0,
    bool is_causal = false, std::optional<double> scale = std::nullopt,
    const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
    std::string_view activation = "tanh", double negative_slope = 0.2);

// Which implementation runs this call and why the ones before it in the list do not, as text.
TORCH_SELFATTN_API std::string explain(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& attn_mask = std::nullopt, double dropout_p = 0.0,
    bool is_causal = false, std::optional<double> scale = std::nullopt, bool enable_gqa = false,
    const std::optional<at::Tensor>& key_lengths = std::nullopt,
    const std::optional<at::Tensor>& key_starts = std::nullopt, c10::SymInt window_left = -1,
    c10::SymInt window_right = -1, c10::SymInt query_offset = 0,
    const std::optional<at::Tensor>& query_offsets = std::nullopt,
    const std::optional<at::Tensor>& alibi_slopes = std::nullopt,
    std::string_view activation = "tanh", double negative_slope = 0.2);

// The implementation that every attention call of the process must use; empty: the best one.
TORCH_SELFATTN_API std::string forced_implementation();
// Sets the implementation that every attention call of the process must use, forward and backward,
// and returns the one before; empty: the best one. ImplementationGuard below puts it back.
TORCH_SELFATTN_API std::string set_forced_implementation(const std::string& name);

// Runs every attention call of the process, forward and backward, by the implementation of this
// name ("reference", "generic", ...; see explain) until the guard is destroyed. A call that it does
// not support raises its reason. Guards nest.
class TORCH_SELFATTN_API ImplementationGuard {
 public:
  explicit ImplementationGuard(const std::string& name);
  ~ImplementationGuard();
  ImplementationGuard(const ImplementationGuard&) = delete;
  ImplementationGuard& operator=(const ImplementationGuard&) = delete;

 private:
  std::string previous_;
};

}  // namespace torch_selfattn
