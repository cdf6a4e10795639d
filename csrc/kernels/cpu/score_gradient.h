#pragma once

#include <cstdint>

#include "kernels/cpu/score.h"

// What backward needs of a score beside its tile: for a block of keys and a block of queries, with
// G(i, j) the gradient of the scaled score, add to
//   dq(i, :) and dk(j, :) up to a factor per element that is applied once at the end,
//   the sums that the gradient of the weight is made of (additive).
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Sums over the rows of a tile, dv += (f p)^T dO and dk += G^T q. Where the left operand of a
// product cannot be transposed (kTransposes), they are made the other way round, dv^T += dO^T (f
// p), of copies of dO and q that were transposed once (pack_transposed); the sums are turned round
// when a block of keys is done.

// One block of queries against one block of keys.
template <typename T>
struct GradientTile {
  const TileRanges<T>* ranges;
  std::int64_t rows;  // queries
  std::int64_t keys;
  // G, 0 where a row of a group may not see a key: words along the keys [rows][ld], and words
  // across the rows [words(rows)][across_ld].
  const T* gradient;
  std::int64_t ld;
  const T* gradient_across;
  std::int64_t across_ld;
  const T* query;  // as they are, packed across rows: [words(rows)][query_ld]; or pack_transposed
  std::int64_t query_ld;
  T* grad_query;  // [rows][grad_query_ld]
  std::int64_t grad_query_ld;
  T* grad_key;  // [keys][grad_key_ld], or [width][grad_key_ld]
  std::int64_t grad_key_ld;
  Zeros zeros;
};

// C(:, j) += sum_i A(i, :) B(i, j) over the rows i of a tile, A from pack_transposed, for each
// panel of keys only the groups of rows that see one of them. A group is a step of the sum.
template <typename Operand, int kGroupRows, typename T = typename Operand::Scalar>
  requires(Operand::kTransposes)
inline void add_over_rows(const TileRanges<T>& ranges, std::int64_t rows, std::int64_t keys,
                          Zeros zeros, const T* b, std::int64_t ldb, const T* a,
                          std::int64_t /*lda*/, T* c, std::int64_t ldc, std::int64_t width) {
  static_assert(kGroupRows == Operand::kStep);
  constexpr int step_words = Operand::kStepWords;
  const std::int64_t step = width * step_words;  // of A
  const std::int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
  for (std::int64_t u = 0; u < keys; u += kPanel<T>) {
    for (std::int64_t g = 0, end = 0; g < groups; g = end) {
      end = g + 1;
      if (!ranges.touches(g, u)) continue;
      while (end < groups && ranges.touches(end, u)) ++end;
      const T* const right = b + g * step_words * ldb + u;
      for (std::int64_t d = 0; d < width; d += Operand::kTileRows) {
        const std::int64_t elements = smaller<std::int64_t>(Operand::kTileRows, width - d);
        const T* const left = a + g * step + d * step_words;
        T* const to = c + d * ldc + u;
        if (zeros == Zeros::kMultiply) {
          Operand::template multiply<2, true>(elements, left, step_words, step, right, ldb,
                                              (end - g) * step_words, to, ldc);
          continue;
        }
        if constexpr (Operand::kParts == 1) {
          for (std::int64_t s = 0; s < end - g; ++s) {
            multiply_skipping_zeros<Operand, true, true, Side::kRight>(
                elements, left + s * step, step_words, right + s * step_words * ldb, ldb,
                step_words, to, ldc, kPanel<T>);
          }
        }
      }
    }
  }
}

// C(j, :) += sum_i A(i, j) B(i, :) over the rows i of a tile, for each group of keys only those
// rows that see one of them (and the others of their words, where A is 0). Rows of groups that the
// mask hides the keys from are left out.
template <typename Operand, int kGroupRows, typename T = typename Operand::Scalar>
  requires(!Operand::kTransposes)
