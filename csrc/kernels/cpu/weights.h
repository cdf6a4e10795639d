#pragma once

#include <cstdint>

#include "kernels/common/attention_weights.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/leaky_relu.h"
#include "kernels/cpu/score.h"
#include "kernels/cpu/tile.h"

// The weights p(i, j) themselves, one score per pair, memory O(result) beside the packed keys.
//
// A task owns a block of up to 64 queries of one head, or, for the mean over the heads, of all of
// them. It computes the scores of the block against all keys by the score's tile (panels of packed
// keys outside, groups of query rows inside), then turns each row into weights where it lies:
// ALiBi, mask, maximum, exponentials, sum, division. The block has so few rows that the scores stay
// in L2, so there is no second pass over the keys and no log-sum-exp. The mean is added up head by
// head in a second buffer of the block: the matrices of single heads are never formed. Panels and
// rows are clipped to the keys that they may see, panels that the mask hides from a group of rows
// are left out; the rest is 0. Keys are packed once per head and shared if several tasks read them,
// else by the task itself. Bound: writing the result, unless averaged; then as in forward.h.
//
// A row with a score that is not finite is repaired: scores that overflowed are computed anew in
// double. What is NaN then is that of an input.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename Score>
class WeightsKernel {
 public:
  using Operand = typename Score::Operand;
  using T = typename Score::T;
  static constexpr int kGroupRows = Score::kGroupRows;

  WeightsKernel(const AttentionWeights& call, const Parallel& parallel)
      : call_(call), p_(call.problem), parallel_(parallel) {}

  // False: a failure (operand.h).
  bool run() {
    if (p_.batch * p_.heads * p_.query_length * p_.key_length == 0) return true;
    plan();
    Carver size;
    carve(size);
    const Scratch scratch(size.used());
    Carver carver(scratch.data());
    carve(carver);

    if (shared_keys_) {
      const std::int64_t heads = p_.batch * packed_heads();
      const std::int64_t chunks = (p_.key_length + kPackedKeys - 1) / kPackedKeys;
      parallel_.run(heads * chunks, [&](std::int64_t t, int thread) {
        pack_shared(t / chunks, t % chunks * kPackedKeys, thread);
      });
    }
    parallel_.run(p_.batch * matrices_ * blocks_, [&](std::int64_t t, int thread) {
      const typename Score::Operand::Session session;
      const std::int64_t matrix = t / blocks_ % matrices_;
      Task task{*this, buffers(thread), t / blocks_ / matrices_, t % blocks_ * block_rows_};
      task.run(matrix * together_, (matrix + 1) * together_);
    });
    return !failure_.raised();
  }

 private:
  static constexpr std::int64_t kPackedKeys = 256;
  static constexpr std::int64_t kWantedTasks = 16;
  static constexpr std::int64_t kBlockBytes = std::int64_t{256} * 1024;  // of scores, a part of L2

  // Sizes depend on the problem only, never on the number of threads.
  void plan() {
    together_ = call_.average_heads ? p_.heads : 1;
    matrices_ = p_.heads / together_;
    // A panel writes whole; the further vector keeps rows from falling on the same cache sets.
    score_ld_ = round_up(p_.key_length, kPanel<T>) + kLanes<T>;
    const std::int64_t row_bytes = score_ld_ * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t rows_per_task =
        (p_.batch * matrices_ * p_.query_length + kWantedTasks - 1) / kWantedTasks;
    block_rows_ = smaller(smaller<std::int64_t>(kBlockBytes / row_bytes, 64), rows_per_task);
    block_rows_ = larger<std::int64_t>(block_rows_ / kGroupRows * kGroupRows, kGroupRows);
    block_rows_ = smaller(block_rows_, p_.query_length);
    blocks_ = (p_.query_length + block_rows_ - 1) / block_rows_;
    shared_keys_ = blocks_ * p_.heads > packed_heads();
  }

  void carve(Carver& carver) {
    if (shared_keys_) {
      key_panels_ = carver.take<T>(p_.batch * packed_heads() * padded_keys() * key_size());
      key_bounds_ = carver.take<T>(p_.batch * packed_heads() * (padded_keys() / kPanel<T>));
    }
    threads_ = carver.used();
    base_ = carver.base();
    thread_bytes_ = Buffers(*this, Carver()).bytes;
    carver.take<char>(thread_bytes_ * larger(parallel_.threads, 1));
  }

