#pragma once

#include "kernels/common/attention_weights.h"
#include "kernels/cuda/attention_forward.cuh"

// The weights p(i, j) themselves, or their mean over the heads. Two launches:
//   1. maximum and 1/sum of each row, as in forward but without values, to the workspace; a block
//      owns a tile of queries of one (batch, head)
//   2. a block owns a tile of queries by keys of the result and computes its scores; for the mean
//      it loops over the heads and adds up in registers, in their order
// Traffic: the result once; operands from L2. Bound: FMA, 4 Lq Lk E FLOP per head; additive: see
// AdditiveScore.
namespace torch_selfattn::kernels::cuda {

// Contiguous (B, H, Lq) each; inverse_sum is 0 where there is no key.
template <typename Acc>
struct RowStatistics {
  Acc* maximum;
  Acc* inverse_sum;

  static __host__ __device__ std::int64_t bytes(const AttentionProblem& p) {
    return 2 * p.batch * p.heads * p.query_length * static_cast<std::int64_t>(sizeof(Acc));
  }
  static __host__ __device__ RowStatistics of(const AttentionProblem& p, void* memory) {
    Acc* const start = static_cast<Acc*>(memory);
    return {start, start + p.batch * p.heads * p.query_length};
  }
};

// As load_biases and key_range_of_tile, for queries that are rows of others in any order.
template <typename T, typename Acc, int R>
__device__ __forceinline__ bool load_biases(Acc (&bias)[R][R], const AttentionWeights& call,
                                            std::int64_t batch, std::int64_t head, Pairs pairs) {
  const AttentionProblem& p = call.problem;
  if (call.query_indices == nullptr) return load_biases<T>(bias, p, batch, head, pairs);
  bool any = false;
#pragma unroll
  for (int q = 0; q < R; ++q) {
    const std::int64_t i = pairs.query + q;
    const KeyRange range = i < p.query_length ? key_range(call, batch, i) : KeyRange{0, 0};
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const std::int64_t j = pairs.key + k;
      const Acc x =
          j >= range.begin && j < range.end ? mask_bias<T>(p, batch, head, i, j) : -kInfinity<Acc>;
      bias[q][k] = x;
      any = any || x != -kInfinity<Acc>;
    }
  }
  if (p.slopes == nullptr) return any;
  const Acc slope = slope_of<T>(p, batch, head);
#pragma unroll
  for (int q = 0; q < R; ++q) {
    const std::int64_t i = pairs.query + q;
    if (i >= p.query_length) continue;
    const std::int64_t position = query_position(p, batch, query_index(call, batch, i));
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (bias[q][k] == -kInfinity<Acc>) continue;
      const Acc distance = fabs(static_cast<Acc>(position - (pairs.key + k)));
      bias[q][k] = limit_score(bias[q][k] - slope * distance);
    }
  }
  return any;
}

__device__ __forceinline__ KeyRange key_range_of_tile(const AttentionWeights& call,
                                                      std::int64_t batch, std::int64_t first,
                                                      int count) {
  const AttentionProblem& p = call.problem;
  if (call.query_indices == nullptr) return key_range_of_tile(p, batch, first, count);
  KeyRange range{p.key_length, 0};
  for (std::int64_t i = first; i < first + count && i < p.query_length; ++i) {
    const KeyRange of_row = key_range(call, batch, i);
    if (of_row.begin < range.begin) range.begin = of_row.begin;
    if (of_row.end > range.end) range.end = of_row.end;
  }
  return range;
}

