#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/few_queries.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/plain_band.h"
#include "kernels/cpu/score.h"
#include "kernels/cpu/tile.h"

// Forward, one pass over the keys, memory O(L).
//
// A task owns a block of up to 64 queries of one head (128 where these are all, or by operands of
// several parts), or the few queries of all heads that read one key head (few_queries.h), and a
// share of the keys, where there are few tasks. It walks over blocks of keys: scores of the block
// by the score's tile (panels of packed keys outside, groups of query rows inside: a panel stays in
// L1, the scores in L2; or, by kBandRows, a register tile's rows at a time), ALiBi, mask, softmax,
// product with the values by the same register tile. Panels and inner loops are clipped to the keys
// that a group of rows may see; panels that the mask hides from a group are left out (TileRanges).
// Tiles of AMX mostly go another way through a block, plain_band.h.
//
// Of scores without ALiBi, weights are relative to the row's maximum in the first block of which it
// sees a key; no maximum is looked for after it, and a mask is added on the way to the
// weights (first_references_, has_references). If the sum of a row shows that later scores rose far
// above that, the block of rows is computed again by running maxima, as all others are from the
// start.
//
// Keys are read where they are (few_queries.h) or packed (Packing): by the task, if few read them;
// by each thread for its tasks, if these are many, since what another core has written comes
// slowly; else once for all. Where heads can be dealt out evenly a thread attends all of a head
// (whole_heads_). Tasks that share a row block merge in a fixed order, so the result does not
// depend on threads.
//
// Bound: FMA (dot product), FMA and division (additive); memory bandwidth with one query.
//
// If a result is still not finite the block is computed again carefully: scores that overflowed
// anew in double, and values behind a weight of 0 are skipped, since 0 * NaN is not 0. Operands of
// several parts have no such pass: the kernel gives up (Failure in operand.h).
// Length: one class, whose steps share the tile and its buffers.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename ScoreT>
class ForwardKernel {
 public:
  using Score = ScoreT;
  using Operand = typename Score::Operand;
  using T = typename Operand::Scalar;
  static constexpr int kGroupRows = Score::kGroupRows;
  static constexpr bool kHasPlainBands = Operand::kTransposes;  // by tiles
  // Others are not known to be bounded.
  static constexpr bool kKeepsReferences =
      !kHasPlainBands &&
      (std::is_same_v<Score, DotScore<Operand>> || std::is_same_v<Score, AdditiveScore<Operand>>);
  static constexpr bool kWeightsApart = Operand::kParts > 1;  // weights, not in place of the scores
  static_assert(Operand::kBlockKeys <= kMaskKeys);

  using Context = ContextOf<Score>;
  ForwardKernel(const AttentionForward& call, const Parallel& parallel, const Context& context = {})
      : call_(call), p_(call.problem), parallel_(parallel), context_(context) {}

  // False: a failure (operand.h).
  bool run() {
    if (p_.batch * p_.heads == 0 || p_.query_length == 0) return true;
    plan();
    if (p_.dropout_p > 0.0) dropout_ = Dropout::make(p_.dropout_p, p_.philox_state);

    Carver size;
    carve(size);
    const Scratch scratch(size.used());
    Carver carver(scratch.data());
    carve(carver);

    for (int thread = 0; packing_ == Packing::kByThread && thread < workers(); ++thread) {
      *buffers(thread).packed = {};
    }
    if (whole_heads_) {
      run_whole_heads();
      return !failure_.raised();
    }
    const std::int64_t units = p_.batch * p_.heads / block_heads_;
    for (first_unit_ = 0; first_unit_ < units; first_unit_ += units_at_once_) {
      run_units(smaller(units_at_once_, units - first_unit_));
      if (failure_.raised()) return false;
    }
    if (splits_ > 1) {
      const std::int64_t rows = p_.batch * p_.heads * p_.query_length;
      const std::int64_t chunk = larger<std::int64_t>(kMergedElements / (splits_ * width_ + 1), 1);
      parallel_.run((rows + chunk - 1) / chunk, [&](std::int64_t t, int thread) {
        for (std::int64_t row = t * chunk; row < smaller((t + 1) * chunk, rows); ++row) {
          merge(row, thread);
        }
      });
    }
    return true;
  }

 private:
  // Who packs keys and values, and for whom: a task for itself, block by block; a thread for its
  // tasks, a head at a time; tasks of their own for all.
  enum class Packing : std::uint8_t { kInPlace, kByTask, kByThread, kForAll };

  void run_whole_heads() {
    parallel_.run(p_.batch * p_.kv_heads, [&](std::int64_t t, int thread) {
      const typename Operand::Session session;
      const std::int64_t per_head = p_.group_size() * blocks_;
      for (std::int64_t n = t * per_head; n < (t + 1) * per_head; ++n) {
        const std::int64_t head = n / blocks_;
        Task task{*this, thread, head / p_.heads, head % p_.heads, n % blocks_ * block_rows_, 0};
        task.run();
      }
    });
  }
  // `units` of heads from first_unit_ on.
  void run_units(std::int64_t units) {
    if (packing_ == Packing::kForAll) {
      const std::int64_t heads = kHasContext<Score> ? units : all_packed_heads();
      const std::int64_t chunks = (p_.key_length + block_keys_ - 1) / block_keys_;
      parallel_.run(heads * chunks, [&](std::int64_t t, int thread) {
        pack_for_all(first_unit_ + t / chunks, (t % chunks) * block_keys_, thread);
      });
    }
    const bool causal = p_.window_right >= 0;
    const std::int64_t together =
        causal && packing_ != Packing::kByThread ? larger<std::int64_t>(parallel_.threads, 1) : 1;
    parallel_.run(units * blocks_ * splits_, [&](std::int64_t t, int thread) {
      const typename Operand::Session session;
      const std::int64_t split = t % splits_;
      const std::int64_t rest = t / splits_;
      // A thread's next task is mostly of the same head, whose keys and values are in its cache.
      // Causal: the last rows have the most keys, so they go first, of as many heads at a time as
      // there are threads.
      const std::int64_t first = rest / (together * blocks_) * together;
      const std::int64_t count = smaller(together, units - first);
      const std::int64_t place = rest - first * blocks_;
      const std::int64_t block = causal ? blocks_ - 1 - place / count : place;
      const std::int64_t head = (first_unit_ + first + place % count) * block_heads_;
      Task task{*this, thread, head / p_.heads, head % p_.heads, block * block_rows_, split};
      task.run();
    });
  }