  // What one thread works in.
  struct Buffers {
    Buffers(const WeightsKernel& k, Carver carver) {
      const std::int64_t rows = k.block_rows_;
      constants = carver.take<T>(Score::constants_size(k.p_.head_dim));
      spare = carver.take<T>(Score::spare_size(k.p_.head_dim, rows));
      queries = carver.take<T>(rows * Score::query_size(k.p_.head_dim));
      scores = carver.take<T>(rows * k.score_ld_);
      sums = carver.take<T>(k.together_ > 1 ? rows * k.score_ld_ : 0);
      panel = carver.take<T>(k.shared_keys_ ? 0 : kPanel<T> * k.key_size());
      ranges = carver.take<RowRanges>(1);
      tile = carver.take<TileRanges<T>>(1);
      bytes = carver.used();
    }
    T *constants, *spare, *queries, *scores, *sums, *panel;
    RowRanges* ranges;
    TileRanges<T>* tile;
    std::int64_t bytes;
  };
  Buffers buffers(int thread) const {
    return Buffers(*this, Carver(base_ + threads_ + thread * thread_bytes_));
  }

  std::int64_t packed_heads() const { return Score::kKeysPerQueryHead ? p_.heads : p_.kv_heads; }
  std::int64_t key_size() const { return Score::key_size(p_.head_dim); }
  std::int64_t padded_keys() const { return round_up(p_.key_length, kPanel<T>); }
  Rows key_rows(std::int64_t b, std::int64_t hk) const {
    return rows_of(p_.dtype, p_.key, b, hk, p_.head_dim);
  }

  // Keys from j of packed head `head` (over batch and heads).
  void pack_shared(std::int64_t head, std::int64_t j, int thread) {
    const Buffers buffer = buffers(thread);
    const std::int64_t b = head / packed_heads();
    const std::int64_t h = head % packed_heads();
    Score score(p_, buffer.constants, buffer.spare);
    score.set_head(b, h);
    score.pack_keys(key_rows(b, Score::kKeysPerQueryHead ? h / p_.group_size() : h), j,
                    smaller(kPackedKeys, p_.key_length - j),
                    key_panels_ + (head * padded_keys() + j) * key_size(),
                    key_bounds_ + (head * padded_keys() + j) / kPanel<T>);
  }

  struct Task {
    const WeightsKernel& k;
    Buffers buffer;
    std::int64_t b, i0;

