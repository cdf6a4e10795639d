#pragma once

#include <cstdint>
#include <optional>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/common/tanh_sines.h"
#include "kernels/cpu/operand.h"
#include "kernels/cpu/score_gradient.h"

// The additive score as a dot product. On an interval tanh is a straight line and a few sines
// (tanh_sines.h), and a sine of a sum is two products:
//
//   tanh(q + k) = s (q + k) + sum_m a_m (sin f_m q cos f_m k + cos f_m q sin f_m k),
//
// so w . tanh(q + k) is a dot product of features of the query and of the key, 2 `terms` of each
// element, and all that is done per pair is a matrix product in bfloat16. Features less a constant
// leave terms that depend on the query or on the key alone:
//
//   sin q cos k = (sin q - n) (cos k - m) + n (cos k - m) + m sin q,
//
// and these, as the straight line, are added up in float, once per token. With n, m near the means
// of the sines and cosines over the tokens the products are small, and their rounding with them.
// Any n, m are right; these are the means of a normal distribution of the mean and variance that
// the tokens have.
//
// A pair of features is a word (operand.h): word m E + d has for element d of E
//   query  (w a_m (sin f_m q - n),  w a_m (cos f_m q - m'))
//   key    (cos f_m k - m,          sin f_m k - n')
// and three words behind these have what depends on one token, in three parts of bfloat16, times 1:
//   query  (1, part),  key  (part, 1).
//
// Error of a score, at most: |scale| sum_d |w_d| e_d with the error e_d of the fit, and what
// rounding leaves of 2^-9 of each product. `terms` is chosen for the inputs: e_d depends on the
// largest |q_d + k_d|, which the extremes of the tokens bound.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// sin and cos of 2 pi t: to 2e-5, t up to 2^13.
TSA_INLINE void sine_and_cosine_of_turns(VecF t, VecF& sine, VecF& cosine) {
  // Of half the angle, by minimax polynomials on a quarter of a turn.
  const VecF r = (VecF)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VecF z = r * r;
  VecF s = fma(splat(-0.55463599f), z, splat(2.54189895f));
  s = fma(s, z, splat(-5.16714279f));
  s = fma(s, z, splat(3.14158202f)) * r;
  VecF c = fma(splat(-1.22649323f), z, splat(4.04316535f));
  c = fma(c, z, splat(-4.93416688f));
  c = fma(c, z, splat(1.f));
  const VecF twice = s + s;
  sine = twice * c;
  cosine = fnma(twice, s, splat(1.f));
}

// Beyond this an element has more turns than sines are good for.
constexpr float kMostInput = 512.f;
// x, or 0 where it can only be of a key that nobody sees.
TSA_INLINE VecF usable(VecF x) { return absolute(x) <= splat(kMostInput) ? x : VecF{}; }

// Of 16 pairs of numbers, the first and the second ones.
TSA_INLINE void part_pairs(const float* pairs, VecF& first, VecF& second) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512 left = _mm512_loadu_ps(pairs);
  const __m512 right = _mm512_loadu_ps(pairs + kLanes<float>);
  first = (VecF)_mm512_permutex2var_ps(left, even, right);
  second = (VecF)_mm512_permutex2var_ps(left, odd, right);
}

// What the features of one query head and of its keys are made with: vectors over the elements, of
// stride() numbers each, zeros behind the last.
class SineHead {
 public:
  // Of term m.
  enum Vector : char {
    kTurns,        // f_m / 2 pi
    kFrequency,    // f_m
    kWeight,       // w a_m
    kQuerySine,    // w a_m n
    kQueryCosine,  // w a_m m'
    kKeyCosine,    // m
    kKeySine,      // n'
    kOfSine,       // w a_m m, what a sine of the query counts by itself
    kOfCosine,     // w a_m n'
    kVectors
  };
  static std::int64_t size(std::int64_t stride, int terms) {
    return (std::int64_t{terms} * kVectors + 2) * stride;
  }
  SineHead(const float* data, std::int64_t stride, int terms)
      : data_(data), stride_(stride), terms_(terms) {}

  int terms() const { return terms_; }
  std::int64_t stride() const { return stride_; }
  const float* vector(std::int64_t m, Vector which) const {
    return data_ + (m * kVectors + which) * stride_;
  }
  TSA_INLINE VecF at(int m, Vector which, std::int64_t d) const {
    return load(vector(m, which) + d);
  }
  const float* line() const { return vector(terms_, kTurns); }  // w s
  const float* weight() const { return line() + stride_; }      // w, never 0

