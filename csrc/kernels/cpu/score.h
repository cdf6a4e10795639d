#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common/attention_problem.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"

// The two scores, as policies of one driver. A policy packs queries and keys into its own features
// and turns a few rows and one panel of keys into scores in units of log2 (times log2 e, so that
// the softmax needs 2^x only).
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// The exact score of one pair in double, for what overflowed in T: limited, NaN only if an input
// is.
template <typename T>
inline double exact_score(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i,
                          std::int64_t j) {
  const Rows query = rows_of(p.dtype, p.query, b, h, p.head_dim);
  const Rows key = rows_of(p.dtype, p.key, b, h / p.group_size(), p.head_dim);
  const std::int64_t w = b * p.weight_stride[0] + h * p.weight_stride[1];
  double sum = 0.0;
  for (std::int64_t d = 0; d < p.head_dim; ++d) {
    const double q_d = load_element<T>(p.dtype, query.data, query.at(i) + d * query.element_stride);
    const double k_d = load_element<T>(p.dtype, key.data, key.at(j) + d * key.element_stride);
    if (p.score == ScoreKind::kDotProduct) {
      sum += q_d * k_d;
    } else {
      const double w_d = load_element<T>(p.dtype, p.weight, w + d * p.weight_stride[2]);
      const double x = q_d + k_d;
      const bool is_tanh = p.activation == Activation::kTanh;
      sum += w_d * (is_tanh ? __builtin_tanh(x) : (x > 0.0 ? x : p.negative_slope * x));
    }
  }
  constexpr double limit = Math<T>::max_score;
  const double score = p.scale * sum * Math<double>::log2e;
  return score > limit ? limit : (score < -limit ? -limit : score);
}

// Scores that are not finite, although the exact ones may be, are computed again.
template <typename T>
[[gnu::noinline]] void repair_scores(const AttentionProblem& p, std::int64_t b, std::int64_t h,
                                     std::int64_t i, std::int64_t j, std::int64_t n, T* scores) {
  for (std::int64_t x = 0; x < n; ++x) {
    if (!is_finite(scores[x])) scores[x] = static_cast<T>(exact_score<T>(p, b, h, i, j + x));
  }
}

// Scores in units of log2 do not exceed this.
template <typename T>
TSA_INLINE Vec<T> limited_score(Vec<T> score) {
  constexpr T most = Math<T>::max_score;
  return at_least(splat(-most), at_most(splat(most), score));
}

// What a policy knows of the whole problem beside the problem itself, if it has a type Context.
struct NoContext {};
template <typename Policy>
struct ContextOfPolicy {
  using Type = NoContext;
};
template <typename Policy>
  requires requires { typename Policy::Context; }
struct ContextOfPolicy<Policy> {
  using Type = typename Policy::Context;
};
template <typename Policy>
using ContextOf = typename ContextOfPolicy<Policy>::Type;
template <typename Policy>
constexpr bool kHasContext = !std::is_same_v<ContextOf<Policy>, NoContext>;
// As a member of a driver.
template <typename Policy>
using ContextMember = std::conditional_t<kHasContext<Policy>, const ContextOf<Policy>&, NoContext>;
template <typename Policy, typename... Memory>
inline Policy make_policy(const AttentionProblem& p, const ContextOf<Policy>& context,
                          Memory... memory) {
  if constexpr (kHasContext<Policy>) {
    return Policy(p, context, memory...);
  } else {
    return Policy(p, memory...);
  }
}

// Queries of a register tile of additive scores.
constexpr int kScoreRows = 4;

// The weight of a head, additive only.
template <typename T>
inline void load_weight(const AttentionProblem& p, std::int64_t b, std::int64_t h, T* to) {
  load_row(p.dtype, p.weight, b * p.weight_stride[0] + h * p.weight_stride[1], p.weight_stride[2],
           p.head_dim, to);
}

// What the softmax finds: scores, or products that could not be scaled on their way to memory
// (kFinishes). It scales those as it reads them, or in a pass of their own before they are changed
// in another way.
template <typename T>
struct FinishedScores {
  bool needs_pass() const { return false; }
  bool can_subtract(Vec<T> /*shift*/) const { return true; }
  void scale_products(T* /*products*/, std::int64_t /*n*/) const {}
  // For what has not been through scale_products, or has.
  Unchanged<T> scale(bool /*done*/) const { return {}; }
};
// Beside a shift of this size, in units of log2, a score of float has eight bits behind the point.
template <typename T>
constexpr T kMostShift = 65536;
template <typename T>
struct UnfinishedScores {
  Vec<T> factor;