  // No result depends on the number of threads: it decides who packs keys, and how many at a time.
  void plan() {
    width_ = padded<T>(p_.value_dim);
    const std::int64_t keys = larger<std::int64_t>(p_.key_length, 1);
    std::int64_t widest = larger<std::int64_t>(larger(p_.head_dim, width_), 1);
    if constexpr (kHasContext<Score>) {
      widest = larger<std::int64_t>(larger(context_.head_dim(), width_), 1);
    }
    // Scores of a block and its packed keys stay within a part of L2. Additive ones of wide heads
    // stay in L1 with the values that they weight: they take so long that more blocks cost nothing.
    constexpr bool is_dot =
        std::is_same_v<Score, DotScore<Operand>> || Score::kInPlace || kHasContext<Score>;
    const std::int64_t most =
        is_dot || widest <= 32 ? Operand::kBlockKeys : Operand::kBlockKeys / 2;
    block_keys_ = smaller(most, larger<std::int64_t>(most * 128 / widest, 1));
    block_keys_ = round_up(smaller(block_keys_, keys), kPanel<T>);
    score_ld_ = block_keys_ + kLanes<T>;
    if (Score::kInPlace) block_heads_ = p_.group_size();
    const std::int64_t units = p_.batch * p_.heads / block_heads_;
    const bool many_rows = units * p_.query_length >= kWantedTasks * Operand::kForwardRows;
    block_rows_ = smaller<std::int64_t>(p_.query_length, many_rows ? Operand::kForwardRows : 64);
    if (p_.query_length <= kMostRows && units >= kManyHeads) block_rows_ = p_.query_length;
    blocks_ = (p_.query_length + block_rows_ - 1) / block_rows_;
    block_rows_ = round_up((p_.query_length + blocks_ - 1) / blocks_, Operand::kTileRows);
    block_rows_ = smaller<std::int64_t>(block_rows_, kMostRows);
    blocks_ = (p_.query_length + block_rows_ - 1) / block_rows_;
    if (Score::kInPlace) block_rows_ = p_.query_length;
    // Few tasks and many keys: a task takes a share of at least 512 keys.
    const std::int64_t tasks = units * blocks_;
    splits_ = smaller(keys / 512, (kWantedTasks + tasks - 1) / tasks);
    splits_ = tasks >= kWantedTasks ? 1 : larger<std::int64_t>(splits_, 1);
    split_keys_ = round_up((keys + splits_ - 1) / splits_, block_keys_);
    splits_ = (keys + split_keys_ - 1) / split_keys_;
    // Two readers of a head's keys, be they blocks of rows or heads, and few tasks altogether pack
    // them again in less time than they would wait for them.
    const bool many_readers =
        blocks_ * p_.heads > 2 * packed_heads() && tasks * splits_ > kFewTasks;
    packing_ = Score::kInPlace                     ? Packing::kInPlace
               : many_readers && p_.key_length > 0 ? Packing::kForAll
                                                   : Packing::kByTask;
    if (packing_ == Packing::kForAll && splits_ == 1) {
      whole_heads_ = parallel_.deals_evenly(p_.batch * p_.kv_heads, !p_.samples_differ());
      // Packing for dot products is quick, and what a thread packed itself is in its cache.
      const std::int64_t readers = blocks_ * p_.group_size();
      const std::int64_t words =
          padded_keys() * key_size() + Operand::words(padded_keys()) * width_;
      const bool quick = std::is_same_v<Score, DotScore<Operand>> &&
                         readers >= 4 * larger<std::int64_t>(parallel_.threads, 1) &&
                         words * std::int64_t{sizeof(T)} <= kCachedBytes;
      if (whole_heads_ || quick) packing_ = Packing::kByThread;
    }
    // What is merged must be relative to maxima.
    first_references_ = (kHasPlainBands || kKeepsReferences) && splits_ == 1 &&
                        p_.slopes == nullptr &&
                        (p_.mask_kind == MaskKind::kNone || p_.mask.stride[3] == 1);
    units_at_once_ = units;
    if (kHasContext<Score> && packing_ == Packing::kForAll) {
      // Packed keys are many times as large as keys. No result depends on how many heads' there are
      // at a time, but there must be work for all threads.
      const std::int64_t bytes = padded_keys() * key_size() * std::int64_t{sizeof(T)};
      const std::int64_t wanted = 4 * larger<std::int64_t>(parallel_.threads, 1);
      units_at_once_ = larger(kPackedBytes / bytes, wanted / (blocks_ * splits_));
      units_at_once_ = larger<std::int64_t>(smaller(units_at_once_, units), 1);
    }
    weight_ld_ = kWeightsApart ? Operand::words(block_keys_) + kLanes<T> : score_ld_;
    copy_values_ = !Score::kInPlace && Operand::in_place(value_rows(0, 0)) == nullptr;
  }

  void carve(Carver& carver) {
    if (packing_ == Packing::kForAll) {
      const std::int64_t heads = kHasContext<Score> ? units_at_once_ : all_packed_heads();
      panels_ = carver.take<T>(heads * padded_keys() * key_size());
      bounds_ = carver.take<T>(heads * (padded_keys() / kPanel<T>));
      const std::int64_t value_heads = copy_values_ ? p_.batch * p_.kv_heads : 0;
      values_ = carver.take<T>(value_heads * Operand::words(padded_keys()) * width_);
    }
    if (splits_ > 1) {
      const std::int64_t rows = splits_ * p_.batch * p_.heads * p_.query_length;
      partial_sum_ = carver.take<T>(rows * width_);
      partial_max_ = carver.take<T>(rows);
      partial_total_ = carver.take<T>(rows);
    }
    threads_ = carver.used();
    base_ = carver.base();
    Buffers one(*this, Carver(nullptr));
    thread_bytes_ = one.bytes;
    carver.take<char>(thread_bytes_ * workers());
  }
  // How many threads can be at work at once.
  std::int64_t workers() const {
    const std::int64_t threads = larger(parallel_.threads, 1);
    if (whole_heads_) return smaller<std::int64_t>(threads, p_.batch * p_.kv_heads);
    const bool one_phase = packing_ != Packing::kForAll && splits_ == 1;
    return one_phase ? smaller<std::int64_t>(threads, p_.batch * p_.heads * blocks_) : threads;
  }

  // Of all samples: what a thread has packed, if it does so by heads.
  struct PackedHeads {
    std::int64_t of_keys = -1, of_values = -1;
  };

