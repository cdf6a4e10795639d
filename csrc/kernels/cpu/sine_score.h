#pragma once

#include <cstdint>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/sine_features.h"

// The additive score as a dot product of features (sine_features.h), as policies of the drivers of
// forward.h and backward.h. The drivers see dot products of bfloat16 with as many elements as a
// token has features; what goes in and out are its own elements.
#if defined(__AMX_BF16__)
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Rows of features are long, so everything is laid out in the order in which tiles are loaded:
//   queries        [rows / 32][step][32 rows][16 words], the left operand of scores
//   panels         [keys / 32][word][32 keys], their right operand
//   queries, transposed, as pack_transposed has them, the left operand of the keys' gradients
//   keys across    [strip of 32 elements][word of two keys][32], the right operand of the queries'
// and products are cut along the features, so that what a tile reads again is in L1.
struct SineTiles : Bfloat16Tiles {
  static constexpr bool kGivesUp = true;
  static constexpr std::int64_t kBlockKeys = 256;
  static constexpr std::int64_t kForwardRows = 256;
  static constexpr std::int64_t kGradientRows = 256;
  static constexpr std::int64_t kGradientKeys = 256;
  static constexpr std::int64_t kChunkSteps = 8;  // of a sum that are multiplied at once
  static constexpr std::int64_t kLeftStep = std::int64_t{kTileRows} * kStepWords;
  static constexpr std::int64_t kRightStep = std::int64_t{kStepWords} * kPanel<float>;

  // Two vectors of columns, added to what is there or not.
  static void multiply_onto(bool adds, std::int64_t rows, const float* a, std::int64_t a_row,
                            std::int64_t a_step, const float* b, std::int64_t ldb,
                            std::int64_t depth, float* c, std::int64_t ldc) {
    if (adds) {
      Bfloat16Tiles::multiply<2, true>(rows, a, a_row, a_step, b, ldb, depth, c, ldc);
    } else {
      Bfloat16Tiles::multiply<2, false>(rows, a, a_row, a_step, b, ldb, depth, c, ldc);
    }
  }

  // scores[rows][panels x kPanel] of up to 32 rows and panels one behind the other.
  static void multiply_long(std::int64_t rows, const float* queries, const float* panels,
                            std::int64_t n, std::int64_t words, float* scores, std::int64_t ld) {
    const std::int64_t steps = words / kStepWords;
    for (std::int64_t s = 0; s < steps; s += kChunkSteps) {
      const std::int64_t depth = smaller(kChunkSteps, steps - s) * kStepWords;
      const float* const left = queries + s * kLeftStep;
      for (std::int64_t x = 0; x < n; ++x) {
        const float* const panel = panels + (x * steps + s) * kRightStep;
        float* const to = scores + x * kPanel<float>;
        multiply_onto(s > 0, rows, left, kStepWords, kLeftStep, panel, kPanel<float>, depth, to,
                      ld);
      }
    }
  }
};

// 16 words of kTokens tokens become a step of rows, to[kTokens][16].
inline void turn_step(const float* words, TokenOrder order, float* to) {
  constexpr std::int64_t lanes = kLanes<float>;
  static_assert(SineTiles::kStepWords == lanes && SineTiles::kTileRows == kTokens);
  for (int x = 0; x < 2; ++x) {
    VecF square[lanes];
#pragma GCC unroll 16
    for (std::int64_t w = 0; w < lanes; ++w) square[w] = load(words + w * kTokens + x * lanes);
    transpose<float>(square);
    const int first = order == TokenOrder::kHalves ? x * lanes : x;
    const int distance = order == TokenOrder::kHalves ? 1 : 2;
#pragma GCC unroll 16
    for (int e = 0; e < lanes; ++e) store(to + (first + e * distance) * lanes, square[e]);
  }
}

// What makes features has as memory to work in: tokens, and a step.
constexpr std::int64_t kStepSize = SineTiles::kStepWords * kTokens;
inline std::int64_t features_scratch(std::int64_t width) { return width * kTokens + kStepSize; }

