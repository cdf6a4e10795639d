#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/common/attention_problem.h"
#include "kernels/common/attention_weights.h"
#include "kernels/common/dtype.h"
#include "kernels/common/parallel.h"
#include "kernels/common/philox.h"

// Attention by plain loops in double, one thread, for every dtype: the yardstick of all tests and
// the implementation "reference". It follows the formulas in attention_problem.h one after the
// other and shares no code with the fast kernels. A row of Lk weights at a time, so O(Lk) memory
// forward; backward keeps every gradient in double until the end.
//
// Backward recomputes the softmax in double and uses neither the saved output nor the saved lse:
//   dP_ij = sum_d dO_id v_jd,  delta_i = sum_j p_ij f_ij dP_ij
//   g_ij = p_ij (f_ij dP_ij - delta_i + grad_lse_i)     gradient of s_ij; f = dropout factor
//   dv_j = sum_i p_ij f_ij dO_i,  dmask_ij = g_ij,  dslope = -sum_ij g_ij |position(i) - j|
//   dq_i = scale sum_j g_ij k_j,  dk_j = scale sum_i g_ij q_i                       (dot product)
//   dq_id = scale sum_j g_ij w_d f'(x), dk alike, dw_d = scale sum_ij g_ij f(x)       (additive)
namespace torch_selfattn::kernels::reference {

inline double load(DType dtype, const void* data, std::int64_t index) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[index];
    case DType::kFloat32: return static_cast<const float*>(data)[index];
    case DType::kFloat16: return static_cast<double>(static_cast<const float16*>(data)[index]);
    case DType::kBFloat16: return static_cast<double>(static_cast<const bfloat16*>(data)[index]);
  }
  return 0.0;
}

inline void store(DType dtype, void* data, std::int64_t index, double value) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[index] = value; break;
    case DType::kFloat32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case DType::kFloat16: static_cast<float16*>(data)[index] = float16(value); break;
    case DType::kBFloat16: static_cast<bfloat16*>(data)[index] = bfloat16(value); break;
  }
}

inline std::int64_t offset(const std::int64_t (&stride)[4], std::int64_t b, std::int64_t h,
                           std::int64_t l) {
  return b * stride[0] + h * stride[1] + l * stride[2];
}

// Scores are limited to +-2^127 (float64: +-2^1023), so that a score which overflows, or a mask of
// finfo.min, is an ordinary number: a difference of two scores is never inf - inf.
inline double max_score(const AttentionProblem& p) {
  return p.compute_in_double() ? 0x1p1023 : 0x1p127;
}

// Index of mask element (b, h, i, j) in a contiguous tensor of mask_size.
inline std::int64_t contiguous_mask_index(const AttentionProblem& p, std::int64_t b, std::int64_t h,
                                          std::int64_t i, std::int64_t j) {
  const std::int64_t index[4] = {b, h, i, j};
  std::int64_t result = 0;
  for (int dim = 0; dim < 4; ++dim) {
    result = result * p.mask_size[dim] + (p.mask_size[dim] == 1 ? 0 : index[dim]);
  }
  return result;
}

// The activation f of the additive score and its derivative.
struct Activated {
  double value;
  double slope;
};
inline Activated activate(const AttentionProblem& p, double x) {
  if (p.activation == Activation::kTanh) {
    const double t = std::tanh(x);
    return {t, 1.0 - t * t};
  }
  return x > 0.0 ? Activated{x, 1.0} : Activated{p.negative_slope * x, p.negative_slope};
}

// |position(i) - j|, what ALiBi multiplies the slope by.
inline double distance(const AttentionProblem& p, std::int64_t b, std::int64_t i, std::int64_t j) {
  return std::abs(static_cast<double>(query_position(p, b, i) - j));
}

// The softmax of one row: what query i of head h gives each key.
struct Row {
  std::vector<char> allowed;
  std::vector<double> weight;  // p(i, j), 0 where not allowed
  double lse = -std::numeric_limits<double>::infinity();

  explicit Row(std::int64_t keys)
      : allowed(static_cast<std::size_t>(keys)), weight(static_cast<std::size_t>(keys)) {}

