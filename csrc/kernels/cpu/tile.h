#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/philox.h"
#include "kernels/cpu/rows.h"

// What forward and backward share about a tile of scores: which keys each row sees, the mask as a
// bias, dropout factors.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

constexpr int kMaxBlockRows = 128;

// For every row of a query block the keys [begin, end) that it may see; end <= begin: none.
struct RowRanges {
  std::int64_t begin[kMaxBlockRows];
  std::int64_t end[kMaxBlockRows];
  KeyRange all;  // hull over the rows

  void compute(const AttentionProblem& p, std::int64_t b, std::int64_t first_row, std::int64_t rows,
               KeyRange keys) {
    all = {keys.end, keys.begin};
    const bool windowed = p.window_left >= 0 || p.window_right >= 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (r == 0 || windowed) {
        const KeyRange range = key_range(p, b, first_row + r);
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