  // What one thread works in.
  struct Buffers {
    Buffers(const ForwardKernel& k, Carver carver) {
      const std::int64_t rows = k.block_rows_ * k.block_heads_;
      constants = carver.take<T>(Score::constants_size(k.p_.head_dim));
      spare = carver.take<T>(Score::spare_size(k.p_.head_dim, rows));
      queries = carver.take<T>(rows * Score::query_size(k.p_.head_dim));
      scores = carver.take<T>(smaller(rows, Operand::kBandRows) * k.score_ld_);
      if constexpr (kHasPlainBands) {
        band_scores = carver.take<T>(PlainBand<Score>::scores_size());
        weights = carver.take<T>(larger(PlainBand<Score>::weights_size(k.block_keys_),
                                        kWeightsApart ? Operand::kTileRows * k.weight_ld_ : 0));
      }
      sums = carver.take<T>(rows * k.width_);
      maximum = carver.take<T>(round_up(rows, kLanes<T>));
      total = carver.take<T>(rows * kLanes<T>);
      row = carver.take<T>(k.score_ld_);
      const std::int64_t keys = k.packing_ == Packing::kByTask     ? k.block_keys_
                                : k.packing_ == Packing::kByThread ? k.padded_keys()
                                                                   : 0;
      panels = carver.take<T>(keys * k.key_size());
      bounds = carver.take<T>(keys / kPanel<T>);
      values = carver.take<T>(k.copy_values_ ? Operand::words(keys) * k.width_ : 0);
      packed = carver.take<PackedHeads>(1);
      ranges = carver.take<RowRanges>(1);
      tile = carver.take<TileRanges<T>>(1);
      bytes = carver.used();
    }
    T *constants, *spare, *queries, *scores, *sums, *maximum, *total, *row;
    T *band_scores = nullptr, *weights = nullptr;
    T *panels, *bounds, *values;
    PackedHeads* packed;
    RowRanges* ranges;
    TileRanges<T>* tile;
    std::int64_t bytes;
  };
  Buffers buffers(int thread) const {
    return Buffers(*this, Carver(base_ + threads_ + thread * thread_bytes_));
  }

  std::int64_t packed_heads() const { return Score::kKeysPerQueryHead ? p_.heads : p_.kv_heads; }
  std::int64_t all_packed_heads() const { return p_.batch * packed_heads(); }
  Rows key_rows(std::int64_t b, std::int64_t hk) const {
    return rows_of(p_.dtype, p_.key, b, hk, p_.head_dim);
  }
  Rows value_rows(std::int64_t b, std::int64_t hk) const {
    return rows_of(p_.dtype, p_.value, b, hk, p_.value_dim);
  }
  std::int64_t key_size() const { return Score::key_size(p_.head_dim); }
  std::int64_t padded_keys() const { return round_up(p_.key_length, kPanel<T>); }

  // Where keys of the packed heads are, and their values.
  struct PackedKeys {
    T *panels, *bounds, *values;
  };
  // Those from key j of packed head `head`, over all samples, and of its key head.
  PackedKeys packed_for_all(std::int64_t head, std::int64_t j) const {
    const std::int64_t row = (kHasContext<Score> ? head - first_unit_ : head) * padded_keys() + j;
    const std::int64_t value_row = kv_head_of(head) * padded_keys() + j;
    return {panels_ + row * key_size(), bounds_ + row / kPanel<T>,
            values_ + Operand::words(value_row) * width_};
  }
  PackedKeys packed_by_thread(const Buffers& buffer, std::int64_t j) const {
    return {buffer.panels + j * key_size(), buffer.bounds + j / kPanel<T>,
            buffer.values + Operand::words(j) * width_};
  }
  std::int64_t kv_head_of(std::int64_t packed_head) const {
    return packed_head / (packed_heads() / p_.kv_heads);
  }

  void pack_for_all(std::int64_t head, std::int64_t j, int thread) const {
    const PackedKeys to = packed_for_all(head, j);
    pack_keys(buffers(thread), head, j, to);
    if (head % (packed_heads() / p_.kv_heads) == 0) pack_values(kv_head_of(head), j, to);
  }
  // All of a head, unless they are there.
  void pack_by_thread(const Buffers& buffer, std::int64_t head) const {
    const bool has_keys = buffer.packed->of_keys == head;
    const bool has_values = buffer.packed->of_values == kv_head_of(head);
    *buffer.packed = {head, kv_head_of(head)};
    for (std::int64_t j = 0; j < p_.key_length; j += block_keys_) {
      const PackedKeys to = packed_by_thread(buffer, j);
      if (!has_keys) pack_keys(buffer, head, j, to);
      if (!has_values) pack_values(kv_head_of(head), j, to);
    }
  }
  // A block of them, from key j.
  void pack_keys(const Buffers& buffer, std::int64_t head, std::int64_t j,
                 const PackedKeys& to) const {
    if constexpr (!Score::kInPlace) {
      const std::int64_t b = head / packed_heads();
      Score score = make_policy<Score>(p_, context_, buffer.constants, buffer.spare);
      score.set_head(b, head % packed_heads());
      score.pack_keys(key_rows(b, kv_head_of(head) % p_.kv_heads), j,
                      smaller(block_keys_, p_.key_length - j), to.panels, to.bounds);
    }
  }
  void pack_values(std::int64_t kv_head, std::int64_t j, const PackedKeys& to) const {
    if (!copy_values_) return;
    const Rows rows = value_rows(kv_head / p_.kv_heads, kv_head % p_.kv_heads);
    const std::int64_t n = smaller(block_keys_, p_.key_length - j);
    failure_.check(pack_across_rows<Operand>(rows, j, n, to.values));
  }

  // A block of keys, and where the products read it if not in place.
  struct KeyBlock {
    std::int64_t first;
    std::int64_t keys;
    const T* panels = nullptr;
    const T* bounds = nullptr;
    const T* values = nullptr;  // packed across rows
    std::int64_t value_ld = 0;
  };

  struct Task {
    const ForwardKernel& k;
    int thread;
    std::int64_t b, h0, i0, split;  // from query i0 of head h0
    bool used_references = false;
    bool running_maxima = false;  // else a row's reference is its maximum in its first keys

    // Row r of the block: as many queries of each head, head by head.
    std::int64_t queries() const { return smaller(k.block_rows_, k.p_.query_length - i0); }
    std::int64_t head(std::int64_t r) const {
      return k.block_heads_ == 1 ? h0 : h0 + r / queries();
    }
    std::int64_t query(std::int64_t r) const {
      return k.block_heads_ == 1 ? i0 + r : i0 + r % queries();
    }

    // Over all samples.
    std::int64_t packed_head() const {
      const std::int64_t h = Score::kKeysPerQueryHead ? h0 : h0 / k.p_.group_size();
      return b * k.packed_heads() + h;
    }