    // One matrix: that of a head, or the mean of several.
    void run(std::int64_t first_head, std::int64_t end_head) {
      if (k.failure_.raised()) return;
      const AttentionProblem& p = k.p_;
      const std::int64_t rows = smaller(k.block_rows_, p.query_length - i0);
      const bool average = end_head - first_head > 1;
      find_ranges(rows);
      buffer.tile->template compute<kGroupRows>(*buffer.ranges, rows, 0, p.key_length);
      const T factor = T(1) / static_cast<T>(end_head - first_head);
      for (std::int64_t h = first_head; h < end_head; ++h) {
        Score score(p, buffer.constants, buffer.spare);
        score.set_head(b, h);
        score.load_queries(b, h, i0, rows, buffer.queries);
        if (!score_block(score, h, rows)) return k.failure_.raise();
        const Alibi<T> alibi(p, b, h);
        for (std::int64_t r = 0; r < rows; ++r) {
          softmax_row(score, h, r, alibi);
          if (average) add_row(r, h == first_head, factor);
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        write_row(k.call_.average_heads ? 0 : first_head, r,
                  (average ? buffer.sums : buffer.scores) + r * k.score_ld_);
      }
    }

    void find_ranges(std::int64_t rows) {
      RowRanges& ranges = *buffer.ranges;
      ranges.all = {k.p_.key_length, 0};
      for (std::int64_t r = 0; r < rows; ++r) {
        const KeyRange range = key_range(k.call_, b, i0 + r);
        ranges.begin[r] = range.begin;
        ranges.end[r] = range.end;
        if (range.begin >= range.end) continue;
        ranges.all.begin = smaller(ranges.all.begin, range.begin);
        ranges.all.end = larger(ranges.all.end, range.end);
      }
    }

    // False: a key is out of the operand's range.
    bool score_block(Score& score, std::int64_t h, std::int64_t rows) {
      const AttentionProblem& p = k.p_;
      const TileRanges<T>& tile = *buffer.tile;
      const std::int64_t hk = h / p.group_size();
      const std::int64_t packed = b * k.packed_heads() + (Score::kKeysPerQueryHead ? h : hk);
      const KeyRange all = buffer.ranges->all;
      for (std::int64_t u = all.begin / kPanel<T> * kPanel<T>; u < all.end; u += kPanel<T>) {
        const T* panel = buffer.panel;
        T bound = 0;
        if (k.shared_keys_) {
          panel = k.key_panels_ + (packed * k.padded_keys() + u) * k.key_size();
          bound = k.key_bounds_[(packed * k.padded_keys() + u) / kPanel<T>];
        } else {
          score.pack_keys(k.key_rows(b, hk), u, smaller<std::int64_t>(kPanel<T>, p.key_length - u),
                          buffer.panel, &bound);
        }
        if constexpr (Failure<Operand>::kPossible) {
          if (!score.are_bounded(&bound, 1)) return false;
        }
        for (std::int64_t r = 0, g = 0; r < rows; r += kGroupRows, ++g) {
          if (tile.group_begin[g] >= u + kPanel<T> || tile.group_end[g] <= u) continue;
          const std::int64_t n = smaller<std::int64_t>(kGroupRows, rows - r);
          T* const scores = buffer.scores + r * k.score_ld_ + u;
          if (p.mask_kind != MaskKind::kNone && is_hidden(h, r, n, u)) {
            for (std::int64_t i = 0; i < n; ++i) fill_zero(scores + i * k.score_ld_, kPanel<T>);
            continue;  // any number will do
          }
          score.scores(buffer.queries, r, n, panel, bound, u, scores, k.score_ld_);
        }
      }
      return true;
    }

    // Whether the mask hides the panel of keys from u from n rows.
    bool is_hidden(std::int64_t h, std::int64_t r, std::int64_t n, std::int64_t u) const {
      const AttentionProblem& p = k.p_;
      const std::int64_t keys = smaller<std::int64_t>(kPanel<T>, p.key_length - u);
      for (std::int64_t i = 0; i < n; ++i) {
        if (i > 0 && p.mask.stride[2] == 0) break;  // a row for all queries
        if (allows_any<T>(p, mask_offset(p, b, h, i0 + r + i, u), keys)) return false;
      }
      return true;
    }

    // Scores of row r become weights, within the keys that the row may see.
    void softmax_row(const Score& score, std::int64_t h, std::int64_t r, const Alibi<T>& alibi) {
      const AttentionProblem& p = k.p_;
      if (buffer.tile->row_is_empty(r)) return;
      const std::int64_t begin = buffer.tile->begin[r];
      const std::int64_t n = buffer.tile->end[r] - begin;
      T* const s = buffer.scores + r * k.score_ld_ + begin;
      score.scale_products(s, n);
      if (!all_finite(s, n)) repair_scores(p, b, h, i0 + r, begin, n, s);
      if (alibi.active) {
        alibi.add(query_index(k.call_, b, i0 + r), begin, n, Zeros::kSkip, s);
      }
      const bool masked = p.mask_kind != MaskKind::kNone;
      if (masked) add_mask_row(p, b, h, i0 + r, begin, n, Zeros::kSkip, s);
      const T maximum = row_maximum(s, n);
      // Where every key is masked out: 2^(-inf - 0) is the 0 that is wanted.
      const T total = exponentials(s, n, maximum == -infinity<T>() ? T(0) : maximum);
      const Vec<T> factor = splat(total == T(0) ? T(0) : T(1) / total);
      std::int64_t j = 0;
      for (; j + kLanes<T> <= n; j += kLanes<T>) store(s + j, load(s + j) * factor);
      for (; j < n; ++j) s[j] *= factor[0];
      if (masked && !is_finite(total)) {  // NaN, but not at keys that are masked out
        add_mask_row(p, b, h, i0 + r, begin, n, Zeros::kSkip, s);
        for (j = 0; j < n; ++j) {
          if (s[j] == -infinity<T>()) s[j] = T(0);
        }
      }
    }

    static bool all_finite(const T* s, std::int64_t n) {
      Vec<T> check{};  // x - x is NaN if x is not finite
      for (std::int64_t j = 0; j < n; j += kLanes<T>) {
        const Vec<T> x = load_up_to(s + j, n - j);
        check += x - x;
      }
      return sum_lanes<T>(check) == T(0);
    }

    static T row_maximum(const T* s, std::int64_t n) {
      constexpr std::int64_t lanes = kLanes<T>;
      Vec<T> largest = splat(-infinity<T>());
      std::int64_t j = 0;
      for (; j + lanes <= n; j += lanes) largest = at_least(load(s + j), largest);
      if (j < n) {
        largest = at_least(first_lanes<T>(load_first(s + j, n - j), n - j, splat(-infinity<T>())),
                           largest);
      }
      return max_lanes<T>(largest);
    }

    // s = 2^(s - shift), and their sum.
    static T exponentials(T* s, std::int64_t n, T shift) {
      constexpr std::int64_t lanes = kLanes<T>;
      Vec<T> sum0{}, sum1{};
      std::int64_t j = 0;
      for (; j + 2 * lanes <= n; j += 2 * lanes) {
        const Vec<T> p0 = exp2<T>(load(s + j) - splat(shift));
        const Vec<T> p1 = exp2<T>(load(s + j + lanes) - splat(shift));
        sum0 += p0;
        sum1 += p1;
        store(s + j, p0);
        store(s + j + lanes, p1);
      }
      for (; j < n; j += lanes) {
        const Vec<T> weight =
            first_lanes<T>(exp2<T>(load_up_to(s + j, n - j) - splat(shift)), n - j, Vec<T>{});
        sum0 += weight;
        store_up_to(s + j, weight, n - j);
      }
      return sum_lanes<T>(sum0 + sum1);
    }

    // The row's part of the mean.
    void add_row(std::int64_t r, bool first, T factor) {
      if (buffer.tile->row_is_empty(r)) return;
      const T* const from = buffer.scores + r * k.score_ld_;
      T* const to = buffer.sums + r * k.score_ld_;
      for (std::int64_t j = buffer.tile->begin[r]; j < buffer.tile->end[r]; ++j) {
        to[j] = first ? from[j] * factor : to[j] + from[j] * factor;
      }
    }

    void write_row(std::int64_t matrix, std::int64_t r, T* row) {
      const AttentionProblem& p = k.p_;
      const bool empty = buffer.tile->row_is_empty(r);
      const std::int64_t begin = empty ? p.key_length : buffer.tile->begin[r];
      const std::int64_t end = empty ? p.key_length : buffer.tile->end[r];
      fill_zero(row, begin);
      fill_zero(row + end, p.key_length - end);
      const View& view = k.call_.weights;
      store_row(p.dtype, view.data,
                b * view.stride[0] + matrix * view.stride[1] + (i0 + r) * view.stride[2],
                view.stride[3], p.key_length, row);
    }
  };

  const AttentionWeights& call_;
  const AttentionProblem& p_;
  const Parallel& parallel_;

  std::int64_t together_ = 1;  // heads of one matrix of the result
  std::int64_t matrices_ = 0;  // of a sample
  std::int64_t block_rows_ = 0, blocks_ = 0, score_ld_ = 0;
  bool shared_keys_ = false;
  mutable Failure<Operand> failure_;

  T* key_panels_ = nullptr;  // [b][packed head][panel][element][kPanel]
  T* key_bounds_ = nullptr;  // [b][packed head][panel]
  char* base_ = nullptr;
  std::int64_t threads_ = 0, thread_bytes_ = 0;
};

template <typename T>
inline void weights_in(const AttentionWeights& call, const Parallel& parallel) {
  if (call.problem.score == ScoreKind::kDotProduct) {
    WeightsKernel<DotScore<Elements<T>>>(call, parallel).run();
  } else if (call.problem.activation == Activation::kTanh) {
    WeightsKernel<AdditiveScore<Elements<T>>>(call, parallel).run();
  } else {
    WeightsKernel<LeakyReluScore<Elements<T>>>(call, parallel).run();
  }
}

// Entry point of one instruction set.
inline void weights(const AttentionWeights& call, const Parallel& parallel) {
  if (call.problem.compute_in_double()) {
    weights_in<double>(call, parallel);
  } else {
    weights_in<float>(call, parallel);
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
