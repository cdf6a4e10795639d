#pragma once

#include <cstdint>

#include "kernels/cpu/score_gradient.h"

// The additive score with leaky ReLU, f(x) = x where x > 0 and a x elsewhere (ReLU: a = 0), as
// GATv2 has it: scale sum_d w_d f(q_d + k_d). Nothing can be made once per token here: a sum over
// w_d q_d and w_d k_d apart would lose the digits that q and k of opposite signs cancel. With
// f(x) = max(x, a x), or the minimum where a > 1, a pair and element cost four vector operations.
// Keys are packed as they are, so the query heads of a group share them.
// Bound: four operations for an element of a vector of pairs, backward eight more.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// kRows queries, one panel of keys: scores = factor sum_d w_d f(q_d + k_d).
template <typename T, int kRows, bool kSteep>
[[gnu::noinline]] void leaky_relu_tile(const T* __restrict queries, const T* __restrict weight,
                                       const T* __restrict panel, std::int64_t head_dim, T slope,
                                       T factor, T* __restrict scores, std::int64_t ld) {
  constexpr int vectors = kPanel<T> / kLanes<T>;
  Vec<T> sum[kRows][vectors] = {};
  for (std::int64_t d = 0; d < head_dim; ++d) {
    const Vec<T> w = splat(weight[d]);
    Vec<T> k[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) k[v] = load(panel + d * kPanel<T> + v * kLanes<T>);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> q = splat(queries[i * head_dim + d]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> x = q + k[v];
        const Vec<T> below = x * splat(slope);
        sum[i][v] = fma(w, kSteep ? at_most(below, x) : at_least(below, x), sum[i][v]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      store(scores + i * ld + v * kLanes<T>, sum[i][v] * splat(factor));
    }
  }
}

template <typename OperandT>
class LeakyReluScore : public FinishedScores<typename OperandT::Scalar> {
 public:
  using Operand = OperandT;
  using T = typename Operand::Scalar;
  static constexpr int kGroupRows = Operand::kTileRows / kScoreRows * kScoreRows;
  static constexpr bool kKeysPerQueryHead = false;
  static constexpr bool kInPlace = false;
  static std::int64_t constants_size(std::int64_t head_dim) { return padded<T>(head_dim); }
  static std::int64_t query_size(std::int64_t head_dim) { return head_dim; }
  static std::int64_t key_size(std::int64_t head_dim) { return head_dim; }
  static std::int64_t spare_size(std::int64_t /*head_dim*/, std::int64_t /*rows*/) { return 0; }

  // constants: w.
  LeakyReluScore(const AttentionProblem& p, T* constants, T* /*spare*/)
      : p_(p),
        weight_(constants),
        slope_(static_cast<T>(p.negative_slope)),
        factor_(static_cast<T>(p.scale * Math<double>::log2e)) {}

  void set_head(std::int64_t b, std::int64_t h) { load_weight(p_, b, h, weight_); }

  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows,
                    T* queries) const {
    const Rows query = rows_of(p_.dtype, p_.query, b, h, p_.head_dim);
    for (std::int64_t r = 0; r < rows; ++r) {
      load_row(query.dtype, query.data, query.at(i + r), query.element_stride, p_.head_dim,
               queries + r * p_.head_dim);
    }
  }

  bool are_bounded(const T* /*bounds*/, std::int64_t /*panels*/) const { return false; }
  void pack_keys(const Rows& key, std::int64_t j, std::int64_t n, T* panels, T* /*bounds*/) const {
    pack_panels<Operand>(key, j, n, panels, Unchanged<T>{});
  }

  void scores(const T* queries, std::int64_t r, std::int64_t rows, const T* panel, T /*bound*/,
              std::int64_t /*j*/, T* scores, std::int64_t ld) const {
    if (slope_ > T(1)) {
      tiles<true>(queries + r * p_.head_dim, panel, rows, scores, ld);
    } else {
      tiles<false>(queries + r * p_.head_dim, panel, rows, scores, ld);
    }
  }

 private:
  template <bool kSteep>
  void tiles(const T* queries, const T* panel, std::int64_t rows, T* scores,
             std::int64_t ld) const {
    for (; rows >= kScoreRows; rows -= kScoreRows, queries += kScoreRows * p_.head_dim) {
      leaky_relu_tile<T, kScoreRows, kSteep>(queries, weight_, panel, p_.head_dim, slope_, factor_,
                                             scores, ld);
      scores += kScoreRows * ld;
    }
    for (; rows > 0; --rows, queries += p_.head_dim, scores += ld) {
      leaky_relu_tile<T, 1, kSteep>(queries, weight_, panel, p_.head_dim, slope_, factor_, scores,
                                    ld);
    }
  }

  const AttentionProblem& p_;
  T* weight_;
  T slope_;
  T factor_;
};

