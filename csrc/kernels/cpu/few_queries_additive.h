#pragma once

#include <cstdint>

#include "kernels/cpu/few_queries.h"

// The additive score (tanh) for a few queries, as in a decoder that attends once per step: keys are
// read once, where they lie. With e^(2k) made for one query there is nothing to be shared between
// queries, so e^(2(q + k)) is made from the sum, whatever its range. Four keys share a division.
// Bound: about twenty operations for an element of a vector of pairs.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

constexpr int kKeysOfDivision = 4;

// One row only, of all heads that read a key head: e^(2(q + k)) is made for each, e^(2k) once. Very
// narrow heads and vectors of fewer lanes than keys share a division gain nothing.
template <typename T>
inline bool has_few_additive_queries(const AttentionProblem& p) {
  return p.score == ScoreKind::kAdditive && p.activation == Activation::kTanh && p.kv_heads > 0 &&
         p.group_size() * p.query_length == 1 && p.key.stride[3] == 1 && p.value.stride[3] == 1 &&
         p.head_dim >= 8 && kLanes<T> >= kKeysOfDivision;
}

// -tanh(q + k) / 2 = 1 / (1 + e^(2(q + k))) - 1/2 for four keys. Beyond +-10 (20 in double) tanh is
// +-1, and four such denominators have a finite product.
template <typename T>
TSA_INLINE void half_tanh(Vec<T> q, const Vec<T> (&k)[kKeysOfDivision],
                          Vec<T> (&h)[kKeysOfDivision]) {
  constexpr T limit = sizeof(T) == 8 ? T(20) : T(10);
  Vec<T> x[kKeysOfDivision];
#pragma GCC unroll 4
  for (int n = 0; n < kKeysOfDivision; ++n) {
    const Vec<T> sum = at_least(splat(-limit), at_most(splat(limit), q + k[n]));
    x[n] = splat(T(1)) + exp2<T>(sum * splat(2 * Math<T>::log2e));
  }
  const Vec<T> x01 = x[0] * x[1];
  const Vec<T> x23 = x[2] * x[3];
  const Vec<T> inverse = splat(T(1)) / (x01 * x23);
  const Vec<T> of_01 = inverse * x23;
  const Vec<T> of_23 = inverse * x01;
  const Vec<T> half = splat(T(-0.5));
  h[0] = fma(x[1], of_01, half);
  h[1] = fma(x[0], of_01, half);
  h[2] = fma(x[3], of_23, half);
  h[3] = fma(x[2], of_23, half);
}

// Four keys from the x-th on. Where these are not among `valid`, the next one that is takes their
// place: what is behind a sample's length may be NaN, and would spoil those beside it.
template <typename T, DType dtype>
struct FourKeys {
  const typename Storage<dtype>::type* key[kKeysOfDivision];

  FourKeys(const typename Storage<dtype>::type* keys, std::int64_t row_stride, std::int64_t x,
           KeyRange valid) {
    for (int y = 0; y < kKeysOfDivision; ++y) {
      key[y] = keys + smaller(larger(x + y, valid.begin), valid.end - 1) * row_stride;
    }
  }
  // Elements from d, zeros behind the head dim.
  TSA_INLINE void load(std::int64_t d, std::int64_t head_dim,
                       Vec<T> (&elements)[kKeysOfDivision]) const {
    if (d + kLanes<T> <= head_dim) {
#pragma GCC unroll 4
      for (int y = 0; y < kKeysOfDivision; ++y) elements[y] = load_widened<T, dtype>(key[y] + d);
    } else {
      for (int y = 0; y < kKeysOfDivision; ++y) {
        elements[y] = load_first_widened<T, dtype>(key[y] + d, head_dim - d);
      }
    }
  }
};