    void run() {
      if (k.failure_.raised()) return;
      const AttentionProblem& p = k.p_;
      Buffers buffer = k.buffers(thread);
      if (k.packing_ == Packing::kByThread) k.pack_by_thread(buffer, packed_head());
      const std::int64_t rows = k.block_heads_ * queries();
      const KeyRange keys = {split * k.split_keys_,
                             smaller((split + 1) * k.split_keys_, p.key_length)};
      buffer.ranges->compute(p, b, i0, queries(), rows, keys);
      Score score = make_policy<Score>(p, k.context_, buffer.constants, buffer.spare);
      score.set_head(b, h0);
      for (std::int64_t r = 0; r < rows; r += queries()) {
        score.load_queries(b, head(r), i0, queries(),
                           buffer.queries + r * Score::query_size(p.head_dim));
      }
      running_maxima = !k.first_references_;
      attend(buffer, score, rows, Zeros::kMultiply);
      if (finish(buffer, score, rows, Zeros::kMultiply)) return;
      if (!running_maxima) {  // scores rose too far above their references, or are not finite
        running_maxima = true;
        if (used_references) {
          attend(buffer, score, rows, Zeros::kMultiply);
          if (finish(buffer, score, rows, Zeros::kMultiply)) return;
        }
      }
      if constexpr (Failure<Operand>::kPossible) {
        k.failure_.raise();
      } else {
        attend(buffer, score, rows, Zeros::kSkip);
        finish(buffer, score, rows, Zeros::kSkip);
      }
    }

    KeyBlock key_block(const Buffers& buffer, const Score& score, std::int64_t first,
                       std::int64_t keys) const {
      const AttentionProblem& p = k.p_;
      const std::int64_t hk = h0 / p.group_size();
      KeyBlock block{first, keys, nullptr, nullptr, nullptr, k.width_};
      const Rows value = k.value_rows(b, hk);
      if (!k.copy_values_) {
        block.value_ld = value.row_stride;
        block.values = Operand::in_place(value) + first * value.row_stride;
      }
      if (k.packing_ != Packing::kByTask) {
        const PackedKeys packed = k.packing_ == Packing::kForAll
                                      ? k.packed_for_all(packed_head(), first)
                                      : k.packed_by_thread(buffer, first);
        block.panels = packed.panels;
        block.bounds = packed.bounds;
        if (k.copy_values_) block.values = packed.values;
      } else {
        score.pack_keys(k.key_rows(b, hk), first, keys, buffer.panels, buffer.bounds);
        block.panels = buffer.panels;
        block.bounds = buffer.bounds;
        if (k.copy_values_) {
          k.failure_.check(pack_across_rows<Operand>(value, first, keys, buffer.values));
          block.values = buffer.values;
        }
      }
      return block;
    }

    // Bands follow each other in the same memory.
    T* score_row(const Buffers& buffer, std::int64_t r) const {
      return buffer.scores + r % Operand::kBandRows * k.score_ld_;
    }

    // Where the weights of a row are, packed.
    T* weight_row(const Buffers& buffer, std::int64_t r) const {
      if constexpr (!kWeightsApart) return score_row(buffer, r);
      return buffer.weights + r % Operand::kBandRows * k.weight_ld_;
    }

    void clear_statistics(Buffers& buffer, std::int64_t rows) const {
      for (std::int64_t r = 0; r < rows; r += kLanes<T>) {
        store(buffer.maximum + r, first_lanes<T>(splat(-infinity<T>()), rows - r, Vec<T>{}));
      }
      fill_zero(buffer.total, rows * kLanes<T>);
    }

    // As attend() by plain bands, if they can.
    bool attend_plainly(Buffers& buffer, Score& score, std::int64_t rows) {
      const AttentionProblem& p = k.p_;
      if (p.dropout_p > 0.0 || score.needs_pass()) return false;
      PlainBand<Score> band(score, k.key_size(), buffer.band_scores, buffer.weights, k.block_keys_);
      const KeyRange all = buffer.ranges->all;
      std::int64_t first = all.begin / kPanel<T> * kPanel<T>;
      for (; first < all.end; first += k.block_keys_) {
        const std::int64_t count = smaller(k.block_keys_, all.end - first);
        TileRanges<T>& tile = *buffer.tile;
        if (!find_ranges(tile, *buffer.ranges, rows, first, count)) continue;
        const KeyBlock block = key_block(buffer, score, first, count);
        if (!score.are_bounded(block.bounds, (count + kPanel<T> - 1) / kPanel<T>)) return false;
        for (std::int64_t r = 0; r < rows; r += kGroupRows) {
          bool added = false;
          with_mask_rows<T>(p, b, head(r), query(r), [&](auto mask) {
            added = band.add({buffer.queries + r * Score::query_size(p.head_dim),
                              smaller<std::int64_t>(rows - r, kGroupRows), buffer.maximum + r,
                              buffer.total + r * kLanes<T>, buffer.sums + r * k.width_, k.width_},
                             {first, block.panels, block.values, block.value_ld}, tile,
                             r / kGroupRows, mask);
          });
          if (!added) return false;
        }
      }
      for (std::int64_t r = 0; r < rows; r += kGroupRows) {
        const std::int64_t n = smaller<std::int64_t>(rows - r, kGroupRows);
        if (!band.has_sums(r / kGroupRows)) fill_zero(buffer.sums + r * k.width_, n * k.width_);
      }
      if (!band.has_low_scores()) return true;
      // A row may still wait for a reference, or have one that low scores are not far below.
      const auto scaled = score.scale(p.mask_kind != MaskKind::kNone);
      IntVec<T> low{};
      for (std::int64_t r = 0; r < rows; r += kLanes<T>) {
        low |= scaled(load(buffer.maximum + r)) < splat(PlainBand<Score>::kLowest + 256);
      }
      return !any_lane<T>(low);
    }

    // Of a block of keys; false: the mask leaves nothing of it.
    bool find_ranges(TileRanges<T>& tile, const RowRanges& ranges, std::int64_t rows,
                     std::int64_t first, std::int64_t keys) const {
      const AttentionProblem& p = k.p_;
      tile.template compute<kGroupRows, Operand::kStep>(ranges, rows, first, keys);
      if (p.mask_kind == MaskKind::kNone) return true;
      return tile.template look_at_mask<kGroupRows>(
          p, rows, [&](std::int64_t r) { return mask_offset(p, b, head(r), query(r), first); });
    }