// Features of n queries as the left operand of scores, and if wanted transposed: the two layouts
// of SineTiles, of rows of `words`.
template <bool kTransposes>
inline void put_queries(const SineHead& head, const Rows& queries, std::int64_t begin,
                        std::int64_t n, std::int64_t words, float* scratch, float* to,
                        float* transposed) {
  constexpr std::int64_t lanes = kLanes<float>;
  constexpr TokenOrder order = kTransposes ? TokenOrder::kPairs : TokenOrder::kHalves;
  float* const step = scratch + queries.width * kTokens;
  for (std::int64_t r = 0; r < n; r += kTokens) {
    turn_tokens(queries, begin + r, smaller<std::int64_t>(kTokens, n - r), order, scratch);
    make_features<true>(
        head, queries.width, scratch, words,
        [&](std::int64_t word, const TokenFeatures& x) __attribute__((always_inline)) {
          float* const at = step + word % lanes * kTokens;
          store(at, words_of(x.first[0], x.second[0]));
          store(at + lanes, words_of(x.first[1], x.second[1]));
          if constexpr (kTransposes) {
            store(transposed + 2 * word * lanes, words_of(x.first[0], x.first[1]));
            store(transposed + (2 * word + 1) * lanes, words_of(x.second[0], x.second[1]));
          }
          if (word % lanes == lanes - 1) turn_step(step, order, to + word / lanes * kStepSize);
        });
    to += kTokens * words;
    if constexpr (kTransposes) transposed += kTokens * words;
  }
}

// Features of n keys as panels. Their turned tokens are in tokens[n / kTokens][width][kTokens], or
// those of the last panel, if they need not be kept.
template <bool kKeepsTokens>
inline void put_keys(const SineHead& head, const Rows& keys, std::int64_t begin, std::int64_t n,
                     std::int64_t words, float* tokens, float* panels) {
  for (std::int64_t r = 0; r < n; r += kTokens, panels += kTokens * words) {
    float* const turned = kKeepsTokens ? tokens + r * keys.width : tokens;
    turn_tokens(keys, begin + r, smaller<std::int64_t>(kTokens, n - r), TokenOrder::kHalves,
                turned);
    make_features<false>(
        head, keys.width, turned, words,
        [&](std::int64_t word, const TokenFeatures& x) __attribute__((always_inline)) {
          store(panels + word * kTokens, words_of(x.first[0], x.second[0]));
          store(panels + word * kTokens + kLanes<float>, words_of(x.first[1], x.second[1]));
        });
  }
}

// What products become scores by, in units of log2.
inline VecF factor_of_scores(const AttentionProblem& p, const SinePlan& plan, std::int64_t b,
                             std::int64_t h) {
  return splat(static_cast<float>(p.scale * plan.head(b, h).unit() * Math<double>::log2e));
}

class SineScore : public UnfinishedScores<float> {
 public:
  using Operand = SineTiles;
  using T = float;
  using Context = SinePlan;
  static constexpr ScoreKind kKind = ScoreKind::kAdditive;
  static constexpr int kGroupRows = Operand::kTileRows;
  static constexpr bool kKeysPerQueryHead = true;  // w is in what depends on a key alone
  static constexpr bool kInPlace = false;
  static constexpr int kPanelsAtOnce = 4;
  // `elements`: of the features.
  static std::int64_t constants_size(std::int64_t /*elements*/) { return 0; }
  static std::int64_t query_size(std::int64_t elements) {
    return padded<T>(Operand::words(elements));
  }
  static std::int64_t key_size(std::int64_t elements) { return Operand::words(elements); }
  static std::int64_t spare_size(std::int64_t elements, std::int64_t /*rows*/) {
    return features_scratch(elements / 2);  // more than a token has
  }

  SineScore(const AttentionProblem& p, const SinePlan& plan, T* /*constants*/, T* spare)
      : p_(p), plan_(plan), size_(query_size(plan.elements())), spare_(spare) {}

  void set_head(std::int64_t b, std::int64_t h) {
    b_ = b, h_ = h;
    factor = factor_of_scores(p_, plan_, b, h);
  }

  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, T* queries) {
    put_queries<false>(plan_.head(b, h), rows_of(p_.dtype, p_.query, b, h, plan_.head_dim()), i,
                       rows, size_, spare_, queries, nullptr);
  }
  void pack_keys(const Rows& /*key*/, std::int64_t j, std::int64_t n, T* panels,
                 T* /*bounds*/) const {
    const Rows key = rows_of(p_.dtype, p_.key, b_, h_ / p_.group_size(), plan_.head_dim());
    put_keys<false>(plan_.head(b_, h_), key, j, n, size_, spare_, panels);
  }
  // Sines are.
  bool are_bounded(const T* /*bounds*/, std::int64_t /*panels*/) const { return true; }

  void scores(const T* queries, std::int64_t r, std::int64_t rows, const T* panel, T /*bound*/,
              std::int64_t /*j*/, T* scores, std::int64_t ld) {
    scores_of_panels(queries + r * size_, rows, panel, 1, scores, ld);
  }
  void scores_of_panels(const T* queries, std::int64_t rows, const T* panels, std::int64_t n,
                        T* scores, std::int64_t ld) {
    Operand::multiply_long(rows, queries, panels, n, size_, scores, ld);
  }

 private:
  const AttentionProblem& p_;
  const SinePlan& plan_;
  std::int64_t size_;  // of a row of features, in words; that of a key in a panel too
  T* spare_;
  std::int64_t b_ = 0, h_ = 0;
};

