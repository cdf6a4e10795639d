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
  return p.score == ScoreKind::kAdditive && p.activation == Activation::kTanh &&
         has_few_rows(p, 1) && p.head_dim >= 8 && kLanes<T> >= kKeysOfDivision;
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

// scale sum_d w_d tanh(q_d + k_d).
template <typename T>
class AdditiveScoreInPlace : public ScoreInPlace<T> {
 public:
  static std::int64_t query_size(std::int64_t head_dim) { return 2 * padded<T>(head_dim); }

  AdditiveScoreInPlace(const AttentionProblem& p, T* /*constants*/, T* /*spare*/)
      : ScoreInPlace<T>(p) {}

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
  using ScoreInPlace<T>::p_;
  using ScoreInPlace<T>::key_;
  using ScoreInPlace<T>::valid_;
};

// With h = -tanh / 2 the slope of tanh is 4 (1/4 - h^2): sums are those of G (1/4 - h^2), then of
// G h.
template <typename T>
struct AdditiveSlopes {
  using Score = AdditiveScoreInPlace<T>;
  static constexpr bool kHasWeight = true;
  static std::int64_t size(std::int64_t head_dim) { return 2 * padded<T>(head_dim); }

  template <typename Store>
  static void add(const AttentionProblem& p, const Rows& key, KeyRange valid, Zeros zeros,
                  std::int64_t rows, const T* queries, const T* g, std::int64_t ld, std::int64_t j,
                  std::int64_t n, T* sums, T* buffer, const Store& store_key) {
    const std::int64_t width = padded<T>(p.head_dim);
    with_widened<T>(key.dtype, [&]<DType dtype>() {
      const auto* const keys =
          static_cast<const typename Storage<dtype>::type*>(key.data) + key.at(j);
      for (std::int64_t x = 0; x < n; x += kKeysOfDivision) {
        const FourKeys<T, dtype> four(keys, key.row_stride, x, {valid.begin - j, valid.end - j});
        if (zeros == Zeros::kMultiply) {
          add_four<dtype, Zeros::kMultiply>(four, p.head_dim, rows, queries, g + x, ld, sums,
                                            buffer);
        } else {
          add_four<dtype, Zeros::kSkip>(four, p.head_dim, rows, queries, g + x, ld, sums, buffer);
        }
        // 4 scale w is -2 ln 2 times what the queries have.
        for (std::int64_t y = x; y < smaller<std::int64_t>(x + kKeysOfDivision, n); ++y) {
          store_key(y, buffer + (y - x) * width, T(-2.0 * Math<double>::ln2));
        }
      }
    });
  }
  static void finish(const AttentionProblem& p, const T* query, T* sums) {
    const std::int64_t width = padded<T>(p.head_dim);
    const T* const weight = query + width;
    for (std::int64_t d = 0; d < width; ++d) sums[d] *= weight[d] * T(-2.0 * Math<double>::ln2);
  }
  // Moves the sums of G h of a row to double, of which few are added up in T then.
  static void take_weight_sums(const AttentionProblem& p, T* sums, double* to) {
    const std::int64_t width = padded<T>(p.head_dim);
    for (std::int64_t d = 0; d < width; ++d) to[d] += static_cast<double>(sums[width + d]);
    fill_zero(sums + width, width);
  }
  static double factor_of_weight(const AttentionProblem& p) { return -2.0 * p.scale; }

 private:
  // buffer: what four keys have of dk.
  template <DType dtype, Zeros zeros>
  [[gnu::noinline]] static void add_four(const FourKeys<T, dtype>& four, std::int64_t head_dim,
                                         std::int64_t rows, const T* __restrict queries,
                                         const T* __restrict g, std::int64_t ld, T* __restrict sums,
                                         T* __restrict buffer) {
    const std::int64_t width = padded<T>(head_dim);
    for (std::int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> elements[kKeysOfDivision], grad_key[kKeysOfDivision] = {};
      four.load(d, head_dim, elements);
      for (std::int64_t r = 0; r < rows; ++r) {
        const T* const query = queries + r * 2 * width + d;
        T* const sum = sums + r * 2 * width + d;
        Vec<T> k[kKeysOfDivision], h[kKeysOfDivision];
#pragma GCC unroll 4
        for (int y = 0; y < kKeysOfDivision; ++y) {
          const bool skip = zeros == Zeros::kSkip && g[r * ld + y] == T(0);
          k[y] = skip ? Vec<T>{} : elements[y];
        }
        half_tanh<T>(load(query), k, h);
        const Vec<T> w = load(query + width);
        Vec<T> of_slope = load(sum);
        Vec<T> of_tanh = load(sum + width);
#pragma GCC unroll 4
        for (int y = 0; y < kKeysOfDivision; ++y) {
          const Vec<T> g_y = splat(g[r * ld + y]);
          const Vec<T> slope = g_y * fnma(h[y], h[y], splat(T(0.25)));
          grad_key[y] = fma(w, slope, grad_key[y]);
          of_slope += slope;
          of_tanh = fma(g_y, h[y], of_tanh);
        }
        store(sum, of_slope);
        store(sum + width, of_tanh);
      }
      for (int y = 0; y < kKeysOfDivision; ++y) store(buffer + y * width + d, grad_key[y]);
    }
  }
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
