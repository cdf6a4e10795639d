#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/backward_rows.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/mask_gradient.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/plain_tile.h"
#include "kernels/cpu/score_gradient.h"
#include "kernels/cpu/tile.h"

// Backward, one pass over the keys, deterministic, memory O(L).
//
// Keys are cut into blocks, blocks are dealt out to a fixed number of groups (block j to group
// j mod groups). A task owns a key head and a group: it keeps dk and dv of one block of keys at a
// time, walks over all blocks of queries of the heads that read it, and adds dq to a buffer of its
// group; the groups' buffers are added in their order at the end. Per tile of queries and keys:
//   S = scores (recomputed), dP = dO v^T, p = 2^(S - lse), G = p (f dP - delta),
//   dv += (f p)^T dO, then dk and dq from G: five matrix products (dot product), three and a sweep
//   over the elements (additive).
// Tiles and inner loops are clipped to the keys that a group of query rows may see. The number of
// groups depends on the problem only, so results do not depend on threads. Where key heads can be
// dealt out evenly a thread runs all groups of one, whose copies and dq stay in its cache
// (whole_heads_), and adds in the same order. Where batches or heads share a mask that needs a
// gradient (mask_gradient.h) a task owns a subset of batches and key heads (a unit) instead of one.
// Bound: FMA (dot product), FMA and division (additive).
//
// If a result is not finite the task is run again carefully, or the kernel gives up, as in
// forward.h. Length: one class, whose steps share the tile and its buffers.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename GradientT>
class BackwardKernel {
 public:
  using Gradient = GradientT;
  using Operand = typename Gradient::Operand;
  using T = typename Operand::Scalar;
  static constexpr int kGroupRows = Gradient::kGroupRows;

  using Context = ContextOf<Gradient>;
  BackwardKernel(const AttentionBackward& call, const Parallel& parallel,
                 const Context& context = {})
      : call_(call), p_(call.problem), parallel_(parallel), context_(context), mask_(call) {}

  // False: a failure (operand.h).
  bool run() {
    plan();
    if (p_.dropout_p > 0.0) dropout_ = Dropout::make(p_.dropout_p, p_.philox_state);
    Carver size;
    carve(size);
    const Scratch scratch(larger<std::int64_t>(size.used(), 64));
    Carver carver(scratch.data());
    carve(carver);

    const std::int64_t pairs = p_.batch * p_.heads;
    if (tasks_share_heads()) {
      const std::int64_t chunks = (p_.query_length + kPrepareRows - 1) / kPrepareRows;
      parallel_.run(pairs * chunks, [&](std::int64_t t, int thread) {
        const std::int64_t b = t / chunks / p_.heads;
        const std::int64_t h = t / chunks % p_.heads;
        const std::int64_t begin = t % chunks * kPrepareRows;
        const std::int64_t end = smaller(begin + kPrepareRows, p_.query_length);
        if (!own_copies_) copy(copies_, b, h, begin, end, buffers(thread).spare);
        if (!failure_.raised()) prepare(b, h, begin, end);
      });
    }
    const std::int64_t groups_at_once = whole_heads_ ? groups_ : 1;
    const std::int64_t tasks = batch_sets_ * head_sets_ * groups_ / groups_at_once;
    parallel_.run(tasks, [&](std::int64_t t, int thread) {
      const typename Operand::Session session;
      for (std::int64_t n = t * groups_at_once; n < (t + 1) * groups_at_once; ++n) {
        const std::int64_t unit = n / groups_;
        Task task{*this, buffers(thread), unit / head_sets_, unit % head_sets_, n % groups_};
        task.run();
        if (whole_heads_) task.add_grad_query();
      }
    });
    if (failure_.raised()) return false;
    if (tasks_share_heads()) {
      const std::int64_t chunks = (p_.query_length + kPrepareRows - 1) / kPrepareRows;
      parallel_.run(pairs * chunks, [&](std::int64_t t, int thread) {
        reduce_grad_query(t / chunks, t % chunks * kPrepareRows,
                          smaller((t % chunks + 1) * kPrepareRows, p_.query_length), thread);
      });
    }
    if (call_.grad_weight != nullptr) reduce_grad_weight();
    mask_.reduce(parallel_);
    if (call_.grad_slopes != nullptr) reduce_grad_slopes();
    return true;
  }

 private:
  // Operands of sums along rows and across rows differ; of single elements they are the same.
  static constexpr bool kPacksTwice = Operand::kPack > 1;
  // Products are of features of the tokens, p_.head_dim of them.
  static constexpr bool kHasFeatures = kHasContext<Gradient>;
  static constexpr std::int64_t kPrepareRows = 64;
  static constexpr std::int64_t kWantedTasks = 32;
  static constexpr std::int64_t kLeastTasks = 4;
  static constexpr std::int64_t kLeastKeys = 64;  // of a half of one head's keys
  static constexpr T kExact = sizeof(T) == 8 ? T(0x1p39) : T(0x1p12);