  bool needs_pass() const { return factor[0] < T(0); }  // for the largest is the least then
  // Whether product * factor - shift may be rounded once, where the shift is such a product,
  // rounded: by up to half a unit of its last place, 2^-9 here, that one is not 0, and its weight
  // not 1. The row's sum has the same factor; but far beyond, 2^x would overflow.
  bool can_subtract(Vec<T> shift) const {
    return !any_lane<T>(absolute(shift) >= splat(kMostShift<T>));
  }
  void scale_products(T* products, std::int64_t n) const {
    for (std::int64_t j = 0; j < n; j += kLanes<T>) {
      store_up_to(products + j, load_up_to(products + j, n - j) * factor, n - j);
    }
  }
  Scaled<T> scale(bool done) const { return {done ? splat(T(1)) : factor}; }
};
template <typename Operand, typename T = typename Operand::Scalar>
using DotProducts = std::conditional_t<Operand::kFinishes, FinishedScores<T>, UnfinishedScores<T>>;

// scale q . k: a matrix product. scale * log2 e is in the packed queries where these are copies of
// the elements, else it is applied to the product.
template <typename OperandT>
class DotScore : public DotProducts<OperandT> {
 public:
  using Operand = OperandT;
  using T = typename Operand::Scalar;
  static constexpr ScoreKind kKind = ScoreKind::kDotProduct;
  static constexpr int kGroupRows = Operand::kTileRows;
  // Keys are the same for all query heads of a group.
  static constexpr bool kKeysPerQueryHead = false;
  static constexpr bool kInPlace = false;  // keys are packed into panels
  static constexpr int kPanelsAtOnce = 2;  // whose scores a band makes, plain_band.h
  static std::int64_t constants_size(std::int64_t /*head_dim*/) { return 0; }
  // Words per query and per key.
  static std::int64_t query_size(std::int64_t head_dim) {
    return padded<T>(Operand::words(head_dim));
  }
  static std::int64_t key_size(std::int64_t head_dim) { return Operand::words(head_dim); }
  static std::int64_t spare_size(std::int64_t /*head_dim*/, std::int64_t /*rows*/) { return 0; }

  DotScore(const AttentionProblem& p, T* /*constants*/, T* /*spare*/)
      : p_(p),
        factor_(splat(static_cast<T>(p.scale * Math<double>::log2e))),
        most_(largest_product()) {
    if constexpr (!Operand::kFinishes) this->factor = factor_;
  }

  void set_head(std::int64_t /*b*/, std::int64_t /*h*/) {}