 private:
  const float* data_;
  std::int64_t stride_;
  int terms_;
};

// Which fits a problem takes, and what follows from them.
class SinePlan {
 public:
  static constexpr int kPartWords = 3;  // the words of what depends on one token
  static constexpr int kMostTerms = sizeof(TanhSines::frequency) / sizeof(float);

  SinePlan() = default;
  SinePlan(const SinePlan&) = delete;
  SinePlan& operator=(const SinePlan&) = delete;

  // False: the inputs are not finite, or too large for any fit.
  bool make(const AttentionProblem& p, const Parallel& parallel) {
    heads_ = p.heads;
    width_ = p.head_dim;
    stride_ = padded<float>(p.head_dim);
    const std::int64_t key_heads = p.batch * p.kv_heads;
    const Scratch statistics(larger<std::int64_t>(key_heads * kNumbers * stride_, 1) * 4);
    auto* const numbers = static_cast<float*>(statistics.data());
    const Scratch found(larger<std::int64_t>(key_heads, 1));
    auto* const terms = static_cast<char*>(found.data());
    parallel.run(key_heads, [&](std::int64_t n, int) {
      terms[n] = static_cast<char>(
          find_terms(p, n / p.kv_heads, n % p.kv_heads, numbers + n * kNumbers * stride_));
    });
    terms_ = kTanhSines[0].terms;
    for (std::int64_t n = 0; n < key_heads; ++n) {
      if (terms[n] == 0) return false;
      terms_ = larger<int>(terms_, terms[n]);
    }
    const std::int64_t size = SineHead::size(stride_, terms_);
    memory_.emplace(larger<std::int64_t>(p.batch * p.heads * size * 4, 64));
    data_ = static_cast<float*>(memory_->data());
    parallel.run(p.batch * p.heads, [&](std::int64_t n, int) {
      const std::int64_t b = n / p.heads;
      const std::int64_t h = n % p.heads;
      const std::int64_t key_head = b * p.kv_heads + h / p.group_size();
      fill_head(p, b, h, numbers + key_head * kNumbers * stride_, data_ + n * size);
    });
    return true;
  }

  // What the gradients of the scores of a row add up to, of backward.
  void set_row_sums(const AttentionBackward& call) {
    query_length_ = call.problem.query_length;
    lse_ = static_cast<const float*>(call.lse);
    grad_lse_ = static_cast<const float*>(call.grad_lse);
  }
  bool has_row_sums() const { return grad_lse_ != nullptr; }
  float row_sum(std::int64_t b, std::int64_t h, std::int64_t i) const {
    const std::int64_t row = (b * heads_ + h) * query_length_ + i;
    return lse_[row] == -infinity<float>() ? 0.f : grad_lse_[row];
  }

  int terms() const { return terms_; }
  std::int64_t head_dim() const { return width_; }  // E
  // Words of features, and elements.
  std::int64_t words() const { return terms_ * width_ + kPartWords; }
  std::int64_t elements() const { return 2 * words(); }
  SineHead head(std::int64_t b, std::int64_t h) const {
    return {data_ + (b * heads_ + h) * SineHead::size(stride_, terms_), stride_, terms_};
  }

 private:
  // Of a key head, for each element: what was found in the tokens.
  enum Number : char { kQueryMean, kQueryVariance, kKeyMean, kKeyVariance, kLimit, kNumbers };
  static constexpr double kMostError = 2e-3;  // of a score, as the root of the sum of its squares
  static constexpr double kMostDerivativeError = 6e-3;  // of gradients, to their size

  // Minimum, maximum, sum and sum of squares of one vector of elements.
  struct Moments {
    VecF least, largest, sum{}, squares{};
    Moments() : least(splat(infinity<float>())), largest(splat(-infinity<float>())) {}
    std::int64_t count = 0;

