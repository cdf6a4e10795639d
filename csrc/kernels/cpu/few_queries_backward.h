#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/backward_rows.h"
#include "kernels/cpu/few_queries.h"
#include "kernels/cpu/few_queries_additive.h"
#include "kernels/cpu/tile.h"

// Backward for a few queries: keys and values are read once, where they lie, and their gradients
// written once. A task owns a key head and a share of its keys; per block of keys it makes
//   S = scores, dP = dO v^T, p = 2^(S - lse), G = p (f dP - delta), a row of dv from the rows of
//   dO, a row of dk, and its part of dq and dw; the parts are added in their order at the end.
// The number of shares depends on the problem only, so results do not depend on threads.
//
// If a result of a task is not finite, the task is run again, and what is multiplied by 0 is left
// out. It gives up, and BackwardKernel does everything from the start, where a gradient of a mask
// that batches, heads or keys share is wanted, a log-sum-exp is too coarse for its exponential, or
// a result is still not finite. Bound: memory bandwidth (dot product), the arithmetic of
// few_queries_additive.h (additive).
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename Slopes>
class FewQueriesBackward {
 public:
  using Score = typename Slopes::Score;
  using T = typename Score::T;

  FewQueriesBackward(const AttentionBackward& call, const Parallel& parallel)
      : call_(call), p_(call.problem), parallel_(parallel) {}

  // False: nothing is done, or what is done is worth nothing.
  bool run() {
    if (call_.grad_mask != nullptr && !has_element_per_pair()) return false;
    rows_ = p_.group_size() * p_.query_length;
    const std::int64_t units = p_.batch * p_.kv_heads;
    if (units * rows_ == 0 || p_.key_length == 0) return false;
    if (p_.dropout_p > 0.0) dropout_ = Dropout::make(p_.dropout_p, p_.philox_state);
    shares_ = (kWantedTasks + units - 1) / units;
    shares_ = larger<std::int64_t>(smaller(shares_, p_.key_length / kLeastKeys), 1);
    share_ = round_up((p_.key_length + shares_ - 1) / shares_, kBlock);
    shares_ = (p_.key_length + share_ - 1) / share_;

    Carver size;
    carve(size);
    const Scratch scratch(size.used());
    Carver carver(scratch.data());
    carve(carver);

    parallel_.run(units * shares_, [&](std::int64_t t, int thread) {
      if (given_up_.raised()) return;
      Task task{*this, buffers(thread), t / shares_ / p_.kv_heads, t / shares_ % p_.kv_heads,
                t % shares_};
      if (!task.run(Zeros::kMultiply) && !task.run(Zeros::kSkip)) given_up_.raise();
    });
    if (given_up_.raised()) return false;
    parallel_.run(units, [&](std::int64_t unit, int thread) {
      if (!finish_queries(unit, buffers(thread).queries)) given_up_.raise();
    });
    if (given_up_.raised()) return false;
    if constexpr (Slopes::kHasWeight) {
      if (call_.grad_weight != nullptr) {
        const std::int64_t chunks = (p_.head_dim + kChunk - 1) / kChunk;
        parallel_.run(chunks, [&](std::int64_t chunk, int) {
          for (std::int64_t d = chunk * kChunk; d < smaller((chunk + 1) * kChunk, p_.head_dim);
               ++d) {
            reduce_per_head<T>(p_, weight_sums_ + d, shares_ * p_.query_length,
                               padded<T>(p_.head_dim), Slopes::factor_of_weight(p_), p_.weight_size,
                               p_.dtype, call_.grad_weight, d, p_.head_dim);
          }
        });
      }
    }
    if (call_.grad_slopes != nullptr) {
      reduce_per_head<T>(p_, slope_sums_, shares_ * p_.query_length, 1, 1.0, p_.slopes_size,
                         p_.slopes_dtype, call_.grad_slopes, 0, 1);
    }
    return true;
  }

 private:
  static constexpr std::int64_t kWantedTasks = 32;
  static constexpr std::int64_t kLeastKeys = 256;  // of a task, if there is more than one
  static constexpr std::int64_t kBlock = 64;       // keys
  static constexpr std::int64_t kChunk = 16;       // elements of the weight that a task finishes
  static_assert(kBlock % kPanel<T> == 0);

