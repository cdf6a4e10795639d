#include "ops/autograd/composed_attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::SymInt;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// 16-bit inputs compute in float32, as the kernels do.
Tensor widened(const Tensor& t) {
  const bool narrow = t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
  return narrow ? t.to(at::kFloat) : t;
}

Tensor both(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? at::logical_and(a, b) : a;
}

double scale_of(const AttentionTensors& t, std::optional<double> scale) {
  if (scale.has_value()) return *scale;
  if (t.weight.has_value()) return 1.0;
  const int64_t head_dim = t.query.sym_size(-1).guard_int(__FILE__, __LINE__);
  return 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(head_dim, 1)));
}

// Sums over the dimensions in which `like` has size 1.
Tensor sum_to(const Tensor& t, const Tensor& like) {
  return t.sum_to_size_symint(like.sym_sizes());
}

// (B, H, L, D) summed over the query heads that read each of kv_heads heads.
Tensor sum_head_groups(const Tensor& t, const SymInt& kv_heads) {
  if (t.sym_size(1) == kv_heads) return t;
  return t
      .reshape_symint(
          {t.sym_size(0), kv_heads, t.sym_size(1) / kv_heads, t.sym_size(2), t.sym_size(3)})
      .sum(2);
}

at::TensorOptions index_options(const AttentionTensors& t) {
  return t.query.options().dtype(at::kLong).requires_grad(false);
}

Tensor per_sample(const Tensor& index) { return index.to(at::kLong).reshape({-1, 1, 1, 1}); }

// Where the queries stand on the axis of the keys: (Lq, 1) or (B or 1, 1, Lq, 1).
Tensor query_positions(const AttentionTensors& t, const OptionalTensor& query_indices,
                       const AttentionOptions<SymInt>& options) {
  const Tensor index = query_indices.has_value()
                           ? query_indices->to(at::kLong).unsqueeze(1)  // (B or 1, 1, Lq)
                           : at::arange(t.query.sym_size(2), index_options(t));
  const Tensor position = index.unsqueeze(-1) + options.query_offset;
  return t.query_offsets.has_value() ? position + per_sample(*t.query_offsets) : position;
}

// (B, Hk, L, D) as (B, H, L, D): each head repeated for the query heads that read it.
Tensor repeat_heads(const Tensor& t, const SymInt& heads) {
  const SymInt kv_heads = t.sym_size(1);
  if (kv_heads == heads) return t;
  return t.unsqueeze(2)
      .expand_symint({t.sym_size(0), kv_heads, heads / kv_heads, t.sym_size(2), t.sym_size(3)})
      .reshape_symint({t.sym_size(0), heads, t.sym_size(2), t.sym_size(3)});
}

// The pairs (i, j) that may attend before the mask tensor is looked at, as a boolean tensor
// broadcastable to (B, H, Lq, Lk); undefined if all may.
Tensor allowed_pairs(const AttentionTensors& t, const OptionalTensor& query_indices,
                     const AttentionOptions<SymInt>& options) {
  const Tensor keys = at::arange(t.key.sym_size(2), index_options(t));  // (Lk)
  Tensor allowed;
  if (t.key_lengths.has_value()) allowed = both(allowed, keys.lt(per_sample(*t.key_lengths)));
  if (t.key_starts.has_value()) allowed = both(allowed, keys.ge(per_sample(*t.key_starts)));
  if (options.window_left >= 0 || options.window_right >= 0) {
    const Tensor position = query_positions(t, query_indices, options);
    if (options.window_left >= 0) {
      allowed = both(allowed, keys.ge(position - options.window_left));
    }
    if (options.window_right >= 0) {
      allowed = both(allowed, keys.le(position + options.window_right));
    }
  }
  return allowed;
}

// |position(i) - j|, what ALiBi multiplies the slopes by: (1 or B, 1, Lq, Lk).
Tensor key_distances(const AttentionTensors& t, const OptionalTensor& query_indices,
                     const AttentionOptions<SymInt>& options, at::ScalarType dtype) {
  const Tensor keys = at::arange(t.key.sym_size(2), index_options(t));
  return (query_positions(t, query_indices, options) - keys).abs().to(dtype);
}

// Softmax statistics of scores (B, H, Lq, Lk).
struct Softmax {
  Tensor weights;
  Tensor lse;
};