    void add(const Rows& rows, KeyRange range, std::int64_t d, std::int64_t n) {
      if (range.begin >= range.end) return;
      count += range.end - range.begin;
      for (std::int64_t r = range.begin; r < range.end; ++r) {
        const VecF x = load_elements_of_row<float>(rows, r, d, n);
        least = at_most(x, least);
        largest = at_least(x, largest);
        sum += x;
        squares = fma(x, x, squares);
      }
    }
    VecF mean() const { return sum * splat(count == 0 ? 0.f : 1.f / static_cast<float>(count)); }
    VecF variance() const {
      const VecF m = mean();
      const VecF of_squares = squares * splat(count == 0 ? 0.f : 1.f / static_cast<float>(count));
      return at_least(VecF{}, fnma(m, m, of_squares));
    }
  };

  // Numbers of a key head; the terms that its heads need, 0 if there is no such fit.
  int find_terms(const AttentionProblem& p, std::int64_t b, std::int64_t hk, float* numbers) const {
    const auto of = [&](Number which) { return numbers + which * stride_; };
    const std::int64_t group = p.group_size();
    VecF bad{};
    for (std::int64_t d = 0; d < width_; d += kLanes<float>) {
      const std::int64_t n = smaller<std::int64_t>(kLanes<float>, width_ - d);
      Moments query, key;
      for (std::int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        query.add(rows_of(p.dtype, p.query, b, h, width_), {0, p.query_length}, d, n);
      }
      key.add(rows_of(p.dtype, p.key, b, hk, width_), key_range(p, b), d, n);
      store(of(kQueryMean) + d, query.mean());
      store(of(kQueryVariance) + d, query.variance());
      store(of(kKeyMean) + d, key.mean());
      store(of(kKeyVariance) + d, key.variance());
      VecF limit{};
      if (query.count > 0 && key.count > 0) {
        limit = at_least(absolute(query.least + key.least), absolute(query.largest + key.largest));
      }
      store(of(kLimit) + d, limit);
      // NaN shows in the sums.
      const auto check = [&](const Moments& x) {
        if (x.count == 0) return;
        bad += (x.squares - x.squares);
        const VecF most = at_least(absolute(x.least), absolute(x.largest));
        bad += most > splat(kMostInput) ? splat(1.f) : VecF{};
      };
      check(query);
      check(key);
    }
    if (sum_lanes<float>(bad) != 0.f) return 0;
    int terms = kTanhSines[0].terms;
    for (std::int64_t h = hk * group; h < (hk + 1) * group && terms != 0; ++h) {
      terms = least_terms(p, b, h, numbers, terms);
    }
    return terms;
  }

  // The mean of the square of tanh's derivative, about, where its argument is normal: that
  // square, 1 / cosh^4, has an area of 4/3 and is much like a normal density of variance 0.3.
  static double mean_square_derivative(double mean, double variance) {
    const double v = variance + 0.3;
    return 4.0 / 3.0 / __builtin_sqrt(2.0 * 3.14159265358979 * v) *
           __builtin_exp(-0.5 * mean * mean / v);
  }

  // The least, from `terms` on, by which the scores of a head and their gradients are accurate
  // enough; 0: none.
  int least_terms(const AttentionProblem& p, std::int64_t b, std::int64_t h, const float* numbers,
                  int terms) const {
    const auto of = [&](Number which, std::int64_t d) {
      return static_cast<double>(numbers[which * stride_ + d]);
    };
    double derivatives = 0.0;
    for (std::int64_t d = 0; d < width_; ++d) {
      const double w = weight_of<float>(p, b, h, d);
      derivatives += w * w *
                     mean_square_derivative(of(kQueryMean, d) + of(kKeyMean, d),
                                            of(kQueryVariance, d) + of(kKeyVariance, d));
    }
    if (!is_finite(derivatives)) return 0;
    for (; terms <= kMostTerms; ++terms) {
      const Fits fits(terms);
      if (fits.none()) continue;
      double error = 0.0;
      double derivative_error = 0.0;
      bool reached = true;
      for (std::int64_t d = 0; d < width_ && reached; ++d) {
        const TanhSines* const fit = fits.of(numbers[kLimit * stride_ + d]);
        reached = fit != nullptr;
        if (!reached) break;
        const double w = weight_of<float>(p, b, h, d);
        error += w * w * fit->error * fit->error;
        derivative_error += w * w * fit->derivative_error * fit->derivative_error;
      }
      if (reached && p.scale * p.scale * error <= kMostError * kMostError &&
          derivative_error <= kMostDerivativeError * kMostDerivativeError * derivatives) {
        return terms;
      }
    }
    return 0;
  }