// Gradients of the features, G times those of the keys and its transpose times those of the
// queries, are products like the others. They become gradients of the elements at once, by 32
// queries or keys, since the rows are long: with F(q) = w a (sin f q - n), C(q) = w a (cos f q -
// m') of a term and f(k), s(k) of the key,
//   dq = sum_m f_m ((C + w a m') x - (F + w a n) y) + w s r,   x = sum_j G (f(k_j) + m), y alike,
//   dk = sum_m f_m ((f + m) y - (s + n') x) + w s c,           x = sum_i G (F + w a n), y alike,
//   w dw = sum_j (sum_m (f x + s y) + w s c (k - mean))
//          + sum_i r (w s (q + mean) + sum_m w a (m sin f q + n' cos f q)), mean of the keys,
// where c = sum_i G is the product with the ones beside the parts, and r = sum_j G is known: it is
// the gradient of the lse, 0 if there is none. (As it comes out, of an output and of G that have
// been rounded, it would be most of dq where q and k are small.)
class SineGradient : public UnfinishedScores<float> {
 public:
  using Operand = SineTiles;
  using T = float;
  using Score = SineScore;
  using Context = SinePlan;
  static constexpr int kGroupRows = Score::kGroupRows;
  static constexpr bool kHasWeight = true;
  static constexpr bool kReadsQueries = true;
  static constexpr int kPanelsAtOnce = Score::kPanelsAtOnce;
  static constexpr std::int64_t kBlockRows = Operand::kGradientRows;
  static constexpr std::int64_t kBlockKeys = Operand::kGradientKeys;
  // Features of the keys across rows; their elements, turned; gradients of features; sums over the
  // keys of a panel.
  static std::int64_t buffer_size(std::int64_t elements) {
    const std::int64_t size = Score::query_size(elements);
    return kBlockKeys * size + kBlockKeys * size / 2 + kTokens * 2 * size + size / 2 * kLanes<T>;
  }
  static std::int64_t query_size(std::int64_t /*elements*/) { return 0; }

  SineGradient(const AttentionProblem& p, const SinePlan& plan, T* /*constants*/, T* /*spare*/,
               T* buffer)
      : p_(p), plan_(plan), size_(Score::query_size(plan.elements())), width_(2 * size_) {
    key_across_ = buffer;
    key_turned_ = key_across_ + kBlockKeys * size_;
    gradients_ = key_turned_ + kBlockKeys * size_ / 2;
    of_weights_ = gradients_ + kPanel<T> * width_;
  }

  void set_head(std::int64_t b, std::int64_t h) {
    b_ = b, h_ = h;
    factor = factor_of_scores(p_, plan_, b, h);
  }

  // Features of queries as the left operand of scores, and transposed; `spare` as the score's.
  static void copy_queries(const AttentionProblem& p, const SinePlan& plan, std::int64_t b,
                           std::int64_t h, std::int64_t begin, std::int64_t n, T* along,
                           T* transposed, T* spare) {
    put_queries<true>(plan.head(b, h), rows_of(p.dtype, p.query, b, h, plan.head_dim()), begin, n,
                      Score::query_size(plan.elements()), spare, along, transposed);
  }

  void load_keys(std::int64_t b, std::int64_t hk, std::int64_t first, std::int64_t n, T* panels,
                 T* /*bounds*/) {
    const Rows key = rows_of(p_.dtype, p_.key, b, hk, plan_.head_dim());
    put_keys<true>(plan_.head(b, h_), key, first, n, size_, key_turned_, panels);
    put_keys_across(panels, n);
    panels_ = panels;
  }
  static bool is_in_range() { return true; }

