#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/macros.h"

// One attention problem as the kernels see it: raw pointers, sizes, strides in elements.
//
//   score(i, j)  = scale * sum_d q[i, d] k[j, d]                     (dot product)
//                = scale * sum_d w[d] f(q[i, d] + k[j, d])            (additive)
//   f(x)         = tanh(x), or x where x > 0 and negative_slope x elsewhere (leaky ReLU; ReLU is
//                  that of slope 0)
//   s(i, j)      = score(i, j) + bias(i, j) - slope |position(i) - j|    where (i, j) is allowed
//   lse(i)       = log sum_j exp(s(i, j)), p(i, j) = exp(s(i, j) - lse(i))
//   out(i)       = sum_j p(i, j) * dropout(i, j) * v[j]
//
// A pair is allowed if j lies in key_range() below, a boolean mask is true there, and a floating
// mask is not -inf there. A row without an allowed pair has out = 0, lse = -inf and no gradients;
// whatever stands in a key, value or gradient of a pair that is not allowed changes nothing.
//
// Letters as in docs/notation.md: B batch, H query heads, Hk key/value heads (H % Hk == 0; query
// head h reads key head h / (H / Hk)), Lq queries, Lk keys, E head dim of q and k, Ev of v.
namespace torch_selfattn::kernels {

enum class ScoreKind : std::uint8_t { kDotProduct, kAdditive };
enum class Activation : std::uint8_t { kTanh, kLeakyRelu };
enum class MaskKind : std::uint8_t { kNone, kBool, kFloat };

// A read-only (B, H, L, D) tensor of the problem's dtype; a stride is 0 where it is broadcast.
struct ConstView {
  const void* data = nullptr;
  std::int64_t stride[4] = {0, 0, 0, 0};
};
struct View {
  void* data = nullptr;
  std::int64_t stride[4] = {0, 0, 0, 0};
};

struct AttentionProblem {
  DType dtype = DType::kFloat32;
  ScoreKind score = ScoreKind::kDotProduct;
  Activation activation = Activation::kTanh;  // additive only
  double negative_slope = 0.0;                // of kLeakyRelu
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t query_length = 0;
  std::int64_t key_length = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;

  ConstView query;  // (B, H, Lq, E)
  ConstView key;    // (B, Hk, Lk, E)
  ConstView value;  // (B, Hk, Lk, Ev)

  // (B or 1, H or 1, E), additive only; strides [b, h, d] in weight_stride, 0 where broadcast.
  const void* weight = nullptr;
  std::int64_t weight_size[2] = {1, 1};
  std::int64_t weight_stride[3] = {0, 0, 0};

  // (B or 1, H or 1, Lq or 1, Lk or 1); strides 0 where broadcast. Boolean: one byte per element.
  MaskKind mask_kind = MaskKind::kNone;
  DType mask_dtype = DType::kFloat32;  // of a floating mask: the problem's dtype or float32
  ConstView mask;
  std::int64_t mask_size[4] = {1, 1, 1, 1};

  // ALiBi: (B or 1, H or 1), strides 0 where broadcast; null: none.
  const void* slopes = nullptr;
  DType slopes_dtype = DType::kFloat32;  // the problem's dtype or float32
  std::int64_t slopes_size[2] = {1, 1};
  std::int64_t slopes_stride[2] = {0, 0};

  const std::int64_t* key_lengths = nullptr;    // (B) or null: keys j < key_lengths[b]
  const std::int64_t* key_starts = nullptr;     // (B) or null: keys j >= key_starts[b]
  const std::int64_t* query_offsets = nullptr;  // (B) or null: added to query_offset

  double scale = 1.0;
  std::int64_t window_left = -1;   // keys j >= i + offset - window_left; -1: no bound
  std::int64_t window_right = -1;  // keys j <= i + offset + window_right; -1: no bound
  std::int64_t query_offset = 0;

  double dropout_p = 0.0;
  const std::int64_t* philox_state = nullptr;  // {seed, offset}; read only if dropout_p > 0

  TSA_HOST_DEVICE bool compute_in_double() const { return dtype == DType::kFloat64; }
  // Whether some samples may have far fewer pairs than others.
  bool samples_differ() const {
    const bool masks = mask_kind == MaskKind::kBool && mask_size[0] > 1;
    return batch > 1 &&
           (masks || key_lengths != nullptr || key_starts != nullptr || query_offsets != nullptr);
  }
  TSA_HOST_DEVICE std::int64_t group_size() const { return heads / kv_heads; }
};

// lse, grad_lse: contiguous (B, H, Lq), float64 for float64 problems, else float32.
struct AttentionForward {
  AttentionProblem problem;
  View out;  // (B, H, Lq, Ev)
  void* lse = nullptr;
};

struct AttentionBackward {
  AttentionProblem problem;
  ConstView out;       // (B, H, Lq, Ev)
  ConstView grad_out;  // (B, H, Lq, Ev)
  const void* lse = nullptr;
  const void* grad_lse = nullptr;  // null: zero
  View grad_query;                 // (B, H, Lq, E)
  View grad_key;                   // (B, Hk, Lk, E)
  View grad_value;                 // (B, Hk, Lk, Ev)
  void* grad_weight = nullptr;     // contiguous (weight_size[0], weight_size[1], E), problem dtype
  void* grad_mask = nullptr;       // contiguous mask_size, mask dtype; null: not wanted
  void* grad_slopes = nullptr;     // contiguous slopes_size, slopes dtype; null: not wanted
};

struct KeyRange {
  std::int64_t begin;
  std::int64_t end;  // end <= begin: no key
};

// Where query i of sample b stands on the axis of the keys.
TSA_HOST_DEVICE std::int64_t query_position(const AttentionProblem& p, std::int64_t b,
                                            std::int64_t i) {
  return i + p.query_offset + (p.query_offsets != nullptr ? p.query_offsets[b] : 0);
}

// Keys of sample b that are not padding.
TSA_HOST_DEVICE KeyRange key_range(const AttentionProblem& p, std::int64_t b) {
  std::int64_t begin = 0;
  std::int64_t end = p.key_length;
  if (p.key_starts != nullptr && p.key_starts[b] > begin) begin = p.key_starts[b];
  if (p.key_lengths != nullptr && p.key_lengths[b] < end) end = p.key_lengths[b];
  return {begin, end};
}

// Keys that query i of sample b may attend to, before the mask tensor is looked at.
TSA_HOST_DEVICE KeyRange key_range(const AttentionProblem& p, std::int64_t b, std::int64_t i) {
  auto [begin, end] = key_range(p, b);
  const std::int64_t position = query_position(p, b, i);
  if (p.window_left >= 0 && position - p.window_left > begin) begin = position - p.window_left;
  if (p.window_right >= 0 && position + p.window_right + 1 < end) {
    end = position + p.window_right + 1;
  }
  return {begin, end};
}

}  // namespace torch_selfattn::kernels