  void compute(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t hk = h / p.group_size();
    const std::int64_t q = offset(p.query.stride, b, h, i);
    const std::int64_t w = b * p.weight_stride[0] + h * p.weight_stride[1];
    std::fill(allowed.begin(), allowed.end(), char{0});
    std::fill(weight.begin(), weight.end(), 0.0);
    lse = -std::numeric_limits<double>::infinity();

    const double slope =
        p.slopes == nullptr
            ? 0.0
            : load(p.slopes_dtype, p.slopes, b * p.slopes_stride[0] + h * p.slopes_stride[1]);

    const KeyRange range = key_range(p, b, i);
    bool is_nan = false;
    double maximum = -std::numeric_limits<double>::infinity();
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      double bias = 0.0;
      const std::int64_t m = offset(p.mask.stride, b, h, i) + j * p.mask.stride[3];
      if (p.mask_kind == MaskKind::kBool) {
        if (static_cast<const unsigned char*>(p.mask.data)[m] == 0) continue;
      } else if (p.mask_kind == MaskKind::kFloat) {
        bias = load(p.mask_dtype, p.mask.data, m);
        if (bias == -std::numeric_limits<double>::infinity()) continue;
      }
      const std::int64_t k = offset(p.key.stride, b, hk, j);
      double score = 0.0;
      for (std::int64_t d = 0; d < p.head_dim; ++d) {
        const double q_d = load(p.dtype, p.query.data, q + d * p.query.stride[3]);
        const double k_d = load(p.dtype, p.key.data, k + d * p.key.stride[3]);
        if (p.score == ScoreKind::kDotProduct) {
          score += q_d * k_d;
        } else {
          const double w_d = load(p.dtype, p.weight, w + d * p.weight_stride[2]);
          score += w_d * activate(p, q_d + k_d).value;
        }
      }
      const double limit = max_score(p);
      score = std::clamp(p.scale * score, -limit, limit);  // a NaN stays one
      if (p.slopes != nullptr) bias -= slope * distance(p, b, i, j);
      score = std::clamp(score + bias, -limit, limit);
      is_nan = is_nan || std::isnan(score);
      maximum = std::max(maximum, score);
      allowed[static_cast<std::size_t>(j)] = 1;
      weight[static_cast<std::size_t>(j)] = score;
    }
    double sum = 0.0;
    for (std::size_t j = 0; j < allowed.size(); ++j) {
      if (allowed[j] != 0) sum += std::exp(weight[j] - maximum);
    }
    if (is_nan) {
      lse = std::numeric_limits<double>::quiet_NaN();
    } else if (sum > 0.0) {
      lse = maximum + std::log(sum);
    }
    for (std::size_t j = 0; j < allowed.size(); ++j) {
      if (allowed[j] == 0) continue;
      // Not exp(weight - lse): at the limits lse cannot hold log(sum).
      weight[j] = is_nan ? lse : std::exp(weight[j] - maximum) / sum;
    }
  }
};

inline void weights(const AttentionWeights& call, const Parallel& /*parallel*/) {
  const AttentionProblem& p = call.problem;
  const std::int64_t together = call.average_heads ? p.heads : 1;  // heads of one matrix
  Row row(p.key_length);
  std::vector<double> sum(static_cast<std::size_t>(p.key_length));
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t first = 0; first < p.heads; first += together) {
      for (std::int64_t i = 0; i < p.query_length; ++i) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (std::int64_t h = first; h < first + together; ++h) {
          AttentionProblem of_row = p;  // query i where it counts as another one
          of_row.query_offset += query_index(call, b, i) - i;
          row.compute(of_row, b, h, i);
          for (std::size_t j = 0; j < sum.size(); ++j) sum[j] += row.weight[j];
        }
        const std::int64_t to = offset(call.weights.stride, b, call.average_heads ? 0 : first, i);
        for (std::int64_t j = 0; j < p.key_length; ++j) {
          store(p.dtype, call.weights.data, to + j * call.weights.stride[3],
                sum[static_cast<std::size_t>(j)] / static_cast<double>(together));
        }
      }
    }
  }
}

inline Dropout make_dropout(const AttentionProblem& p) {
  return p.dropout_p > 0.0 ? Dropout::make(p.dropout_p, p.philox_state) : Dropout{};
}

inline double dropout_factor(const AttentionProblem& p, const Dropout& dropout, std::int64_t b,
                             std::int64_t h, std::int64_t i, std::int64_t j) {
  if (p.dropout_p <= 0.0) return 1.0;
  return dropout.factor((b * p.heads + h) * p.query_length + i, j, p.key_length);
}

