#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
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

// What a score adds to gradients, by rows of a block: sums[rows][size] of each row, of which dq and
// dw are made, and rows of dk. g[rows][ld] holds zeros behind the n keys of a block, as far as
// whole vectors go.
template <typename T>
struct DotSlopes {
  using Score = DotScoreInPlace<T>;
  static constexpr bool kHasWeight = false;
  static std::int64_t size(std::int64_t head_dim) { return padded<T>(head_dim); }

  // store(x, row, factor): dk of the key j + x.
  template <typename Store>
  static void add(const AttentionProblem& p, const Rows& key, KeyRange /*valid*/, Zeros zeros,
                  std::int64_t rows, const T* queries, const T* g, std::int64_t ld, std::int64_t j,
                  std::int64_t n, T* sums, T* buffer, const Store& store_key) {
    const std::int64_t width = padded<T>(p.head_dim);
    add_weighted_values(zeros, rows, g, ld, key, j, n, sums, width);
    for (std::int64_t x = 0; x < n; ++x) {
      add_rows(zeros, rows, queries, width, g + x, ld, width, buffer);
      store_key(x, buffer, T(Math<double>::ln2));  // log2 e is in the queries
    }
  }
  // buffer = sum_r g[r * ld] rows[r]
  static void add_rows(Zeros zeros, std::int64_t rows, const T* row, std::int64_t row_ld,
                       const T* g, std::int64_t ld, std::int64_t width, T* buffer) {
    for (std::int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> sum{};
      for (std::int64_t r = 0; r < rows; ++r) {
        if (zeros == Zeros::kSkip && g[r * ld] == T(0)) continue;
        sum = fma(splat(g[r * ld]), load(row + r * row_ld + d), sum);
      }
      store(buffer + d, sum);
    }
  }
  // dq of a row, in place of its sums.
  static void finish(const AttentionProblem& p, const T* /*query*/, T* sums) {
    const T factor = static_cast<T>(p.scale);
    for (std::int64_t d = 0; d < padded<T>(p.head_dim); ++d) sums[d] *= factor;
  }
};

// With h = -tanh / 2 the slope of tanh is 4 (1/4 - h^2): sums are those of G (1/4 - h^2), then of
// G h.
template <typename T>
struct AdditiveSlopes {
  using Score = AdditiveScoreInPlace<T>;
  static constexpr bool kHasWeight = true;
  static std::int64_t size(std::int64_t head_dim) { return 2 * padded<T>(head_dim); }

  template <typename Store>
  static void add(const AttentionProblem& p, const Rows& key, KeyRange valid, Zeros zeros,
                  std::int64_t rows, const T* queries, const T* g, std::int64_t ld, std::int64_t j,
                  std::int64_t n, T* sums, T* buffer, const Store& store_key) {
    const std::int64_t width = padded<T>(p.head_dim);
    with_widened<T>(key.dtype, [&]<DType dtype>() {
      const auto* const keys =
          static_cast<const typename Storage<dtype>::type*>(key.data) + key.at(j);
      for (std::int64_t x = 0; x < n; x += kKeysOfDivision) {
        const FourKeys<T, dtype> four(keys, key.row_stride, x, {valid.begin - j, valid.end - j});
        if (zeros == Zeros::kMultiply) {
          add_four<dtype, Zeros::kMultiply>(four, p.head_dim, rows, queries, g + x, ld, sums,
                                            buffer);
        } else {
          add_four<dtype, Zeros::kSkip>(four, p.head_dim, rows, queries, g + x, ld, sums, buffer);
        }
        // 4 scale w is -2 ln 2 times what the queries have.
        for (std::int64_t y = x; y < smaller<std::int64_t>(x + kKeysOfDivision, n); ++y) {
          store_key(y, buffer + (y - x) * width, T(-2.0 * Math<double>::ln2));
        }
      }
    });
  }
  static void finish(const AttentionProblem& p, const T* query, T* sums) {
    const std::int64_t width = padded<T>(p.head_dim);
    const T* const weight = query + width;
    for (std::int64_t d = 0; d < width; ++d) sums[d] *= weight[d] * T(-2.0 * Math<double>::ln2);
  }
  // Moves the sums of G h of a row to double, of which few are added up in T then.
  static void take_weight_sums(const AttentionProblem& p, T* sums, double* to) {
    const std::int64_t width = padded<T>(p.head_dim);
    for (std::int64_t d = 0; d < width; ++d) to[d] += static_cast<double>(sums[width + d]);
    fill_zero(sums + width, width);
  }
  static double factor_of_weight(const AttentionProblem& p) { return -2.0 * p.scale; }