  // rows queries from i to `queries`.
  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, T* queries) {
    const Rows query = rows_of(p_.dtype, p_.query, b, h, p_.head_dim);
    Vec<T> bound{};
    pack_along_rows<Operand>(query, i, rows, queries, [&](Vec<T> words) {
      if constexpr (kScalesQueries) words = words * factor_;
      bound = Operand::raise_bound(bound, words);
      return words;
    });
    query_bound_ = Operand::bound_of(bound);
  }

  // bounds[panel]: the largest |k| in it.
  void pack_keys(const Rows& key, std::int64_t j, std::int64_t n, T* panels, T* bounds) const {
    pack_bounded_panels<Operand>(key, j, n, panels, bounds,
                                 [](Vec<T> words, std::int64_t /*d*/, Vec<T>& bound) {
                                   bound = Operand::raise_bound(bound, words);
                                   return words;
                                 });
  }

  // Whether scores of keys of these bounds are known not to overflow, nor the sums on the way; and
  // not to lose digits, where parts may be too small.
  bool are_bounded(const T* bounds, std::int64_t panels) const {
    bool bounded = true;
    if constexpr (Operand::kParts > 1) bounded = Operand::in_range_of_scores(query_bound_, factor_);
    for (std::int64_t n = 0; n < panels; ++n) {
      bounded = bounded && query_bound_ * bounds[n] < most_;
      if constexpr (Operand::kParts > 1) {
        bounded = bounded && Operand::in_range_of_scores(bounds[n], factor_);
      }
    }
    return bounded;
  }

  // scores[rows][kPanel] of rows <= kGroupRows queries from row r of the block.
  void scores(const T* queries, std::int64_t r, std::int64_t rows, const T* panel, T /*bound*/,
              std::int64_t /*j*/, T* scores, std::int64_t ld) {
    const std::int64_t size = query_size(p_.head_dim);
    const std::int64_t depth = key_size(p_.head_dim);
    if constexpr (kScalesProduct) {
      multiply_rows<Operand, 2, false, true>(rows, queries + r * size, size, panel, kPanel<T>,
                                             depth, scores, ld, Scaled<T>{factor_});
    } else {
      multiply_rows<Operand, 2, false, true>(rows, queries + r * size, size, panel, kPanel<T>,
                                             depth, scores, ld);
    }
  }
  // scores[rows][n x kPanel] of the first rows of a group and n panels one behind the other.
  void scores_of_panels(const T* queries, std::int64_t rows, const T* panels, std::int64_t n, T* to,
                        std::int64_t ld) {
    for (std::int64_t x = 0; x < n; ++x) {
      const std::int64_t key = x * kPanel<T>;
      scores(queries, 0, rows, panels + key * key_size(p_.head_dim), T(0), key, to + key, ld);
    }
  }

 private:
  // A word of several elements cannot be scaled without rounding.
  static constexpr bool kScalesProduct = Operand::kPack > 1 && Operand::kFinishes;
  static constexpr bool kScalesQueries = Operand::kPack == 1;

  // Of one product: as many as there are elements, scaled, stay finite.
  T largest_product() const {
    const T factor = kScalesQueries ? T(1) : larger(T(1), absolute(factor_)[0]);
    return Math<T>::max_score / (static_cast<T>(p_.head_dim + 1) * factor);
  }

  const AttentionProblem& p_;
  Vec<T> factor_;
  T most_;
  T query_bound_ = 0;  // the largest |q|, scaled if the queries are
};

// scale sum_d w_d tanh(q_d + k_d). The sign of w_d moves into q_d and k_d, and
//   tanh(q + k) = 1 - 2 / (1 + e^(2q) e^(2k)),
// so the exponentials are made once per token: Lq + Lk of them, not Lq Lk. With c = max |w| and
// u_d = c / |w_d| the score is -2c scale sum_d (1 / x_d - |w_d| / 2c), x_d = u_d + (u_d A_d) B_d:
// one FMA per pair and element, and eight elements share a division, since
//   n1 / d1 + n2 / d2 = (n1 d2 + n2 d1) / (d1 d2).
// Everything is in units of 2^-15 (2^-127 in double), so that products of eight begin at 2^-120
// and have all exponents above before they overflow. Where |q|, |k| and u are so large that they
// could (kEight), four elements share a division (kFour); where these could, x_d is limited to
// `cap`, which keeps the product of four finite at an error of c / cap, and serves w_d = 0 as well
// (kLimited); where |q| or |k| is so large that the exponentials leave the range, x_d is computed
// from q_d + k_d instead (kSum). This is decided per panel of keys. Registers for eight are there
// with AVX-512 only.
// Bound, for eight elements of a vector of pairs: 27 sums, products and FMAs, and a division.
enum class Join : char { kEight, kFour, kLimited, kSum };
constexpr bool kSharesEight = kVectorBytes == 64;

template <typename T, Join join>
TSA_INLINE Vec<T> joined(Vec<T> a, Vec<T> b, Vec<T> u) {
  constexpr T cap = Math<T>::cap * Math<T>::unit;
  if constexpr (join == Join::kLimited) {
    return at_most(splat(cap), fma(a, b, u));
  } else if constexpr (join == Join::kSum) {
    return at_most(splat(cap), fma(exp_2x(a + b), u, u));  // a = q, b = k
  } else {
    return fma(a, b, u);  // a = u e^(2q), b = e^(2k)
  }
}

