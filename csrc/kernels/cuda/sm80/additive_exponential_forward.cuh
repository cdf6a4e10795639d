#pragma once

#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/sm80/additive_exponential_tile.cuh"

// Forward by the exponential form. A block owns 64 queries of one (batch, head) and goes over the
// tiles of 64 keys that one of them may see:
//   scores -> online softmax -> weights to shared memory
//   -> out = out * factor + weights V, warps of 16 queries by half of the values
// while the next tile of keys and values is copied to shared memory. Where one of its tiles is
// beyond the range, a block leaves its queries to the generic kernel.
// Traffic: prepared queries once; keys and values once per tile of queries, from L2 for all but the
// first.
// Bound: issue. 4.3e9 pairs and features, at B H = 64, L = 1024, E = 64, at 4 slots each for the
// scores and 1.2 for the rest take 0.67 ms of 132 multiprocessors at 1.98 GHz.
namespace torch_selfattn::kernels::cuda::sm80 {

// Maximum and sum of exp(score - maximum) of a thread's four rows; the 16 threads of a row have the
// same maximum, and sums of their own. Scores that are bounded, |s| <= 20, keep the first maximum
// that they find: weights are at most e^40 then, and nothing is rescaled.
struct BoundedSoftmax {
  float maximum[4];
  float sum[4];

  __device__ __forceinline__ BoundedSoftmax() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      maximum[r] = -kInfinity<float>;
      sum[r] = 0;
    }
  }

  static __device__ __forceinline__ bool is_bounded(const AttentionProblem& p,
                                                    float weight_magnitude) {
    return p.mask_kind != MaskKind::kFloat && p.slopes == nullptr &&
           fabsf(static_cast<float>(p.scale)) * weight_magnitude <= 20;
  }

  // Replaces scores by weights relative to the maximum; `rescale` is for what was accumulated.
  __device__ __forceinline__ void update(float (&s)[4][4], float (&rescale)[4], bool bounded) {
    bool has_maximum = bounded;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      rescale[r] = 1;
      has_maximum = has_maximum && maximum[r] > -kInfinity<float>;
    }
    if (__all_sync(~0U, has_maximum) == 0) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float largest = maximum[r];
#pragma unroll
        for (int c = 0; c < 4; ++c) largest = maximum_or_nan(largest, s[r][c]);
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) {
          largest = maximum_or_nan(largest, __shfl_xor_sync(~0U, largest, lanes));
        }
        if (largest != -kInfinity<float>) rescale[r] = exponential(maximum[r] - largest);
        maximum[r] = largest;
        sum[r] *= rescale[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float base = maximum[r] == -kInfinity<float> ? 0.0F : maximum[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[r][c] = exponential_of_difference(s[r][c] - base);
        sum[r] += s[r][c];
      }
    }
  }

  // At the end: whole sums.
  __device__ __forceinline__ void join_sums() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) sum[r] += __shfl_xor_sync(~0U, sum[r], lanes);
    }
  }
};

