#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/score.h"

// The dot product for a few queries, as in decoding with a cache: keys and values are read once,
// where they lie, and 16-bit ones are widened in registers. Packing them, as for many queries,
// would cost more than the products.
//
// Scores: a tile of kRows queries by kLanes / kRows keys has one accumulator for a pair, along the
// elements; one reduction then adds up the lanes of all of them into one vector of scores. Values:
// kRows sums of several vectors stay in registers while the keys go by. The query heads that share
// a key head are rows of one block, so that they share the reading too.
// Bound: memory bandwidth.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// More queries gain from packed keys, unless they share them with other heads.
constexpr std::int64_t kFewQueries = 4;
constexpr std::int64_t kFewRows = 8;

// Whether at most so many queries of all heads read a key head, and keys and values where they lie.
inline bool has_few_rows(const AttentionProblem& p, std::int64_t rows) {
  return p.kv_heads > 0 && p.group_size() * p.query_length <= rows && p.key.stride[3] == 1 &&
         p.value.stride[3] == 1;
}
inline bool has_few_queries(const AttentionProblem& p) {
  return p.score == ScoreKind::kDotProduct && p.query_length <= kFewQueries &&
         has_few_rows(p, kFewRows);
}

// scores[kRows][kKeys] of kRows queries and the kKeys = kLanes / kRows keys from `keys`. kTail: the
// head dim is not a multiple of kLanes.
template <typename T, DType dtype, int kRows, bool kTail>
[[gnu::noinline]] void score_keys_in_place(const T* __restrict queries, std::int64_t query_ld,
                                           const typename Storage<dtype>::type* __restrict keys,
                                           std::int64_t row_stride, std::int64_t head_dim,
                                           T* __restrict scores, std::int64_t ld) {
  constexpr int lanes = kLanes<T>;
  constexpr int kKeys = lanes / kRows;
  constexpr int kAtOnce = 4 * lanes;  // elements of a key
  Vec<T> sum[lanes];
#pragma GCC unroll 16
  for (int x = 0; x < lanes; ++x) sum[x] = Vec<T>{};
  // Key by key, in the order of memory, which is what the hardware's prefetching follows.
#pragma GCC unroll 16
  for (int x = 0; x < kKeys; ++x, keys += row_stride) {
    const auto add = [&](std::int64_t d, Vec<T> k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sum[r * kKeys + x] = fma(load(queries + r * query_ld + d), k, sum[r * kKeys + x]);
      }
    };
    std::int64_t d = 0;
    for (; d + kAtOnce <= head_dim; d += kAtOnce) {
#pragma GCC unroll 4
      for (std::int64_t e = d; e < d + kAtOnce; e += lanes) {
        add(e, load_widened<T, dtype>(keys + e));
      }
    }
    for (; d + lanes <= head_dim; d += lanes) add(d, load_widened<T, dtype>(keys + d));
    if constexpr (kTail) {  // the queries have zeros there
      add(d, load_first_widened<T, dtype>(keys + d, head_dim - d));
    }
  }
  T total[lanes];
  store(total, sums_of_lanes<T>(sum));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(scores + r * ld, total + r * kKeys, kKeys * sizeof(T));
  }
}

// One query and one key, where fewer are left.
template <typename T, DType dtype>
inline T score_key_in_place(const T* query, const typename Storage<dtype>::type* key,
                            std::int64_t head_dim) {
  Vec<T> sum{};
  for (std::int64_t d = 0; d < head_dim; d += kLanes<T>) {
    const std::int64_t n = head_dim - d;
    const Vec<T> k =
        n >= kLanes<T> ? load_widened<T, dtype>(key + d) : load_first_widened<T, dtype>(key + d, n);
    sum = fma(load(query + d), k, sum);
  }
  return sum_lanes<T>(sum);
}

