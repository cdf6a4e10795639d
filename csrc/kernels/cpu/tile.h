#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/philox.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/rows.h"

// What forward and backward share about a tile of scores: which keys each row sees, ALiBi, the mask
// as a bias, dropout factors.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

constexpr int kMaxBlockRows = 128;

// For every row of a query block the keys [begin, end) that it may see; end <= begin: none. Rows
// are the queries from first_query, repeated for each head of the block.
struct RowRanges {
  std::int64_t begin[kMaxBlockRows];
  std::int64_t end[kMaxBlockRows];
  KeyRange all;  // hull over the rows

  void compute(const AttentionProblem& p, std::int64_t b, std::int64_t first_query,
               std::int64_t queries, std::int64_t rows, KeyRange keys) {
    all = {keys.end, keys.begin};
    const bool windowed = p.window_left >= 0 || p.window_right >= 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (r == 0 || windowed) {
        const KeyRange range = key_range(p, b, first_query + r % queries);
        begin[r] = larger(range.begin, keys.begin);
        end[r] = smaller(range.end, keys.end);
      } else {
        begin[r] = begin[0];
        end[r] = end[0];
      }
      if (begin[r] >= end[r]) continue;
      all.begin = smaller(all.begin, begin[r]);
      all.end = larger(all.end, end[r]);
    }
  }
};

// The columns of a key block [first_key, first_key + keys) that rows see: columns [begin[r],
// end[r]) of row r, and per group of kGroupRows rows the hull, rounded to words of kPack columns,
// which may add a column behind the last. Empty: begin >= end.
struct TileRanges {
  std::int64_t begin[kMaxBlockRows];
  std::int64_t end[kMaxBlockRows];
  std::int64_t group_begin[kMaxBlockRows];
  std::int64_t group_end[kMaxBlockRows];

  template <int kGroupRows, int kPack = 1>
  void compute(const RowRanges& ranges, std::int64_t rows, std::int64_t first_key,
               std::int64_t keys) {
    for (std::int64_t r = 0, g = 0; r < rows; r += kGroupRows, ++g) {
      group_begin[g] = keys;
      group_end[g] = 0;
      for (std::int64_t i = r; i < smaller<std::int64_t>(r + kGroupRows, rows); ++i) {
        begin[i] = larger<std::int64_t>(ranges.begin[i] - first_key, 0);
        end[i] = smaller(ranges.end[i] - first_key, keys);
        if (begin[i] >= end[i]) continue;
        group_begin[g] = smaller(group_begin[g], begin[i]);
        group_end[g] = larger(group_end[g], end[i]);
      }
      group_begin[g] = group_begin[g] / kPack * kPack;
      if (group_end[g] > 0) group_end[g] = round_up(group_end[g], kPack);
    }
  }
  bool row_is_empty(std::int64_t r) const { return begin[r] >= end[r]; }
  bool group_is_empty(std::int64_t g) const { return group_begin[g] >= group_end[g]; }
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

  // Scores in units of log2 of those keys. With Zeros::kSkip, the careful pass, they stay finite as
  // in add_bias; without, what overflows shows, and has that pass run.
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

// bias[n] = mask of keys [key, key + n) in units of log2: 0 or -inf for a boolean mask. A finite
// bias never becomes -inf, which means "not allowed".
template <typename T>
inline void load_mask_row(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i,
                          std::int64_t key, std::int64_t n, T* bias) {
  const std::int64_t stride = p.mask.stride[3];
  const std::int64_t offset =
      b * p.mask.stride[0] + h * p.mask.stride[1] + i * p.mask.stride[2] + key * stride;
  if (p.mask_kind == MaskKind::kBool) {
    const auto* const from = static_cast<const std::uint8_t*>(p.mask.data) + offset;
    if (stride == 1) {
      for (std::int64_t j = 0; j < n; ++j) bias[j] = from[j] != 0 ? T(0) : -infinity<T>();
    } else {
      for (std::int64_t j = 0; j < n; ++j) bias[j] = from[j * stride] != 0 ? T(0) : -infinity<T>();
    }
    return;
  }
  load_row(p.mask_dtype, p.mask.data, offset, stride, n, bias);
  for (std::int64_t j = 0; j < n; ++j) {
    const T scaled = bias[j] * Math<T>::log2e;
    const T limited = scaled < -Math<T>::max_score ? -Math<T>::max_score : scaled;
    bias[j] = bias[j] == -infinity<T>() ? bias[j] : limited;
  }
}

// scores += bias, finite where the bias is not -inf.
template <typename T>
inline void add_bias(const T* bias, std::int64_t n, T* scores) {
  constexpr int lanes = kLanes<T>;
  const auto biased = [](Vec<T> s, Vec<T> bias_j) {
    const Vec<T> sum =
        at_least(splat(-Math<T>::max_score), at_most(splat(Math<T>::max_score), s + bias_j));
    return bias_j == splat(-infinity<T>()) ? bias_j : sum;
  };
  std::int64_t j = 0;
  for (; j + lanes <= n; j += lanes) store(scores + j, biased(load(scores + j), load(bias + j)));
  if (j < n) {
    store_first(scores + j, biased(load_first(scores + j, n - j), load_first(bias + j, n - j)),
                n - j);
  }
}

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

template <typename T>
inline void fill_zero(T* to, std::int64_t n) {
  if (n > 0) __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(T));
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