// 1 / x[0] + ... + 1 / x[n - 1].
template <typename T>
struct Fraction {
  Vec<T> numerator, denominator;
};
template <int n, typename T>
TSA_INLINE Fraction<T> sum_of_reciprocals(const Vec<T>* x) {
  if constexpr (n == 2) {
    return {x[0] + x[1], x[0] * x[1]};
  } else {
    const Fraction<T> a = sum_of_reciprocals<n / 2, T>(x);
    const Fraction<T> b = sum_of_reciprocals<n / 2, T>(x + n / 2);
    return {fma(a.numerator, b.denominator, b.numerator * a.denominator),
            a.denominator * b.denominator};
  }
}

// The operands of one vector of keys and kRows queries, and sum += sum_d (1 / x_d - half_d).
// Without `half`, what 1 / x_d is at tanh = 0, the sum would grow to sum |w| and lose digits.
template <typename T, int kRows, Join join>
struct AdditiveTile {
  const T* __restrict a;
  const T* __restrict u;
  const T* __restrict panel;
  std::int64_t head_dim;
  Vec<T> sum[kRows] = {};

  // Of n elements from d, which share a division.
  template <int n>
  TSA_INLINE void add(std::int64_t d, T half) {
    Vec<T> b[n], u_d[n];
#pragma GCC unroll 8
    for (int e = 0; e < n; ++e) {
      b[e] = load(panel + (d + e) * kPanel<T>);
      u_d[e] = splat(u[d + e]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Vec<T> x[n];
#pragma GCC unroll 8
      for (int e = 0; e < n; ++e) {
        x[e] = joined<T, join>(splat(a[i * head_dim + d + e]), b[e], u_d[e]);
      }
      const Fraction<T> all = sum_of_reciprocals<n, T>(x);
      sum[i] += all.numerator / all.denominator - splat(half);
    }
  }
};

// One vector of keys, kRows queries: scores = k2 sum_d (1 / x_d - half_d).
template <typename T, int kRows, Join join>
[[gnu::noinline]] void additive_tile(const T* __restrict a, const T* __restrict u,
                                     const T* __restrict half, const T* __restrict panel,
                                     std::int64_t head_dim, T k2, T* __restrict scores,
                                     std::int64_t ld) {
  AdditiveTile<T, kRows, join> tile{a, u, panel, head_dim};
  std::int64_t d = 0;
  if constexpr (join == Join::kEight) {
    for (; d + 8 <= head_dim; d += 8) tile.template add<8>(d, half[d / 4] + half[d / 4 + 1]);
  }
  for (; d + 4 <= head_dim; d += 4) tile.template add<4>(d, half[d / 4]);
  half += head_dim / 4 - d;
  for (; d < head_dim; ++d) {
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> a_i = splat(a[i * head_dim + d]);
      const Vec<T> x = joined<T, join>(a_i, load(panel + d * kPanel<T>), splat(u[d]));
      tile.sum[i] += T(1) / x - splat(half[d]);
    }
  }
  for (int i = 0; i < kRows; ++i) store(scores + i * ld, limited_score<T>(tile.sum[i] * splat(k2)));
}

template <typename OperandT>
class AdditiveScore : public FinishedScores<typename OperandT::Scalar> {
 public:
  using Operand = OperandT;
  using T = typename Operand::Scalar;
  static constexpr ScoreKind kKind = ScoreKind::kAdditive;
  static constexpr int kGroupRows = Operand::kTileRows / kScoreRows * kScoreRows;
  static constexpr bool kKeysPerQueryHead = true;  // the sign of w is in them
  static constexpr bool kInPlace = false;
  static std::int64_t constants_size(std::int64_t head_dim) { return 3 * padded<T>(head_dim); }
  static std::int64_t query_size(std::int64_t head_dim) { return head_dim; }
  static std::int64_t key_size(std::int64_t head_dim) { return head_dim; }
  static std::int64_t spare_size(std::int64_t head_dim, std::int64_t rows) {
    return head_dim * (rows + kPanel<T>);
  }

  // constants: u and the sign of w. spare: q and k themselves, used by Join::kSum only.
  AdditiveScore(const AttentionProblem& p, T* constants, T* spare)
      : p_(p),
        u_(constants),
        sign_(constants + padded<T>(p.head_dim)),
        half_(constants + 2 * padded<T>(p.head_dim)),
        spare_(spare) {}

