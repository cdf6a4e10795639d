#pragma once

#include <cstdint>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/score.h"
#include "kernels/cpu/tile.h"

// Attention of a register tile's rows where nothing but a mask stands between the product and the
// softmax: no ALiBi, no dropout. Two panels of keys at a time become scores and then weights, while
// the scores are in L1; the values follow when the weights of a block of keys are complete.
//
// The weights of a row are relative to a reference that stays: its largest score in the first two
// panels of which it sees a key. After these no maximum is looked for. Should later scores rise so
// far above it, the sums show it, and the caller has the rows computed again, by running maxima.
//
// So few keys at a time, since 32 rows of 256 scores beside what they are made of do not stay in
// L1; and in the time of 64 keys the tile unit does not fall asleep (docs/kernels.md).
// Bound: 2^x, a third of the time at 64 elements; at 128 loading keys and values from L2.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename Score>
class PlainBand {
 public:
  using Operand = typename Score::Operand;
  using T = typename Operand::Scalar;
  static constexpr int kRows = Operand::kTileRows;
  static constexpr T kLowest = -kMostShift<T>;  // of a reference, scaled

  static std::int64_t scores_size() { return kRows * kScoreStride; }
  static std::int64_t weights_size(std::int64_t block_keys) {
    return kRows * weights_stride(block_keys);
  }

  // Of a group of rows.
  struct Queries {
    const T* packed;
    std::int64_t rows;  // up to kRows
    T* references;      // -inf: has seen no key
    T* totals;          // [rows][kLanes], lanes of the sum of the weights
    T* sums;            // [rows][width], of the weighted values; not read at first (has_sums)
    std::int64_t width;
  };
  struct Keys {
    std::int64_t first;
    const T* panels;
    const T* values;  // packed across rows
    std::int64_t value_ld;
  };

  // To work in: scores[scores_size()] and weights[weights_size()].
  PlainBand(Score& score, std::int64_t key_size, T* scores, T* weights, std::int64_t block_keys)
      : score_(score),
        key_size_(key_size),
        scores_(scores),
        weights_(weights),
        weights_stride_(weights_stride(block_keys)) {}

  // Adds a block of keys, of which `tile` says what rows of group g see, to references, totals and
  // sums. False: scores are too large for this way.
  template <typename Mask>
  bool add(const Queries& q, const Keys& keys, const TileRanges<T>& tile, std::int64_t g,
           Mask& mask) {
    begin_ = tile.begin + g * kRows;
    end_ = tile.end + g * kRows;
    const KeyRange all = tile.seen_by_all(g * kRows, q.rows);
    bool all_have_references = find_shifts<Mask>(q);
    for (KeyRange s = tile.span(g, 0); s.begin < s.end; s = tile.span(g, s.end)) {
      for (std::int64_t u = s.begin, n = 0; u < s.end; u += n) {
        n = kAtOnce;
        while (n > s.end - u) n /= 2;
        score_.scores_of_panels(q.packed, q.rows, keys.panels + u * key_size_, n / kPanel<T>,
                                scores_, kScoreStride);
        const bool all_see_all = all.begin <= u && u + n <= all.end;
        if (!all_have_references) {
          find_references(q, keys.first, u, n, all_see_all, mask);
          all_have_references = find_shifts<Mask>(q);
        }
        if (!can_subtract_) return false;
        find_weights(q, keys.first, u, n, all_see_all, mask);
        if constexpr (kValuesAtOnce) find_sums(q, keys, {u, u + n}, weights_, g);
      }
      if constexpr (!kValuesAtOnce) find_sums(q, keys, s, weights_ + Operand::words(s.begin), g);
    }
    return true;
  }

  // Whether group g has seen keys: else its sums are still as they were.
  bool has_sums(std::int64_t g) const { return (has_sums_ >> g & 1) != 0; }

  // Whether a row may have had very low scores only, which counted 0.
  bool has_low_scores() const { return has_low_; }

 private:
  static_assert(Operand::kPack == 2 && Operand::kStep == kPanel<T>);
  static_assert(kMaxBlockRows / kRows <= 64);  // has_sums_
  // Weights of several parts would leave L1 until those of a block are complete; and with as many
  // products, sums may be loaded and stored more often.
  static constexpr bool kValuesAtOnce = Operand::kParts > 1;
  static constexpr int kAtOnce = Score::kPanelsAtOnce * kPanel<T>;
  // Rows would else begin in the same few sets of L1.
  static constexpr std::int64_t kScoreStride = kAtOnce + kLanes<T>;
  static std::int64_t weights_stride(std::int64_t block_keys) {
    const std::int64_t keys =
        kValuesAtOnce ? smaller<std::int64_t>(kAtOnce, block_keys) : block_keys;
    return Operand::words(keys) + kLanes<T>;
  }

  void find_sums(const Queries& q, const Keys& keys, KeyRange span, const T* weights,
                 std::int64_t g) {
    if (has_sums(g)) {
      multiply_values<true>(q, keys, span, weights);
    } else {
      multiply_values<false>(q, keys, span, weights);
    }
    has_sums_ |= std::uint64_t{1} << g;
  }
  template <bool kAdd>
  void multiply_values(const Queries& q, const Keys& keys, KeyRange span, const T* weights) const {
    const std::int64_t from = Operand::words(span.begin);
    for (std::int64_t d = 0; d < q.width; d += kStrip<T>) {
      multiply<Operand, kAdd, true>(Zeros::kMultiply, q.rows, weights, weights_stride_,
                                    keys.values + from * keys.value_ld + d, keys.value_ld,
                                    Operand::words(span.end) - from, q.sums + d, q.width,
                                    smaller<std::int64_t>(kStrip<T>, q.width - d));
    }
  }

  // What is subtracted from scaled scores; whether every row has a reference. References are of
  // products, or of masked scores.
  template <typename Mask>
  bool find_shifts(const Queries& q) {
    const auto scaled = score_.scale(Mask::kChanges);
    bool all = true;
    can_subtract_ = true;
    for (std::int64_t r = 0; r < q.rows; r += kLanes<T>) {
      const Vec<T> reference = load(q.references + r);
      const IntVec<T> missing = reference == splat(-infinity<T>());
      const Vec<T> shift = scaled(missing ? Vec<T>{} : reference);
      store(shifts_ + r, shift);
      all = all && !any_lane<T>(missing);
      can_subtract_ = can_subtract_ && score_.can_subtract(shift);
    }
    return all;
  }

  // Columns are counted from u.
  SeenColumns<T> seen_columns(std::int64_t r, std::int64_t u) const {
    return {begin_[r] - u, end_[r] - u};
  }

  // Of rows that have none and see any of the n columns from u, whose scores are there. A row of
  // very low scores waits for others.
  template <typename Mask>
  [[gnu::noinline]] void find_references(const Queries& q, std::int64_t first, std::int64_t u,
                                         std::int64_t n, bool all_see_all, Mask& mask) {
    const auto scaled = score_.scale(!Mask::kChanges);
    for (std::int64_t r = 0; r < q.rows; r += kLanes<T>) {
      Vec<T> largest[kLanes<T>];
      for (std::int64_t x = 0; x < kLanes<T>; ++x) {
        largest[x] = splat(-infinity<T>());
        if (r + x >= q.rows) continue;
        const T* const scores = scores_ + (r + x) * kScoreStride;
        const auto row = mask.row(r + x, first + u, n);
        const SeenColumns<T> seen = seen_columns(r + x, u);
        for (int j = 0; j < n; j += kLanes<T>) {
          Vec<T> score = row.limited(j, scaled(load(scores + j)));
          if (!all_see_all) score = seen.select(j, score, largest[x]);
          largest[x] = at_least(score, largest[x]);
        }
      }
      const Vec<T> found = maxima_of_lanes<T>(largest);
      const Vec<T> before = load(q.references + r);
      const IntVec<T> missing = before == splat(-infinity<T>());
      // As by the smallest number, where it stands for a hidden key.
      const IntVec<T> low = score_.scale(Mask::kChanges)(found) < splat(kLowest);
      const IntVec<T> some = found > splat(-infinity<T>());
      has_low_ = has_low_ || any_lane<T>(missing & low & some);
      store(q.references + r, (missing & ~low) ? found : before);
    }
  }

  template <typename Mask>
  void find_weights(const Queries& q, std::int64_t first, std::int64_t u, std::int64_t n,
                    bool all_see_all, Mask& mask) {
    if (all_see_all) {
      find_weights_of<kAtOnce, true>(q, first, u, n, mask);
    } else {
      find_weights_of<kAtOnce, false>(q, first, u, n, mask);
    }
  }
  // n is kKeys, or this halved a few times.
  template <int kKeys, bool kAllSeeAll, typename Mask>
  void find_weights_of(const Queries& q, std::int64_t first, std::int64_t u, std::int64_t n,
                       Mask& mask) {
    if constexpr (kKeys > kPanel<T>) {
      if (n < kKeys) return find_weights_of<kKeys / 2, kAllSeeAll>(q, first, u, n, mask);
    }
    weights_of<kKeys, kAllSeeAll>(q, first, u, mask);
  }

  // Weights of kKeys keys from u; 0 for those that a row does not see, if not all see all.
  template <int kKeys, bool kAllSeeAll, typename Mask>
  void weights_of(const Queries& q, std::int64_t first, std::int64_t u, Mask& mask) {
    const auto scaled = score_.scale(false);
    const T* scores = scores_;
    T* words = weights_ + (kValuesAtOnce ? 0 : Operand::words(u));
    T* total = q.totals;
    for (std::int64_t r = 0; r < q.rows; ++r) {
      const SeenColumns<T> seen = seen_columns(r, u);
      const auto row = mask.row(r, first + u, kKeys);
      const Vec<T> shift = splat(shifts_[r]);
      const auto weights = [&](int j) __attribute__((always_inline)) {
        const Vec<T> x = row.relative(j, load(scores + j), scaled, shift);
        const Vec<T> p = Operand::template exp2_of_score<T>(x);
        return kAllSeeAll ? p : seen.select(j, p, Vec<T>{});
      };
      Vec<T> sum = load(total);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; j += kPanel<T>) {
        const Vec<T> p0 = weights(j);
        const Vec<T> p1 = weights(j + kLanes<T>);
        Operand::put_along(p0, p1, words + Operand::words(j));
        sum += p0 + p1;
      }
      store(total, sum);
      scores += kScoreStride, words += weights_stride_, total += kLanes<T>;
    }
  }

  Score& score_;
  std::int64_t key_size_;
  T *scores_, *weights_;
  std::int64_t weights_stride_;
  const std::int64_t *begin_ = nullptr, *end_ = nullptr;  // columns that rows see
  T shifts_[kRows];
  bool can_subtract_ = true;
  bool has_low_ = false;
  std::uint64_t has_sums_ = 0;  // of a group, a bit each
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
