#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/philox.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/rows.h"

// What forward and backward share about a tile of scores: which keys each row sees, ALiBi, dropout
// factors.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

constexpr int kMaxBlockRows = 256;

// For every row of a query block the keys [begin, end) that it may see; end <= begin: none. Rows
// are the queries from first_query, repeated for each head of the block.
struct RowRanges {
  std::int64_t begin[kMaxBlockRows];
  std::int64_t end[kMaxBlockRows];
  KeyRange all;  // hull over the rows

  void compute(const AttentionProblem& p, std::int64_t b, std::int64_t first_query,
               std::int64_t queries, std::int64_t rows, KeyRange keys) {
    if (p.window_left < 0 && p.window_right < 0) {  // all rows see the same keys
      const KeyRange range = key_range(p, b, first_query);
      const KeyRange row = {larger(range.begin, keys.begin), smaller(range.end, keys.end)};
      for (std::int64_t r = 0; r < rows; ++r) begin[r] = row.begin;
      for (std::int64_t r = 0; r < rows; ++r) end[r] = row.end;
      all = row.begin < row.end ? row : KeyRange{keys.end, keys.begin};
      return;
    }
    all = {keys.end, keys.begin};
    for (std::int64_t r = 0; r < rows; ++r) {
      const KeyRange range = key_range(p, b, first_query + r % queries);
      begin[r] = larger(range.begin, keys.begin);
      end[r] = smaller(range.end, keys.end);
      if (begin[r] >= end[r]) continue;
      all.begin = smaller(all.begin, begin[r]);
      all.end = larger(all.end, end[r]);
    }
  }
};

// The columns of a key block [first_key, first_key + keys) that rows see: columns [begin[r],
// end[r]) of row r, and per group of kGroupRows rows the hull, rounded to steps of kStep columns,
// which may add columns behind the last. Empty: begin >= end. The mask may leave out whole panels
// of a group; what is left of the hull are its spans.
template <typename T>
struct TileRanges {
  std::int64_t begin[kMaxBlockRows];
  std::int64_t end[kMaxBlockRows];
  std::int64_t group_begin[kMaxBlockRows];
  std::int64_t group_end[kMaxBlockRows];
  std::uint64_t panels[kMaxBlockRows];  // of a group, a bit each: a pair may be allowed there
  bool one_span[kMaxBlockRows];         // a group's hull has no gaps
  std::int64_t columns;

  template <int kGroupRows, int kStep = 1>
  void compute(const RowRanges& ranges, std::int64_t rows, std::int64_t first_key,
               std::int64_t keys) {
    columns = keys;
    for (std::int64_t r = 0, g = 0; r < rows; r += kGroupRows, ++g) {
      panels[g] = ~std::uint64_t{0};
      one_span[g] = true;
      KeyRange hull = {keys, 0};
      for (std::int64_t i = r; i < smaller<std::int64_t>(r + kGroupRows, rows); ++i) {
        const KeyRange row = {larger<std::int64_t>(ranges.begin[i] - first_key, 0),
                              smaller(ranges.end[i] - first_key, keys)};
        begin[i] = row.begin;
        end[i] = row.end;
        if (row.begin < row.end) {
          hull = {smaller(hull.begin, row.begin), larger(hull.end, row.end)};
        }
      }
      group_begin[g] = hull.begin / kStep * kStep;
      group_end[g] = hull.end > 0 ? round_up(hull.end, kStep) : 0;
    }
  }

  // Leaves out the panels in which the mask allows no pair. offset(r): of row r's element for the
  // block's first key in the mask. A panel is looked at until the first pair that is allowed, which
  // costs next to nothing where most are. False if nothing is left.
  template <int kGroupRows, typename Offset>
  bool look_at_mask(const AttentionProblem& p, std::int64_t rows, const Offset& offset) {
    bool any = false;
    for (std::int64_t r = 0, g = 0; r < rows; r += kGroupRows, ++g) {
      if (group_is_empty(g)) continue;
      const std::int64_t rows_end = smaller<std::int64_t>(r + kGroupRows, rows);
      std::uint64_t found = 0;
      for (std::int64_t n = group_begin[g] / kPanel<T>; n * kPanel<T> < group_end[g]; ++n) {
        const std::int64_t u = larger(n * kPanel<T>, group_begin[g]);
        const std::int64_t keys = smaller(smaller((n + 1) * kPanel<T>, group_end[g]), columns) - u;
        for (std::int64_t i = r; i < rows_end; ++i) {
          if (i > r && offset(i) == offset(i - 1)) continue;  // a row for all queries
          if (allows_any<T>(p, offset(i) + u * p.mask.stride[3], keys)) {
            found |= std::uint64_t{1} << n;
            break;
          }
        }
      }
      panels[g] = found;
      const KeyRange first = span(g, 0);
      const int last = found == 0 ? -1 : 63 - __builtin_clzll(found);
      group_begin[g] = first.begin;
      group_end[g] = smaller((last + 1) * std::int64_t{kPanel<T>}, group_end[g]);
      one_span[g] = found != 0 && span(g, 0).end == group_end[g];
      any = any || found != 0;
    }
    return any;
  }