  struct Buffers {
    Buffers(const FewQueriesBackward& k, Carver carver) {
      const AttentionProblem& p = k.p_;
      queries = carver.take<T>(k.rows_ * Score::query_size(p.head_dim));
      grad_out = carver.take<T>(k.rows_ * padded<T>(p.value_dim));
      weights = carver.take<T>(k.rows_ * kLd);
      grads = carver.take<T>(k.rows_ * kLd);
      factors = carver.take<T>(kLd);
      row = carver.take<T>(larger(kKeysOfDivision * padded<T>(p.head_dim), padded<T>(p.value_dim)));
      lse = carver.take<T>(k.rows_);
      delta = carver.take<T>(k.rows_);
      ranges = carver.take<KeyRange>(k.rows_);
      bytes = carver.used();
    }
    T *queries, *grad_out, *weights, *grads, *factors, *row, *lse, *delta;
    KeyRange* ranges;
    std::int64_t bytes;
  };
  static constexpr std::int64_t kLd = kBlock + kLanes<T>;

  void carve(Carver& carver) {
    const std::int64_t units = p_.batch * p_.kv_heads;
    const std::int64_t rows = units * shares_ * rows_;
    sums_ = carver.take<T>(rows * Slopes::size(p_.head_dim));
    if (Slopes::kHasWeight) weight_sums_ = carver.take<double>(rows * padded<T>(p_.head_dim));
    if (call_.grad_slopes != nullptr) slope_sums_ = carver.take<double>(rows);
    threads_ = carver.used();
    base_ = carver.base();
    thread_bytes_ = Buffers(*this, Carver()).bytes;
    const std::int64_t threads = larger(parallel_.threads, 1);
    carver.take<char>(thread_bytes_ * smaller<std::int64_t>(threads, units * shares_));
  }

  Buffers buffers(int thread) const {
    return Buffers(*this, Carver(base_ + threads_ + thread * thread_bytes_));
  }

  // Whether the mask's gradient is G.
  bool has_element_per_pair() const {
    return p_.mask_size[0] == p_.batch && p_.mask_size[1] == p_.heads &&
           p_.mask_size[2] == p_.query_length && p_.mask_size[3] == p_.key_length;
  }

  // Row r of a unit: as many queries of each head, head by head.
  std::int64_t head(std::int64_t hk, std::int64_t r) const {
    return hk * p_.group_size() + r / p_.query_length;
  }
  std::int64_t query(std::int64_t r) const { return r % p_.query_length; }
  T* sums_of(std::int64_t unit, std::int64_t share, std::int64_t r) const {
    return sums_ + ((unit * shares_ + share) * rows_ + r) * Slopes::size(p_.head_dim);
  }
  // Which of its head's parts, [b][h][share][query], is row r's.
  std::int64_t part(std::int64_t b, std::int64_t hk, std::int64_t share, std::int64_t r) const {
    return ((b * p_.heads + head(hk, r)) * shares_ + share) * p_.query_length + query(r);
  }
  void load_queries(Score& score, std::int64_t b, std::int64_t hk, T* to) const {
    score.set_head(b, hk * p_.group_size());
    for (std::int64_t r = 0; r < rows_; r += p_.query_length) {
      score.load_queries(b, head(hk, r), 0, p_.query_length,
                         to + r * Score::query_size(p_.head_dim));
    }
  }

  struct Task {
    const FewQueriesBackward& k;
    Buffers buffer;
    std::int64_t b, hk, share;
    Zeros zeros = Zeros::kMultiply;
    Vec<T> check{};
    KeyRange valid{};  // keys of the sample

    bool run(Zeros how) {
      const AttentionProblem& p = k.p_;
      zeros = how;
      check = Vec<T>{};
      valid = key_range(p, b);
      Score score(p, nullptr, nullptr);
      k.load_queries(score, b, hk, buffer.queries);
      const KeyRange keys = {share * k.share_, smaller((share + 1) * k.share_, p.key_length)};
      KeyRange all = {keys.end, keys.begin};
      for (std::int64_t r = 0; r < k.rows_; ++r) {
        if (!load_row_of(r, keys)) return false;
        const KeyRange range = buffer.ranges[r];
        if (range.begin >= range.end) continue;
        all = {smaller(all.begin, range.begin), larger(all.end, range.end)};
      }
      T* const sums = k.sums_of(b * p.kv_heads + hk, share, 0);
      fill_zero(sums, k.rows_ * Slopes::size(p.head_dim));
      for (std::int64_t r = 0; r < k.rows_; ++r) {
        if (Slopes::kHasWeight) fill_zero(weight_sums(r), padded<T>(p.head_dim));
        if (k.slope_sums_ != nullptr) slope_sum(r) = 0.0;
      }
      for (std::int64_t first = keys.begin; first < keys.end; first += kBlock) {
        const std::int64_t n = smaller(kBlock, keys.end - first);
        if (first + n <= all.begin || first >= all.end) {
          fill_zero(buffer.row, larger(padded<T>(p.head_dim), padded<T>(p.value_dim)));
          for (std::int64_t x = 0; x < n; ++x) {
            store_row_of(k.call_.grad_key, p.head_dim, first + x, buffer.row, T(1));
            store_row_of(k.call_.grad_value, p.value_dim, first + x, buffer.row, T(1));
          }
          fill_zero(buffer.grads, k.rows_ * kLd);
          for (std::int64_t r = 0; r < k.rows_; ++r) store_mask_gradient(r, first, n);
        } else if (!run_block(score, first, n, sums)) {
          return false;
        }
        if constexpr (Slopes::kHasWeight) {
          for (std::int64_t r = 0; r < k.rows_; ++r) {
            Slopes::take_weight_sums(p, sums + r * Slopes::size(p.head_dim), weight_sums(r));
          }
        }
      }
      if constexpr (Slopes::kHasWeight) {
        for (std::int64_t r = 0; r < k.rows_; ++r) {
          for (std::int64_t d = 0; d < p.head_dim; ++d) {
            const double sum = weight_sums(r)[d];
            check += splat(static_cast<T>(sum - sum));
          }
        }
      }
      for (std::int64_t d = 0; d < k.rows_ * Slopes::size(p.head_dim); d += kLanes<T>) {
        check += load(sums + d) - load(sums + d);
      }
      return sum_lanes<T>(check) == T(0);
    }

    double* weight_sums(std::int64_t r) const {
      return k.weight_sums_ + k.part(b, hk, share, r) * padded<T>(k.p_.head_dim);
    }
    double& slope_sum(std::int64_t r) const { return k.slope_sums_[k.part(b, hk, share, r)]; }

    // dO, delta, lse and the keys that it sees; false: the lse is too coarse, or not a number.
    bool load_row_of(std::int64_t r, KeyRange keys) {
      const AttentionProblem& p = k.p_;
      const std::int64_t h = k.head(hk, r);
      const std::int64_t i = k.query(r);
      pack_along_rows<Elements<T>>(rows_of(p.dtype, k.call_.grad_out, b, h, p.value_dim), i, 1,
                                   buffer.grad_out + r * padded<T>(p.value_dim));
      buffer.delta[r] = delta_of_row<T>(k.call_, b, h, i);
      const T lse = static_cast<const T*>(k.call_.lse)[(b * p.heads + h) * p.query_length + i];
      buffer.lse[r] = lse * Math<T>::log2e;
      const KeyRange range = key_range(p, b, i);
      buffer.ranges[r] = {larger(range.begin, keys.begin), smaller(range.end, keys.end)};
      if (lse == -infinity<T>()) buffer.ranges[r] = {0, 0};
      return lse == lse && !is_coarse(lse);
    }

    // n keys from `first`.
    bool run_block(const Score& score, std::int64_t first, std::int64_t n, T* sums) {
      const AttentionProblem& p = k.p_;
      const std::int64_t value_width = padded<T>(p.value_dim);
      for (std::int64_t u = 0; u < n; u += kPanel<T>) {
        for (std::int64_t r = 0; r < k.rows_; r += Score::kGroupRows) {
          score.scores(buffer.queries, r, smaller<std::int64_t>(Score::kGroupRows, k.rows_ - r),
                       first + u, buffer.weights + r * kLd + u, kLd);
        }
      }
      multiply_in_place(k.rows_, buffer.grad_out, value_width,
                        rows_of(p.dtype, p.value, b, hk, p.value_dim), first, n, buffer.grads, kLd);
      for (std::int64_t r = 0; r < k.rows_; ++r) {
        if (!find_weights(score, r, first, n)) return false;
      }
      for (std::int64_t x = 0; x < n; ++x) {
        DotSlopes<T>::add_rows(zeros, k.rows_, buffer.grad_out, value_width, buffer.weights + x,
                               kLd, value_width, buffer.row);
        store_row_of(k.call_.grad_value, p.value_dim, first + x, buffer.row, T(1));
      }
      Slopes::add(p, rows_of(p.dtype, p.key, b, hk, p.head_dim), valid, zeros, k.rows_,
                  buffer.queries, buffer.grads, kLd, first, n, sums, buffer.row,
                  [&](std::int64_t x, const T* row, T factor) {
                    store_row_of(k.call_.grad_key, p.head_dim, first + x, row, factor);
                  });
      return true;
    }