  // The fits of so many terms.
  class Fits {
   public:
    explicit Fits(int terms) {
      for (const TanhSines& fit : kTanhSines) {
        if (fit.terms != terms) continue;
        if (begin_ == nullptr) begin_ = &fit;
        end_ = &fit + 1;
      }
    }
    bool none() const { return begin_ == nullptr; }
    // Null if none reaches so far.
    const TanhSines* of(float limit) const {
      for (const TanhSines* fit = begin_; fit != end_; ++fit) {
        if (limit <= fit->limit) return fit;
      }
      return nullptr;
    }

   private:
    const TanhSines* begin_ = nullptr;
    const TanhSines* end_ = nullptr;
  };

  void fill_head(const AttentionProblem& p, std::int64_t b, std::int64_t h, const float* numbers,
                 float* to) const {
    constexpr std::int64_t lanes = kLanes<float>;
    const auto of = [&](Number which, std::int64_t d) {
      return load(numbers + which * stride_ + d);
    };
    const Fits fits(terms_);
    float* const line = to + SineHead::size(stride_, terms_) - 2 * stride_;
    float* const weight = line + stride_;
    fill_zero(weight, stride_);
    load_weight(p, b, h, weight);
    VecF largest{};
    for (std::int64_t d = 0; d < width_; d += lanes) {
      largest = at_least(absolute(load(weight + d)), largest);
    }
    const float least = kLeastWeight * larger(max_lanes<float>(largest), 1.f / kMostInput);
    for (std::int64_t d = 0; d < width_; d += lanes) {
      const auto n = static_cast<int>(smaller<std::int64_t>(lanes, width_ - d));
      VecF w = load(weight + d);
      w = first_lanes<float>(absolute(w) < splat(least) ? splat(least) : w, n, VecF{});
      store(weight + d, w);
      VecF slope{}, frequency[kMostTerms] = {}, amplitude[kMostTerms] = {};
      for (int lane = 0; lane < n; ++lane) {
        const TanhSines& fit = *fits.of(numbers[kLimit * stride_ + d + lane]);
        slope[lane] = fit.slope;
        for (int m = 0; m < terms_; ++m) {
          frequency[m][lane] = fit.frequency[m];
          amplitude[m][lane] = fit.amplitude[m];
        }
      }
      store(line + d, w * slope);
      for (int m = 0; m < terms_; ++m) {
        const auto put = [&](SineHead::Vector which, VecF x) {
          store(to + (m * SineHead::kVectors + which) * stride_ + d, x);
        };
        const VecF turns = frequency[m] * splat(0.159154943f);
        const VecF wa = w * amplitude[m];
        VecF query_sine, query_cosine, key_sine, key_cosine;
        find_means(frequency[m], turns, of(kQueryMean, d), of(kQueryVariance, d), query_sine,
                   query_cosine);
        find_means(frequency[m], turns, of(kKeyMean, d), of(kKeyVariance, d), key_sine, key_cosine);
        put(SineHead::kTurns, turns);
        put(SineHead::kFrequency, turns * splat(6.28318531f));
        put(SineHead::kWeight, wa);
        put(SineHead::kQuerySine, wa * query_sine);
        put(SineHead::kQueryCosine, wa * query_cosine);
        put(SineHead::kKeyCosine, key_cosine);
        put(SineHead::kKeySine, key_sine);
        put(SineHead::kOfSine, wa * key_cosine);
        put(SineHead::kOfCosine, wa * key_sine);
      }
    }
  }

  // The mean of e^(i f x) over a normal distribution.
  static void find_means(VecF frequency, VecF turns, VecF mean, VecF variance, VecF& sine,
                         VecF& cosine) {
    const VecF shrinks =
        exp2<float>(splat(-0.5f * Math<float>::log2e) * frequency * frequency * variance);
    sine_and_cosine_of_turns(turns * mean, sine, cosine);
    sine *= shrinks;
    cosine *= shrinks;
  }

  // The gradient of w is found by dividing by it. A w_d that is less than this part of the largest
  // counts as that: the score does not know.
  static constexpr float kLeastWeight = 0x1p-20f;

  std::int64_t heads_ = 0, width_ = 0, stride_ = 0;
  int terms_ = 0;
  std::optional<Scratch> memory_;
  float* data_ = nullptr;  // SineHead::size() for each head
  std::int64_t query_length_ = 0;
  const float *lse_ = nullptr, *grad_lse_ = nullptr;
};