// scores[n] of a query and n <= kLanes keys, of which `valid` are wanted. query: [width] elements,
// then their weights; zeros behind head_dim.
template <typename T, DType dtype>
[[gnu::noinline]] void additive_scores_in_place(
    const T* __restrict query, std::int64_t width,
    const typename Storage<dtype>::type* __restrict keys, std::int64_t row_stride,
    std::int64_t head_dim, std::int64_t n, KeyRange valid, T* __restrict scores) {
  Vec<T> sums[kLanes<T>] = {};
  for (std::int64_t x = 0; x < n; x += kKeysOfDivision) {
    const FourKeys<T, dtype> four(keys, row_stride, x, valid);
    Vec<T> sum[kKeysOfDivision] = {};
    for (std::int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> k[kKeysOfDivision], h[kKeysOfDivision];
      four.load(d, head_dim, k);
      half_tanh<T>(load(query + d), k, h);
      const Vec<T> w = load(query + width + d);
#pragma GCC unroll 4
      for (int y = 0; y < kKeysOfDivision; ++y) sum[y] = fma(w, h[y], sum[y]);
    }
    for (int y = 0; y < smaller(kKeysOfDivision, kLanes<T>); ++y) sums[x + y] = sum[y];
  }
  store_up_to(scores, limited_score<T>(sums_of_lanes<T>(sums)), n);
}

// scale sum_d w_d tanh(q_d + k_d) against keys where they are.
template <typename Scalar>
class AdditiveScoreInPlace : public FinishedScores<Scalar> {
 public:
  using Operand = Elements<Scalar>;
  using T = Scalar;
  static constexpr int kGroupRows = Operand::kTileRows;
  static constexpr bool kKeysPerQueryHead = false;
  static constexpr bool kInPlace = true;
  static std::int64_t constants_size(std::int64_t /*head_dim*/) { return 0; }
  static std::int64_t query_size(std::int64_t head_dim) { return 2 * padded<T>(head_dim); }
  static std::int64_t key_size(std::int64_t /*head_dim*/) { return 0; }
  static std::int64_t spare_size(std::int64_t /*head_dim*/, std::int64_t /*rows*/) { return 0; }

  AdditiveScoreInPlace(const AttentionProblem& p, T* /*constants*/, T* /*spare*/) : p_(p) {}

  bool are_bounded(const T* /*bounds*/, std::int64_t /*panels*/) const { return false; }
  void set_head(std::int64_t b, std::int64_t h) {
    key_ = rows_of(p_.dtype, p_.key, b, h / p_.group_size(), p_.head_dim);
    valid_ = key_range(p_, b);
  }
  // What half_tanh is multiplied by: -2 scale log2 e w.
  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, T* queries) {
    const Rows query = rows_of(p_.dtype, p_.query, b, h, p_.head_dim);
    const std::int64_t width = padded<T>(p_.head_dim);
    const T factor = static_cast<T>(-2.0 * p_.scale * Math<double>::log2e);
    for (std::int64_t r = 0; r < rows; ++r, queries += 2 * width) {
      fill_zero(queries, 2 * width);
      load_row(query.dtype, query.data, query.at(i + r), query.element_stride, p_.head_dim,
               queries);
      load_weight(p_, b, h, queries + width);
      for (std::int64_t d = width; d < 2 * width; ++d) queries[d] *= factor;
    }
  }

  // scores[rows][kPanel] of rows <= kGroupRows queries from row r of the block and keys from j.
  void scores(const T* queries, std::int64_t r, std::int64_t rows, std::int64_t j, T* scores,
              std::int64_t ld) const {
    const std::int64_t width = padded<T>(p_.head_dim);
    const std::int64_t keys = smaller<std::int64_t>(kPanel<T>, p_.key_length - j);
    if (larger(valid_.begin, j) >= smaller(valid_.end, j + keys)) return;  // nobody sees these
    queries += r * query_size(p_.head_dim);
    with_widened<T>(key_.dtype, [&]<DType dtype>() {
      const auto* const from =
          static_cast<const typename Storage<dtype>::type*>(key_.data) + key_.at(j);
      for (std::int64_t i = 0; i < rows; ++i, queries += 2 * width, scores += ld) {
        for (std::int64_t x = 0; x < keys; x += kLanes<T>) {
          additive_scores_in_place<T, dtype>(
              queries, width, from + x * key_.row_stride, key_.row_stride, p_.head_dim,
              smaller<std::int64_t>(kLanes<T>, keys - x),
              {valid_.begin - j - x, valid_.end - j - x}, scores + x);
        }
      }
    });
  }

 private:
  const AttentionProblem& p_;
  Rows key_{};
  KeyRange valid_{};  // of the sample
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