  bool row_is_empty(std::int64_t r) const { return begin[r] >= end[r]; }
  // The columns that each of the rows [r, r + rows) sees.
  KeyRange seen_by_all(std::int64_t r, std::int64_t rows) const {
    KeyRange all = {0, columns};
    for (std::int64_t i = r; i < r + rows; ++i) {
      all = {larger(all.begin, begin[i]), smaller(all.end, end[i])};
    }
    return all;
  }
  // The hull of those that they see; empty: begin >= end.
  KeyRange seen_by_any(std::int64_t r, std::int64_t rows) const {
    KeyRange hull = {columns, 0};
    for (std::int64_t i = r; i < r + rows; ++i) {
      if (row_is_empty(i)) continue;
      hull = {smaller(hull.begin, begin[i]), larger(hull.end, end[i])};
    }
    return hull;
  }
  bool group_is_empty(std::int64_t g) const { return group_begin[g] >= group_end[g]; }
  // Whether group g has anything to do in the panel from column u.
  bool touches(std::int64_t g, std::int64_t u) const {
    return group_begin[g] < u + kPanel<T> && group_end[g] > u &&
           (panels[g] >> u / kPanel<T> & 1) != 0;
  }
  // The first columns of group g from column `from` on without a gap; empty: there are no more.
  KeyRange span(std::int64_t g, std::int64_t from) const {
    const std::int64_t column = larger(from, group_begin[g]);
    if (column >= group_end[g]) return {column, column};
    const std::int64_t n = column / kPanel<T>;
    const std::uint64_t left = panels[g] >> n;
    if (left == 0) return {column, column};
    const int skipped = __builtin_ctzll(left);
    const std::uint64_t gaps = ~(left >> skipped);
    const int length = gaps == 0 ? 64 : __builtin_ctzll(gaps);
    return {skipped == 0 ? column : (n + skipped) * kPanel<T>,
            smaller((n + skipped + length) * kPanel<T>, group_end[g])};
  }
};

// Which columns a row sees, [begin, end), counted from some column as j is.
template <typename T>
struct SeenColumns {
  Vec<T> begin, end;

  // Beyond the numbers that T has exactly they are still on the right side of a block's columns.
  SeenColumns(std::int64_t first, std::int64_t behind)
      : begin(splat(static_cast<T>(first))), end(splat(static_cast<T>(behind))) {}
  // v where lane l stands for a column that is seen, column j + l; `other` elsewhere.
  TSA_INLINE Vec<T> select(int j, Vec<T> v, Vec<T> other) const {
    const Vec<T> column = lane_numbers<T>() + splat(static_cast<T>(j));
    return ((column >= begin) & (column < end)) ? v : other;
  }
};

// ALiBi of one head: the score of a query at position t and key j gets -slope |t - j|.
template <typename T>
struct Alibi {
  bool active = false;
  T slope = 0;  // times log2 e
  std::int64_t first_position = 0;

  Alibi() = default;
  Alibi(const AttentionProblem& p, std::int64_t b, std::int64_t h) {
    if (p.slopes == nullptr) return;
    active = true;
    slope = Math<T>::log2e * load_element<T>(p.slopes_dtype, p.slopes,
                                             b * p.slopes_stride[0] + h * p.slopes_stride[1]);
    first_position = query_position(p, b, 0);
  }

  // f(j, left, |t - (key + j)|) for each vector of the keys [key, key + n) of query i.
  template <typename F>
  TSA_INLINE void for_each_vector(std::int64_t i, std::int64_t key, std::int64_t n,
                                  const F& f) const {
    const Vec<T> ahead = splat(static_cast<T>(first_position + i - key));
    Vec<T> index = lane_numbers<T>();
    for (std::int64_t j = 0; j < n; j += kLanes<T>, index += splat(T(kLanes<T>))) {
      f(j, n - j, absolute(ahead - index));
    }
  }

  // Scores in units of log2 of those keys. With Zeros::kSkip, the careful pass, they stay finite;
  // without, what overflows shows, and has that pass run.
  void add(std::int64_t i, std::int64_t key, std::int64_t n, Zeros zeros, T* scores) const {
    constexpr T largest = Math<T>::max_score;
    const T limit = zeros == Zeros::kSkip ? largest : infinity<T>();
    for_each_vector(i, key, n, [&](std::int64_t j, std::int64_t left, Vec<T> distance) {
      const Vec<T> s = fnma(splat(slope), distance, load_up_to(scores + j, left));
      store_up_to(scores + j, at_least(splat(-limit), at_most(splat(limit), s)), left);
    });
  }

  // sum_j x_j |t - j|
  T sum_distances(std::int64_t i, std::int64_t key, std::int64_t n, const T* x) const {
    Vec<T> sum{};
    for_each_vector(i, key, n, [&](std::int64_t j, std::int64_t left, Vec<T> distance) {
      sum = fma(load_up_to(x + j, left), distance, sum);
    });
    return sum_lanes<T>(sum);
  }
};

// factor[n] = dropout of keys [key, key + n) of row (b, h, i).
template <typename T>
inline void load_dropout_row(const AttentionProblem& p, const Dropout& dropout, std::int64_t b,
                             std::int64_t h, std::int64_t i, std::int64_t key, std::int64_t n,
                             T* factor) {
  const std::int64_t row = (b * p.heads + h) * p.query_length + i;
  const T keep_scale = static_cast<T>(dropout.keep_scale);
  std::int64_t j = 0;
  while (j < n) {
    const PhiloxBlock block =
        philox(dropout.seed, dropout.offset, Dropout::block_index(row, key + j, p.key_length));
    const std::int64_t lane = (key + j) % 4;
    const std::int64_t count = smaller<std::int64_t>(4 - lane, n - j);
    for (std::int64_t l = 0; l < count; ++l) {
      factor[j + l] = dropout.keep(block.value[lane + l]) ? keep_scale : T(0);
    }
    j += count;
  }
}

template <typename T>
TSA_INLINE T exp2_of(T x) {
  return exp2<T>(splat(x))[0];
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