inline void forward(const AttentionForward& call, const Parallel& /*parallel*/) {
  const AttentionProblem& p = call.problem;
  const DType lse_dtype = p.compute_in_double() ? DType::kFloat64 : DType::kFloat32;
  const Dropout dropout = make_dropout(p);
  Row row(p.key_length);
  std::vector<double> sum(static_cast<std::size_t>(p.value_dim));
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.heads; ++h) {
      for (std::int64_t i = 0; i < p.query_length; ++i) {
        row.compute(p, b, h, i);
        std::fill(sum.begin(), sum.end(), 0.0);
        for (std::int64_t j = 0; j < p.key_length; ++j) {
          const double weight = row.weight[static_cast<std::size_t>(j)];
          if (weight == 0.0) continue;  // never 0 * NaN
          const double dropped = weight * dropout_factor(p, dropout, b, h, i, j);
          if (dropped == 0.0) continue;
          const std::int64_t v = offset(p.value.stride, b, h / p.group_size(), j);
          for (std::int64_t d = 0; d < p.value_dim; ++d) {
            sum[static_cast<std::size_t>(d)] +=
                dropped * load(p.dtype, p.value.data, v + d * p.value.stride[3]);
          }
        }
        const std::int64_t o = offset(call.out.stride, b, h, i);
        for (std::int64_t d = 0; d < p.value_dim; ++d) {
          store(p.dtype, call.out.data, o + d * call.out.stride[3],
                sum[static_cast<std::size_t>(d)]);
        }
        store(lse_dtype, call.lse, (b * p.heads + h) * p.query_length + i, row.lse);
      }
    }
  }
}

// The gradients of one backward call, contiguous and in double.
struct Gradients {
  const AttentionProblem& problem;
  std::vector<double> query, key, value, weight, mask, slopes;

  explicit Gradients(const AttentionProblem& p)
      : problem(p),
        query(size(p.batch * p.heads * p.query_length * p.head_dim)),
        key(size(p.batch * p.kv_heads * p.key_length * p.head_dim)),
        value(size(p.batch * p.kv_heads * p.key_length * p.value_dim)),
        weight(size(p.weight_size[0] * p.weight_size[1] * p.head_dim)),
        mask(size(p.mask_size[0] * p.mask_size[1] * p.mask_size[2] * p.mask_size[3])),
        slopes(size(p.slopes_size[0] * p.slopes_size[1])) {}

  double* query_row(std::int64_t b, std::int64_t h, std::int64_t i) {
    return query.data() + ((b * problem.heads + h) * problem.query_length + i) * problem.head_dim;
  }
  double* key_row(std::int64_t b, std::int64_t hk, std::int64_t j) {
    return key.data() + ((b * problem.kv_heads + hk) * problem.key_length + j) * problem.head_dim;
  }
  double* value_row(std::int64_t b, std::int64_t hk, std::int64_t j) {
    return value.data() +
           ((b * problem.kv_heads + hk) * problem.key_length + j) * problem.value_dim;
  }
  double* weight_row(std::int64_t b, std::int64_t h) {
    return weight.data() + ((problem.weight_size[0] > 1 ? b * problem.weight_size[1] : 0) +
                            (problem.weight_size[1] > 1 ? h : 0)) *
                               problem.head_dim;
  }
  double& slope(std::int64_t b, std::int64_t h) {
    return slopes[size((problem.slopes_size[0] > 1 ? b * problem.slopes_size[1] : 0) +
                       (problem.slopes_size[1] > 1 ? h : 0))];
  }

  void write(const AttentionBackward& call) const {
    write_view(call.grad_query, query, problem.heads, problem.query_length, problem.head_dim);
    write_view(call.grad_key, key, problem.kv_heads, problem.key_length, problem.head_dim);
    write_view(call.grad_value, value, problem.kv_heads, problem.key_length, problem.value_dim);
    if (call.grad_weight != nullptr) write_contiguous(problem.dtype, call.grad_weight, weight);
    if (call.grad_mask != nullptr) write_contiguous(problem.mask_dtype, call.grad_mask, mask);
    if (call.grad_slopes != nullptr) {
      write_contiguous(problem.slopes_dtype, call.grad_slopes, slopes);
    }
  }

  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  void write_view(const View& view, const std::vector<double>& from, std::int64_t heads,
                  std::int64_t length, std::int64_t dim) const {
    std::size_t next = 0;
    for (std::int64_t b = 0; b < problem.batch; ++b) {
      for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t l = 0; l < length; ++l) {
          for (std::int64_t d = 0; d < dim; ++d) {
            store(problem.dtype, view.data, offset(view.stride, b, h, l) + d * view.stride[3],
                  from[next++]);
          }
        }
      }
    }
  }
  static void write_contiguous(DType dtype, void* to, const std::vector<double>& from) {
    for (std::size_t n = 0; n < from.size(); ++n) {
      store(dtype, to, static_cast<std::int64_t>(n), from[n]);
    }
  }
};

