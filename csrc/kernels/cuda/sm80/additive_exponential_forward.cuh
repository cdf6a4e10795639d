#pragma once

#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/sm80/additive_exponential_tile.cuh"

// Forward by the exponential form. A block owns 64 queries of one (batch, head) and goes over the
// tiles of 64 keys that one of them may see:
//   e^2k and values to shared memory -> scores -> online softmax -> weights to shared memory
//   -> out = out * factor + weights V, warps of 16 queries by half of the values
// It ends at once where a number is beyond the range, and leaves the tile to the generic kernel.
// Traffic: q once; k and v once per tile of queries, from L2 for all but the first.
// Bound: issue. At B H = 64, L = 1024, E = 64, 4.3e9 pairs and features: 0.54 ms at 3.75 slots each,
// of 132 multiprocessors at 1.755 GHz; products with V add 3 %.
namespace torch_selfattn::kernels::cuda::sm80 {

template <int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 2 : 1)
    additive_exponential_forward_kernel(const __grid_constant__ AttentionForward call,
                                        std::uint8_t* redo) {
  using Shape = ExponentialTile<kWidth>;
  constexpr int kTiles = kWidth / 16;  // of 8 values, for a warp
  const AttentionProblem& p = call.problem;
  float* const queries = shared_at<float>(0, Shape::kTokens);
  float* const keys = shared_at<float>(4 * Shape::kTokens, Shape::kTokens);
  float* const weight = shared_at<float>(8 * Shape::kTokens, kWidth);
  float* const values = shared_at<float>(4 * Shape::kScoreOperands, Shape::kTokens);
  float* const pairs_at =
      shared_at<float>(4 * (Shape::kScoreOperands + Shape::kTokens), Shape::kPairs);
  float* const factors = shared_at<float>(
      4 * (Shape::kScoreOperands + Shape::kTokens + Shape::kPairs), kTileTokens);
  const Thread me = Thread::me();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp % 4 * 16;
  const int warp_column = warp / 4 * (kWidth / 2);

  // The last tiles of a causal problem have the most keys, so they go first.
  const std::int64_t rows = p.batch * p.heads;
  const std::int64_t tiles = (p.query_length - 1) / kTileTokens + 1;
  const std::int64_t row = blockIdx.x % rows;
  const std::int64_t tile = tiles - 1 - blockIdx.x / rows;
  const std::int64_t head = row % p.heads;
  const std::int64_t batch = row / p.heads;
  const std::int64_t kv_head = head / p.group_size();
  const std::int64_t first_query = tile * kTileTokens;
  const KeyRange range = key_range_of_tile(p, batch, first_query, kTileTokens);
  const auto key_tokens = AnyTokens::of(p.key, p.dtype, batch, kv_head, p.head_dim);
  const auto value_tokens = AnyTokens::of(p.value, p.dtype, batch, kv_head, p.value_dim);
  const int quads = static_cast<int>((p.head_dim + 3) / 4);
  const auto dropout = DropoutFactors<float>::of(p);

  const float largest_query = stage_tokens<kWidth, true>(
      queries, AnyTokens::of(p.query, p.dtype, batch, head, p.head_dim), first_query, 0,
      p.query_length);
  const bool weight_beyond = stage_weight<kWidth>(weight, p, batch, head);
  bool beyond = __syncthreads_or(weight_beyond || largest_query > kLimitOfTwo) != 0;
  const bool queries_by_fours = __syncthreads_or(largest_query > kLimitOfFour) == 0;
  float weight_sum = 0;
  for (int d = 0; d < p.head_dim; ++d) weight_sum += weight[d];

  OnlineSoftmax<float> softmax;
  float out[kTiles][4] = {};
  for (std::int64_t first_key = range.begin / kTileTokens * kTileTokens;
       first_key < range.end && !beyond; first_key += kTileTokens) {
    const auto pairs = Pairs::of<float>(first_query, first_key);
    float s[4][4];
    float bias[4][4];
    if (__syncthreads_or(load_biases_of_any(bias, p, batch, head, pairs)) == 0) continue;
    const float largest_key =
        stage_tokens<kWidth, true>(keys, key_tokens, first_key, range.begin, range.end);
    const float largest_value =
        stage_tokens<kWidth, false>(values, value_tokens, first_key, range.begin, range.end);
    beyond = __syncthreads_or(largest_key > kLimitOfTwo || !(largest_value <= kLargestValue)) != 0;
    const bool by_fours = __syncthreads_or(largest_key > kLimitOfFour) == 0 && queries_by_fours;
    if (beyond) break;
    score_pairs<kWidth>(s, queries, keys, weight, weight_sum, quads, by_fours);
    finish_scores(s, bias, static_cast<float>(p.scale));
    float rescale[4];
    softmax.update(s, rescale);
    if (dropout.active) {
      float factor[4][4];
      dropout.load(factor, p, batch, head, pairs);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) s[r][c] = factor[r][c] == 0 ? 0.0F : s[r][c] * factor[r][c];
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
    multiply(product, {pairs_at, Shape::kPairStride, 1}, warp_row, {values, 1, Shape::kStride},
             warp_column, kTileTokens);
    const float factor[2] = {factors[warp_row + lane / 4], factors[warp_row + lane / 4 + 8]};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] = fmaf(out[n][e], factor[e / 2], product[n][e]);
    }
  }
  if (threadIdx.x == 0) redo[row * tiles + tile] = beyond ? 1 : 0;
  if (beyond) return;

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
                {out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse, 0, 0}, 2);
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