  void plan() {
    token_dim_ = p_.head_dim;
    if constexpr (kHasFeatures) token_dim_ = context_.head_dim();
    query_width_ = padded<T>(token_dim_);
    feature_width_ = padded<T>(p_.head_dim);
    if constexpr (kHasFeatures) feature_width_ = 2 * Gradient::Score::query_size(p_.head_dim);
    value_width_ = padded<T>(p_.value_dim);
    key_sums_ld_ = Operand::kTransposes ? query_width_ : spread_rows<T>(query_width_);
    query_words_ = padded<T>(Operand::words(p_.head_dim));
    value_words_ = padded<T>(Operand::words(p_.value_dim));
    row_words_ = Operand::words(p_.query_length);
    query_rows_ = kHasFeatures ? round_up(p_.query_length, kGroupRows) : p_.query_length;
    const std::int64_t widest = larger<std::int64_t>(larger(query_width_, value_width_), 1);
    block_keys_ =
        smaller(Gradient::kBlockKeys, larger<std::int64_t>(Gradient::kBlockKeys * 128 / widest, 1));
    // The keys of one head are cut in two, so that two threads have work.
    const bool halves = p_.batch * p_.kv_heads == 1 && p_.key_length >= 2 * kLeastKeys;
    const std::int64_t most = halves ? (p_.key_length + 1) / 2 : p_.key_length;
    block_keys_ = smaller(block_keys_, larger<std::int64_t>(most, 1));
    block_keys_ = round_up(block_keys_, kPanel<T>);
    block_rows_ = smaller<std::int64_t>(
        Gradient::kBlockRows, round_up(larger<std::int64_t>(p_.query_length, 1), kGroupRows));
    score_ld_ = block_keys_ + kLanes<T>;
    blocks_ = (p_.key_length + block_keys_ - 1) / block_keys_;

    batch_sets_ = p_.batch;
    head_sets_ = p_.kv_heads;
    mask_.plan_sets(batch_sets_, head_sets_);
    const std::int64_t units = larger<std::int64_t>(batch_sets_ * head_sets_, 1);
    groups_ = smaller(blocks_ / 4, (kWantedTasks + units - 1) / units);
    // A group of one block sums dq for that alone, but one task would leave the other threads idle.
    groups_ = larger(groups_, smaller(blocks_, (kLeastTasks + units - 1) / units));
    groups_ = larger<std::int64_t>(groups_, 1);
    mask_.plan_groups(groups_);
    const bool one_head = batch_sets_ == p_.batch && head_sets_ == p_.kv_heads;
    whole_heads_ = groups_ > 1 && one_head && parallel_.deals_evenly(units, !p_.samples_differ());
    // Features are many times as large as tokens: of all heads only where these are few.
    const bool few_heads = p_.batch * p_.heads <= larger(parallel_.threads, 1);
    own_copies_ = !tasks_share_heads() || (kHasFeatures && !few_heads);

    copy_query_ = Gradient::kReadsQueries &&
                  Operand::in_place(rows_of(p_.dtype, p_.query, 0, 0, p_.head_dim)) == nullptr;
    copy_grad_out_ =
        Operand::in_place(rows_of(p_.dtype, call_.grad_out, 0, 0, p_.value_dim)) == nullptr;
    grad_query_in_place_ = groups_ == 1 && p_.dtype == dtype_of<T>() &&
                           call_.grad_query.stride[3] == 1 && p_.head_dim % kLanes<T> == 0;
  }

  void carve(Carver& carver) {
    const std::int64_t rows = p_.batch * p_.heads * p_.query_length;
    delta_ = carver.take<T>(rows);
    lse_ = carver.take<T>(rows);
    norm_ = carver.take<T>(rows);
    huge_ = carver.take<char>(rows);
    if (!own_copies_) copies_.carve(*this, carver, p_.batch * p_.heads);
    if (tasks_share_heads()) {
      grad_query_ = carver.take<T>(groups_ * rows * query_width_);
    }
    if (Gradient::kHasWeight) {
      weight_sums_ = carver.take<double>(p_.batch * p_.heads * groups_ * weight_size());
    }
    if (call_.grad_slopes != nullptr) {
      slope_sums_ = carver.take<double>(p_.batch * p_.heads * groups_);
    }
    mask_.carve(carver);
    threads_ = carver.used();
    base_ = carver.base();
    thread_bytes_ = Buffers(*this, Carver()).bytes;
    carver.take<char>(thread_bytes_ * workers());
  }
  // Whether several tasks work on a head: its groups.
  bool tasks_share_heads() const { return groups_ > 1 && !whole_heads_; }
  // How many threads can be at work at once.
  std::int64_t workers() const {
    const std::int64_t threads = larger(parallel_.threads, 1);
    if (tasks_share_heads()) return threads;
    return larger<std::int64_t>(smaller<std::int64_t>(threads, batch_sets_ * head_sets_), 1);
  }
  std::int64_t weight_size() const { return query_width_ + 1; }  // sum G r, then sum G

  // Copies of queries and of the output's gradient as the products read them, where they cannot be
  // read in place: [head][words or rows][width or words]. Of all heads, if several tasks read them;
  // else (own_copies_) of the heads of one key head, by its task, or by the first of those that a
  // thread runs one after the other (whole_heads_).
  struct Copies {
    T *query_across = nullptr, *grad_out_across = nullptr;
    T *query_along = nullptr, *grad_out_along = nullptr;  // if kPacksTwice

    void carve(const BackwardKernel& k, Carver& carver, std::int64_t heads) {
      const std::int64_t across = heads * k.row_words_;
      const std::int64_t rows = heads * k.p_.query_length;
      query_across = carver.take<T>(k.copy_query_ ? across * k.feature_width_ : 0);
      grad_out_across = carver.take<T>(k.copy_grad_out_ ? across * k.value_width_ : 0);
      query_along = carver.take<T>(kPacksTwice ? heads * k.query_rows_ * k.query_words_ : 0);
      grad_out_along = carver.take<T>(kPacksTwice ? rows * k.value_words_ : 0);
    }
  };
  std::int64_t place_of_copy(std::int64_t b, std::int64_t h) const {
    return own_copies_ ? h % p_.group_size() : b * p_.heads + h;
  }