inline void backward(const AttentionBackward& call, const Parallel& /*parallel*/) {
  const AttentionProblem& p = call.problem;
  const DType lse_dtype = p.compute_in_double() ? DType::kFloat64 : DType::kFloat32;
  const Dropout dropout = make_dropout(p);
  Gradients gradients(p);
  Row row(p.key_length);
  std::vector<double> factor(static_cast<std::size_t>(p.key_length));  // dropout f_ij
  std::vector<double> grad_p(static_cast<std::size_t>(p.key_length));  // f_ij dP_ij
  std::vector<double> grad_o(static_cast<std::size_t>(p.value_dim));   // dO_i
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t hk = h / p.group_size();
      const std::int64_t w = b * p.weight_stride[0] + h * p.weight_stride[1];
      for (std::int64_t i = 0; i < p.query_length; ++i) {
        row.compute(p, b, h, i);
        for (std::int64_t d = 0; d < p.value_dim; ++d) {
          grad_o[static_cast<std::size_t>(d)] =
              load(p.dtype, call.grad_out.data,
                   offset(call.grad_out.stride, b, h, i) + d * call.grad_out.stride[3]);
        }
        const std::int64_t lse_index = (b * p.heads + h) * p.query_length + i;
        const double grad_lse =
            call.grad_lse != nullptr ? load(lse_dtype, call.grad_lse, lse_index) : 0.0;

        // Values: dv, and what the weights get.
        double delta = 0.0;
        for (std::int64_t j = 0; j < p.key_length; ++j) {
          const std::size_t at = static_cast<std::size_t>(j);
          grad_p[at] = 0.0;
          if (row.weight[at] == 0.0) continue;
          factor[at] = dropout_factor(p, dropout, b, h, i, j);
          if (factor[at] == 0.0) continue;
          const std::int64_t v = offset(p.value.stride, b, hk, j);
          double* const dv = gradients.value_row(b, hk, j);
          for (std::int64_t d = 0; d < p.value_dim; ++d) {
            const double grad = grad_o[static_cast<std::size_t>(d)];
            grad_p[at] += grad * load(p.dtype, p.value.data, v + d * p.value.stride[3]);
            dv[d] += row.weight[at] * factor[at] * grad;
          }
          grad_p[at] *= factor[at];
          delta += row.weight[at] * grad_p[at];
        }

        // Scores: mask, query, key and weight.
        const std::int64_t q = offset(p.query.stride, b, h, i);
        double* const dq = gradients.query_row(b, h, i);
        for (std::int64_t j = 0; j < p.key_length; ++j) {
          const std::size_t at = static_cast<std::size_t>(j);
          if (row.weight[at] == 0.0) continue;
          const double g = row.weight[at] * (grad_p[at] - delta + grad_lse);
          if (p.mask_kind == MaskKind::kFloat) {
            gradients.mask[static_cast<std::size_t>(contiguous_mask_index(p, b, h, i, j))] += g;
          }
          if (p.slopes != nullptr) gradients.slope(b, h) -= g * distance(p, b, i, j);
          const std::int64_t k = offset(p.key.stride, b, hk, j);
          double* const dk = gradients.key_row(b, hk, j);
          for (std::int64_t d = 0; d < p.head_dim; ++d) {
            const double q_d = load(p.dtype, p.query.data, q + d * p.query.stride[3]);
            const double k_d = load(p.dtype, p.key.data, k + d * p.key.stride[3]);
            if (p.score == ScoreKind::kDotProduct) {
              dq[d] += p.scale * g * k_d;
              dk[d] += p.scale * g * q_d;
            } else {
              const double w_d = load(p.dtype, p.weight, w + d * p.weight_stride[2]);
              const Activated f = activate(p, q_d + k_d);
              const double slope = p.scale * g * w_d * f.slope;
              dq[d] += slope;
              dk[d] += slope;
              gradients.weight_row(b, h)[d] += p.scale * g * f.value;
            }
          }
        }
      }
    }
  }
  gradients.write(call);
}

}  // namespace torch_selfattn::kernels::reference