  void load_queries(std::int64_t /*b*/, std::int64_t /*h*/, std::int64_t /*i*/,
                    std::int64_t /*rows*/, const T* query, std::int64_t /*query_ld*/, T* /*to*/) {
    query_ = query;
  }
  void scores(std::int64_t r, std::int64_t rows, const T* panel, T /*bound*/, std::int64_t /*j*/,
              T* scores, std::int64_t ld) {
    scores_of_panels(r, rows, panel, 1, scores, ld);
  }
  void scores_of_panels(std::int64_t r, std::int64_t rows, const T* panels, std::int64_t n,
                        T* scores, std::int64_t ld) {
    Operand::multiply_long(rows, query_ + r * size_, panels, n, size_, scores, ld);
  }

  void accumulate(const GradientTile<T>& tile, std::int64_t /*key*/, const T* /*bounds*/,
                  double* weight_sums) {
    for (std::int64_t r = 0; r < tile.rows; r += kGroupRows) add_queries(tile, r);
    for (std::int64_t u = 0; u < tile.keys; u += kPanel<T>) add_keys(tile, u, weight_sums);
  }

  // What the sums r contribute to dq, rows of `ld` numbers, and to dw; once for all keys.
  void add_row_sums(std::int64_t b, std::int64_t h, T* grad_query, std::int64_t ld,
                    double* weight_sums) const {
    if (!plan_.has_row_sums()) return;
    const SineHead head = plan_.head(b, h);
    const Rows queries = rows_of(p_.dtype, p_.query, b, h, plan_.head_dim());
    for (std::int64_t d = 0; d < queries.width; d += kLanes<T>) {
      const std::int64_t n = smaller<std::int64_t>(kLanes<T>, queries.width - d);
      VecF of_weight{};
      for (std::int64_t i = 0; i < p_.query_length; ++i) {
        const VecF total = splat(plan_.row_sum(b, h, i));
        const VecF q = load_elements_of_row<T>(queries, i, d, n);
        VecF slope = load(head.line() + d);
        VecF value = slope * (q + load(head.shift() + d));
        for (int m = 0; m < head.terms(); ++m) {
          VecF sine, cosine;
          sine_and_cosine_of_turns(q * head.at(m, SineHead::kTurns, d), sine, cosine);
          const VecF of_sine = head.at(m, SineHead::kOfSine, d);
          const VecF of_cosine = head.at(m, SineHead::kOfCosine, d);
          value = fma(sine, of_sine, fma(cosine, of_cosine, value));
          slope = fma(head.at(m, SineHead::kFrequency, d), fnma(sine, of_cosine, cosine * of_sine),
                      slope);
        }
        T* const dq = grad_query + i * ld + d;
        store(dq, fma(total, slope, load(dq)));
        of_weight = fma(total, value, of_weight);
      }
      for (std::int64_t lane = 0; lane < n; ++lane) {
        weight_sums[d + lane] += static_cast<double>(of_weight[lane]);
      }
    }
  }

  // What a weight counted for that is too small for the score.
  T factor_of_sums(std::int64_t d) const {
    const double w = plan_.head(b_, h_).weight()[d];
    return static_cast<T>(p_.scale * weight_of<T>(p_, b_, h_, d) / w);
  }
  double weight_gradient(std::int64_t d, double /*total*/, double sum) const {
    return p_.scale * sum / plan_.head(b_, h_).weight()[d];
  }

 private:
  static constexpr int kLow = 16;  // bits of a bfloat16
  static TSA_INLINE VecF first_of(VecF words) { return (VecF)((IntVec<float>)words << kLow); }
  static TSA_INLINE VecF second_of(VecF words) { return (VecF)((IntVec<float>)words & ~0xffff); }

  // From the panels of n keys. Zeros behind the last key: nothing is multiplied by what is there.
  void put_keys_across(const T* panels, std::int64_t n) {
    constexpr std::int64_t lanes = kLanes<T>;
    const __m512i low = interleaved(0);
    const __m512i high = interleaved(lanes);
    T* const rows = gradients_;  // [kTokens][16 words]
    for (std::int64_t r = 0; r < n; r += kTokens, panels += kTokens * size_) {
      for (std::int64_t w = 0; w < size_; w += lanes) {
        turn_step(panels + w * kTokens, TokenOrder::kHalves, rows);
        T* to = key_across_ + 2 * w * Operand::words(kBlockKeys) + r / 2 * kStrip<T>;
        for (int x = 0; x < kTokens; x += 2, to += kStrip<T>) {
          const auto upper = (__m512i)load(rows + x * lanes);
          const auto lower = (__m512i)load(rows + (x + 1) * lanes);
          store(to, (VecF)_mm512_permutex2var_epi16(upper, low, lower));
          store(to + lanes, (VecF)_mm512_permutex2var_epi16(upper, high, lower));
        }
      }
    }
  }
  // Elements `first` to first + 15 of two rows, in turn.
  static __m512i interleaved(std::int64_t first) {
    alignas(64) std::uint16_t order[2 * kLanes<T>];
    for (std::int64_t x = 0; x < kLanes<T>; ++x) {
      order[2 * x] = static_cast<std::uint16_t>(first + x);
      order[2 * x + 1] = static_cast<std::uint16_t>(kTokens + first + x);
    }
    return _mm512_load_si512(order);
  }