  struct Buffers {
    Buffers(const BackwardKernel& k, Carver carver) {
      using Score = typename Gradient::Score;
      const std::int64_t head_dim = k.p_.head_dim;
      constants = carver.take<T>(Score::constants_size(head_dim));
      spare = carver.take<T>(Score::spare_size(head_dim, k.block_rows_));
      gradient = carver.take<T>(Gradient::buffer_size(head_dim));
      queries = carver.take<T>(k.block_rows_ * Gradient::query_size(head_dim));
      key_panels = carver.take<T>(k.block_keys_ * Score::key_size(head_dim));
      bounds = carver.take<T>(k.block_keys_ / kPanel<T>);
      value_panels = carver.take<T>(k.block_keys_ * Operand::words(k.p_.value_dim));
      weights = carver.take<T>(k.block_rows_ * k.score_ld_);
      grad_scores = carver.take<T>(k.block_rows_ * k.score_ld_);
      packed_grad_scores = carver.take<T>(kPacksTwice ? k.block_rows_ * k.packed_ld() : 0);
      const std::int64_t across = Operand::words(k.block_rows_) * k.score_ld_;
      weights_across = kPacksTwice ? carver.take<T>(across) : weights;
      grad_scores_across = kPacksTwice ? carver.take<T>(across) : grad_scores;
      if constexpr (Operand::kTransposes) plain_tile = carver.take<T>(PlainTile<Gradient>::size());
      row = carver.take<T>(k.score_ld_);
      grad_key = carver.take<T>(k.block_keys_ * k.query_width_);
      grad_key_head = carver.take<T>(k.block_keys_ * k.key_sums_ld_);
      grad_value = carver.take<T>(k.block_keys_ * k.value_width_);
      constexpr bool turned = Operand::kTransposes;
      grad_key_turned = carver.take<T>(turned ? k.query_width_ * k.score_ld_ : 0);
      grad_value_turned = carver.take<T>(turned ? k.value_width_ * k.score_ld_ : 0);
      factors = carver.take<T>(k.query_width_);
      ranges = carver.take<RowRanges>(1);
      tile = carver.take<TileRanges<T>>(1);
      const std::int64_t heads = k.p_.kv_heads > 0 ? k.p_.group_size() : 0;
      if (k.own_copies_) copies.carve(k, carver, heads);
      const bool elsewhere = k.tasks_share_heads() || k.grad_query_in_place_;
      const std::int64_t parts = elsewhere ? 0 : smaller<std::int64_t>(k.groups_, 2);
      grad_query = carver.take<T>(parts * heads * k.p_.query_length * k.query_width_);
      bytes = carver.used();
    }
    T *constants, *spare, *gradient, *queries, *key_panels, *bounds, *value_panels;
    T *weights, *grad_scores, *packed_grad_scores, *weights_across, *grad_scores_across;
    T* plain_tile = nullptr;
    T* grad_query;  // of the groups so far, then of this one (own_grad_query)
    T *row, *grad_key, *grad_key_head, *grad_value, *grad_key_turned, *grad_value_turned, *factors;
    RowRanges* ranges;
    TileRanges<T>* tile;
    Copies copies;
    std::int64_t bytes;
  };
  Buffers buffers(int thread) const {
    return Buffers(*this, Carver(base_ + threads_ + thread * thread_bytes_));
  }

  std::int64_t first_row(std::int64_t b, std::int64_t h) const {
    return (b * p_.heads + h) * p_.query_length;
  }
  std::int64_t packed_ld() const { return Operand::words(score_ld_); }

  // As the operand of sums over rows: words of neighbouring rows.
  static T pack_over_rows(const Rows& rows, std::int64_t begin, std::int64_t n, T* to) {
    if constexpr (Operand::kTransposes) {
      return pack_transposed<Operand>(rows, begin, n, to);
    } else {
      return pack_across_rows<Operand>(rows, begin, n, to);
    }
  }

