#pragma once

#include "kernels/cuda/attention_scores.cuh"

// Forward, generic. Each block owns a tile of queries of one (batch, head) and a slice of at most
// kWidth value columns; it goes over the tiles of keys that one of its queries may see:
//   scores -> running maximum and sum of the rows -> weights to shared memory -> out += weights V.
// With `wanted`, one byte per tile of queries, (B, H, tiles): only the tiles of which it is not 0.
// Traffic: q, k and v once per query tile (k, v from L2 for all but the first), out and lse once.
// Bound: FMA, 2 Lq Lk (E + Ev) FLOP; additive: see AdditiveScore.
namespace torch_selfattn::kernels::cuda {

// A maximum that is NaN if one of the two is.
template <typename Acc>
__device__ __forceinline__ Acc maximum_or_nan(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}

// Running maximum and sum of exp(score - maximum) of a thread's rows; the 16 threads of a row
// agree.
template <typename Acc>
struct OnlineSoftmax {
  static constexpr int R = Tile<Acc>::kPerThread;
  Acc maximum[R];
  Acc sum[R];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      maximum[r] = -kInfinity<Acc>;
      sum[r] = 0;
    }
  }

  // Replaces scores by weights relative to the new maximum; `rescale` is for what was accumulated.
  __device__ __forceinline__ void update(Acc (&s)[R][R], Acc (&rescale)[R]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Acc largest = maximum[r];
#pragma unroll
      for (int c = 0; c < R; ++c) largest = maximum_or_nan(largest, s[r][c]);
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) {
        largest = maximum_or_nan(largest, __shfl_xor_sync(~0u, largest, lanes));
      }
      const bool empty = largest == -kInfinity<Acc>;
      rescale[r] = empty ? Acc(1) : exponential(maximum[r] - largest);
      maximum[r] = largest;
      Acc total = 0;
#pragma unroll
      for (int c = 0; c < R; ++c) {
        s[r][c] = s[r][c] == -kInfinity<Acc> ? Acc(0) : exponential(s[r][c] - largest);
        total += s[r][c];
      }
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
      sum[r] = sum[r] * rescale[r] + total;
    }
  }
};

template <typename T, typename Score>
__global__ void __launch_bounds__(kThreads)
    attention_forward_kernel(const __grid_constant__ AttentionForward call,
                             const std::uint8_t* wanted) {
  using Acc = Accumulator<T>;
  using Shape = Tile<Acc>;
  constexpr int R = Shape::kPerThread;
  const AttentionProblem& p = call.problem;
  const Shared<Acc> shared = Shared<Acc>::get();
  const Thread me = Thread::me();

  const std::int64_t slices = p.value_dim > 0 ? (p.value_dim - 1) / Shape::kWidth + 1 : 1;
  const std::int64_t tiles = (p.query_length - 1) / Shape::kTokens + 1;
  std::int64_t index = blockIdx.x;
  const std::int64_t slice = index % slices;
  index /= slices;
  // The last tiles of a causal problem have the most keys, so they go first.
  const std::int64_t tile = tiles - 1 - index % tiles;
  index /= tiles;
  if (wanted != nullptr && wanted[index * tiles + tile] == 0) return;
  const std::int64_t first_query = tile * Shape::kTokens;
  const std::int64_t head = index % p.heads;
  const std::int64_t batch = index / p.heads;
  const std::int64_t kv_head = head / p.group_size();
  const std::int64_t dim = slice * Shape::kWidth;

  const KeyRange range = key_range_of_tile(p, batch, first_query, Shape::kTokens);
  const Side<T> queries{Tokens<T>::of(p.query, batch, head), first_query, 0, p.query_length};
  Side<T> keys{Tokens<T>::of(p.key, batch, kv_head), 0, range.begin, range.end};
  Side<T> values{Tokens<T>::of(p.value, batch, kv_head), 0, range.begin, range.end};
  const Weight<T> weight = Score::kHasWeight ? Weight<T>::of(p, batch, head) : Weight<T>{};
  const auto dropout = DropoutFactors<Acc>::of(p);

  OnlineSoftmax<Acc> softmax;
  Acc out[R][2 * R] = {};
  for (std::int64_t first_key = range.begin / Shape::kTokens * Shape::kTokens;
       first_key < range.end; first_key += Shape::kTokens) {
    const auto pairs = Pairs::of<Acc>(first_query, first_key);
    Acc bias[R][R];
    if (__syncthreads_or(load_biases<T>(bias, p, batch, head, pairs)) == 0) continue;
    keys.first = first_key;
    values.first = first_key;
    Acc s[R][R];
    Acc rescale[R];
    Score::score_tile(s, queries, keys, weight, p.head_dim, shared);
    finish_scores(s, bias, static_cast<Acc>(p.scale));
    softmax.update(s, rescale);
    if (dropout.active) {
      Acc factor[R][R];
      dropout.load(factor, p, batch, head, pairs);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < R; ++c) s[r][c] = factor[r][c] == 0 ? Acc(0) : s[r][c] * factor[r][c];
      }
    }
    store_tile(s, /*transposed=*/false, shared);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int e = 0; e < 2 * R; ++e) out[r][e] *= rescale[r];
    }
    accumulate_tile(out, values, dim, p.value_dim, shared);
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    const std::int64_t i = first_query + me.row * R + r;
    const bool empty = softmax.sum[r] == 0;
    const Acc inverse = empty ? Acc(0) : 1 / softmax.sum[r];
#pragma unroll
    for (int e = 0; e < 2 * R; ++e) out[r][e] *= inverse;
    if (slice == 0 && me.column == 0 && i < p.query_length) {
      static_cast<Acc*>(call.lse)[(batch * p.heads + head) * p.query_length + i] =
          empty ? -kInfinity<Acc> : softmax.maximum[r] + log(softmax.sum[r]);
    }
  }
  for_each_output<Acc>(first_query, p.query_length, dim, p.value_dim,
                       [&](int r, int e, std::int64_t i, std::int64_t d) {
                         store<T>(call.out, batch, head, i, d, out[r][e]);
                       });
}

}  // namespace torch_selfattn::kernels::cuda