  // The group of queries from row r of the tile. Gradients of their features are strips of 32
  // elements, [strip][32 rows][32].
  void add_queries(const GradientTile<T>& tile, std::int64_t r) {
    const TileRanges<T>& ranges = *tile.ranges;
    const std::int64_t g = r / kGroupRows;
    const std::int64_t rows = smaller<std::int64_t>(kGroupRows, tile.rows - r);
    bool any = false;
    for (KeyRange s = ranges.span(g, 0); s.begin < s.end; s = ranges.span(g, s.end)) {
      const std::int64_t begin = Operand::words(s.begin / Operand::kStep * Operand::kStep);
      const T* const left = tile.gradient + r * tile.ld + begin;
      const std::int64_t depth = Operand::words(s.end) - begin;
      for (std::int64_t d = 0; d < width_; d += kStrip<T>) {
        const T* const right = key_across_ + d * Operand::words(kBlockKeys) + begin * kStrip<T>;
        T* const to = gradients_ + d * kGroupRows;
        Operand::multiply_onto(any, rows, left, tile.ld, Operand::kStepWords, right, kStrip<T>,
                               depth, to, kStrip<T>);
      }
      any = true;
    }
    if (!any) return;
    const std::int64_t width = plan_.head_dim();
    const SineHead head = plan_.head(b_, h_);
    for (int m = 0; m < head.terms(); ++m) {
      for (std::int64_t d = 0; d < width; d += kLanes<T>) {
        if (width % kLanes<T> == 0) {
          contract_queries<true>(tile, head, r, rows, m, d);
        } else {
          contract_queries<false>(tile, head, r, rows, m, d);
        }
      }
    }
  }

  // Of term m and a vector of elements from d. kPlain: the vector's words are a step.
  template <bool kPlain>
  void contract_queries(const GradientTile<T>& tile, const SineHead& head, std::int64_t r,
                        std::int64_t rows, int m, std::int64_t d) const {
    constexpr std::int64_t lanes = kLanes<T>;
    const std::int64_t width = plan_.head_dim();
    const std::int64_t n = kPlain ? lanes : smaller(lanes, width - d);
    const std::int64_t word = m * width + d;
    const VecF query_sine = head.at(m, SineHead::kQuerySine, d);
    const VecF query_cosine = head.at(m, SineHead::kQueryCosine, d);
    const VecF frequency = head.at(m, SineHead::kFrequency, d);
    const T* const features = query_ + r * size_;
    for (std::int64_t x = 0; x < rows; ++x) {
      VecF words, gx, gy;
      if constexpr (kPlain) {
        words = load(features + word * kGroupRows + x * lanes);
        part_pairs(gradients_ + 2 * word * kGroupRows + x * kStrip<T>, gx, gy);
      } else {
        T both_words[2 * lanes] = {}, both_strips[2 * kStrip<T>] = {};
        const std::int64_t first = word / lanes * lanes;
        for (std::int64_t y = 0; y < 2 && first + y * lanes < size_; ++y) {
          const std::int64_t at = first + y * lanes;
          store(both_words + y * lanes, load(features + at * kGroupRows + x * lanes));
          const T* const strip = gradients_ + 2 * at * kGroupRows + x * kStrip<T>;
          store(both_strips + y * kStrip<T>, load(strip));
          store(both_strips + y * kStrip<T> + lanes, load(strip + lanes));
        }
        words = load(both_words + word % lanes);
        part_pairs(both_strips + 2 * (word % lanes), gx, gy);
      }
      const VecF sine = first_of(words) + query_sine;
      const VecF cosine = second_of(words) + query_cosine;
      T* const dq = tile.grad_query + (r + x) * tile.grad_query_ld + d;
      const VecF sum = frequency * fnma(sine, gy, cosine * gx);
      store(dq, load(dq) + (kPlain ? sum : first_lanes<T>(sum, n, VecF{})));
    }
  }

  // The panel of keys from column u of the tile.
  void add_keys(const GradientTile<T>& tile, std::int64_t u, double* weight_sums) {
    constexpr std::int64_t lanes = kLanes<T>;
    constexpr int halves = kPanel<T> / lanes;
    constexpr std::int64_t ld = kPanel<T>;
    const TileRanges<T>& ranges = *tile.ranges;
    const std::int64_t groups = (tile.rows + kGroupRows - 1) / kGroupRows;
    bool any = false;
    for (std::int64_t g = 0, end = 0; g < groups; g = end) {
      end = g + 1;
      if (!ranges.touches(g, u)) continue;
      while (end < groups && ranges.touches(end, u)) ++end;
      const T* const right = tile.gradient_across + g * Operand::kStepWords * tile.across_ld + u;
      const std::int64_t step = width_ * Operand::kStepWords;
      const std::int64_t depth = (end - g) * Operand::kStepWords;
      for (std::int64_t d = 0; d < width_; d += Operand::kTileRows) {
        const T* const left = tile.query + g * step + d * Operand::kStepWords;
        Operand::multiply_onto(any, Operand::kTileRows, left, Operand::kStepWords, step, right,
                               tile.across_ld, depth, gradients_ + d * ld, ld);
      }
      any = true;
    }
    if (!any) return;
    const std::int64_t width = plan_.head_dim();
    const SineHead head = plan_.head(b_, h_);
    const T* const features = panels_ + u * size_;
    const T* const raw = key_turned_ + u * width;
    VecF total[halves];
    for (int x = 0; x < halves; ++x) {
      total[x] = load(gradients_ + std::int64_t{2} * head.terms() * width * ld + x * lanes);
    }
    for (std::int64_t d = 0; d < width; ++d) {  // the straight line
      const VecF line = splat(head.line()[d]);
      const VecF shift = splat(head.shift()[d]);
      T* const dk = tile.grad_key + d * tile.grad_key_ld + u;
      VecF of_weight{};
      for (int x = 0; x < halves; ++x) {
        const VecF gradient = line * total[x];
        store(dk + x * lanes, load(dk + x * lanes) + gradient);
        of_weight = fma(gradient, load(raw + d * kPanel<T> + x * lanes) - shift, of_weight);
      }
      store(of_weights_ + d * lanes, of_weight);
    }
    for (int m = 0; m < head.terms(); ++m) {
      for (std::int64_t d = 0; d < width; ++d) {
        const auto of = [&](SineHead::Vector which) { return splat(head.vector(m, which)[d]); };
        const VecF key_cosine = of(SineHead::kKeyCosine);
        const VecF key_sine = of(SineHead::kKeySine);
        const VecF query_sine = of(SineHead::kQuerySine);
        const VecF query_cosine = of(SineHead::kQueryCosine);
        const VecF frequency = of(SineHead::kFrequency);
        const std::int64_t word = m * width + d;
        T* const dk = tile.grad_key + d * tile.grad_key_ld + u;
        VecF of_weight = load(of_weights_ + d * lanes);
#pragma GCC unroll 2
        for (int x = 0; x < halves; ++x) {
          const VecF words = load(features + word * kPanel<T> + x * lanes);
          const T* const pair = gradients_ + 2 * word * ld + x * lanes;
          const VecF gx = fma(total[x], query_sine, load(pair));
          const VecF gy = fma(total[x], query_cosine, load(pair + ld));
          const VecF first = first_of(words);
          const VecF second = second_of(words);
          of_weight = fma(first, gx, fma(second, gy, of_weight));
          const VecF slope = fnma(second + key_sine, gx, (first + key_cosine) * gy);
          store(dk + x * lanes, fma(frequency, slope, load(dk + x * lanes)));
        }
        store(of_weights_ + d * lanes, of_weight);
      }
    }
    for (std::int64_t d = 0; d < width; ++d) {
      weight_sums[d] += static_cast<double>(sum_lanes<T>(load(of_weights_ + d * lanes)));
    }
  }

  const AttentionProblem& p_;
  const SinePlan& plan_;
  std::int64_t size_;   // words of a row of features
  std::int64_t width_;  // their elements
  T *key_across_, *key_turned_, *gradients_, *of_weights_;
  const T* panels_ = nullptr;
  const T* query_ = nullptr;
  std::int64_t b_ = 0, h_ = 0;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
#endif