  void set_head(std::int64_t b, std::int64_t h) {
    b_ = b;
    h_ = h;
    load_weight(p_, b, h, u_);
    double largest = 0.0;
    for (std::int64_t d = 0; d < p_.head_dim; ++d) {
      const double w = __builtin_fabs(static_cast<double>(u_[d]));
      largest = w > largest ? w : largest;
    }
    // NaN if a weight is not finite: then no score is right.
    double total = 0.0;
    const std::int64_t fours = p_.head_dim / 4 * 4;
    for (std::int64_t d = 0; d < p_.head_dim; d += d < fours ? 4 : 1) {
      double sum = 0.0;
      for (std::int64_t e = d; e < (d < fours ? d + 4 : d + 1); ++e) {
        sum += __builtin_fabs(static_cast<double>(u_[e]));
      }
      total += sum;
      const std::int64_t at = d < fours ? d / 4 : fours / 4 + d - fours;
      half_[at] = sum == 0.0 ? T(0) : static_cast<T>(sum / (2.0 * largest * Math<T>::unit));
    }
    double of_four = 0.0;  // the largest product of u, its log2
    double of_eight = 0.0;
    double four_before = 0.0;
    double product = 1.0;
    for (std::int64_t d = 0; d < padded<T>(p_.head_dim); ++d) {
      const T w = d < p_.head_dim ? u_[d] : T(0);
      const double wanted = largest / __builtin_fabs(static_cast<double>(w));
      const T u =
          wanted < static_cast<double>(Math<T>::cap) ? static_cast<T>(wanted) : Math<T>::cap;
      sign_[d] = w < T(0) ? T(-1) : T(1);
      u_[d] = u * Math<T>::unit;
      product *= static_cast<double>(u);
      if (d % 4 != 3) continue;
      if (d < fours) {
        const double four = __builtin_log2(product);
        of_four = larger(of_four, four);
        if (d % 8 == 7) of_eight = larger(of_eight, four_before + four);
        four_before = four;
      }
      product = 1.0;
    }
    four_ = largest_argument(4, of_four);
    eight_ = smaller(largest_argument(8, of_eight), four_);
    k2_ = static_cast<T>(-2.0 * largest * Math<T>::unit * p_.scale * Math<double>::log2e);
    bounded_ = __builtin_fabs(p_.scale) * total * Math<double>::log2e < Math<T>::max_score;
  }

