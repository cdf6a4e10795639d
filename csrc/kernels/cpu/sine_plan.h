#pragma once

#include <cstdint>
#include <optional>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/common/tanh_sines.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/operand.h"
#include "kernels/cpu/score_gradient.h"

// Which fits of tanh by sines (sine_features.h) a problem takes, if any is accurate enough for its
// tokens, and the constants that features are made with.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// sin and cos of 2 pi t: to 2e-5, t as it is.
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
    return (std::int64_t{terms} * kVectors + 3) * stride + kLanes<float>;
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
  // What the straight line takes from keys and gives to queries: the mean of the keys.
  const float* shift() const { return weight() + stride_; }
  // The largest |w|, in units of which the others are.
  float unit() const { return shift()[stride_]; }

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

  // False: the inputs are not finite, the fits would not be accurate, or there is so little to do
  // that they would not pay off.
  bool make(const AttentionProblem& p, const Parallel& parallel) {
    if (mask_leaves_little(p)) return false;
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
  static constexpr double kMostError = 2e-3;    // of a score, as the root of the sum of its squares
  static constexpr double kMostWeights = 16.0;  // |scale| times the norm of w
  // Relative, of derivatives, and of what varies of them and of tanh.
  static constexpr double kMostDerivativeError = 6e-3;
  static constexpr double kMostVaryingError = 1e-2;
  static constexpr double kLeastVariation = 3e-3;
  static constexpr double kRoundedFeatures = 2.3e-3, kRoundedOutput = 2.6e-3;
  static constexpr float kTurnsOfRadian = 0.159154943f;

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
    int terms() const { return begin_->terms; }
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

  // Beyond so many more terms take longer than the definition.
  static int most_terms(const AttentionProblem& p) {
    if (smaller(p.query_length, p.key_length) < 256) return 7;
    if (p.head_dim <= 64) return 10;
    return p.head_dim <= 128 ? 8 : 6;
  }

  // The least, from `terms` on, by which the scores of a head and their gradients are accurate
  // enough; 0: none.
  int least_terms(const AttentionProblem& p, std::int64_t b, std::int64_t h, const float* numbers,
                  int terms) const {
    double weights = 0.0;
    for (std::int64_t d = 0; d < width_; ++d) {
      const double w = weight_of<float>(p, b, h, d);
      weights += w * w;
    }
    // What rounding of the features leaves is about 2^-9 of this.
    if (!(p.scale * p.scale * weights <= kMostWeights * kMostWeights)) return 0;
    for (; terms <= most_terms(p); ++terms) {
      const Fits fits(terms);
      if (fits.none()) continue;
      double error = 0.0;
      bool reached = true;
      for (std::int64_t d = 0; d < width_ && reached; ++d) {
        const TanhSines* const fit = fits.of(numbers[kLimit * stride_ + d]);
        reached = fit != nullptr;
        if (!reached) break;
        const double w = weight_of<float>(p, b, h, d);
        error += w * w * fit->error * fit->error;
      }
      if (reached && p.scale * p.scale * error <= kMostError * kMostError &&
          is_accurate(p, b, h, numbers, fits)) {
        return terms;
      }
    }
    return 0;
  }

  // Fits of a vector of elements.
  struct VectorOfFits {
    VecF slope{}, frequency[kMostTerms] = {}, amplitude[kMostTerms] = {};
  };

  // Numbers in [0, count), the same ones each time.
  struct Draw {
    std::uint64_t state = 1;
    std::int64_t operator()(std::int64_t count) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      return static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(count));
    }
  };

  // Whether a mask hides most panels of keys from groups of queries, by some of them: the other
  // kernels leave these out too, but make nothing for the tokens in them.
  static bool mask_leaves_little(const AttentionProblem& p) {
    if (p.mask_kind == MaskKind::kNone || p.batch * p.heads * p.query_length * p.key_length == 0) {
      return false;
    }
    constexpr std::int64_t places = 48;
    constexpr std::int64_t rows = 8;
    Draw drawn;
    std::int64_t found = 0;
    for (std::int64_t n = 0; n < places; ++n) {
      const std::int64_t b = drawn(p.batch);
      const std::int64_t h = drawn(p.heads);
      const std::int64_t i = drawn((p.query_length + rows - 1) / rows) * rows;
      const std::int64_t j =
          drawn((p.key_length + kPanel<float> - 1) / kPanel<float>) * kPanel<float>;
      const std::int64_t keys = smaller<std::int64_t>(kPanel<float>, p.key_length - j);
      bool any = false;
      for (std::int64_t r = i; r < smaller(i + rows, p.query_length) && !any; ++r) {
        any = allows_any<float>(p, mask_offset(p, b, h, r, j), keys);
      }
      found += any ? 1 : 0;
    }
    return 4 * found < places && found * p.key_length < 128 * places;
  }

  // What a difference does to gradients: of 8 pairs of one query, for each element, sums of squares
  // of the numbers, and of the numbers less their mean (the gradients of a query's scores add up to
  // 0, so that a constant makes no difference to its gradient).
  static constexpr int kSamples = 8;
  struct Squares {
    double all = 0.0, varying = 0.0;
    void add(const VecF* x, VecF weights) {
      VecF mean{}, of_all{}, of_varying{};
      for (int s = 0; s < kSamples; ++s) mean += x[s];
      mean *= splat(1.f / kSamples);
      for (int s = 0; s < kSamples; ++s) {
        of_all = fma(x[s], x[s], of_all);
        of_varying = fma(x[s] - mean, x[s] - mean, of_varying);
      }
      all += static_cast<double>(sum_lanes<float>(of_all * weights));
      varying += static_cast<double>(sum_lanes<float>(of_varying * weights));
    }
  };

  // Whether derivatives are accurate, measured by a few pairs: where tokens saturate tanh those of
  // the fit are as large as elsewhere, but those of tanh are next to 0.
  bool is_accurate(const AttentionProblem& p, std::int64_t b, std::int64_t h, const float* numbers,
                   const Fits& fits) const {
    const KeyRange range = key_range(p, b);
    if (p.query_length == 0 || range.begin >= range.end) return true;
    const Rows queries = rows_of(p.dtype, p.query, b, h, width_);
    const Rows keys = rows_of(p.dtype, p.key, b, h / p.group_size(), width_);
    Squares tanh, derivative, tanh_error, derivative_error;
    double weights = 0.0;
    double noise = 0.0;
    for (std::int64_t d = 0; d < width_; d += kLanes<float>) {
      const auto n = static_cast<int>(smaller<std::int64_t>(kLanes<float>, width_ - d));
      const VectorOfFits fit = gather(fits, numbers + kLimit * stride_ + d, n);
      VecF w{};
      for (int lane = 0; lane < n; ++lane) {
        w[lane] = static_cast<float>(weight_of<float>(p, b, h, d + lane));
      }
      w *= w;
      weights += static_cast<double>(sum_lanes<float>(w));
      const VecF variance = load(numbers + kKeyVariance * stride_ + d);
      VecF features{};  // squares of what is rounded, times what it does to derivatives
      for (int m = 0; m < fits.terms(); ++m) {
        const VecF frequency = fit.frequency[m];
        const VecF size = fit.amplitude[m] * frequency;
        const VecF constant =
            exp2<float>(splat(-Math<float>::log2e) * frequency * frequency * variance);
        features = fma(size * size, splat(1.f) - constant, features);
      }
      noise += static_cast<double>(sum_lanes<float>(features * w));
      Draw drawn;
      for (int pass = 0; pass < 2; ++pass) {
        const VecF q = load_elements_of_row<float>(queries, drawn(p.query_length), d, n);
        VecF t[kSamples], h_of[kSamples], t_error[kSamples], h_error[kSamples];
        for (int s = 0; s < kSamples; ++s) {
          const std::int64_t j = range.begin + drawn(range.end - range.begin);
          const VecF x = q + load_elements_of_row<float>(keys, j, d, n);
          const VecF r = splat(1.f) / (splat(1.f) + exp_2x(x));
          t[s] = splat(1.f) - (r + r);
          h_of[s] = splat(4.f) * fnma(r, r, r);
          VecF value = fit.slope * x;
          VecF slope = fit.slope;
          for (int m = 0; m < fits.terms(); ++m) {
            VecF sine, cosine;
            sine_and_cosine_of_turns(x * fit.frequency[m] * splat(kTurnsOfRadian), sine, cosine);
            value = fma(fit.amplitude[m], sine, value);
            slope = fma(fit.amplitude[m] * fit.frequency[m], cosine, slope);
          }
          t_error[s] = value - t[s];
          h_error[s] = slope - h_of[s];
        }
        tanh.add(t, w);
        derivative.add(h_of, w);
        tanh_error.add(t_error, w);
        derivative_error.add(h_error, w);
      }
    }
    const auto small = [](double error, double size, double most) {
      return error <= most * most * size;
    };
    // Numbers that hardly vary at all are made with errors of their own.
    constexpr double pairs = 2.0 * kSamples;
    const double least = kLeastVariation * kLeastVariation * pairs * weights;
    // Rounding of the keys' features, beside what varies of derivatives, or beside what the
    // rounding of the saved output does to the other kernels, which is in proportion to the
    // derivatives.
    const double borne = larger(kMostVaryingError * kMostVaryingError * derivative.varying,
                                kRoundedOutput * kRoundedOutput * derivative.all);
    if (kRoundedFeatures * kRoundedFeatures * noise * pairs > borne) return false;
    return small(derivative_error.all, derivative.all, kMostDerivativeError) &&
           small(derivative_error.varying, derivative.varying + least, kMostVaryingError) &&
           small(tanh_error.varying, tanh.varying + least, kMostVaryingError);
  }

  void fill_head(const AttentionProblem& p, std::int64_t b, std::int64_t h, const float* numbers,
                 float* to) const {
    constexpr std::int64_t lanes = kLanes<float>;
    const auto of = [&](Number which, std::int64_t d) {
      return load(numbers + which * stride_ + d);
    };
    const Fits fits(terms_);
    float* const line = to + (std::int64_t{terms_} * SineHead::kVectors) * stride_;
    float* const weight = line + stride_;
    float* const shift = weight + stride_;
    fill_zero(weight, stride_);
    load_weight(p, b, h, weight);
    VecF largest{};
    for (std::int64_t d = 0; d < width_; d += lanes) {
      largest = at_least(absolute(load(weight + d)), largest);
    }
    const float unit = max_lanes<float>(largest);
    store(shift + stride_, splat(unit));
    for (std::int64_t d = 0; d < width_; d += lanes) {
      const auto n = static_cast<int>(smaller<std::int64_t>(lanes, width_ - d));
      VecF w = unit == 0.f ? VecF{} : load(weight + d) / splat(unit);
      const VecF least = splat(kLeastWeight);
      w = first_lanes<float>(absolute(w) < least ? (w < VecF{} ? -least : least) : w, n, VecF{});
      store(weight + d, w);
      store(shift + d, of(kKeyMean, d));
      const auto [slope, frequency, amplitude] = gather(fits, numbers + kLimit * stride_ + d, n);
      store(line + d, w * slope);
      for (int m = 0; m < terms_; ++m) {
        const auto put = [&](SineHead::Vector which, VecF x) {
          store(to + (m * SineHead::kVectors + which) * stride_ + d, x);
        };
        const VecF turns = frequency[m] * splat(kTurnsOfRadian);
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

  // Of n elements by their limits.
  static VectorOfFits gather(const Fits& fits, const float* limits, int n) {
    VectorOfFits all;
    for (int lane = 0; lane < n; ++lane) {
      const TanhSines& fit = *fits.of(limits[lane]);
      all.slope[lane] = fit.slope;
      for (int m = 0; m < fit.terms; ++m) {
        all.frequency[m][lane] = fit.frequency[m];
        all.amplitude[m][lane] = fit.amplitude[m];
      }
    }
    return all;
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

  // The gradient of w is found by dividing by it, in units of the largest. What is less counts as
  // this: so little that all that there are do not change a score.
  static constexpr float kLeastWeight = 0x1p-60f;

  std::int64_t heads_ = 0, width_ = 0, stride_ = 0;
  int terms_ = 0;
  std::optional<Scratch> memory_;
  float* data_ = nullptr;  // SineHead::size() for each head
  std::int64_t query_length_ = 0;
  const float *lse_ = nullptr, *grad_lse_ = nullptr;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