// kRows queries and n keys.
template <typename T, DType dtype, int kRows, bool kTail>
inline void score_rows_in_place(const T* queries, std::int64_t query_ld,
                                const typename Storage<dtype>::type* keys, std::int64_t row_stride,
                                std::int64_t head_dim, std::int64_t n, T* scores, std::int64_t ld) {
  constexpr int at_once = smaller(kRows, kLanes<T>);  // a vector of two doubles takes two rows
  constexpr int kKeys = kLanes<T> / at_once;
  const std::int64_t whole = n / kKeys * kKeys;
  for (std::int64_t x = 0; x < whole; x += kKeys) {
    for (int r = 0; r < kRows; r += at_once) {
      score_keys_in_place<T, dtype, at_once, kTail>(queries + r * query_ld, query_ld,
                                                    keys + x * row_stride, row_stride, head_dim,
                                                    scores + r * ld + x, ld);
    }
  }
  for (std::int64_t x = whole; x < n; ++x) {
    for (int r = 0; r < kRows; ++r) {
      scores[r * ld + x] =
          score_key_in_place<T, dtype>(queries + r * query_ld, keys + x * row_stride, head_dim);
    }
  }
}

// scores[rows][n] = queries (keys j, j + 1, ...)^T, queries padded with zeros.
template <typename T>
inline void multiply_in_place(std::int64_t rows, const T* queries, std::int64_t query_ld,
                              const Rows& keys, std::int64_t j, std::int64_t n, T* scores,
                              std::int64_t ld) {
  const auto score = [&]<DType dtype, bool kTail>() {
    const auto* const from =
        static_cast<const typename Storage<dtype>::type*>(keys.data) + keys.at(j);
    const auto some = [&]<int kRows>(std::int64_t r) {
      score_rows_in_place<T, dtype, kRows, kTail>(queries + r * query_ld, query_ld, from,
                                                  keys.row_stride, keys.width, n, scores + r * ld,
                                                  ld);
    };
    std::int64_t r = 0;
    for (; r + 4 <= rows; r += 4) some.template operator()<4>(r);
    if (r + 2 <= rows) some.template operator()<2>(r), r += 2;
    if (r < rows) some.template operator()<1>(r);
  };
  with_widened<T>(keys.dtype, [&]<DType dtype>() {
    if (keys.width % kLanes<T> == 0) {
      score.template operator()<dtype, false>();
    } else {
      score.template operator()<dtype, true>();
    }
  });
}

// What the scores of keys where they are have in common.
template <typename Scalar>
class ScoreInPlace : public FinishedScores<Scalar> {
 public:
  using Operand = Elements<Scalar>;
  using T = Scalar;
  static constexpr int kGroupRows = Operand::kTileRows;
  static constexpr bool kKeysPerQueryHead = false;
  static constexpr bool kInPlace = true;
  static std::int64_t constants_size(std::int64_t /*head_dim*/) { return 0; }
  static std::int64_t key_size(std::int64_t /*head_dim*/) { return 0; }
  static std::int64_t spare_size(std::int64_t /*head_dim*/, std::int64_t /*rows*/) { return 0; }

  explicit ScoreInPlace(const AttentionProblem& p) : p_(p) {}

  bool are_bounded(const T* /*bounds*/, std::int64_t /*panels*/) const { return false; }
  void set_head(std::int64_t b, std::int64_t h) {
    key_ = rows_of(p_.dtype, p_.key, b, h / p_.group_size(), p_.head_dim);
    valid_ = key_range(p_, b);
  }

 protected:
  const AttentionProblem& p_;
  Rows key_{};
  KeyRange valid_{};  // of the sample
};

// scale q . k.
template <typename T>
class DotScoreInPlace : public ScoreInPlace<T> {
 public:
  using Operand = Elements<T>;
  static std::int64_t query_size(std::int64_t head_dim) { return padded<T>(head_dim); }

  DotScoreInPlace(const AttentionProblem& p, T* /*constants*/, T* /*spare*/) : ScoreInPlace<T>(p) {}

  void load_queries(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, T* queries) {
    const std::int64_t width = query_size(p_.head_dim);
    const T factor = static_cast<T>(p_.scale * Math<double>::log2e);
    pack_along_rows<Operand>(rows_of(p_.dtype, p_.query, b, h, p_.head_dim), i, rows, queries);
    for (std::int64_t d = 0; d < rows * width; ++d) queries[d] *= factor;
  }

  // scores[rows][kPanel] of rows <= kGroupRows queries from row r of the block and keys from j.
  void scores(const T* queries, std::int64_t r, std::int64_t rows, std::int64_t j, T* scores,
              std::int64_t ld) const {
    const std::int64_t width = query_size(p_.head_dim);
    multiply_in_place(rows, queries + r * width, width, key_, j,
                      smaller<std::int64_t>(kPanel<T>, p_.key_length - j), scores, ld);
  }