// Tokens whose features are made together, lanes being tokens: two vectors of them.
constexpr std::int64_t kTokens = std::int64_t{2} * kLanes<float>;

// Which token a lane of the two vectors is of.
enum class TokenOrder : bool {
  kHalves,  // the first 16, the next 16
  kPairs    // those of even, those of odd numbers
};

// to[d][kTokens] = elements of up to kTokens rows, 0 behind the last.
inline void turn_tokens(const Rows& rows, std::int64_t begin, std::int64_t n, TokenOrder order,
                        float* to) {
  constexpr std::int64_t lanes = kLanes<float>;
  static_assert(kPanel<float> == kTokens);
  pack_panel<Elements<float>>(rows, begin, n, to,
                              [](VecF x, std::int64_t /*d*/) { return usable(x); });
  if (order == TokenOrder::kHalves) return;
  for (std::int64_t d = 0; d < rows.width; ++d, to += kTokens) {
    VecF even, odd;
    part_pairs(to, even, odd);
    store(to, even);
    store(to + lanes, odd);
  }
}

// Two vectors, rounded to bfloat16, halves away from 0, as the low and high halves of words.
TSA_INLINE VecF words_of(VecF low, VecF high) {
  const WordVec<float> rounded = ((WordVec<float>)low + 0x8000u) >> 16;
  return (VecF)(rounded | (((WordVec<float>)high + 0x8000u) & 0xffff0000u));
}

// One word's features of kTokens tokens.
struct TokenFeatures {
  VecF first[2], second[2];
};

// Features of kTokens tokens from turn_tokens(): put(word, TokenFeatures) for all words, of which
// there are `words` with those behind the last, 0.
template <bool kIsQuery, typename Put>
inline void make_features(const SineHead& head, std::int64_t width, const float* tokens,
                          std::int64_t words, const Put& put) {
  constexpr std::int64_t lanes = kLanes<float>;
  VecF alone[2] = {};  // what depends on one token
  for (std::int64_t d = 0; d < width; ++d) {
    for (int x = 0; x < 2; ++x) {
      alone[x] = fma(load(tokens + d * kTokens + x * lanes), splat(head.line()[d]), alone[x]);
    }
  }
  const std::int64_t stride = head.stride();
  const int terms = head.terms();
  for (int m = 0; m < terms; ++m) {
    const float* const vectors = head.vector(m, SineHead::Vector{});
    for (std::int64_t d = 0; d < width; ++d) {
      const auto of = [&](SineHead::Vector which) { return splat(vectors[which * stride + d]); };
      TokenFeatures features;
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        VecF sine, cosine;
        const VecF token = load(tokens + d * kTokens + x * lanes);
        sine_and_cosine_of_turns(token * of(SineHead::kTurns), sine, cosine);
        if constexpr (kIsQuery) {
          const VecF weight = of(SineHead::kWeight);
          features.first[x] = fma(sine, weight, -of(SineHead::kQuerySine));
          features.second[x] = fma(cosine, weight, -of(SineHead::kQueryCosine));
          alone[x] = fma(sine, of(SineHead::kOfSine), alone[x]);
          alone[x] = fma(cosine, of(SineHead::kOfCosine), alone[x]);
        } else {
          features.first[x] = cosine - of(SineHead::kKeyCosine);
          features.second[x] = sine - of(SineHead::kKeySine);
          alone[x] = fma(features.first[x], of(SineHead::kQuerySine), alone[x]);
          alone[x] = fma(features.second[x], of(SineHead::kQueryCosine), alone[x]);
        }
      }
      put(m * width + d, features);
    }
  }
  // Parts of it, times 1.
  std::int64_t word = terms * width;
  for (int part = 0; part < SinePlan::kPartWords; ++part, ++word) {
    TokenFeatures features;
    for (int x = 0; x < 2; ++x) {
      const auto high = (VecF)(((WordVec<float>)alone[x] + 0x8000u) & 0xffff0000u);
      features.first[x] = kIsQuery ? splat(1.f) : high;
      features.second[x] = kIsQuery ? high : splat(1.f);
      alone[x] -= high;
    }
    put(word, features);
  }
  for (; word < words; ++word) put(word, TokenFeatures{});
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