// With m = f'(q + k), 1 or a:  dq_d = scale w_d sum_j G m, dk alike,
//                              dw_d = scale sum_ij G m (q_d + k_d).
template <typename T>
struct LeakyReluSlope {
  T negative_slope;

  // y = g m, h = y x.
  template <int kRows>
  TSA_INLINE void operator()(const Vec<T> (&a)[kRows], Vec<T> b, const Vec<T> (&g)[kRows],
                             Vec<T> (&h)[kRows], Vec<T> (&y)[kRows]) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> x = a[i] + b;
      y[i] = x > T(0) ? g[i] : g[i] * splat(negative_slope);
      h[i] = y[i] * x;
    }
  }
};

template <typename OperandT>
class LeakyReluGradient : public FinishedScores<typename OperandT::Scalar> {
 public:
  using Operand = OperandT;
  using T = typename Operand::Scalar;
  using Score = LeakyReluScore<Operand>;
  static constexpr int kGroupRows = Score::kGroupRows;
  static constexpr bool kHasWeight = true;
  static constexpr bool kReadsQueries = true;
  static constexpr std::int64_t kBlockRows = 32;
  static constexpr std::int64_t kBlockKeys = 64;
  static std::int64_t buffer_size(std::int64_t head_dim) {
    return kBlockKeys * padded<T>(head_dim);  // rows of keys
  }
  static std::int64_t query_size(std::int64_t head_dim) { return head_dim; }

  LeakyReluGradient(const AttentionProblem& p, T* constants, T* spare, T* buffer)
      : p_(p), score_(p, constants, spare), width_(padded<T>(p.head_dim)), key_(buffer) {}

  void set_head(std::int64_t b, std::int64_t h) {
    b_ = b;
    h_ = h;
    score_.set_head(b, h);
  }
  void load_keys(std::int64_t b, std::int64_t hk, std::int64_t first, std::int64_t n, T* panels,
                 T* bounds) {
    const Rows key = rows_of(p_.dtype, p_.key, b, hk, p_.head_dim);
    score_.pack_keys(key, first, n, panels, bounds);
    pack_across_rows<Operand>(key, first, n, key_);
  }
  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows,
                    const T* query, std::int64_t query_ld, T* to) {
    score_.load_queries(b, h, i, rows, to);
    score_query_ = to;
    query_ = query;
    query_ld_ = query_ld;
  }
  void scores(std::int64_t r, std::int64_t rows, const T* panel, T bound, std::int64_t j, T* scores,
              std::int64_t ld) const {
    score_.scores(score_query_, r, rows, panel, bound, j, scores, ld);
  }

  // weight_sums[width]: sum G m (q + k).
  void accumulate(const GradientTile<T>& tile, std::int64_t /*key*/, const T* /*bounds*/,
                  double* weight_sums) const {
    const LeakyReluSlope<T> slope{static_cast<T>(p_.negative_slope)};
    sweep_tile<kGroupRows>(tile, query_, query_ld_, key_, width_, width_, slope, weight_sums);
  }

  T factor_of_sums(std::int64_t d) const {
    return static_cast<T>(p_.scale * weight_of<T>(p_, b_, h_, d));
  }
  double weight_gradient(std::int64_t /*d*/, double /*total*/, double sum) const {
    return p_.scale * sum;
  }

 private:
  const AttentionProblem& p_;
  Score score_;
  std::int64_t width_;
  T* key_;
  const T* score_query_ = nullptr;
  const T* query_ = nullptr;
  std::int64_t query_ld_ = 0;
  std::int64_t b_ = 0;
  std::int64_t h_ = 0;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