 private:
  using ScoreInPlace<T>::p_;
  using ScoreInPlace<T>::key_;
};

// sums[kRows][kVectors] += sum_j weights(:, j) values(j, :), n rows of values from j.
template <typename T, DType dtype, int kRows, int kVectors>
[[gnu::noinline]] void add_values_in_place(const T* __restrict weights, std::int64_t weight_ld,
                                           const typename Storage<dtype>::type* __restrict values,
                                           std::int64_t row_stride, std::int64_t n,
                                           T* __restrict sums, std::int64_t ld) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * ld + v * lanes);
  }
  for (std::int64_t j = 0; j < n; ++j, values += row_stride) {
    Vec<T> weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = splat(weights[r * weight_ld + j]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> value = load_widened<T, dtype>(values + v * lanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][v] = fma(weight[r], value, sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums + r * ld + v * lanes, sum[r][v]);
  }
}

// One row of weights, from element d on; weights of 0 may be skipped.
template <typename T, DType dtype>
inline void add_values_carefully(Zeros zeros, const T* weights,
                                 const typename Storage<dtype>::type* values,
                                 std::int64_t row_stride, std::int64_t n, std::int64_t d,
                                 std::int64_t width, T* sums) {
  for (; d < width; d += kLanes<T>) {
    const std::int64_t elements = smaller<std::int64_t>(kLanes<T>, width - d);
    Vec<T> sum = load(sums + d);
    for (std::int64_t j = 0; j < n; ++j) {
      if (zeros == Zeros::kSkip && weights[j] == T(0)) continue;
      const auto* const from = values + j * row_stride + d;
      const Vec<T> value = elements == kLanes<T> ? load_widened<T, dtype>(from)
                                                 : load_first_widened<T, dtype>(from, elements);
      sum = fma(splat(weights[j]), value, sum);
    }
    store(sums + d, sum);
  }
}

// sums(r, :) += sum_j weights(r, j) values(begin + j, :) for n keys; sums is [rows][ld], padded.
template <typename T>
inline void add_weighted_values(Zeros zeros, std::int64_t rows, const T* weights,
                                std::int64_t weight_ld, const Rows& values, std::int64_t begin,
                                std::int64_t n, T* sums, std::int64_t ld) {
  // Accumulators that the registers hold.
  constexpr int kAccumulators = kVectorBytes == 64 ? 16 : 8;
  with_widened<T>(values.dtype, [&]<DType dtype>() {
    const auto* const from =
        static_cast<const typename Storage<dtype>::type*>(values.data) + values.at(begin);
    const auto add = [&]<int kRows>(std::int64_t r) {
      const T* const w = weights + r * weight_ld;
      T* const s = sums + r * ld;
      std::int64_t d = 0;
      const auto strips = [&]<int kVectors>() {
        for (; d + kVectors * kLanes<T> <= values.width; d += kVectors * kLanes<T>) {
          add_values_in_place<T, dtype, kRows, kVectors>(w, weight_ld, from + d, values.row_stride,
                                                         n, s + d, ld);
        }
      };
      if constexpr (8 * kRows <= kAccumulators) strips.template operator()<8>();
      if constexpr (4 * kRows <= kAccumulators) strips.template operator()<4>();
      strips.template operator()<2>();
      for (int i = 0; i < kRows; ++i) {
        add_values_carefully<T, dtype>(Zeros::kMultiply, w + i * weight_ld, from, values.row_stride,
                                       n, d, values.width, s + i * ld);
      }
    };
    if (zeros == Zeros::kSkip) {
      for (std::int64_t r = 0; r < rows; ++r) {
        add_values_carefully<T, dtype>(zeros, weights + r * weight_ld, from, values.row_stride, n,
                                       0, values.width, sums + r * ld);
      }
      return;
    }
    std::int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add.template operator()<4>(r);
    if (r + 2 <= rows) add.template operator()<2>(r), r += 2;
    if (r < rows) add.template operator()<1>(r);
  });
}

// What few_queries_backward.h needs of a score: what it adds to gradients, by rows of a block:
// sums[rows][size] of each row, of which dq and dw are made, and rows of dk. g[rows][ld] holds
// zeros behind the n keys of a block, as far as whole vectors go.
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

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
