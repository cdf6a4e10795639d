#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cpu/rows.h"

// What both kernels of backward do with a row, and with gradients that rows share.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// sum dO O - grad_lse of row i: what is subtracted from f dP.
template <typename T>
inline T delta_of_row(const AttentionBackward& call, std::int64_t b, std::int64_t h,
                      std::int64_t i) {
  const AttentionProblem& p = call.problem;
  const Rows out = rows_of(p.dtype, call.out, b, h, p.value_dim);
  const Rows grad = rows_of(p.dtype, call.grad_out, b, h, p.value_dim);
  Vec<T> sum{};
  for (std::int64_t d = 0; d < p.value_dim; d += kLanes<T>) {
    const std::int64_t n = smaller<std::int64_t>(kLanes<T>, p.value_dim - d);
    sum = fma(load_elements_of_row<T>(out, i, d, n), load_elements_of_row<T>(grad, i, d, n), sum);
  }
  T delta = sum_lanes<T>(sum);
  if (call.grad_lse != nullptr) {
    delta -= static_cast<const T*>(call.grad_lse)[(b * p.heads + h) * p.query_length + i];
  }
  return delta;
}

// Whether the rounding of a log-sum-exp is too much of an error in its exponential.
template <typename T>
inline bool is_coarse(T lse) {
  constexpr T limit = sizeof(T) == 8 ? T(0x1p40) : T(0x1p13);
  return lse > limit || (lse < -limit && lse != -infinity<T>());
}

// Of some pairs of a row.
template <typename T>
struct PairSums {
  Vec<T> gradients{};  // sum G, by lanes
  Vec<T> smallest{};   // score, or 0

  // Without a mask -inf is a score that overflowed.
  bool has_lowest() const { return any_lane<T>(smallest == splat(-infinity<T>())); }
};
// n scores w of a row, in units of log2 by `scaled`, become f p, and dP in x becomes G, with
// p = 2^(score - shift) norm. factors: f, null: all are 1.
template <typename T, typename Scale>
TSA_INLINE PairSums<T> softmax_gradients(const Scale& scaled, T shift, T norm, T delta,
                                         const T* factors, std::int64_t n, T* w, T* x) {
  PairSums<T> sums;
  for (std::int64_t j = 0; j < n; j += kLanes<T>) {
    const std::int64_t left = n - j;
    const Vec<T> score = scaled(load_up_to(w + j, left));
    sums.smallest = at_most(score, sums.smallest);
    Vec<T> weight = exp2<T>(score - splat(shift)) * splat(norm);
    if (left < kLanes<T>) weight = first_lanes<T>(weight, left, Vec<T>{});
    Vec<T> grad = load_up_to(x + j, left);
    Vec<T> kept = weight;
    if (factors != nullptr) {
      const Vec<T> factor = load_up_to(factors + j, left);
      grad = factor == Vec<T>{} ? factor : grad * factor;
      kept *= factor;
    }
    grad = weight == Vec<T>{} ? Vec<T>{} : weight * (grad - splat(delta));
    sums.gradients += grad;
    store_up_to(w + j, kept, left);
    store_up_to(x + j, grad, left);
  }
  return sums;
}

// A gradient of (B or 1, H or 1) numbers, element n of which lies at offset + n stride, from the
// heads' parts sums[b][h][parts], `step` apart, added up in their order, times a factor.
template <typename T>
inline void reduce_per_head(const AttentionProblem& p, const double* sums, std::int64_t parts,
                            std::int64_t step, double factor, const std::int64_t (&size)[2],
                            DType dtype, void* gradient, std::int64_t offset, std::int64_t stride) {
  for (std::int64_t gb = 0; gb < size[0]; ++gb) {
    for (std::int64_t gh = 0; gh < size[1]; ++gh) {
      const KeyRange batches = size[0] > 1 ? KeyRange{gb, gb + 1} : KeyRange{0, p.batch};
      const KeyRange heads = size[1] > 1 ? KeyRange{gh, gh + 1} : KeyRange{0, p.heads};
      double sum = 0.0;
      for (std::int64_t b = batches.begin; b < batches.end; ++b) {
        for (std::int64_t h = heads.begin; h < heads.end; ++h) {
          for (std::int64_t part = 0; part < parts; ++part) {
            sum += sums[((b * p.heads + h) * parts + part) * step];
          }
        }
      }
      const T value = static_cast<T>(factor * sum);
      store_row(dtype, gradient, offset + (gb * size[1] + gh) * stride, 1, 1, &value);
    }
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