    // Sums over all keys of the task: buffer.sums, .maximum, .total.
    void attend(Buffers& buffer, Score& score, std::int64_t rows, Zeros zeros) {
      clear_statistics(buffer, rows);
      if constexpr (kHasPlainBands) {
        if (!running_maxima && zeros == Zeros::kMultiply) {
          used_references = true;
          if (attend_plainly(buffer, score, rows)) return;
          running_maxima = true;
          clear_statistics(buffer, rows);
        }
      }
      fill_zero(buffer.sums, rows * k.width_);
      const KeyRange all = buffer.ranges->all;
      // Blocks begin at multiples of a panel, as the shared panels do.
      std::int64_t first = all.begin / kPanel<T> * kPanel<T>;
      for (; first < all.end; first += k.block_keys_) {
        TileRanges<T>& tile = *buffer.tile;
        const std::int64_t keys = smaller(k.block_keys_, all.end - first);
        if (!find_ranges(tile, *buffer.ranges, rows, first, keys)) continue;
        KeyBlock block{first, keys};
        if constexpr (!Score::kInPlace) block = key_block(buffer, score, first, keys);
        if constexpr (Failure<Operand>::kPossible) {
          if (!score.are_bounded(block.bounds, (keys + kPanel<T> - 1) / kPanel<T>)) {
            k.failure_.raise();
          }
          if (k.failure_.raised()) return;
        }
        for (std::int64_t r = 0; r < rows; r += Operand::kBandRows) {
          const std::int64_t end = smaller(r + Operand::kBandRows, rows);
          score_tile(buffer, score, block, r, end);
          if constexpr (kKeepsReferences) {
            if (has_references(buffer, score, block, r, end)) {
              used_references = true;
              with_mask_rows<T>(k.p_, b, head(r), query(r), [&](auto mask) {
                find_weights(buffer, score, block, r, end, zeros, mask);
              });
              add_values(buffer, block, r, end, zeros);
              continue;
            }
            if (used_references && !running_maxima) {
              // Weights above their reference cannot be put relative to another one.
              running_maxima = true;
              return attend(buffer, score, rows, zeros);
            }
          }
          NoMask<T> applied;  // to the scores
          find_maxima(buffer, score, block, r, end, zeros);
          find_weights(buffer, score, block, r, end, zeros, applied);
          add_values(buffer, block, r, end, zeros);
        }
      }
    }

    // Of rows [first_row, end_row), as all that follow; first_row begins a group.
    void score_tile(Buffers& buffer, Score& score, const KeyBlock& block, std::int64_t first_row,
                    std::int64_t end_row) {
      const TileRanges<T>& tile = *buffer.tile;
      for (std::int64_t u = 0; u < block.keys; u += kPanel<T>) {
        for (std::int64_t r = first_row; r < end_row; r += kGroupRows) {
          if (!tile.touches(r / kGroupRows, u)) continue;
          const std::int64_t n = smaller<std::int64_t>(kGroupRows, end_row - r);
          T* const to = score_row(buffer, r) + u;
          if constexpr (Score::kInPlace) {
            score.scores(buffer.queries, r, n, block.first + u, to, k.score_ld_);
          } else {
            score.scores(buffer.queries, r, n, block.panels + u * k.key_size(),
                         block.bounds[u / kPanel<T>], block.first + u, to, k.score_ld_);
          }
        }
      }
    }

    // The largest and, if wanted, the smallest of scores, by lanes. Four chains, since one would
    // wait for its maximum.
    template <bool kSmallest>
    struct Extremes {
      Vec<T> largest[4], smallest[4];

      Extremes() {
        for (int x = 0; x < 4; ++x) largest[x] = splat(-infinity<T>());
        for (int x = 0; x < 4; ++x) smallest[x] = splat(infinity<T>());
      }
      TSA_INLINE void add(int x, Vec<T> score) {
        largest[x] = at_least(score, largest[x]);
        if constexpr (kSmallest) smallest[x] = at_most(score, smallest[x]);
      }
      TSA_INLINE void add_all(const T* s, std::int64_t n) {
        constexpr std::int64_t lanes = kLanes<T>;
        std::int64_t j = 0;
        for (; j + 4 * lanes <= n; j += 4 * lanes) {
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) add(x, load(s + j + x * lanes));
        }
        for (; j + lanes <= n; j += lanes) add(0, load(s + j));
        if (j == n) return;
        const Vec<T> score = load_first(s + j, n - j);
        largest[1] = at_least(first_lanes<T>(score, n - j, largest[1]), largest[1]);
        if constexpr (kSmallest) {
          smallest[1] = at_most(first_lanes<T>(score, n - j, smallest[1]), smallest[1]);
        }
      }
      Vec<T> maximum() const {
        return at_least(at_least(largest[0], largest[1]), at_least(largest[2], largest[3]));
      }
      Vec<T> minimum() const {
        return at_most(at_most(smallest[0], smallest[1]), at_most(smallest[2], smallest[3]));
      }
    };

    // Whether scores are changed between the product and the softmax; else it scales them.
    bool changes_scores(const Score& score, Zeros zeros) const {
      return zeros == Zeros::kSkip || k.p_.slopes != nullptr || k.p_.mask_kind != MaskKind::kNone ||
             score.needs_pass();
    }

    // body(begin, n) for each run of columns that row r sees without a gap.
    template <typename Body>
    static TSA_INLINE void for_each_span(const TileRanges<T>& tile, std::int64_t r,
                                         const Body& body) {
      const std::int64_t g = r / kGroupRows;
      for (KeyRange span = tile.span(g, 0); span.begin < span.end; span = tile.span(g, span.end)) {
        const std::int64_t begin = larger(span.begin, tile.begin[r]);
        const std::int64_t n = smaller(span.end, tile.end[r]) - begin;
        if (n > 0) body(begin, n);
      }
    }

    // Whether the block's scores can become weights as they are, relative to what rows have.
    bool has_references(const Buffers& buffer, const Score& score, const KeyBlock& block,
                        std::int64_t first_row, std::int64_t end_row) const {
      const bool masked = k.p_.mask_kind != MaskKind::kNone;
      const std::int64_t panels = (block.keys + kPanel<T> - 1) / kPanel<T>;
      if (running_maxima || score.needs_pass() || !score.are_bounded(block.bounds, panels)) {
        return false;
      }
      // A row may be waiting for its first key, or be hidden by the smallest number so far; beside
      // a bias of this size a score has no digits left.
      const Vec<T> most = splat(masked ? kMostShift<T> : infinity<T>());
      IntVec<T> missing{};
      for (std::int64_t r = first_row; r < end_row; r += kLanes<T>) {
        const Vec<T> maximum = load(buffer.maximum + r);
        missing |= (maximum <= -most) | (masked ? maximum >= most : IntVec<T>{});
      }
      return !any_lane<T>(missing);
    }