  // Copies of what cannot be read in place, of rows [begin, end). `rows`: to work in, of the size
  // of a policy's spare memory.
  void copy(const Copies& copies, std::int64_t b, std::int64_t h, std::int64_t begin,
            std::int64_t end, [[maybe_unused]] T* rows) const {
    const std::int64_t n = end - begin;
    const Rows grad = rows_of(p_.dtype, call_.grad_out, b, h, p_.value_dim);
    const Rows query = rows_of(p_.dtype, p_.query, b, h, p_.head_dim);
    const std::int64_t place = place_of_copy(b, h);
    const std::int64_t word = place * row_words_ + Operand::words(begin);
    if constexpr (kHasFeatures) {
      Gradient::copy_queries(p_, context_, b, h, begin, n,
                             copies.query_along + (place * query_rows_ + begin) * query_words_,
                             copies.query_across + word * feature_width_, rows);
    } else if (copy_query_) {
      failure_.check(pack_over_rows(query, begin, n, copies.query_across + word * feature_width_));
    }
    if (copy_grad_out_) {
      failure_.check_gradient(
          pack_over_rows(grad, begin, n, copies.grad_out_across + word * value_width_));
    }
    if constexpr (kPacksTwice) {
      const std::int64_t row = place * p_.query_length + begin;
      if constexpr (!kHasFeatures) {
        pack_along_rows<Operand>(query, begin, n, copies.query_along + row * query_words_);
      }
      pack_along_rows<Operand>(grad, begin, n, copies.grad_out_along + row * value_words_);
    }
  }
  // delta, and lse in log2, of rows [begin, end).
  void prepare(std::int64_t b, std::int64_t h, std::int64_t begin, std::int64_t end) const {
    const std::int64_t row0 = first_row(b, h);
    for (std::int64_t i = begin; i < end; ++i) {
      const T lse = static_cast<const T*>(call_.lse)[row0 + i];
      delta_[row0 + i] = delta_of_row<T>(call_, b, h, i);
      lse_[row0 + i] = lse * Math<T>::log2e;
      norm_[row0 + i] = T(1);
      huge_[row0 + i] = is_coarse(lse);
      if (Failure<Operand>::kPossible && !is_finite(lse) && lse != -infinity<T>()) {
        return failure_.raise();
      }
      if (huge_[row0 + i] != 0) {
        if (kHasFeatures) return failure_.raise();
        exact_statistics(b, h, i, lse_[row0 + i], norm_[row0 + i]);
      }
    }
  }
  // Maximum and 1 / sum of row i from scores in double, where the lse is too coarse: it takes their
  // place in the softmax, p = 2^(score - maximum) norm.
  void exact_statistics(std::int64_t b, std::int64_t h, std::int64_t i, T& maximum, T& norm) const {
    const KeyRange range = key_range(p_, b, i);
    const Alibi<T> alibi(p_, b, h);
    maximum = -infinity<T>();
    T total = 0;
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      T score = static_cast<T>(exact_score<T>(p_, b, h, i, j));
      if (alibi.active) alibi.add(i, j, 1, Zeros::kSkip, &score);
      if (p_.mask_kind != MaskKind::kNone) add_mask_row(p_, b, h, i, j, 1, Zeros::kSkip, &score);
      if (score == -infinity<T>()) continue;
      if (score > maximum) {
        total = maximum == -infinity<T>() ? T(0) : total * exp2_of(maximum - score);
        maximum = score;
      }
      total += exp2_of(score - maximum);
    }
    norm = T(1) / total;
  }

  // Rows of a head, as the products read them: where they are, or the copy.
  struct Matrix {
    const T* data;
    std::int64_t ld;
    const T* row(std::int64_t r) const { return data + r * ld; }
  };
  Matrix query_across(const Copies& copies, std::int64_t b, std::int64_t h) const {
    if constexpr (!Gradient::kReadsQueries) return {nullptr, 0};
    const std::int64_t word = place_of_copy(b, h) * row_words_;
    if (copy_query_) return {copies.query_across + word * feature_width_, feature_width_};
    const Rows rows = rows_of(p_.dtype, p_.query, b, h, p_.head_dim);
    return {Operand::in_place(rows), rows.row_stride};
  }
  Matrix grad_out_across(const Copies& copies, std::int64_t b, std::int64_t h) const {
    const std::int64_t word = place_of_copy(b, h) * row_words_;
    if (copy_grad_out_) return {copies.grad_out_across + word * value_width_, value_width_};
    const Rows rows = rows_of(p_.dtype, call_.grad_out, b, h, p_.value_dim);
    return {Operand::in_place(rows), rows.row_stride};
  }
  Matrix query_along(const Copies& copies, std::int64_t b, std::int64_t h) const {
    if constexpr (!kPacksTwice) return query_across(copies, b, h);
    return {copies.query_along + place_of_copy(b, h) * query_rows_ * query_words_, query_words_};
  }
  Matrix grad_out_along(const Copies& copies, std::int64_t b, std::int64_t h) const {
    if constexpr (!kPacksTwice) return grad_out_across(copies, b, h);
    const std::int64_t row = place_of_copy(b, h) * p_.query_length;
    return {copies.grad_out_along + row * value_words_, value_words_};
  }
  struct MutableMatrix {
    T* data;
    std::int64_t ld;
  };
  MutableMatrix grad_query_matrix(std::int64_t b, std::int64_t h, std::int64_t group) const {
    const std::int64_t rows = p_.batch * p_.heads * p_.query_length;
    return {grad_query_ + (group * rows + first_row(b, h)) * query_width_, query_width_};
  }

  struct Task {
    const BackwardKernel& k;
    Buffers buffer;
    std::int64_t batch_set, head_set, group;
    Alibi<T> alibi{};  // of the head at work

    // The batches or key heads of a set: [begin, end).
    static KeyRange members(std::int64_t set, std::int64_t sets, std::int64_t n) {
      return {set * n / sets, (set + 1) * n / sets};
    }

    void run() {
      const AttentionProblem& p = k.p_;
      const KeyRange batches = members(batch_set, k.batch_sets_, p.batch);
      const KeyRange heads = members(head_set, k.head_sets_, p.kv_heads);
      if (k.failure_.raised() || run_unit(batches, heads, Zeros::kMultiply)) return;
      if constexpr (Failure<Operand>::kPossible) {
        k.failure_.raise();
      } else {
        run_unit(batches, heads, Zeros::kSkip);
      }
    }

    // False if a result is not finite.
    bool run_unit(KeyRange batches, KeyRange heads, Zeros zeros) {
      k.mask_.clear(mask_task(), batches,
                    {heads.begin * k.p_.group_size(), heads.end * k.p_.group_size()}, k.block_keys_,
                    k.groups_);
      bool finite = true;
      for (std::int64_t b = batches.begin; b < batches.end; ++b) {
        for (std::int64_t hk = heads.begin; hk < heads.end; ++hk) {
          finite = run_head(b, hk, zeros) && finite;
        }
      }
      return finite;
    }

    bool run_head(std::int64_t b, std::int64_t hk, Zeros zeros) {
      const AttentionProblem& p = k.p_;
      const std::int64_t per_head = p.group_size();
      for (std::int64_t h = hk * per_head; h < (hk + 1) * per_head; ++h) {
        if (k.own_copies_ && (group == 0 || !k.whole_heads_)) {
          k.copy(buffer.copies, b, h, 0, p.query_length, buffer.spare);
          if (k.failure_.raised()) return true;
        }
        const bool prepares = !k.tasks_share_heads() && group == 0;
        if (prepares && zeros == Zeros::kMultiply) k.prepare(b, h, 0, p.query_length);
        const MutableMatrix dq = grad_query(b, h);
        for (std::int64_t i = 0; i < p.query_length; ++i) {
          fill_zero(dq.data + i * dq.ld, k.query_width_);
        }
        if (Gradient::kHasWeight) {
          double* const sums = weight_sums(b, h);
          for (std::int64_t d = 0; d < k.weight_size(); ++d) sums[d] = 0.0;
        }
        if (k.slope_sums_ != nullptr) slope_sum(b, h) = 0.0;
      }
      Vec<T> check{};
      bool finite = true;
      Gradient gradient =
          make_policy<Gradient>(p, k.context_, buffer.constants, buffer.spare, buffer.gradient);
      for (std::int64_t n = group; n < k.blocks_; n += k.groups_) {
        const std::int64_t first = n * k.block_keys_;
        const std::int64_t keys = smaller(k.block_keys_, p.key_length - first);
        k.failure_.check(pack_panels<Operand>(rows_of(p.dtype, p.value, b, hk, p.value_dim), first,
                                              keys, buffer.value_panels, Unchanged<T>{}));
        fill_zero(buffer.grad_key, keys * k.query_width_);
        const Sums dv = value_sums();
        const Sums dk_head = head_key_sums();
        dv.clear(keys);
        for (std::int64_t h = hk * per_head; h < (hk + 1) * per_head; ++h) {
          gradient.set_head(b, h);
          alibi = Alibi<T>(p, b, h);
          if (h == hk * per_head || Gradient::Score::kKeysPerQueryHead) {
            gradient.load_keys(b, hk, first, keys, buffer.key_panels, buffer.bounds);
            if constexpr (Failure<Operand>::kPossible) {
              if (!gradient.is_in_range()) k.failure_.raise();
            }
          }
          if (k.failure_.raised()) return true;
          dk_head.clear(keys);
          for (std::int64_t i = 0; i < p.query_length; i += k.block_rows_) {
            run_tile(gradient, b, h, i, first, keys, zeros);
          }
          load_factors(gradient);
          dk_head.turn(keys);
          for (std::int64_t j = 0; j < keys; ++j) {
            T* const dk = buffer.grad_key + j * k.query_width_;
            const T* const head = buffer.grad_key_head + j * k.key_sums_ld_;
            for (std::int64_t d = 0; d < k.query_width_; d += kLanes<T>) {
              const Vec<T> sum = fma(load(head + d), load(buffer.factors + d), load(dk + d));
              check += sum - sum;
              store(dk + d, sum);
            }
          }
        }
        dv.turn(keys);
        for (std::int64_t j = 0; j < keys; ++j) {
          const T* const row = buffer.grad_value + j * k.value_width_;
          for (std::int64_t d = 0; d < k.value_width_; d += kLanes<T>) {
            check += load(row + d) - load(row + d);
          }
          write_row(k.call_.grad_key, b, hk, first + j, k.token_dim_,
                    buffer.grad_key + j * k.query_width_);
          write_row(k.call_.grad_value, b, hk, first + j, p.value_dim, row);
        }
      }
      for (std::int64_t h = hk * per_head; h < (hk + 1) * per_head; ++h) {
        gradient.set_head(b, h);
        load_factors(gradient);
        const MutableMatrix dq = grad_query(b, h);
        if constexpr (kHasFeatures) {
          if (group == 0) gradient.add_row_sums(b, h, dq.data, dq.ld, weight_sums(b, h));
        }
        for (std::int64_t i = 0; i < p.query_length; ++i) {
          T* const row = dq.data + i * dq.ld;
          for (std::int64_t d = 0; d < k.query_width_; d += kLanes<T>) {
            const Vec<T> x = load(row + d) * load(buffer.factors + d);
            check += x - x;
            store(row + d, x);
          }
          if (k.groups_ == 1 && !k.grad_query_in_place_) {
            write_row(k.call_.grad_query, b, h, i, k.token_dim_, row);
          }
        }
        finite = finish_weight(gradient, b, h) && finite;
      }
      return finite && sum_lanes<T>(check) == T(0);
    }

    MutableMatrix grad_query(std::int64_t b, std::int64_t h) const {
      if (k.grad_query_in_place_) {
        const View& view = k.call_.grad_query;
        T* const data = static_cast<T*>(view.data);
        return {data + b * view.stride[0] + h * view.stride[1], view.stride[2]};
      }
      if (k.tasks_share_heads()) return k.grad_query_matrix(b, h, group);
      return own_grad_query(h, group == 0 ? 0 : 1);
    }
    // Part 0 is of the first group, and then of all so far.
    MutableMatrix own_grad_query(std::int64_t h, std::int64_t part) const {
      const std::int64_t per_head = k.p_.group_size();
      const std::int64_t row = (part * per_head + h % per_head) * k.p_.query_length;
      return {buffer.grad_query + row * k.query_width_, k.query_width_};
    }

    // Where one task after the other has the groups of a head: adds that of this one to those
    // before, as reduce_grad_query does; the last one writes the sum.
    void add_grad_query() {
      const AttentionProblem& p = k.p_;
      if (group == 0 || k.failure_.raised()) return;
      const std::int64_t per_head = p.group_size();
      for (std::int64_t h = head_set * per_head; h < (head_set + 1) * per_head; ++h) {
        const MutableMatrix sum = own_grad_query(h, 0);
        const MutableMatrix part = own_grad_query(h, 1);
        for (std::int64_t i = 0; i < p.query_length; ++i) {
          T* const row = sum.data + i * sum.ld;
          for (std::int64_t d = 0; d < k.query_width_; d += kLanes<T>) {
            const Vec<T> before = load(row + d);
            store(row + d,
                  (group == 1 ? Vec<T>{} + before : before) + load(part.data + i * part.ld + d));
          }
          if (group == k.groups_ - 1) {
            write_row(k.call_.grad_query, batch_set, h, i, k.token_dim_, row);
          }
        }
      }
    }

    // Where sums over rows for a block of keys are made: rows[keys][width], or the transpose of it.
    struct Sums {
      T* rows;
      T* turned;
      std::int64_t width, row_ld, turned_ld;

      T* data() const { return Operand::kTransposes ? turned : rows; }
      std::int64_t ld() const { return Operand::kTransposes ? turned_ld : row_ld; }
      void clear(std::int64_t keys) const {
        fill_zero(data(), Operand::kTransposes ? width * turned_ld : keys * row_ld);
      }
      void turn(std::int64_t keys) const {
        if constexpr (Operand::kTransposes) {
          turn_round(turned, turned_ld, round_up(keys, kLanes<T>), rows, width);
        }
      }
    };
    Sums head_key_sums() const {
      return {buffer.grad_key_head, buffer.grad_key_turned, k.query_width_, k.key_sums_ld_,
              k.score_ld_};
    }
    Sums value_sums() const {
      return {buffer.grad_value, buffer.grad_value_turned, k.value_width_, k.value_width_,
              k.score_ld_};
    }

    const Copies& copies() const { return k.own_copies_ ? buffer.copies : k.copies_; }
    double* weight_sums(std::int64_t b, std::int64_t h) const {
      return k.weight_sums_ + ((b * k.p_.heads + h) * k.groups_ + group) * k.weight_size();
    }
    double& slope_sum(std::int64_t b, std::int64_t h) const {
      return k.slope_sums_[(b * k.p_.heads + h) * k.groups_ + group];
    }
    void load_factors(const Gradient& gradient) const {
      for (std::int64_t d = 0; d < k.query_width_; ++d) {
        buffer.factors[d] = d < k.token_dim_ ? gradient.factor_of_sums(d) : T(0);
      }
    }
    // The sums become this group's part of dw of the head. False if one of them is not finite.
    bool finish_weight(const Gradient& gradient, std::int64_t b, std::int64_t h) const {
      double check = 0.0;
      if constexpr (Gradient::kHasWeight) {
        double* const sums = weight_sums(b, h);
        const double total = sums[k.query_width_];
        for (std::int64_t d = 0; d < k.token_dim_; ++d) {
          sums[d] = gradient.weight_gradient(d, total, sums[d]);
          check += sums[d] - sums[d];
        }
      }
      return check == 0.0;
    }
    void write_row(const View& view, std::int64_t b, std::int64_t h, std::int64_t l, std::int64_t n,
                   const T* from) const {
      store_row(k.p_.dtype, view.data, b * view.stride[0] + h * view.stride[1] + l * view.stride[2],
                view.stride[3], n, from);
    }

    void run_tile(Gradient& gradient, std::int64_t b, std::int64_t h, std::int64_t i0,
                  std::int64_t first, std::int64_t keys, Zeros zeros) {
      const AttentionProblem& p = k.p_;
      const std::int64_t rows = smaller(k.block_rows_, p.query_length - i0);
      RowRanges& ranges = *buffer.ranges;
      ranges.compute(p, b, i0, rows, rows, {first, first + keys});
      TileRanges<T>& tile = *buffer.tile;
      tile.template compute<kGroupRows>(ranges, rows, first, keys);
      bool any = ranges.all.begin < ranges.all.end;
      if (any && p.mask_kind != MaskKind::kNone) {
        const auto offset = [&](std::int64_t r) { return mask_offset(p, b, h, i0 + r, first); };
        any = tile.template look_at_mask<kGroupRows>(p, rows, offset);
      }
      if (!any) {
        add_mask_gradient(b, h, i0, rows, first, keys);
        return;
      }

      const Matrix query = k.query_along(copies(), b, h);
      gradient.load_queries(b, h, i0, rows, query.row(i0), query.ld, buffer.queries);
      const bool plain =
          zeros == Zeros::kMultiply && run_plain_tile(gradient, tile, b, h, i0, rows);
      const double total = plain ? 0.0 : run_scores(gradient, b, h, i0, rows, first, keys, zeros);
      const std::int64_t word = Operand::words(i0);
      const Matrix grad_out_across = k.grad_out_across(copies(), b, h);
      const Matrix query_across = k.query_across(copies(), b, h);
      const Sums dv = value_sums();
      const Sums dk_head = head_key_sums();
      add_over_rows<Operand, kGroupRows>(tile, rows, keys, zeros, buffer.weights_across,
                                         k.score_ld_, grad_out_across.row(word), grad_out_across.ld,
                                         dv.data(), dv.ld(), k.value_width_);
      const MutableMatrix dq = grad_query(b, h);
      GradientTile<T> work;
      work.ranges = &tile;
      work.rows = rows;
      work.keys = keys;
      work.gradient = kPacksTwice ? buffer.packed_grad_scores : buffer.grad_scores;
      work.ld = kPacksTwice ? k.packed_ld() : k.score_ld_;
      work.gradient_across = buffer.grad_scores_across;
      work.across_ld = k.score_ld_;
      work.query = query_across.row(word);
      work.query_ld = query_across.ld;
      work.grad_query = dq.data + i0 * dq.ld;
      work.grad_query_ld = dq.ld;
      work.grad_key = dk_head.data();
      work.grad_key_ld = dk_head.ld();
      work.zeros = zeros;
      double* const sums = Gradient::kHasWeight ? weight_sums(b, h) : nullptr;
      gradient.accumulate(work, first, buffer.bounds, sums);
      if (Gradient::kHasWeight) sums[k.query_width_] += total;
    }

    // Scores, dP, weights and gradients of the tile, packed if the operand asks for it. Returns sum
    // G.
    double run_scores(Gradient& gradient, std::int64_t b, std::int64_t h, std::int64_t i0,
                      std::int64_t rows, std::int64_t first, std::int64_t keys, Zeros zeros) {
      const AttentionProblem& p = k.p_;
      const TileRanges<T>& tile = *buffer.tile;
      const Matrix grad_out = k.grad_out_along(copies(), b, h);
      const std::int64_t key_size = Gradient::Score::key_size(p.head_dim);
      const std::int64_t value_size = Operand::words(p.value_dim);
      for (std::int64_t u = 0; u < keys; u += kPanel<T>) {
        for (std::int64_t r = 0, g = 0; r < rows; r += kGroupRows, ++g) {
          if (!tile.touches(g, u)) continue;
          const std::int64_t n = smaller<std::int64_t>(kGroupRows, rows - r);
          const std::int64_t at = r * k.score_ld_ + u;
          gradient.scores(r, n, buffer.key_panels + u * key_size, buffer.bounds[u / kPanel<T>],
                          first + u, buffer.weights + at, k.score_ld_);
          multiply_rows<Operand, 2, false, true>(n, grad_out.row(i0 + r), grad_out.ld,
                                                 buffer.value_panels + u * value_size, kPanel<T>,
                                                 value_size, buffer.grad_scores + at, k.score_ld_);
        }
      }
      double total = 0.0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t g = r / kGroupRows;
        if (tile.group_is_empty(g)) continue;
        total += softmax_row(gradient, b, h, i0 + r, r, g, first, zeros);
      }
      add_mask_gradient(b, h, i0, rows, first, keys);
      pack_tile(tile, rows);
      return total;
    }

    // Weights and gradients of the scores as the operands of the products that follow.
    void pack_tile(const TileRanges<T>& tile, std::int64_t rows) const {
      if constexpr (kPacksTwice) {
        constexpr int lanes = kLanes<T>;
        const std::int64_t ld = k.score_ld_;
        for (std::int64_t first = 0, g = 0; first < rows; first += kGroupRows, ++g) {
          if (tile.group_is_empty(g)) continue;
          const std::int64_t begin = tile.group_begin[g] / kPanel<T> * kPanel<T>;
          const std::int64_t end = round_up(tile.group_end[g], kPanel<T>);
          // The rows that are missing in a step of a sum over rows count 0.
          for (std::int64_t r = larger(first, rows); r < first + kGroupRows; ++r) {
            fill_zero(buffer.weights + r * ld + begin, end - begin);
            fill_zero(buffer.grad_scores + r * ld + begin, end - begin);
          }
          const PackedTile<Operand> packed = packed_tile();
          for (int w = 0; w < kGroupRows / Operand::kPack; ++w) {
            const std::int64_t upper = (first + Operand::pair_row(w)) * ld;
            const std::int64_t lower = upper + Operand::kPairDistance * ld;
            for (std::int64_t j = begin; j < end; j += kPanel<T>) {
              if (!tile.touches(g, j)) continue;
              const T* const p = buffer.weights + j;
              const T* const x = buffer.grad_scores + j;
              packed.put(first, w, j, {load(p + upper), load(p + upper + lanes)},
                         {load(p + lower), load(p + lower + lanes)},
                         {load(x + upper), load(x + upper + lanes)},
                         {load(x + lower), load(x + lower + lanes)});
            }
          }
        }
      }
    }
    PackedTile<Operand> packed_tile() const {
      return {buffer.weights_across, buffer.grad_scores_across, k.score_ld_,
              buffer.packed_grad_scores, k.packed_ld()};
    }

    // Scores, dP, weights and gradients of the tile, packed, by plain tiles; false: another way is
    // to be taken.
    bool run_plain_tile(Gradient& gradient, const TileRanges<T>& tile, std::int64_t b,
                        std::int64_t h, std::int64_t i0, std::int64_t rows) {
      if constexpr (Operand::kTransposes) {
        const AttentionProblem& p = k.p_;
        if (alibi.active || p.mask_kind != MaskKind::kNone || p.dropout_p > 0.0) return false;
        const std::int64_t row0 = k.first_row(b, h) + i0;
        for (std::int64_t r = 0; r < rows; ++r) {
          if (k.huge_[row0 + r] != 0) return false;
        }
        const Matrix grad_out = k.grad_out_along(copies(), b, h);
        PlainTile<Gradient> plain(gradient, buffer.plain_tile, packed_tile());
        for (std::int64_t r = 0; r < rows; r += kGroupRows) {
          const std::int64_t n = smaller<std::int64_t>(kGroupRows, rows - r);
          const bool done = plain.run(tile, r / kGroupRows, n,
                                      {grad_out.row(i0 + r), grad_out.ld, buffer.key_panels,
                                       Gradient::Score::key_size(p.head_dim), buffer.value_panels,
                                       Operand::words(p.value_dim)},
                                      k.lse_ + row0 + r, k.delta_ + row0 + r);
          if (!done) return false;
        }
        return true;
      }
      return false;
    }

    // Row r of the tile: scores and dP become f p and G; 0 for keys that the row may not see, in
    // all panels that its group has touched. Returns sum G.
    T softmax_row(const Gradient& gradient, std::int64_t b, std::int64_t h, std::int64_t i,
                  std::int64_t r, std::int64_t g, std::int64_t first, Zeros zeros) {
      const TileRanges<T>& tile = *buffer.tile;
      T* const weights = buffer.weights + r * k.score_ld_;
      T* const grads = buffer.grad_scores + r * k.score_ld_;
      const bool empty = k.lse_[k.first_row(b, h) + i] == -infinity<T>();
      Vec<T> total{};
      for (KeyRange span = tile.span(g, 0); span.begin < span.end; span = tile.span(g, span.end)) {
        const std::int64_t begin = larger(span.begin, smaller(tile.begin[r], span.end));
        const std::int64_t end = empty ? begin : larger(begin, smaller(tile.end[r], span.end));
        if (begin < end) {
          total += softmax_span(gradient, b, h, i, first + begin, end - begin, weights + begin,
                                grads + begin, zeros);
        }
        const std::int64_t panels_begin = span.begin / kPanel<T> * kPanel<T>;
        const std::int64_t panels_end = round_up(span.end, kPanel<T>);
        fill_zero(weights + panels_begin, begin - panels_begin);
        fill_zero(grads + panels_begin, begin - panels_begin);
        fill_zero(weights + end, panels_end - end);
        fill_zero(grads + end, panels_end - end);
      }
      return sum_lanes<T>(total);
    }

    // The n pairs of query i and the keys from `key`: scores w become f p, dP in x becomes G.
    Vec<T> softmax_span(const Gradient& gradient, std::int64_t b, std::int64_t h, std::int64_t i,
                        std::int64_t key, std::int64_t n, T* w, T* x, Zeros zeros) {
      const AttentionProblem& p = k.p_;
      const std::int64_t row = k.first_row(b, h) + i;
      const bool huge = k.huge_[row] != 0;
      const bool changes =
          huge || zeros == Zeros::kSkip || alibi.active || p.mask_kind != MaskKind::kNone;
      if (changes) gradient.scale_products(w, n);
      if (huge) {
        // As exact_statistics has them. Small scores are huge by the mask, which swallows the rest.
        for (std::int64_t j = 0; j < n; ++j) {
          if (w[j] > -kExact && w[j] < kExact) continue;
          w[j] = static_cast<T>(exact_score<T>(p, b, h, i, key + j));
        }
      } else if (zeros == Zeros::kSkip) {
        repair_scores(p, b, h, i, key, n, w);
      }
      if (alibi.active) alibi.add(i, key, n, zeros, w);
      if (p.mask_kind != MaskKind::kNone) {
        prefetch_mask_row(p, b, h, i + k.block_rows_, key, n);
        add_mask_row(p, b, h, i, key, n, zeros, w);
      }
      const bool drops = p.dropout_p > 0.0;
      if (drops) load_dropout_row(p, k.dropout_, b, h, i, key, n, buffer.row);
      const PairSums<T> sums =
          softmax_gradients(gradient.scale(changes), k.lse_[row], k.norm_[row], k.delta_[row],
                            drops ? buffer.row : nullptr, n, w, x);
      // A NaN has the task repeated with care.
      if (p.mask_kind == MaskKind::kNone && sums.has_lowest()) {
        w[0] = x[0] = infinity<T>() - infinity<T>();
      }
      if (k.slope_sums_ != nullptr) slope_sum(b, h) -= alibi.sum_distances(i, key, n, x);
      return sums.gradients;
    }

    typename MaskGradient<T>::Task mask_task() const {
      return {batch_set, head_set, group, members(batch_set, k.batch_sets_, k.p_.batch).begin,
              members(head_set, k.head_sets_, k.p_.kv_heads).begin * k.p_.group_size()};
    }
    // Before pack_tile, which takes the place of the gradients.
    void add_mask_gradient(std::int64_t b, std::int64_t h, std::int64_t i0, std::int64_t rows,
                           std::int64_t first, std::int64_t keys) const {
      k.mask_.template add<kGroupRows>(mask_task(), *buffer.tile, b, h, i0, rows, first, keys,
                                       buffer.grad_scores, k.score_ld_);
    }
  };

  void reduce_grad_query(std::int64_t pair, std::int64_t begin, std::int64_t end,
                         int thread) const {
    T* const sum = buffers(thread).factors;
    const std::int64_t b = pair / p_.heads;
    const std::int64_t h = pair % p_.heads;
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t d = 0; d < query_width_; d += kLanes<T>) {
        Vec<T> total{};
        for (std::int64_t group = 0; group < groups_; ++group) {
          const MutableMatrix part = grad_query_matrix(b, h, group);
          total += load(part.data + i * part.ld + d);
        }
        store(sum + d, total);
      }
      const View& view = call_.grad_query;
      store_row(p_.dtype, view.data, b * view.stride[0] + h * view.stride[1] + i * view.stride[2],
                view.stride[3], token_dim_, sum);
    }
  }

  void reduce_grad_weight() const {
    for (std::int64_t d = 0; d < token_dim_; ++d) {
      reduce_per_head<T>(p_, weight_sums_ + d, groups_, weight_size(), 1.0, p_.weight_size,
                         p_.dtype, call_.grad_weight, d, token_dim_);
    }
  }
  void reduce_grad_slopes() const {
    reduce_per_head<T>(p_, slope_sums_, groups_, 1, 1.0, p_.slopes_size, p_.slopes_dtype,
                       call_.grad_slopes, 0, 1);
  }

  const AttentionBackward& call_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  ContextMember<Gradient> context_;
  Dropout dropout_;

  std::int64_t token_dim_ = 0;  // elements of a query
  std::int64_t query_width_ = 0, value_width_ = 0, key_sums_ld_ = 0;
  std::int64_t feature_width_ = 0;  // of a row of what queries are multiplied by
  std::int64_t query_rows_ = 0;     // that a head has in query_along: features are by groups
  std::int64_t query_words_ = 0, value_words_ = 0, row_words_ = 0;
  std::int64_t block_keys_ = 0, block_rows_ = 0, blocks_ = 0, score_ld_ = 0;
  std::int64_t batch_sets_ = 0, head_sets_ = 0, groups_ = 1;
  bool copy_query_ = false, copy_grad_out_ = false, grad_query_in_place_ = false;
  bool own_copies_ = true;    // of a key head, in the thread's buffers
  bool whole_heads_ = false;  // a thread runs all groups of a key head, one after the other
  mutable Failure<Operand> failure_;

  MaskGradient<T> mask_;

  T* delta_ = nullptr;             // [b][h][i]: sum dO O - grad_lse
  T* lse_ = nullptr;               // [b][h][i] in units of log2
  T* norm_ = nullptr;              // [b][h][i]: 1, or see exact_statistics
  char* huge_ = nullptr;           // [b][h][i]: the scores of the row are huge
  Copies copies_;                  // unless own_copies_
  T* grad_query_ = nullptr;        // [group][b][h][i][query_width_], if tasks share rows
  double* weight_sums_ = nullptr;  // [b][h][group][weight_size()]
  double* slope_sums_ = nullptr;   // [b][h][group]; null: not wanted
  char* base_ = nullptr;
  std::int64_t threads_ = 0, thread_bytes_ = 0;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