template <int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 2 : 1)
    additive_exponential_forward_kernel(const __grid_constant__ AttentionForward call,
                                        const __grid_constant__ ExponentialForwardWorkspace
                                            workspace) {
  using Shape = ExponentialTile<kWidth>;
  constexpr int kTiles = kWidth / 16;  // of 8 values, for a warp
  const AttentionProblem& p = call.problem;
  constexpr std::uint32_t kStages = Shape::kTokens + kWidth;
  constexpr std::uint32_t kPairsAt = kStages + 4 * Shape::kTokens;
  float* const queries = shared_at<float>(0, Shape::kTokens);
  float* const weight = shared_at<float>(4 * Shape::kTokens, kWidth);
  float* const stages = shared_at<float>(4 * kStages, 4 * Shape::kTokens);  // keys, values; twice
  float* const pairs_at = shared_at<float>(4 * kPairsAt, Shape::kPairs);
  float* const factors = shared_at<float>(4 * (kPairsAt + Shape::kPairs), kTileTokens);
  const Thread me = Thread::me();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int warp_row = warp % 4 * 16;
  const int warp_column = warp / 4 * (kWidth / 2);

  // The last tiles of a causal problem have the most keys, so they go first.
  const std::int64_t rows = p.batch * p.heads;
  const auto& [query, key, value, unused] = workspace.operands;
  const std::int64_t row = blockIdx.x % rows;
  const std::int64_t tile = query.tiles - 1 - blockIdx.x / rows;
  const std::int64_t head = row % p.heads;
  const std::int64_t batch = row / p.heads;
  const std::int64_t kv_row = batch * p.kv_heads + head / p.group_size();
  const std::int64_t first_query = tile * kTileTokens;
  const KeyRange range = key_range_of_tile(p, batch, first_query, kTileTokens);
  const std::int64_t first_tile = range.begin / kTileTokens;
  const std::int64_t end_tile =
      range.end > range.begin ? (range.end + kTileTokens - 1) / kTileTokens : first_tile;
  const int quads = query.columns / 4;
  const bool has_dropout = p.dropout_p > 0;

  const auto start_copy = [&](std::int64_t key_tile) {
    if (key_tile < end_tile) {
      float* const to = stages + key_tile % 2 * (2 * Shape::kTokens);
      copy_tile<kWidth>(to, key.tile(kv_row, key_tile), key.columns);
      copy_tile<kWidth>(to + Shape::kTokens, value.tile(kv_row, key_tile), value.columns);
    }
    cp_async_commit();
  };
  const float largest_query = query.largest_of(row, tile);
  bool beyond = stage_weight<kWidth>(weight, p, batch, head) || largest_query == kInfinity<float>;
  beyond = beyond || any_beyond(key, kv_row, first_tile, end_tile) ||
           any_beyond(value, kv_row, first_tile, end_tile);
  beyond = __syncthreads_or(beyond) != 0;
  if (thread == 0) workspace.redo[row * query.tiles + tile] = beyond ? 1 : 0;
  if (beyond) return;
  float weight_sum = 0;
  float weight_magnitude = 0;
  for (int d = 0; d < query.columns; ++d) {
    weight_sum += weight[d];
    weight_magnitude += fabsf(weight[d]);
  }
  const bool bounded = BoundedSoftmax::is_bounded(p, weight_magnitude);

  copy_tile<kWidth>(queries, query.tile(row, tile), query.columns);
  start_copy(first_tile);
  BoundedSoftmax softmax;
  float out[kTiles][4] = {};
  for (std::int64_t key_tile = first_tile; key_tile < end_tile; ++key_tile) {
    const std::int64_t first_key = key_tile * kTileTokens;
    const auto pairs = Pairs::of<float>(first_query, first_key);
    const Pattern pattern = pattern_of(p, batch, first_query, first_key);
    bool any = pattern != Pattern::kNone;
    if (pattern == Pattern::kSome) {
      float bias[4][4];
      any = load_biases_of_any(bias, p, batch, head, pairs);
    }
    cp_async_wait<0>();
    any = __syncthreads_or(any) != 0;  // also: everybody is done with the stage that comes next
    start_copy(key_tile + 1);
    if (!any) continue;
    const float* const keys = stages + key_tile % 2 * (2 * Shape::kTokens);
    const Sharing sharing = sharing_of(largest_query, key.largest_of(kv_row, key_tile));
    float s[4][4];
    score_pairs<kWidth>(s, queries, keys, weight, weight_sum, quads, sharing);
    finish_scores_of_any(s, p, batch, head, pairs, pattern == Pattern::kPlain);
    float rescale[4];
    softmax.update(s, rescale, bounded);
    if (has_dropout) {
      const auto dropout = DropoutFactors<float>::of(p);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float factor[4];
        dropout.load_row(factor, p, batch, head, pairs, r);
#pragma unroll
        for (int c = 0; c < 4; ++c) s[r][c] = factor[c] == 0 ? 0.0F : s[r][c] * factor[c];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      put(pairs_at + (4 * me.row + r) * Shape::kPairStride + 4 * me.column,
          {s[r][0], s[r][1], s[r][2], s[r][3]});
      if (me.column == 0) factors[4 * me.row + r] = rescale[r];
    }
    __syncthreads();
    float product[kTiles][4];
    multiply<Precision::kFull, Precision::kShortColumns>(
        product, {pairs_at, Shape::kPairStride, 1}, warp_row,
        {keys + Shape::kTokens, 1, Shape::kStride}, warp_column, kTileTokens, p.dtype);
    const float factor[2] = {factors[warp_row + lane / 4], factors[warp_row + lane / 4 + 8]};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] = fmaf(out[n][e], factor[e / 2], product[n][e]);
    }
  }
  cp_async_wait<0>();

  softmax.join_sums();
  __syncthreads();
  if (me.column == 0) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const std::int64_t i = first_query + 4 * me.row + r;
      const bool empty = softmax.sum[r] == 0;
      factors[4 * me.row + r] = empty ? 0.0F : 1 / softmax.sum[r];
      if (i < p.query_length) {
        static_cast<float*>(call.lse)[row * p.query_length + i] =
            empty ? -kInfinity<float> : softmax.maximum[r] + logf(softmax.sum[r]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local = warp_row + lane / 4 + 8 * half;
    const std::int64_t i = first_query + local;
    if (i >= p.query_length) continue;
    const float inverse = factors[local];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      store_any(call.out, p.dtype, batch, head, i, warp_column + 8 * n + lane % 4 * 2, p.value_dim,
                {out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse});
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