    // Scores are finished, and the running maxima of their rows take them in.
    void find_maxima(Buffers& buffer, const Score& score, const KeyBlock& block,
                     std::int64_t first_row, std::int64_t end_row, Zeros zeros) {
      // Without a mask -inf is a score that overflowed, not a hidden key.
      const std::int64_t panels = (block.keys + kPanel<T> - 1) / kPanel<T>;
      const bool repairs = k.p_.mask_kind == MaskKind::kNone &&
                           (k.p_.slopes != nullptr || !score.are_bounded(block.bounds, panels));
      const TileRanges<T>& tile = *buffer.tile;
      const bool changes = changes_scores(score, zeros);
      for (std::int64_t r = first_row; r < end_row; r += kLanes<T>) {
        // Lane by lane for as many rows as there are lanes, then for all at once.
        Vec<T> largest[kLanes<T>];
        for (std::int64_t x = 0; x < kLanes<T>; ++x) {
          if (r + x >= end_row) {
            largest[x] = splat(-infinity<T>());
          } else if (!changes && !repairs) {  // no mask, so no gaps
            Extremes<false> extremes;
            extremes.add_all(score_row(buffer, r + x) + tile.begin[r + x],
                             larger<std::int64_t>(tile.end[r + x] - tile.begin[r + x], 0));
            largest[x] = extremes.maximum();
          } else if (repairs) {
            largest[x] = row_maximum<true>(buffer, score, block, r + x, zeros);
          } else {
            largest[x] = row_maximum<false>(buffer, score, block, r + x, zeros);
          }
        }
        raise_maxima(buffer, r, smaller<std::int64_t>(kLanes<T>, end_row - r),
                     maxima_of_lanes<T>(largest), score.scale(changes));
      }
    }

    // Scores of row r are finished; the lanes of their maximum. With kRepairs the row's sum becomes
    // infinite, which has the block computed again, if one of them is -inf.
    template <bool kRepairs>
    [[gnu::noinline]] Vec<T> row_maximum(Buffers& buffer, const Score& score, const KeyBlock& block,
                                         std::int64_t r, Zeros zeros) const {
      T* const row = score_row(buffer, r);
      const bool changes = changes_scores(score, zeros);
      Extremes<kRepairs> extremes;
      for_each_span(*buffer.tile, r, [&](std::int64_t begin, std::int64_t n) {
        if (changes) change_scores(score, r, block.first + begin, n, zeros, row + begin);
        extremes.add_all(row + begin, n);
      });
      if constexpr (kRepairs) {
        if (any_lane<T>(extremes.minimum() == splat(-infinity<T>()))) {
          store(buffer.total + r * kLanes<T>, splat(infinity<T>()));
        }
      }
      return extremes.maximum();
    }

    // Scores of row r and n keys from j.
    [[gnu::noinline]] void change_scores(const Score& score, std::int64_t r, std::int64_t j,
                                         std::int64_t n, Zeros zeros, T* s) const {
      const AttentionProblem& p = k.p_;
      const std::int64_t h = head(r);
      const std::int64_t i = query(r);
      score.scale_products(s, n);
      if (zeros == Zeros::kSkip) repair_scores(p, b, h, i, j, n, s);
      const Alibi<T> alibi(p, b, h);
      if (alibi.active) alibi.add(i, j, n, zeros, s);
      if (p.mask_kind != MaskKind::kNone) {
        prefetch_mask_row(p, b, h, i, j + k.block_keys_,
                          smaller(n, p.key_length - j - k.block_keys_));
        add_mask_row(p, b, h, i, j, n, zeros, s);
      }
    }

    // Scores, which `mask` is applied to on the way, become weights relative to their row's
    // maximum.
    template <typename Mask>
    void find_weights(Buffers& buffer, const Score& score, const KeyBlock& block,
                      std::int64_t first_row, std::int64_t end_row, Zeros zeros, Mask& mask) {
      const TileRanges<T>& tile = *buffer.tile;
      const bool changes = changes_scores(score, zeros);
      const auto scaled = score.scale(changes);
      for (std::int64_t r = first_row; r < end_row; ++r) {
        const std::int64_t g = r / kGroupRows;
        const T maximum = buffer.maximum[r];
        // While every key is masked out the maximum is -inf: 2^(-inf - 0) is the 0 that is wanted.
        const Vec<T> shift = scaled(splat(maximum == -infinity<T>() ? T(0) : maximum));
        const bool subtracts = changes || score.can_subtract(shift);
        const std::int64_t begin = tile.begin[r];
        const std::int64_t end = smaller(tile.end[r], tile.group_end[g]);
        if (tile.one_span[g] && begin == tile.group_begin[g] && begin < end &&
            packs_at_once(begin) && subtracts) {
          const Vec<T> sum = packed_weights(score_row(buffer, r), weight_row(buffer, r), begin, end,
                                            tile.group_end[g], scaled, shift,
                                            mask_of(mask, block, r - first_row, begin, end));
          T* const total = buffer.total + r * kLanes<T>;
          store(total, load(total) + sum);
        } else {
          if (!subtracts) {
            for_each_span(tile, r, [&](std::int64_t from, std::int64_t n) {
              score.scale_products(score_row(buffer, r) + from, n);
            });
          }
          find_weights_of_row(buffer, block, r, r - first_row, score.scale(changes || !subtracts),
                              shift, mask);
        }
      }
    }

    // 0 for keys that the row may not see but its group does.
    template <typename Scale, typename Mask>
    [[gnu::noinline]] void find_weights_of_row(Buffers& buffer, const KeyBlock& block,
                                               std::int64_t r, std::int64_t mask_row,
                                               const Scale& scaled, Vec<T> shift, Mask& mask) {
      const AttentionProblem& p = k.p_;
      const TileRanges<T>& tile = *buffer.tile;
      const std::int64_t g = r / kGroupRows;
      T* const row = score_row(buffer, r);
      T* const packed = weight_row(buffer, r);
      T* const total = buffer.total + r * kLanes<T>;
      Vec<T> sum = load(total);
      for (KeyRange span = tile.span(g, 0); span.begin < span.end; span = tile.span(g, span.end)) {
        const std::int64_t begin = larger(span.begin, smaller(tile.begin[r], span.end));
        const std::int64_t end = larger(begin, smaller(tile.end[r], span.end));
        const auto masked = mask_of(mask, block, mask_row, begin, end);
        if (begin == span.begin && packs_at_once(begin)) {
          sum += packed_weights(row, packed, begin, end, span.end, scaled, shift, masked);
          continue;
        }
        sum += exponentials<false>(row, row, begin, end, scaled, shift, masked);
        if (p.dropout_p > 0.0) {
          const std::int64_t n = end - begin;
          load_dropout_row(p, k.dropout_, b, head(r), query(r), block.first + begin, n, buffer.row);
          for (std::int64_t x = 0; x < n; ++x) row[begin + x] *= buffer.row[x];
        }
        fill_zero(row + span.begin, begin - span.begin);
        fill_zero(row + end, span.end - end);
        pack_weights(row, span.begin, span.end, packed);
      }
      store(total, sum);
    }