  const T* sign() const { return sign_; }
  T query_bound() const { return query_bound_; }

  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, T* queries) {
    load_queries(b, h, i, rows, queries, [](std::int64_t, std::int64_t, Vec<T>, Vec<T>) {});
  }
  // also(r, d, q, e^(2q)): of row r from element d, with the sign of w.
  template <typename Also>
  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, T* queries,
                    const Also& also) {
    const Rows query = rows_of(p_.dtype, p_.query, b, h, p_.head_dim);
    first_query_ = i;
    query_rows_ = rows;
    spare_queries_ready_ = false;
    query_bound_ = T(0);
    for (std::int64_t r = 0; r < rows; ++r) {
      T* const to = queries + r * p_.head_dim;
      Vec<T> bound{};
      for (std::int64_t d = 0; d < p_.head_dim; d += kLanes<T>) {
        const std::int64_t n = smaller<std::int64_t>(kLanes<T>, p_.head_dim - d);
        const Vec<T> q = load_elements_of_row<T>(query, i + r, d, n) * load(sign_ + d);
        const Vec<T> feature = exp_2x(q);
        bound = at_least(absolute(q), bound);
        store_up_to(to + d, feature * load(u_ + d), n);
        also(r, d, q, feature);
      }
      query_bound_ = larger(query_bound_, max_lanes<T>(bound));
    }
  }

  // bounds[panel]: the largest |k| in it.
  void pack_keys(const Rows& key, std::int64_t j, std::int64_t n, T* panels, T* bounds) const {
    pack_bounded_panels<Operand>(key, j, n, panels, bounds,
                                 [&](Vec<T> k, std::int64_t d, Vec<T>& bound) {
                                   k *= load(sign_ + d);
                                   bound = Operand::raise_bound(bound, k);
                                   return exp_2x(k);
                                 });
  }
  // Scores are at most |scale| sum |w|.
  bool are_bounded(const T* /*bounds*/, std::int64_t /*panels*/) const { return bounded_; }

  void scores(const T* queries, std::int64_t r, std::int64_t rows, const T* panel, T bound,
              std::int64_t j, T* scores, std::int64_t ld) {
    const T* const features = queries + r * p_.head_dim;
    if constexpr (kSharesEight) {
      if (bound + query_bound_ <= eight_) {
        return tile<Join::kEight>(features, panel, rows, scores, ld);
      }
    }
    if (bound + query_bound_ <= four_) {
      return tile<Join::kFour>(features, panel, rows, scores, ld);
    }
    if (larger(bound, query_bound_) <= Math<T>::max_exponent_argument) {
      return tile<Join::kLimited>(features, panel, rows, scores, ld);
    }
    prepare_spare(j);
    tile<Join::kSum>(spare_ + (kPanel<T> + r) * p_.head_dim, spare_, rows, scores, ld);
  }

 private:
  // The largest |q| + |k| at which n elements, whose u have a product of 2^log2_product, may share
  // a division. Of x_d <= u_d (1 + e^(2m)) <= u_d 2^(2m log2 e + 1), m = |q| + |k|, in units, n
  // have a product d; and since no x_d is below 1, the numerator is at most d n / unit.
  static T largest_argument(int n, double log2_product) {
    const double max_exponent = -1.0 - static_cast<double>(Math<T>::min_exponent);
    const double unit_exponent = __builtin_log2(static_cast<double>(Math<T>::unit));
    const double of_numerator = __builtin_log2(n) - unit_exponent;
    const double of_product = n * unit_exponent + log2_product;
    return static_cast<T>(((max_exponent - of_numerator - of_product) / n - 1.0) /
                          (2.0 * Math<double>::log2e));
  }

  template <Join join>
  void tile(const T* queries, const T* panel, std::int64_t rows, T* scores, std::int64_t ld) const {
    for (int side = 0; side < kPanel<T>; side += kLanes<T>) {
      const T* a = queries;
      T* s = scores + side;
      std::int64_t left = rows;
      for (; left >= kScoreRows; left -= kScoreRows, a += kScoreRows * p_.head_dim) {
        additive_tile<T, kScoreRows, join>(a, u_, half_, panel + side, p_.head_dim, k2_, s, ld);
        s += kScoreRows * ld;
      }
      for (; left > 0; --left, a += p_.head_dim, s += ld) {
        additive_tile<T, 1, join>(a, u_, half_, panel + side, p_.head_dim, k2_, s, ld);
      }
    }
  }

  // The panel of keys from j and, once per block, the queries, both with the sign of w only.
  [[gnu::noinline]] void prepare_spare(std::int64_t j) {
    const Rows key = rows_of(p_.dtype, p_.key, b_, h_ / p_.group_size(), p_.head_dim);
    const auto with_sign = [&](Vec<T> k, std::int64_t d) { return k * load(sign_ + d); };
    pack_panel<Operand>(key, j, smaller<std::int64_t>(kPanel<T>, p_.key_length - j), spare_,
                        with_sign);
    if (spare_queries_ready_) return;
    spare_queries_ready_ = true;
    const Rows query = rows_of(p_.dtype, p_.query, b_, h_, p_.head_dim);
    for (std::int64_t r = 0; r < query_rows_; ++r) {
      T* const to = spare_ + (kPanel<T> + r) * p_.head_dim;
      load_row(query.dtype, query.data, query.at(first_query_ + r), query.element_stride,
               p_.head_dim, to);
      for (std::int64_t d = 0; d < p_.head_dim; ++d) to[d] *= sign_[d];
    }
  }

  const AttentionProblem& p_;
  T* u_;
  T* sign_;
  T* half_;  // sums of |w| / 2c over four elements, then of the single ones behind
  T* spare_;
  T k2_ = 0;
  std::int64_t b_ = 0;
  std::int64_t h_ = 0;
  std::int64_t first_query_ = 0;
  std::int64_t query_rows_ = 0;
  T query_bound_ = 0;
  T eight_ = 0;  // up to this |q| + |k| eight elements may share a division
  T four_ = 0;   // four
  bool bounded_ = false;
  bool spare_queries_ready_ = false;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