    // Scores and dP of row r become f p and G, 0 where it may not see a key and behind the last
    // one. False: a score overflowed.
    bool find_weights(const Score& score, std::int64_t r, std::int64_t first, std::int64_t n) {
      const AttentionProblem& p = k.p_;
      const std::int64_t h = k.head(hk, r);
      const std::int64_t i = k.query(r);
      T* const weights = buffer.weights + r * kLd;
      T* const grads = buffer.grads + r * kLd;
      const KeyRange range = buffer.ranges[r];
      const std::int64_t begin = smaller(larger<std::int64_t>(range.begin - first, 0), n);
      const std::int64_t end = larger(smaller(range.end - first, n), begin);
      T* const w = weights + begin;
      T* const x = grads + begin;
      const std::int64_t count = end - begin;
      const bool masked = p.mask_kind != MaskKind::kNone;
      const Alibi<T> alibi(p, b, h);
      if (count > 0) {
        if (alibi.active) alibi.add(i, first + begin, count, zeros, w);
        if (masked) add_mask_row(p, b, h, i, first + begin, count, zeros, w);
        if (p.dropout_p > 0.0) {
          load_dropout_row(p, k.dropout_, b, h, i, first + begin, count, buffer.factors);
        }
      }
      const PairSums<T> sums =
          softmax_gradients(score.scale(true), buffer.lse[r], T(1), buffer.delta[r],
                            p.dropout_p > 0.0 ? buffer.factors : nullptr, count, w, x);
      fill_zero(weights, begin);
      fill_zero(grads, begin);
      fill_zero(weights + end, kLd - end);
      fill_zero(grads + end, kLd - end);
      store_mask_gradient(r, first, n);
      if (k.slope_sums_ != nullptr && count > 0) {
        slope_sum(r) -= static_cast<double>(alibi.sum_distances(i, first + begin, count, x));
      }
      return masked || !sums.has_lowest();
    }

    void store_mask_gradient(std::int64_t r, std::int64_t first, std::int64_t n) const {
      if (k.call_.grad_mask == nullptr) return;
      const AttentionProblem& p = k.p_;
      const std::int64_t row = (b * p.heads + k.head(hk, r)) * p.query_length + k.query(r);
      store_row(p.mask_dtype, k.call_.grad_mask, row * p.key_length + first, 1, n,
                buffer.grads + r * kLd);
    }
    void store_row_of(const View& view, std::int64_t width, std::int64_t j, const T* row,
                      T factor) {
      check += store_scaled_row(k.p_.dtype, view.data,
                                b * view.stride[0] + hk * view.stride[1] + j * view.stride[2],
                                view.stride[3], width, row, factor);
    }
  };

  // dq of a unit's rows, whose parts are added in their order. False: a sum is not finite.
  bool finish_queries(std::int64_t unit, T* queries) {
    const std::int64_t b = unit / p_.kv_heads;
    const std::int64_t hk = unit % p_.kv_heads;
    const std::int64_t width = padded<T>(p_.head_dim);
    if constexpr (Slopes::kHasWeight) {  // the weight is beside them
      Score score(p_, nullptr, nullptr);
      load_queries(score, b, hk, queries);
    }
    Vec<T> check{};
    for (std::int64_t r = 0; r < rows_; ++r) {
      T* const sums = sums_of(unit, 0, r);
      for (std::int64_t d = 0; d < width; d += kLanes<T>) {
        Vec<T> sum = load(sums + d);
        for (std::int64_t s = 1; s < shares_; ++s) sum += load(sums_of(unit, s, r) + d);
        store(sums + d, sum);
      }
      Slopes::finish(p_, queries + r * Score::query_size(p_.head_dim), sums);
      const View& view = call_.grad_query;
      check += store_scaled_row(
          p_.dtype, view.data,
          b * view.stride[0] + head(hk, r) * view.stride[1] + query(r) * view.stride[2],
          view.stride[3], p_.head_dim, sums, T(1));
    }
    return sum_lanes<T>(check) == T(0);
  }

  const AttentionBackward& call_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;

  std::int64_t rows_ = 0;                // of a unit, a key head
  std::int64_t shares_ = 1, share_ = 0;  // of its keys; keys of one
  Flag given_up_;

  T* sums_ = nullptr;              // [unit][share][row][Slopes::size()]
  double* weight_sums_ = nullptr;  // [part][element]: sums of G h
  double* slope_sums_ = nullptr;   // [part]; null: not wanted
  char* base_ = nullptr;
  std::int64_t threads_ = 0, thread_bytes_ = 0;
};

// Whether backward was done so. Several rows of narrow heads gain from the register tile.
template <typename T>
inline bool backward_of_few_queries(const AttentionBackward& call, const Parallel& parallel) {
  const AttentionProblem& p = call.problem;
  if (has_few_queries(p)) {
    const bool gains = p.group_size() * p.query_length <= 2 || p.head_dim >= 32;
    return gains && FewQueriesBackward<DotSlopes<T>>(call, parallel).run();
  }
  return has_few_additive_queries<T>(p) &&
         FewQueriesBackward<AdditiveSlopes<T>>(call, parallel).run();
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