    // The running maxima of n rows from r, which what has been added up so far is put relative to.
    template <typename Scale>
    void raise_maxima(Buffers& buffer, std::int64_t r, std::int64_t n, Vec<T> largest,
                      const Scale& scaled) const {
      const Vec<T> before = load(buffer.maximum + r);
      const Vec<T> raised = at_least(largest, before);
      store(buffer.maximum + r, raised);
      const IntVec<T> changed = (raised > before) & (before != splat(-infinity<T>()));
      if (!any_lane<T>(changed)) return;
      // Weights are relative to the maximum as it is rounded when it is scaled.
      const Vec<T> factors = exp2<T>(scaled(before) - scaled(raised));
      T factor[kLanes<T>];
      store(factor, changed ? factors : splat(T(1)));
      for (std::int64_t x = 0; x < n; ++x) {
        if (factor[x] == T(1)) continue;
        const auto scale = [&](T* to) { store(to, load(to) * splat(factor[x])); };
        T* const sums = buffer.sums + (r + x) * k.width_;
        scale(buffer.total + (r + x) * kLanes<T>);
        for (std::int64_t d = 0; d < k.width_; d += kLanes<T>) scale(sums + d);
      }
    }

    // Weights are the left operand of the product with the values, in place, where words of several
    // take the place of the first of them; or, if they have several parts, apart.
    static constexpr std::int64_t kPackedKeys = Operand::kPack * kLanes<T>;
    static constexpr std::int64_t kPackedWords = Operand::kParts * kLanes<T>;

    bool packs_at_once(std::int64_t begin) const {
      return k.p_.dropout_p == 0.0 && begin % kPackedKeys == 0;
    }
    static void pack_weights(const T* row, std::int64_t begin, std::int64_t end, T* to) {
      if constexpr (Operand::kPack > 1) {
        for (std::int64_t j = begin / kPackedKeys * kPackedKeys; j < end; j += kPackedKeys) {
          Operand::put_along(load(row + j), load(row + j + kLanes<T>), to + Operand::words(j));
        }
      }
    }

    // Weights of keys [begin, end) of a row, packed, zeros behind them to span_end; the lanes of
    // their sum.
    template <typename Scale, typename MaskRow>
    static TSA_INLINE Vec<T> packed_weights(const T* row, T* to, std::int64_t begin,
                                            std::int64_t end, std::int64_t span_end,
                                            const Scale& scaled, Vec<T> shift,
                                            const MaskRow& mask) {
      const Vec<T> sum = exponentials<true>(row, to, begin, end, scaled, shift, mask);
      const std::int64_t packed =
          Operand::kPack > 1 ? smaller(round_up(end, kPackedKeys), span_end) : end;
      if (packed < span_end) {
        fill_zero(to + Operand::words(packed), Operand::words(span_end) - Operand::words(packed));
      }
      return sum;
    }

    // The mask's row of keys [begin, end) of the block.
    template <typename Mask>
    static TSA_INLINE auto mask_of(Mask& mask, const KeyBlock& block, std::int64_t mask_row,
                                   std::int64_t begin, std::int64_t end) {
      const std::int64_t n = round_up(larger<std::int64_t>(end - begin, 0), kLanes<T>);
      return mask.row(mask_row, block.first + begin, static_cast<int>(n));
    }

    // 2^(score - maximum) of keys [begin, end), to the same keys of a row, or packed; the lanes of
    // their sum.
    template <bool kPacks, typename Scale, typename MaskRow>
    static Vec<T> exponentials(const T* row, T* to, std::int64_t begin, std::int64_t end,
                               const Scale& scaled, Vec<T> shift, const MaskRow& mask) {
      constexpr std::int64_t lanes = kLanes<T>;
      const auto weights = [&](std::int64_t j) __attribute__((always_inline)) {
        return Operand::template exp2_of_score<T>(
            mask.relative(j - begin, load(row + j), scaled, shift));
      };
      T* words = to + Operand::words(begin);
      const auto put = [&](std::int64_t j, Vec<T> p0, Vec<T> p1) __attribute__((always_inline)) {
        if constexpr (kPacks && Operand::kPack > 1) {
          Operand::put_along(p0, p1, words);
          words += kPackedWords;
        } else {
          store_up_to(to + j, p0, end - j);
          if (end - j > lanes) store_up_to(to + j + lanes, p1, end - j - lanes);
        }
      };
      Vec<T> sum0{}, sum1{};
      std::int64_t j = begin;
      for (; j + 2 * lanes <= end; j += 2 * lanes) {
        const Vec<T> p0 = weights(j);
        const Vec<T> p1 = weights(j + lanes);
        sum0 += p0;
        sum1 += p1;
        put(j, p0, p1);
      }
      if (j < end) {  // a row has room for whole vectors
        const Vec<T> p0 = first_lanes<T>(weights(j), end - j, Vec<T>{});
        const Vec<T> p1 = end - j > lanes
                              ? first_lanes<T>(weights(j + lanes), end - j - lanes, Vec<T>{})
                              : Vec<T>{};
        sum0 += p0;
        sum1 += p1;
        put(j, p0, p1);
      }
      return sum0 + sum1;
    }

    void add_values(Buffers& buffer, const KeyBlock& block, std::int64_t first_row,
                    std::int64_t end_row, Zeros zeros) {
      const TileRanges<T>& tile = *buffer.tile;
      if (Score::kInPlace) {
        const Rows values = k.value_rows(b, h0 / k.p_.group_size());
        for (std::int64_t r = first_row; r < end_row; r += kGroupRows) {
          const std::int64_t g = r / kGroupRows;
          for (KeyRange s = tile.span(g, 0); s.begin < s.end; s = tile.span(g, s.end)) {
            add_weighted_values(zeros, smaller<std::int64_t>(kGroupRows, end_row - r),
                                score_row(buffer, r) + s.begin, k.score_ld_, values,
                                block.first + s.begin, s.end - s.begin, buffer.sums + r * k.width_,
                                k.width_);
          }
        }
        return;
      }
      for (std::int64_t d = 0; d < k.width_; d += kStrip<T>) {
        const std::int64_t columns = smaller<std::int64_t>(kStrip<T>, k.width_ - d);
        for (std::int64_t r = first_row; r < end_row; r += kGroupRows) {
          const std::int64_t g = r / kGroupRows;
          for (KeyRange s = tile.span(g, 0); s.begin < s.end; s = tile.span(g, s.end)) {
            const std::int64_t begin = Operand::words(s.begin);
            multiply<Operand, true, true>(zeros, smaller<std::int64_t>(kGroupRows, end_row - r),
                                          weight_row(buffer, r) + begin, k.weight_ld_,
                                          block.values + begin * block.value_ld + d, block.value_ld,
                                          Operand::words(s.end) - begin,
                                          buffer.sums + r * k.width_ + d, k.width_, columns);
          }
        }
      }
    }