Softmax masked_softmax(const Tensor& given_scores, const Tensor& allowed) {
  // A score that overflowed counts as the largest finite one: no inf - inf below.
  const double largest = given_scores.scalar_type() == at::kDouble
                             ? std::numeric_limits<double>::max()
                             : static_cast<double>(std::numeric_limits<float>::max());
  Tensor scores = at::clamp(given_scores, -largest, largest);
  const Tensor minus_infinity = at::scalar_tensor(-kInfinity, scores.options());
  const Tensor zero = at::scalar_tensor(0.0, scores.options());
  if (allowed.defined()) scores = at::where(allowed, scores, minus_infinity);
  if (scores.sym_size(-1) == 0) {
    return {scores, at::full_symint(scores.sym_sizes().slice(0, 3), -kInfinity, scores.options())};
  }
  const Tensor row_max = at::amax(scores.detach(), {-1}, /*keepdim=*/true);
  const Tensor shift = at::where(row_max.eq(-kInfinity), zero, row_max);
  Tensor shifted = scores - shift;
  Tensor exponentials;
  if (allowed.defined()) {
    // exp of a masked score is 0 either way; the first where keeps its derivative from being NaN.
    shifted = at::where(allowed, shifted, zero);
    exponentials = at::where(allowed, at::exp(shifted), zero);
  } else {
    exponentials = at::exp(shifted);
  }
  const Tensor sum = exponentials.sum(-1, /*keepdim=*/true);
  const Tensor empty = sum.eq(0);
  const Tensor divisor = at::where(empty, at::ones_like(sum), sum);
  const Tensor lse = at::where(empty, minus_infinity, shift + at::log(divisor)).squeeze(-1);
  return {exponentials / divisor, lse};
}

// Everything both directions need of one problem.
struct Terms {
  Tensor query;      // (B, H, Lq, E), widened
  Tensor key;        // (B, H, Lk, E), widened; rows that no query may see are 0
  Tensor value;      // (B, H, Lk, Ev), alike
  Tensor weight;     // (B or 1, H or 1, 1, 1, E), additive only
  Tensor activated;  // f(q + k), (B, H, Lq, Lk, E), additive only
  Tensor slope;      // f'(q + k), alike, where f does not tell it: undefined for tanh
  Tensor factors;    // dropout, undefined without
  Tensor distances;  // (1 or B, 1, Lq, Lk), with ALiBi slopes only
  Softmax softmax;
  double scale;
};

Terms make_terms(const AttentionTensors& t, const OptionalTensor& query_indices,
                 const Tensor& philox_state, const AttentionOptions<SymInt>& options) {
  Terms terms;
  const SymInt heads = t.query.sym_size(1);
  Tensor allowed = allowed_pairs(t, query_indices, options);
  Tensor bias;
  if (t.attn_mask.has_value()) {
    const Tensor& mask = *t.attn_mask;
    if (mask.scalar_type() == at::kBool) {
      allowed = both(allowed, mask);
    } else {
      const Tensor open = mask.ne(-kInfinity);
      allowed = both(allowed, open);
      bias = at::where(open, widened(mask), at::scalar_tensor(0.0, widened(mask).options()));
    }
  }
  terms.query = widened(t.query);
  terms.key = repeat_heads(widened(t.key), heads);
  terms.value = repeat_heads(widened(t.value), heads);
  if (allowed.defined()) {
    // What stands in a key or value that nobody attends to must not reach a derivative as 0 * NaN.
    const Tensor seen =
        allowed.expand_symint({t.query.sym_size(0), heads, t.query.sym_size(2), t.key.sym_size(2)})
            .any(2)
            .unsqueeze(-1);
    const Tensor zero = at::scalar_tensor(0.0, terms.key.options());
    terms.key = at::where(seen, terms.key, zero);
    terms.value = at::where(seen, terms.value, zero);
  }
  terms.scale = scale_of(t, options.scale);
  Tensor scores;
  if (t.weight.has_value()) {
    terms.weight = widened(*t.weight).unsqueeze(-2).unsqueeze(-2);
    const Tensor sum = terms.query.unsqueeze(3) + terms.key.unsqueeze(2);
    if (options.negative_slope.has_value()) {
      const auto number = [&](double x) { return at::scalar_tensor(x, sum.options()); };
      terms.slope = at::where(sum.gt(0), number(1.0), number(*options.negative_slope));
      terms.activated = sum * terms.slope;
    } else {
      terms.activated = at::tanh(sum);
    }
    scores = (terms.activated * terms.weight).sum(-1) * terms.scale;
  } else {
    scores = at::matmul(terms.query * terms.scale, terms.key.transpose(-2, -1));
  }
  if (t.alibi_slopes.has_value()) {
    terms.distances = key_distances(t, query_indices, options, scores.scalar_type());
    const Tensor slopes = t.alibi_slopes->to(scores.scalar_type()).unsqueeze(-1).unsqueeze(-1);
    scores = scores - slopes * terms.distances;
  }
  if (bias.defined()) scores = scores + bias;
  terms.softmax = masked_softmax(scores, allowed);
  if (options.dropout_p > 0) {
    terms.factors =
        attention_dropout_factors(philox_state, t.query.sym_size(0), heads, t.query.sym_size(2),
                                  t.key.sym_size(2), options.dropout_p, scores.scalar_type());
  }
  return terms;
}