inline void add_over_rows(const TileRanges<T>& ranges, std::int64_t rows, std::int64_t keys,
                          Zeros zeros, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,
                          T* c, std::int64_t ldc, std::int64_t width) {
  for (std::int64_t d = 0; d < width; d += kStrip<T>) {
    const std::int64_t columns = smaller<std::int64_t>(kStrip<T>, width - d);
    std::int64_t first = 0;  // row ranges are monotone: both ends only move on
    std::int64_t last = 0;
    // A group of rows has initialised whole panels, so a group of keys must not cross one.
    for (std::int64_t u = 0; u < keys; u += kPanel<T>) {
      const std::int64_t panel_end = smaller<std::int64_t>(u + kPanel<T>, keys);
      for (std::int64_t j = u; j < panel_end; j += Operand::kTileRows) {
        const std::int64_t j_end = smaller<std::int64_t>(j + Operand::kTileRows, panel_end);
        while (first < rows && (ranges.row_is_empty(first) || ranges.end[first] <= j)) ++first;
        last = larger(last, first);
        while (last < rows && !ranges.row_is_empty(last) && ranges.begin[last] < j_end) ++last;
        for (std::int64_t r = first; r < last;) {
          std::int64_t end = r;
          while (end < last && ranges.touches(end / kGroupRows, u)) {
            end = smaller(end / kGroupRows * kGroupRows + kGroupRows, last);
          }
          if (r < end) {
            const std::int64_t word = r / Operand::kPack;
            multiply<Operand, true, false>(zeros, j_end - j, a + word * lda + j, lda,
                                           b + word * ldb + d, ldb, Operand::words(end) - word,
                                           c + j * ldc + d, ldc, columns);
          }
          r = end / kGroupRows * kGroupRows + kGroupRows;
        }
      }
    }
  }
}

// dq += G k, dk += G^T q: two matrix products.
template <typename OperandT>
class DotGradient : public DotProducts<OperandT> {
 public:
  using Operand = OperandT;
  using T = typename Operand::Scalar;
  using Score = DotScore<Operand>;
  static constexpr int kGroupRows = Score::kGroupRows;
  static constexpr bool kHasWeight = false;
  static constexpr bool kReadsQueries = true;  // as the driver has them, else as it likes
  static constexpr int kPanelsAtOnce = 1;      // whose scores are made at once, plain_tile.h
  static constexpr std::int64_t kBlockRows = Operand::kGradientRows;
  static constexpr std::int64_t kBlockKeys = Operand::kGradientKeys;
  static std::int64_t buffer_size(std::int64_t head_dim) {
    return Operand::words(kBlockKeys) * padded<T>(head_dim);  // rows of keys
  }
  static std::int64_t query_size(std::int64_t /*head_dim*/) { return 0; }

  DotGradient(const AttentionProblem& p, T* /*constants*/, T* /*spare*/, T* buffer)
      : p_(p),
        width_(padded<T>(p.head_dim)),
        scale_{splat(static_cast<T>(p.scale * Math<double>::log2e))},
        buffer_(buffer) {
    if constexpr (!Operand::kFinishes) this->factor = scale_.factor;
  }

  void set_head(std::int64_t /*b*/, std::int64_t /*h*/) {}