template <typename T, typename Score>
__global__ void __launch_bounds__(kThreads)
    attention_weights_statistics_kernel(const __grid_constant__ AttentionWeights call,
                                        void* memory) {
  using Acc = Accumulator<T>;
  using Shape = Tile<Acc>;
  constexpr int R = Shape::kPerThread;
  const AttentionProblem& p = call.problem;
  const Shared<Acc> shared = Shared<Acc>::get();
  const RowStatistics<Acc> statistics = RowStatistics<Acc>::of(p, memory);
  const Thread me = Thread::me();

  const std::int64_t tiles = (p.query_length - 1) / Shape::kTokens + 1;
  const std::int64_t first_query = blockIdx.x % tiles * Shape::kTokens;
  const std::int64_t head = blockIdx.x / tiles % p.heads;
  const std::int64_t batch = blockIdx.x / tiles / p.heads;

  const KeyRange range = key_range_of_tile(call, batch, first_query, Shape::kTokens);
  const Side<T> queries{Tokens<T>::of(p.query, batch, head), first_query, 0, p.query_length};
  Side<T> keys{Tokens<T>::of(p.key, batch, head / p.group_size()), 0, range.begin, range.end};
  const Weight<T> weight = Score::kHasWeight ? Weight<T>::of(p, batch, head) : Weight<T>{};
  OnlineSoftmax<Acc> softmax;
  for (std::int64_t first_key = range.begin / Shape::kTokens * Shape::kTokens;
       first_key < range.end; first_key += Shape::kTokens) {
    const auto pairs = Pairs::of<Acc>(first_query, first_key);
    Acc bias[R][R];
    if (__syncthreads_or(load_biases<T>(bias, call, batch, head, pairs)) == 0) continue;
    keys.first = first_key;
    Acc s[R][R];
    Acc rescale[R];
    Score::score_tile(s, queries, keys, weight, p.head_dim, shared);
    finish_scores(s, bias, static_cast<Acc>(p.scale));
    softmax.update(s, rescale);
  }
  if (me.column == 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const std::int64_t i = first_query + me.row * R + r;
      if (i >= p.query_length) continue;
      const std::int64_t row = (batch * p.heads + head) * p.query_length + i;
      statistics.maximum[row] = softmax.maximum[r];
      statistics.inverse_sum[row] = softmax.sum[r] == 0 ? Acc(0) : 1 / softmax.sum[r];
    }
  }
}

template <typename T, typename Score>
__global__ void __launch_bounds__(kThreads)
    attention_weights_kernel(const __grid_constant__ AttentionWeights call, void* memory) {
  using Acc = Accumulator<T>;
  using Shape = Tile<Acc>;
  constexpr int R = Shape::kPerThread;
  const AttentionProblem& p = call.problem;
  const Shared<Acc> shared = Shared<Acc>::get();
  const RowStatistics<Acc> statistics = RowStatistics<Acc>::of(p, memory);

  const std::int64_t together = call.average_heads ? p.heads : 1;  // heads of one matrix
  const std::int64_t matrices = p.heads / together;
  const std::int64_t key_tiles = (p.key_length - 1) / Shape::kTokens + 1;
  const std::int64_t query_tiles = (p.query_length - 1) / Shape::kTokens + 1;
  std::int64_t index = blockIdx.x;
  const std::int64_t first_key = index % key_tiles * Shape::kTokens;
  index /= key_tiles;
  const std::int64_t first_query = index % query_tiles * Shape::kTokens;
  index /= query_tiles;
  const std::int64_t matrix = index % matrices;
  const std::int64_t batch = index / matrices;

  const KeyRange range = key_range_of_tile(call, batch, first_query, Shape::kTokens);
  const auto pairs = Pairs::of<Acc>(first_query, first_key);
  Acc result[R][R] = {};
  for (std::int64_t head = matrix * together; head < (matrix + 1) * together; ++head) {
    Acc bias[R][R];
    if (__syncthreads_or(load_biases<T>(bias, call, batch, head, pairs)) == 0) continue;
    const Side<T> queries{Tokens<T>::of(p.query, batch, head), first_query, 0, p.query_length};
    const Side<T> keys{Tokens<T>::of(p.key, batch, head / p.group_size()), first_key, range.begin,
                       range.end};
    const Weight<T> weight = Score::kHasWeight ? Weight<T>::of(p, batch, head) : Weight<T>{};
    Acc s[R][R];
    Score::score_tile(s, queries, keys, weight, p.head_dim, shared);
    finish_scores(s, bias, static_cast<Acc>(p.scale));
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const std::int64_t i = pairs.query + r;
      if (i >= p.query_length) continue;
      const std::int64_t row = (batch * p.heads + head) * p.query_length + i;
      const Acc maximum = statistics.maximum[row];
      const Acc inverse_sum = statistics.inverse_sum[row];
#pragma unroll
      for (int c = 0; c < R; ++c) {
        if (s[r][c] != -kInfinity<Acc>)
          result[r][c] += exponential(s[r][c] - maximum) * inverse_sum;
      }
    }
  }
  const Acc share = Acc(1) / static_cast<Acc>(together);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const std::int64_t i = pairs.query + r;
    if (i >= p.query_length) continue;
#pragma unroll
    for (int c = 0; c < R; ++c) {
      const std::int64_t j = pairs.key + c;
      if (j < p.key_length) store<T>(call.weights, batch, matrix, i, j, result[r][c] * share);
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda
