#pragma once

#include <cstdint>

#include "kernels/cpu/score_gradient.h"
#include "kernels/cpu/tile.h"

// Backward of a register tile, 32 queries and 32 keys, where nothing stands between the products
// and the softmax: no mask, no ALiBi, no dropout, no huge lse. Scores and dP become weights and
// gradients of scores while they are in L1, and leave it as the operands of the three products that
// follow. Bound: 2^x, and making words of the weights and of the gradients in both directions.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Weights and gradients of the scores of a tile as the products read them: words across the rows
// [words(rows)][ld], and of the gradients along the rows [rows][along_ld] too.
template <typename Operand>
struct PackedTile {
  using T = typename Operand::Scalar;
  T *weights, *gradients;
  std::int64_t ld;
  T* along;
  std::int64_t along_ld;

  struct Pair {
    Vec<T> left, right;  // of the keys from j and kLanes further on
  };
  // The two rows of word w of the rows from `first`: weights p and gradients x.
  TSA_INLINE void put(std::int64_t first, int w, std::int64_t j, Pair upper_p, Pair lower_p,
                      Pair upper_x, Pair lower_x) const {
    constexpr std::int64_t lanes = kLanes<T>;
    constexpr int parts = Operand::kParts;
    const auto left = Operand::words_across(upper_p.left, lower_p.left);
    const auto right = Operand::words_across(upper_p.right, lower_p.right);
    const auto square =
        Operand::words_of_square(upper_x.left, upper_x.right, lower_x.left, lower_x.right);
    const std::int64_t across = (Operand::words(first) + w) * ld + j;
    T* const upper = along + (first + Operand::pair_row(w)) * along_ld + Operand::words(j);
    T* const lower = upper + Operand::kPairDistance * along_ld;
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      const std::int64_t to = across + part * lanes * ld;
      store(weights + to, left.part[part]);
      store(weights + to + lanes, right.part[part]);
      store(gradients + to, square.across[0].part[part]);
      store(gradients + to + lanes, square.across[1].part[part]);
      store(upper + part * lanes, square.along[0].part[part]);
      store(lower + part * lanes, square.along[1].part[part]);
    }
  }
};

template <typename Gradient>
class PlainTile {
 public:
  using Operand = typename Gradient::Operand;
  using T = typename Operand::Scalar;
  static std::int64_t size() { return Operand::kTileRows * (kScoreStride + kStride); }

  // To work in: scratch[size()].
  PlainTile(Gradient& gradient, T* scratch, const PackedTile<Operand>& packed)
      : gradient_(gradient),
        scores_(scratch),
        products_(scratch + Operand::kTileRows * kScoreStride),
        packed_(packed) {}

  // What a group of rows is multiplied by: the output's gradient along the rows, and panels.
  struct Operands {
    const T* grad_out;
    std::int64_t grad_out_ld;
    const T* key_panels;
    std::int64_t key_words;
    const T* value_panels;
    std::int64_t value_words;
  };
  // Group g of the tile, n rows, and all keys that it sees; lse in units of log2, and delta, are of
  // its first row. False: a score is -inf, which has overflowed.
  bool run(const TileRanges<T>& tile, std::int64_t g, std::int64_t n, const Operands& x,
           const T* lse, const T* delta) {
    const std::int64_t r = g * Operand::kTileRows;
    const KeyRange all = tile.seen_by_all(r, n);
    std::int64_t ready = 0;  // columns up to which there are scores
    for (std::int64_t u = 0; u < tile.columns; u += kPanel<T>) {
      if (!tile.touches(g, u)) continue;
      if (u >= ready) {
        begin_ = u;
        ready = find_scores(tile, g, r, n, x, u);
      }
      multiply_rows<Operand, 2, false, true>(n, x.grad_out, x.grad_out_ld,
                                             x.value_panels + u * x.value_words, kPanel<T>,
                                             x.value_words, products_, kStride);
      const bool all_see_all =
          n == Operand::kTileRows && all.begin <= u && u + kPanel<T> <= all.end;
      const bool finite = all_see_all ? softmax<true>(tile, r, n, u, lse, delta)
                                      : softmax<false>(tile, r, n, u, lse, delta);
      if (!finite) return false;
    }
    return true;
  }

 private:
  static constexpr int kAtOnce = Gradient::kPanelsAtOnce * kPanel<T>;
  // Rows would else begin in the same few sets of L1.
  static constexpr std::int64_t kStride = kPanel<T> + kLanes<T>;
  static constexpr std::int64_t kScoreStride = kAtOnce + kLanes<T>;

  // Of the panels from column u that the group sees without a gap, as many as are made at once.
  // Returns the column behind them.
  std::int64_t find_scores(const TileRanges<T>& tile, std::int64_t g, std::int64_t r,
                           std::int64_t n, const Operands& x, std::int64_t u) {
    std::int64_t end = u + kPanel<T>;
    while (end < u + kAtOnce && end < tile.columns && tile.touches(g, end)) end += kPanel<T>;
    gradient_.scores_of_panels(r, n, x.key_panels + u * x.key_words, (end - u) / kPanel<T>, scores_,
                               kScoreStride);
    return end;
  }

  template <bool kAllSeeAll>
  bool softmax(const TileRanges<T>& tile, std::int64_t r, std::int64_t n, std::int64_t u,
               const T* lse, const T* delta) {
    using Pair = typename PackedTile<Operand>::Pair;
    constexpr int lanes = kLanes<T>;
    const auto scaled = gradient_.scale(false);
    Vec<T> smallest{};
    const auto row = [&](std::int64_t i, Pair& p, Pair& x) __attribute__((always_inline)) {
      if (!kAllSeeAll && i >= n) {
        p = x = Pair{};
        return;
      }
      const Vec<T> shift = splat(lse[i]);
      const Vec<T> less = splat(delta[i]);
      const SeenColumns<T> seen(tile.begin[r + i] - u, tile.end[r + i] - u);
      const auto half = [&](int j, Vec<T>& weight, Vec<T>& gradient)
                            __attribute__((always_inline)) {
                              Vec<T> score = load(scores_ + i * kScoreStride + (u - begin_) + j);
                              if constexpr (!kAllSeeAll) score = seen.select(j, score, Vec<T>{});
                              const Vec<T> product = load(products_ + i * kStride + j);
                              const Vec<T> relative = scaled.minus(score, shift);
                              smallest = at_most(relative, smallest);
                              weight = Operand::template exp2_of_score<T>(relative);
                              gradient = weight == Vec<T>{} ? Vec<T>{} : weight * (product - less);
                              if constexpr (!kAllSeeAll) {
                                weight = seen.select(j, weight, Vec<T>{});
                                gradient = seen.select(j, gradient, Vec<T>{});
                              }
                            };
      half(0, p.left, x.left);
      half(lanes, p.right, x.right);
    };
    for (int w = 0; w < Operand::kTileRows / Operand::kPack; ++w) {
      Pair p[2], x[2];
      row(Operand::pair_row(w), p[0], x[0]);
      row(Operand::pair_row(w) + Operand::kPairDistance, p[1], x[1]);
      packed_.put(r, w, u, p[0], p[1], x[0], x[1]);
    }
    return !any_lane<T>(smallest == splat(-infinity<T>()));
  }

  Gradient& gradient_;
  std::int64_t begin_ = 0;  // column of the first score
  T *scores_, *products_;
  PackedTile<Operand> packed_;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