 private:
  // buffer: what four keys have of dk.
  template <DType dtype, Zeros zeros>
  [[gnu::noinline]] static void add_four(const FourKeys<T, dtype>& four, std::int64_t head_dim,
                                         std::int64_t rows, const T* __restrict queries,
                                         const T* __restrict g, std::int64_t ld, T* __restrict sums,
                                         T* __restrict buffer) {
    const std::int64_t width = padded<T>(head_dim);
    for (std::int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> elements[kKeysOfDivision], grad_key[kKeysOfDivision] = {};
      four.load(d, head_dim, elements);
      for (std::int64_t r = 0; r < rows; ++r) {
        const T* const query = queries + r * 2 * width + d;
        T* const sum = sums + r * 2 * width + d;
        Vec<T> k[kKeysOfDivision], h[kKeysOfDivision];
#pragma GCC unroll 4
        for (int y = 0; y < kKeysOfDivision; ++y) {
          const bool skip = zeros == Zeros::kSkip && g[r * ld + y] == T(0);
          k[y] = skip ? Vec<T>{} : elements[y];
        }
        half_tanh<T>(load(query), k, h);
        const Vec<T> w = load(query + width);
        Vec<T> of_slope = load(sum);
        Vec<T> of_tanh = load(sum + width);
#pragma GCC unroll 4
        for (int y = 0; y < kKeysOfDivision; ++y) {
          const Vec<T> g_y = splat(g[r * ld + y]);
          const Vec<T> slope = g_y * fnma(h[y], h[y], splat(T(0.25)));
          grad_key[y] = fma(w, slope, grad_key[y]);
          of_slope += slope;
          of_tanh = fma(g_y, h[y], of_tanh);
        }
        store(sum, of_slope);
        store(sum + width, of_tanh);
      }
      for (int y = 0; y < kKeysOfDivision; ++y) store(buffer + y * width + d, grad_key[y]);
    }
  }
};

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
      if (given_up()) return;
      Task task{*this, buffers(thread), t / shares_ / p_.kv_heads, t / shares_ % p_.kv_heads,
                t % shares_};
      if (!task.run(Zeros::kMultiply) && !task.run(Zeros::kSkip)) give_up();
    });
    if (given_up()) return false;
    parallel_.run(units, [&](std::int64_t unit, int thread) {
      if (!finish_queries(unit, buffers(thread).queries)) give_up();
    });
    if (given_up()) return false;
    if constexpr (Slopes::kHasWeight) {
      if (call_.grad_weight != nullptr) {
        const std::int64_t chunks = (p_.head_dim + kChunk - 1) / kChunk;
        parallel_.run(chunks, [&](std::int64_t chunk, int) {
          for (std::int64_t d = chunk * kChunk; d < smaller((chunk + 1) * kChunk, p_.head_dim);
               ++d) {
            reduce_per_head(weight_sums_ + d, padded<T>(p_.head_dim), Slopes::factor_of_weight(p_),
                            p_.weight_size, p_.dtype, call_.grad_weight, d, p_.head_dim);
          }
        });
      }
    }
    if (call_.grad_slopes != nullptr) {
      reduce_per_head(slope_sums_, 1, 1.0, p_.slopes_size, p_.slopes_dtype, call_.grad_slopes, 0,
                      1);
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

  void give_up() { __atomic_store_n(&given_up_, true, __ATOMIC_RELAXED); }
  bool given_up() const { return __atomic_load_n(&given_up_, __ATOMIC_RELAXED); }

  // Row r of a unit: as many queries of each head, head by head.
  std::int64_t head(std::int64_t hk, std::int64_t r) const {
    return hk * p_.group_size() + r / p_.query_length;
  }
  std::int64_t query(std::int64_t r) const { return r % p_.query_length; }
  // Where something of a row's part is.
  std::int64_t part(std::int64_t unit, std::int64_t share, std::int64_t r) const {
    return (unit * shares_ + share) * rows_ + r;
  }
  T* sums_of(std::int64_t unit, std::int64_t share, std::int64_t r) const {
    return sums_ + part(unit, share, r) * Slopes::size(p_.head_dim);
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
      const std::int64_t part = k.part(b * p.kv_heads + hk, share, 0);
      T* const sums = k.sums_of(b * p.kv_heads + hk, share, 0);
      const std::int64_t width = padded<T>(p.head_dim);
      fill_zero(sums, k.rows_ * Slopes::size(p.head_dim));
      if (Slopes::kHasWeight) fill_zero(k.weight_sums_ + part * width, k.rows_ * width);
      if (k.slope_sums_ != nullptr) fill_zero(k.slope_sums_ + part, k.rows_);
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
            Slopes::take_weight_sums(p, sums + r * Slopes::size(p.head_dim),
                                     k.weight_sums_ + (part + r) * width);
          }
        }
      }
      if constexpr (Slopes::kHasWeight) {
        for (std::int64_t n = 0; n < k.rows_ * width; ++n) {
          const double sum = k.weight_sums_[part * width + n];
          check += splat(static_cast<T>(sum - sum));
        }
      }
      for (std::int64_t d = 0; d < k.rows_ * Slopes::size(p.head_dim); d += kLanes<T>) {
        check += load(sums + d) - load(sums + d);
      }
      return sum_lanes<T>(check) == T(0);
    }

    // dO, delta, lse and the keys that it sees; false: the lse is too coarse, or not a number.
    bool load_row_of(std::int64_t r, KeyRange keys) {
      const AttentionProblem& p = k.p_;
      const std::int64_t h = k.head(hk, r);
      const std::int64_t i = k.query(r);
      const std::int64_t width = padded<T>(p.value_dim);
      const Rows out = rows_of(p.dtype, k.call_.out, b, h, p.value_dim);
      const Rows grad = rows_of(p.dtype, k.call_.grad_out, b, h, p.value_dim);
      T* const grad_out = buffer.grad_out + r * width;
      Vec<T> sum{};
      for (std::int64_t d = 0; d < width; d += kLanes<T>) {
        const std::int64_t n = smaller<std::int64_t>(kLanes<T>, p.value_dim - d);
        const Vec<T> x = load_elements_of_row<T>(grad, i, d, n);
        store(grad_out + d, x);
        sum = fma(load_elements_of_row<T>(out, i, d, n), x, sum);
      }
      const std::int64_t row = (b * p.heads + h) * p.query_length + i;
      buffer.delta[r] = sum_lanes<T>(sum);
      if (k.call_.grad_lse != nullptr) {
        buffer.delta[r] -= static_cast<const T*>(k.call_.grad_lse)[row];
      }
      const T lse = static_cast<const T*>(k.call_.lse)[row];
      buffer.lse[r] = lse * Math<T>::log2e;
      const KeyRange range = key_range(p, b, i);
      buffer.ranges[r] = {larger(range.begin, keys.begin), smaller(range.end, keys.end)};
      if (lse == -infinity<T>()) buffer.ranges[r] = {0, 0};
      constexpr T most = sizeof(T) == 8 ? T(0x1p40) : T(0x1p13);
      return lse == -infinity<T>() || (lse >= -most && lse <= most);
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
        if (!find_weights(r, first, n)) return false;
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
    bool find_weights(std::int64_t r, std::int64_t first, std::int64_t n) {
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
      const Vec<T> lse = splat(buffer.lse[r]);
      const Vec<T> delta = splat(buffer.delta[r]);
      IntVec<T> overflowed{};
      for (std::int64_t j = 0; j < count; j += kLanes<T>) {
        const std::int64_t left = count - j;
        const Vec<T> score = load_up_to(w + j, left);
        overflowed |= score == splat(-infinity<T>());
        Vec<T> weight = exp2<T>(score - lse);
        if (left < kLanes<T>) weight = first_lanes<T>(weight, left, Vec<T>{});
        Vec<T> grad = load_up_to(x + j, left);
        Vec<T> kept = weight;
        if (p.dropout_p > 0.0) {
          const Vec<T> factor = load_up_to(buffer.factors + j, left);
          grad = factor == Vec<T>{} ? factor : grad * factor;
          kept *= factor;
        }
        grad = weight == Vec<T>{} ? Vec<T>{} : weight * (grad - delta);
        store_up_to(w + j, kept, left);
        store_up_to(x + j, grad, left);
      }
      fill_zero(weights, begin);
      fill_zero(grads, begin);
      fill_zero(weights + end, kLd - end);
      fill_zero(grads + end, kLd - end);
      store_mask_gradient(r, first, n);
      if (k.slope_sums_ != nullptr && count > 0) {
        k.slope_sums_[k.part(b * p.kv_heads + hk, share, r)] -=
            static_cast<double>(alibi.sum_distances(i, first + begin, count, x));
      }
      return masked || !any_lane<T>(overflowed);
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
    Score score(p_, nullptr, nullptr);
    load_queries(score, b, hk, queries);
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

  static KeyRange one(std::int64_t n) { return {n, n + 1}; }

  // A gradient of (B or 1, H or 1) numbers, element n of which lies at offset + n stride, from the
  // parts sums[unit][share][row], `step` apart.
  void reduce_per_head(const double* sums, std::int64_t step, double factor,
                       const std::int64_t (&size)[2], DType dtype, void* gradient,
                       std::int64_t offset, std::int64_t stride) const {
    for (std::int64_t n = 0; n < size[0] * size[1]; ++n) {
      const KeyRange batches = size[0] > 1 ? one(n / size[1]) : KeyRange{0, p_.batch};
      const KeyRange heads = size[1] > 1 ? one(n % size[1]) : KeyRange{0, p_.heads};
      double sum = 0.0;
      for (std::int64_t b = batches.begin; b < batches.end; ++b) {
        for (std::int64_t h = heads.begin; h < heads.end; ++h) {
          const std::int64_t unit = b * p_.kv_heads + h / p_.group_size();
          const std::int64_t first = h % p_.group_size() * p_.query_length;
          for (std::int64_t share = 0; share < shares_; ++share) {
            for (std::int64_t r = first; r < first + p_.query_length; ++r) {
              sum += sums[part(unit, share, r) * step];
            }
          }
        }
      }
      const T value = static_cast<T>(factor * sum);
      store_row(dtype, gradient, offset + n * stride, 1, 1, &value);
    }
  }

  const AttentionBackward& call_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;

  std::int64_t rows_ = 0;                // of a unit, a key head
  std::int64_t shares_ = 1, share_ = 0;  // of its keys; keys of one
  bool given_up_ = false;

  T* sums_ = nullptr;              // [unit][share][row][Slopes::size()]
  double* weight_sums_ = nullptr;  // [unit][share][row][element]: sums of G h
  double* slope_sums_ = nullptr;   // [unit][share][row]; null: not wanted
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