  // The scale is in the keys, or applied to the product: queries are read as they are.
  void load_keys(std::int64_t b, std::int64_t hk, std::int64_t first, std::int64_t n, T* panels,
                 T* /*bounds*/) {
    const Rows key = rows_of(p_.dtype, p_.key, b, hk, p_.head_dim);
    if constexpr (kScalesKeys) {
      pack_panels<Operand>(key, first, n, panels, scale_);
    } else {
      largest_key_ = pack_panels<Operand>(key, first, n, panels, Unchanged<T>{});
    }
    if (const T* const in_place = Operand::in_place(key)) {
      key_ = in_place + first * key.row_stride;
      key_ld_ = key.row_stride;
    } else {
      pack_across_rows<Operand>(key, first, n, buffer_);
      key_ = buffer_;
      key_ld_ = width_;
    }
  }
  // Of operands of several parts: the keys, and the scale.
  bool is_in_range() const {
    return Operand::in_range(largest_key_, Operand::kLeast) &&
           Operand::in_range_of_scores(largest_key_, scale_.factor);
  }
  void load_queries(std::int64_t /*b*/, std::int64_t /*h*/, std::int64_t /*i*/,
                    std::int64_t /*rows*/, const T* query, std::int64_t query_ld, T* /*to*/) {
    query_ = query;
    query_ld_ = query_ld;
  }
  void scores(std::int64_t r, std::int64_t rows, const T* panel, T /*bound*/, std::int64_t /*j*/,
              T* scores, std::int64_t ld) {
    const std::int64_t depth = Score::key_size(p_.head_dim);
    if constexpr (kScalesProduct) {
      multiply_rows<Operand, 2, false, true>(rows, query_ + r * query_ld_, query_ld_, panel,
                                             kPanel<T>, depth, scores, ld, scale_);
    } else {
      multiply_rows<Operand, 2, false, true>(rows, query_ + r * query_ld_, query_ld_, panel,
                                             kPanel<T>, depth, scores, ld);
    }
  }
  // scores[rows][n x kPanel] of rows from r and n panels one behind the other.
  void scores_of_panels(std::int64_t r, std::int64_t rows, const T* panels, std::int64_t n, T* to,
                        std::int64_t ld) {
    for (std::int64_t x = 0; x < n; ++x) {
      const std::int64_t key = x * kPanel<T>;
      scores(r, rows, panels + key * Score::key_size(p_.head_dim), T(0), key, to + key, ld);
    }
  }

  void accumulate(const GradientTile<T>& tile, std::int64_t /*key*/, const T* /*bounds*/,
                  double* /*weight_sums*/) {
    add_over_rows<Operand, kGroupRows>(*tile.ranges, tile.rows, tile.keys, tile.zeros,
                                       tile.gradient_across, tile.across_ld, tile.query,
                                       tile.query_ld, tile.grad_key, tile.grad_key_ld, width_);
    for (std::int64_t d = 0; d < width_; d += kStrip<T>) {
      const std::int64_t columns = smaller<std::int64_t>(kStrip<T>, width_ - d);
      for (std::int64_t r = 0, g = 0; r < tile.rows; r += kGroupRows, ++g) {
        const TileRanges<T>& ranges = *tile.ranges;
        for (KeyRange s = ranges.span(g, 0); s.begin < s.end; s = ranges.span(g, s.end)) {
          const std::int64_t begin = Operand::words(s.begin / Operand::kStep * Operand::kStep);
          multiply<Operand, true, true>(
              tile.zeros, smaller<std::int64_t>(kGroupRows, tile.rows - r),
              tile.gradient + r * tile.ld + begin, tile.ld, key_ + begin * key_ld_ + d, key_ld_,
              Operand::words(s.end) - begin, tile.grad_query + r * tile.grad_query_ld + d,
              tile.grad_query_ld, columns);
        }
      }
    }
  }

  // dq and dk are the sums times this.
  T factor_of_sums(std::int64_t /*d*/) const { return static_cast<T>(p_.scale); }

 private:
  // As in DotScore.
  static constexpr bool kScalesProduct = Operand::kPack > 1 && Operand::kFinishes;
  static constexpr bool kScalesKeys = Operand::kPack == 1;

  const AttentionProblem& p_;
  std::int64_t width_;
  Scaled<T> scale_;
  T largest_key_ = 0;
  T* buffer_;
  const T* key_ = nullptr;
  std::int64_t key_ld_ = 0;
  const T* query_ = nullptr;
  std::int64_t query_ld_ = 0;
};

// With r = 1 / (1 + e^(2q) e^(2k)) in the signed variables, tanh = 1 - 2r and its slope is
// 4 (r - r^2):  dq_d = 4 scale w_d sum_j G (r - r^2), dk alike,
//               dw_d = scale sign(w_d) (sum_ij G - 2 sum_ij G r).
// r is computed again from the features, elements side by side in a vector, four queries at a time,
// which share a division with AVX-512; else, and where 1 + e^(2q) e^(2k) has to be limited, two do.
// In units of 2^-28 a product of four has room on both sides of 1. It never divides by w_d, and
// sum_ij G is added up, not taken to be 0, which it is not if the lse has a gradient.
// Bound, for four vectors: 33 sums, products and FMAs and a division, or 30 and two.
enum class Features : char { kFinite, kLimited, kSum };
template <typename T>
constexpr T kSlopeUnit = T(0x1p-28);
constexpr int kSlopesOfDivision = kVectorBytes == 64 ? 4 : 2;