    // Writes the rows; false if a result is not finite.
    bool finish(Buffers& buffer, const Score& score, std::int64_t rows, Zeros zeros) {
      const AttentionProblem& p = k.p_;
      const auto scaled = score.scale(changes_scores(score, zeros));
      Vec<T> check{};
      for (std::int64_t r = 0; r < rows; r += kLanes<T>) {
        const std::int64_t n = smaller<std::int64_t>(kLanes<T>, rows - r);
        Vec<T> lanes[kLanes<T>];
        for (std::int64_t x = 0; x < kLanes<T>; ++x) {
          lanes[x] = x < n ? load(buffer.total + (r + x) * kLanes<T>) : Vec<T>{};
        }
        const Vec<T> total = sums_of_lanes<T>(lanes);
        const Vec<T> none = splat(-infinity<T>());
        const Vec<T> nan = none - none;
        const Vec<T> reference = first_lanes<T>(load(buffer.maximum + r), n, none);
        const Vec<T> maximum = scaled(reference);
        // x - x is NaN if x is not finite. A row of no weight has no reference, or has lost them.
        const Vec<T> of_empty = reference > none ? nan : Vec<T>{};
        check += total == Vec<T>{} ? of_empty : (total - total) + (maximum - maximum);
        // Far above the reference there are no digits left.
        constexpr T most = sizeof(T) == 8 ? T(0x1p500) : T(0x1p60);
        check += total > splat(most) ? nan : Vec<T>{};
        const Vec<T> factor = reciprocal_of_total(total);
        const Vec<T> lse = lse_of(total, maximum);
        const T* const sums = buffer.sums + r * k.width_;
        if (k.splits_ > 1) {
          for (int x = 0; x < n; ++x) {
            const std::int64_t row = (b * p.heads + head(r + x)) * p.query_length + query(r + x);
            check +=
                k.keep_part(row * k.splits_ + split, sums + x * k.width_, maximum[x], total[x]);
          }
          continue;
        }
        T factors[kLanes<T>], lses[kLanes<T>];
        store(factors, factor);
        store(lses, lse);
        std::int64_t places[kLanes<T>];
        for (int x = 0; x < n; ++x) {
          places[x] = k.write_lse(b, head(r + x), query(r + x), lses[x]);
        }
        check += k.write_outputs(n, places, sums, factors);
      }
      return sum_lanes<T>(check) == T(0);
    }
  };

  static Vec<T> reciprocal_of_total(Vec<T> total) {
    return total == Vec<T>{} ? Vec<T>{} : splat(T(1)) / total;
  }
  static Vec<T> lse_of(Vec<T> total, Vec<T> maximum) {
    return total == Vec<T>{} ? splat(-infinity<T>()) : log_scaled<T>(total, maximum);
  }

  // The lse of row i. The result is the place of its output.
  std::int64_t write_lse(std::int64_t b, std::int64_t h, std::int64_t i, T lse) const {
    static_cast<T*>(call_.lse)[(b * p_.heads + h) * p_.query_length + i] = lse;
    const View& view = call_.out;
    return b * view.stride[0] + h * view.stride[1] + i * view.stride[2];
  }
  // The outputs of rows, factors[r] sums[r][width_]. The result is 0 if all are finite.
  Vec<T> write_outputs(std::int64_t rows, const std::int64_t* places, const T* sums,
                       const T* factors) const {
    return store_scaled_rows(p_.dtype, call_.out.data, rows, places, call_.out.stride[3],
                             p_.value_dim, sums, width_, factors);
  }

  // What one split has of a row. The result is as above.
  Vec<T> keep_part(std::int64_t part, const T* sums, T maximum, T total) const {
    partial_max_[part] = maximum;
    partial_total_[part] = total;
    return store_scaled_row(dtype_of<T>(), partial_sum_, part * width_, 1, width_, sums, T(1));
  }

  // Adds up the splits of one row in their order.
  void merge(std::int64_t row, int thread) {
    const Buffers buffer = buffers(thread);
    const T* const maxima = partial_max_ + row * splits_;
    T maximum = -infinity<T>();
    for (std::int64_t s = 0; s < splits_; ++s) maximum = larger(maximum, maxima[s]);
    T total = 0;
    fill_zero(buffer.sums, width_);
    for (std::int64_t s = 0; s < splits_; ++s) {
      const T part = partial_total_[row * splits_ + s];
      if (part == T(0)) continue;
      const T factor = exp2_of(maxima[s] - maximum);
      total += factor * part;
      if (factor == T(0)) continue;
      const T* const from = partial_sum_ + (row * splits_ + s) * width_;
      for (std::int64_t d = 0; d < width_; d += kLanes<T>) {
        store(buffer.sums + d, fma(load(from + d), splat(factor), load(buffer.sums + d)));
      }
    }
    const std::int64_t pair = row / p_.query_length;
    const T factor = reciprocal_of_total(splat(total))[0];
    const std::int64_t place = write_lse(pair / p_.heads, pair % p_.heads, row % p_.query_length,
                                         lse_of(splat(total), splat(maximum))[0]);
    write_outputs(1, &place, buffer.sums, &factor);
  }

  static constexpr std::int64_t kMostRows = Operand::kForwardRows > 128 ? kMaxBlockRows : 128;
  static constexpr std::int64_t kPackedBytes = 32 << 20;
  static constexpr std::int64_t kCachedBytes = 1 << 20;  // a part of L2
  static constexpr std::int64_t kWantedTasks = 16;
  static constexpr std::int64_t kFewTasks = 4;
  static constexpr std::int64_t kManyHeads = 8;           // a block each keeps the threads busy
  static constexpr std::int64_t kMergedElements = 16384;  // by one task

  const AttentionForward& call_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  ContextMember<Score> context_;
  Dropout dropout_;

  std::int64_t width_ = 0;  // of a row of values and sums
  std::int64_t block_keys_ = 0, block_rows_ = 0, blocks_ = 0, score_ld_ = 0, weight_ld_ = 0;
  std::int64_t block_heads_ = 1;  // that a row block takes the queries of
  std::int64_t first_unit_ = 0, units_at_once_ = 0;
  std::int64_t splits_ = 1, split_keys_ = 0;
  Packing packing_ = Packing::kInPlace;
  bool whole_heads_ = false;  // a task is all of a key head
  bool copy_values_ = false;
  bool first_references_ = false;  // see above
  mutable Failure<Operand> failure_;

  T* panels_ = nullptr;         // [b][packed head][panel][element][kPanel]
  T* bounds_ = nullptr;         // [b][packed head][panel]
  T* values_ = nullptr;         // [b][kv head][key][width_]
  T* partial_sum_ = nullptr;    // [b][h][i][split][width_]
  T* partial_max_ = nullptr;    // [b][h][i][split]
  T* partial_total_ = nullptr;  // [b][h][i][split]
  char* base_ = nullptr;
  std::int64_t threads_ = 0, thread_bytes_ = 0;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