Tensor dropped(const Terms& terms, const Tensor& t) {
  return terms.factors.defined() ? t * terms.factors : t;
}

// What the gradient (B, H, Lq, Lk) of the scores gives the inputs; grad_value stays undefined.
BackwardResults score_gradients(const AttentionTensors& t, const Terms& terms,
                                const Tensor& grad_scores, bool attn_mask_grad,
                                bool alibi_slopes_grad) {
  BackwardResults grads;
  Tensor grad_query;
  Tensor grad_key;
  if (t.weight.has_value()) {
    const Tensor g = grad_scores.unsqueeze(-1) * terms.scale;
    const Tensor& f = terms.activated;
    const Tensor slope = terms.slope.defined() ? terms.slope : 1 - f * f;
    const Tensor grad_sum = g * terms.weight * slope;  // of q_i + k_j
    grad_query = grad_sum.sum(3);
    grad_key = grad_sum.sum(2);
    grads.grad_weight =
        sum_to((g * f).sum(std::vector<int64_t>{2, 3}), *t.weight).to(t.weight->scalar_type());
  } else {
    grad_query = at::matmul(grad_scores, terms.key) * terms.scale;
    grad_key = at::matmul(grad_scores.transpose(-2, -1), terms.query) * terms.scale;
  }
  grads.grad_query = grad_query.to(t.query.scalar_type());
  grads.grad_key = sum_head_groups(grad_key, t.key.sym_size(1)).to(t.key.scalar_type());
  if (attn_mask_grad) {
    grads.grad_attn_mask = sum_to(grad_scores, *t.attn_mask).to(t.attn_mask->scalar_type());
  }
  if (alibi_slopes_grad) {
    const Tensor per_head = -(grad_scores * terms.distances).sum(std::vector<int64_t>{2, 3});
    grads.grad_alibi_slopes = sum_to(per_head, *t.alibi_slopes).to(t.alibi_slopes->scalar_type());
  }
  return grads;
}

}  // namespace

ForwardResults composed_attention(const AttentionTensors& t, const Tensor& philox_state,
                                  const AttentionOptions<SymInt>& options) {
  const Terms terms = make_terms(t, std::nullopt, philox_state, options);
  const Tensor output = at::matmul(dropped(terms, terms.softmax.weights), terms.value);
  return {output.to(t.query.scalar_type()), terms.softmax.lse, philox_state};
}

BackwardResults composed_attention_backward(const BackwardInputs& inputs, const AttentionTensors& t,
                                            const AttentionOptions<SymInt>& options) {
  const Terms terms = make_terms(t, std::nullopt, inputs.philox_state, options);
  const Tensor& p = terms.softmax.weights;
  const Tensor grad_out = widened(inputs.grad_output);

  const Tensor grad_value = at::matmul(dropped(terms, p).transpose(-2, -1), grad_out);
  const Tensor grad_p = dropped(terms, at::matmul(grad_out, terms.value.transpose(-2, -1)));
  Tensor row_term = -(p * grad_p).sum(-1, /*keepdim=*/true);
  if (inputs.grad_lse.has_value()) {
    row_term = row_term + inputs.grad_lse->to(p.scalar_type()).unsqueeze(-1);
  }
  BackwardResults grads = score_gradients(t, terms, p * (grad_p + row_term), inputs.attn_mask_grad,
                                          inputs.alibi_slopes_grad);
  grads.grad_value = sum_head_groups(grad_value, t.key.sym_size(1)).to(t.value.scalar_type());
  return grads;
}

Tensor composed_attention_weights(const WeightsInputs& inputs, const AttentionTensors& t,
                                  const AttentionOptions<SymInt>& options) {
  Tensor p = make_terms(t, inputs.query_indices, Tensor(), options).softmax.weights;
  if (inputs.average_heads) p = p.sum(1, /*keepdim=*/true) / t.query.sym_size(1).max(1);
  return p.to(t.query.scalar_type());
}

BackwardResults composed_attention_weights_backward(const WeightsBackwardInputs& inputs,
                                                    const AttentionTensors& t,
                                                    const AttentionOptions<SymInt>& options) {
  const Terms terms = make_terms(t, inputs.query_indices, Tensor(), options);
  const Tensor& p = terms.softmax.weights;
  Tensor grad_p = widened(inputs.grad);  // (B, H or 1, Lq, Lk)
  if (inputs.average_heads) grad_p = grad_p / t.query.sym_size(1).max(1);
  const Tensor row_term = (p * grad_p).sum(-1, /*keepdim=*/true);
  return score_gradients(t, terms, p * (grad_p - row_term), inputs.attn_mask_grad,
                         inputs.alibi_slopes_grad);
}

}  // namespace torch_selfattn::ops