// 1 + e^(2q) e^(2k), in units.
template <typename T, Features features>
TSA_INLINE Vec<T> one_plus(Vec<T> a, Vec<T> b) {
  const Vec<T> one = splat(kSlopeUnit<T>);
  constexpr T cap = Math<T>::cap * kSlopeUnit<T>;
  if constexpr (features == Features::kFinite) {
    return fma(a, b, one);  // a = e^(2q) in units, b = e^(2k)
  } else if constexpr (features == Features::kLimited) {
    return at_most(splat(cap), fma(a, b, one));
  } else {
    return at_most(splat(cap), fma(exp_2x(a + b), one, one));  // a = q, b = k
  }
}

// r[i] = 1 / x[i] of two.
template <typename T>
TSA_INLINE void reciprocals_of_two(const Vec<T>* x, Vec<T> inverse, Vec<T>* r) {
  r[0] = x[1] * inverse;
  r[1] = x[0] * inverse;
}

template <typename T, Features features>
struct TanhSlope {
  // h = g r, y = g (r - r^2), of queries a and one key b.
  template <int kRows>
  TSA_INLINE void operator()(const Vec<T> (&a)[kRows], Vec<T> b, const Vec<T> (&g)[kRows],
                             Vec<T> (&h)[kRows], Vec<T> (&y)[kRows]) const {
    const Vec<T> one = splat(kSlopeUnit<T>);
    Vec<T> x[kRows], r[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = one_plus<T, features>(a[i], b);
    if constexpr (kRows != 4) {
      for (int i = 0; i < kRows; ++i) r[i] = one / x[i];
    } else if constexpr (features == Features::kFinite && kSlopesOfDivision == 4) {
      const Vec<T> x01 = x[0] * x[1];
      const Vec<T> x23 = x[2] * x[3];
      const Vec<T> inverse = one / (x01 * x23);
      reciprocals_of_two<T>(x, inverse * x23, r);
      reciprocals_of_two<T>(x + 2, inverse * x01, r + 2);
    } else {
      reciprocals_of_two<T>(x, one / (x[0] * x[1]), r);
      reciprocals_of_two<T>(x + 2, one / (x[2] * x[3]), r + 2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      h[i] = g[i] * r[i];
      y[i] = fnma(h[i], r[i], h[i]);
    }
  }
};

// kRows queries against all keys of the tile for kLanes elements: adds up y of `slope` over keys
// and over queries. Returns the sum of h.
template <typename T, int kRows, Zeros zeros, typename Slope>
[[gnu::noinline]] Vec<T> sweep_rows(Slope slope, const T* __restrict a, std::int64_t a_ld,
                                    const T* __restrict b, std::int64_t b_ld, std::int64_t begin,
                                    std::int64_t end, const T* __restrict gradient, std::int64_t ld,
                                    T* __restrict grad_query, std::int64_t grad_query_ld,
                                    T* __restrict grad_key, std::int64_t grad_key_ld) {
  Vec<T> a_i[kRows], dq[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    a_i[i] = load(a + i * a_ld);
    dq[i] = load(grad_query + i * grad_query_ld);
  }
  Vec<T> weighted{};
  for (std::int64_t j = begin; j < end; ++j) {
    if constexpr (zeros == Zeros::kSkip) {
      static_assert(kRows == 1);
      if (gradient[j] == T(0)) continue;
    }
    Vec<T> g[kRows], h[kRows], y[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) g[i] = splat(gradient[i * ld + j]);
    slope(a_i, load(b + j * b_ld), g, h, y);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) dq[i] += y[i];
    T* const dk = grad_key + j * grad_key_ld;
    if constexpr (kRows == 4) {
      weighted += (h[0] + h[1]) + (h[2] + h[3]);
      store(dk, load(dk) + ((y[0] + y[1]) + (y[2] + y[3])));
    } else {
      weighted += h[0];
      store(dk, load(dk) + y[0]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) store(grad_query + i * grad_query_ld, dq[i]);
  return weighted;
}

// The whole tile: queries [rows][query_ld] and keys [keys][key_ld] as `slope` takes them. The sums
// of h are added to weight_sums[width].
template <int kGroupRows, typename T, typename Slope>
inline void sweep_tile(const GradientTile<T>& tile, const T* query, std::int64_t query_ld,
                       const T* key, std::int64_t key_ld, std::int64_t width, const Slope& slope,
                       double* weight_sums) {
  static_assert(kGroupRows % kScoreRows == 0);
  const TileRanges<T>& ranges = *tile.ranges;
  for (std::int64_t d = 0; d < width; d += kLanes<T>) {
    for (std::int64_t r = 0; r < tile.rows; r += kScoreRows) {
      Vec<T> sum{};
      const std::int64_t rows = smaller<std::int64_t>(kScoreRows, tile.rows - r);
      const KeyRange seen = ranges.seen_by_any(r, rows);
      const std::int64_t g = r / kGroupRows;
      for (KeyRange s = ranges.span(g, 0); s.begin < s.end; s = ranges.span(g, s.end)) {
        const std::int64_t begin = larger(s.begin, seen.begin);
        const std::int64_t end = smaller(s.end, seen.end);
        if (begin >= end) continue;
        if (rows == kScoreRows && tile.zeros == Zeros::kMultiply) {
          sum += sweep_rows<T, kScoreRows, Zeros::kMultiply>(
              slope, query + r * query_ld + d, query_ld, key + d, key_ld, begin, end,
              tile.gradient + r * tile.ld, tile.ld, tile.grad_query + r * tile.grad_query_ld + d,
              tile.grad_query_ld, tile.grad_key + d, tile.grad_key_ld);
          continue;
        }
        Vec<T> of_rows{};
        for (std::int64_t i = r; i < r + rows; ++i) {
          of_rows += sweep_rows<T, 1, Zeros::kSkip>(
              slope, query + i * query_ld + d, query_ld, key + d, key_ld, begin, end,
              tile.gradient + i * tile.ld, tile.ld, tile.grad_query + i * tile.grad_query_ld + d,
              tile.grad_query_ld, tile.grad_key + d, tile.grad_key_ld);
        }
        sum += of_rows;
      }
      for (int lane = 0; lane < kLanes<T>; ++lane) weight_sums[d + lane] += sum[lane];
    }
  }
}

// w_d of a head.
template <typename T>
inline double weight_of(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t d) {
  return load_element<T>(p.dtype, p.weight,
                         b * p.weight_stride[0] + h * p.weight_stride[1] + d * p.weight_stride[2]);
}

template <typename OperandT>
class AdditiveGradient : public FinishedScores<typename OperandT::Scalar> {
 public:
  using Operand = OperandT;
  using T = typename Operand::Scalar;
  using Score = AdditiveScore<Operand>;
  static constexpr int kGroupRows = Score::kGroupRows;
  static constexpr bool kHasWeight = true;
  static constexpr bool kReadsQueries = false;
  // Up to this |q| + |k| products of kSlopesOfDivision 1 + e^(2q) e^(2k) <= 2^(2 (|q| + |k|) log2 e
  // + 1) are at most 2^98 in units, and their reciprocals times the unit are normal numbers.
  static constexpr T kFinite = (T(98) / kSlopesOfDivision + 28 - 1) / (2 * Math<T>::log2e);
  static constexpr std::int64_t kBlockRows = 32;
  static constexpr std::int64_t kBlockKeys = 128;
  // e^(2k) and, where that leaves the range, k; the same of q; two sets of each.
  static std::int64_t buffer_size(std::int64_t head_dim) {
    const std::int64_t width = padded<T>(head_dim);
    return kBlockKeys * (spread_rows<T>(width) + width) + 2 * kBlockRows * width;
  }
  static std::int64_t query_size(std::int64_t head_dim) { return head_dim; }

  AdditiveGradient(const AttentionProblem& p, T* constants, T* spare, T* buffer)
      : p_(p),
        score_(p, constants, spare),
        width_(padded<T>(p.head_dim)),
        key_ld_(spread_rows<T>(width_)) {
    key_ = buffer;
    raw_key_ = key_ + kBlockKeys * key_ld_;
    query_ = raw_key_ + kBlockKeys * width_;
    raw_query_ = query_ + kBlockRows * width_;
  }

  void set_head(std::int64_t b, std::int64_t h) {
    b_ = b;
    h_ = h;
    score_.set_head(b, h);
  }
  void load_keys(std::int64_t b, std::int64_t hk, std::int64_t first, std::int64_t n, T* panels,
                 T* bounds) {
    const Rows key = rows_of(p_.dtype, p_.key, b, hk, p_.head_dim);
    score_.pack_keys(key, first, n, panels, bounds);
    pack_across_rows<Operand>(key, first, n, raw_key_);
    for (std::int64_t r = 0; r < n; ++r) {
      for (std::int64_t d = 0; d < width_; d += kLanes<T>) {
        const Vec<T> k = load(raw_key_ + r * width_ + d) * load(score_.sign() + d);
        store(raw_key_ + r * width_ + d, k);
        store(key_ + r * key_ld_ + d, exp_2x(k));
      }
    }
  }
  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows,
                    const T* /*query*/, std::int64_t /*query_ld*/, T* to) {
    scaled_query_ = to;
    score_.load_queries(b, h, i, rows, to,
                        [&](std::int64_t r, std::int64_t d, Vec<T> q, Vec<T> feature) {
                          store(raw_query_ + r * width_ + d, q);
                          store(query_ + r * width_ + d, feature * splat(kSlopeUnit<T>));
                        });
  }
  void scores(std::int64_t r, std::int64_t rows, const T* panel, T bound, std::int64_t j, T* scores,
              std::int64_t ld) {
    score_.scores(scaled_query_, r, rows, panel, bound, j, scores, ld);
  }

  // weight_sums[width]: sum G r. (sum G is the driver's.)
  void accumulate(const GradientTile<T>& tile, std::int64_t /*key*/, const T* bounds,
                  double* weight_sums) {
    const T of_queries = score_.query_bound();
    T of_keys = 0;
    for (std::int64_t u = 0; u < tile.keys; u += kPanel<T>) {
      of_keys = larger(of_keys, bounds[u / kPanel<T>]);
    }
    if (of_queries + of_keys <= kFinite) {
      sweep_tile<kGroupRows>(tile, query_, width_, key_, key_ld_, width_,
                             TanhSlope<T, Features::kFinite>{}, weight_sums);
    } else if (larger(of_queries, of_keys) <= Math<T>::max_exponent_argument) {
      sweep_tile<kGroupRows>(tile, query_, width_, key_, key_ld_, width_,
                             TanhSlope<T, Features::kLimited>{}, weight_sums);
    } else {
      sweep_tile<kGroupRows>(tile, raw_query_, width_, raw_key_, width_, width_,
                             TanhSlope<T, Features::kSum>{}, weight_sums);
    }
  }

  T factor_of_sums(std::int64_t d) const {
    return static_cast<T>(4.0 * p_.scale * weight_of<T>(p_, b_, h_, d));
  }
  double weight_gradient(std::int64_t d, double total, double sum) const {
    return p_.scale * static_cast<double>(score_.sign()[d]) * (total - 2.0 * sum);
  }

 private:
  const AttentionProblem& p_;
  Score score_;
  std::int64_t width_, key_ld_;
  T *key_, *raw_key_, *query_, *raw_query_;
  T* scaled_query_ = nullptr;
  std::int64_t b_ = 0;
  std::int64_t h_ = 0;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
