#pragma once

#include "kernels/cuda/sm80/additive_group_gradients_tile.cuh"

// Steps of the gradient kernels of the group method: what a block makes before its loop, p and g of
// a piece, and the sums that end it.
namespace torch_selfattn::kernels::cuda::sm80 {

// Weights of float16 problems, which are often below its normal numbers, times 2^14 for dv.
template <typename T>
constexpr float kWeightFactor = std::is_same_v<T, __half> ? 0x1p14f : 1.0f;

// The most by which the p of a query may differ from 1 in sum: rounded scores are off by 2^-9
// |scale| |w|_2, which is up to 0.03.
constexpr float kLargestSumError = 0.1f;

// Sums over the four lanes of a row: of all 16 products, and of those whose bit d is set.
struct BitSums {
  float all = 0;
  float bit[4] = {};

  // `pair`: 2 (bit 3 of s) + (bit 0 of s); bits 1 and 2 are the lane's.
  __device__ __forceinline__ void add(int pair, float x) {
    all += x;
    if ((pair & 1) != 0) bit[0] += x;
    if ((pair & 2) != 0) bit[3] += x;
  }
  __device__ __forceinline__ void join_lanes() {
    const int p = thread_index_here() % 4;
    bit[1] = (p & 1) != 0 ? all : 0.0f;
    bit[2] = (p & 2) != 0 ? all : 0.0f;
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      all += __shfl_xor_sync(~0u, all, lanes);
#pragma unroll
      for (int d = 0; d < 4; ++d) bit[d] += __shfl_xor_sync(~0u, bit[d], lanes);
    }
  }
  __device__ __forceinline__ float of(int d) const {
    return d == 0 ? bit[0] : d == 1 ? bit[1] : d == 2 ? bit[2] : bit[3];
  }
};

// Of the tanh of a query's feature over the keys, roughly: mean, and mean of 1 - tanh^2, if keys
// lie one third of their greatest distance from the centre, on either side. `x` is relative to it.
struct MeanOverKeys {
  float tanh;
  float slope;

  static __device__ __forceinline__ MeanOverKeys of(float x, float floor) {
    const float distance = logf((1 - floor) / floor) * (1.0f / 6);
    const float below = smaller_side(x - distance);
    const float above = smaller_side(x + distance);
    return {0.5f * (tanh_of(below) + tanh_of(above)), 0.5f * (slope_of(below) + slope_of(above))};
  }

 private:
  static __device__ __forceinline__ float tanh_of(float smaller) {
    return copysignf(1 - 2 * fabsf(smaller), smaller);
  }
  static __device__ __forceinline__ float slope_of(float smaller) {
    return 4 * fabsf(smaller) * (1 - fabsf(smaller));
  }
};

// The constant c of a quad's group (lane % 16) / 4: scale w times the mean tanh(q + c) of the
// queries, of up to 16 blocks of them. Any number is right; this one is near num/den where features
// are saturated.
template <typename T>
__device__ __forceinline__ float find_constant(const AttentionProblem& p,
                                               const GradientWorkspace& workspace,
                                               std::int64_t batch, int head, int quad) {
  constexpr std::int64_t kMostBlocks = 16;
  const int d = quad * kQuadFeatures + thread_index_here() % kQuadFeatures;
  const std::int64_t step = (workspace.query_blocks + kMostBlocks - 1) / kMostBlocks;
  const std::int64_t features = workspace.centre.features;
  const float* const sums =
      workspace.mean_tanh + (batch * p.heads + head) * workspace.query_blocks * features + d;
  float sum = 0;
  std::int64_t queries = 0;
  for (std::int64_t block = 0; block < workspace.query_blocks; block += step) {
    sum += sums[block * features];
    queries += min(std::int64_t{kRows}, p.query_length - block * kRows);
  }
  const float w = d < p.head_dim ? Weight<T>::of(p, batch, head).at(d) : 0.0f;
  float constant = static_cast<float>(p.scale) * w * (sum / static_cast<float>(queries));
  constant += __shfl_xor_sync(~0u, constant, 1);
  constant += __shfl_xor_sync(~0u, constant, 2);
  return constant;
}

// (W_s - c) phi^s of a warp's rows and quad, rounded once, for a head. Returns the sum of the
// quad's constants c, which its scores lack then.
template <typename T>
__device__ __forceinline__ float weigh_rows(uint4* to, const uint4* rows, const AttentionProblem& p,
                                            const GradientWorkspace& workspace, std::int64_t batch,
                                            int head, int quad) {
  const float constants = find_constant<T>(p, workspace, batch, head, quad);
  const auto weight = Weight<T>::of(p, batch, head);
  const auto scale = static_cast<float>(p.scale);
#pragma unroll 1
  for (int index = thread_index_here() % 32; index < kStripe * 8; index += 32) {
    const int chunk = (index % 8) ^ (index / 8 & 7);
    const float constant = __shfl_sync(~0u, constants, chunk / 2 * 4);
    float w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int d = quad * kQuadFeatures + chunk / 2 * 4 + e;
      w[e] = d < p.head_dim ? scale * weight.at(d) : 0.0f;
    }
    const uint4 x = rows[index];
    const std::uint32_t from[4] = {x.x, x.y, x.z, x.w};
    std::uint32_t weighted[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const float middle = ((s & 1) != 0 ? w[1] : -w[1]) + ((s & 2) != 0 ? w[2] : -w[2]) +
                           (chunk % 2 != 0 ? w[3] : -w[3]) - constant;
      weighted[s] =
          pack<__nv_bfloat16>((middle - w[0]) * lower(from[s]), (middle + w[0]) * upper(from[s]));
    }
    to[index] = make_uint4(weighted[0], weighted[1], weighted[2], weighted[3]);
  }
  __syncwarp();
  return (__shfl_sync(~0u, constants, 0) + __shfl_sync(~0u, constants, 4)) +
         (__shfl_sync(~0u, constants, 8) + __shfl_sync(~0u, constants, 12));
}

// p and g of a lane's two pairs of a piece.
template <typename T, bool kOwnsKeys>
struct Piece {
  static constexpr int Q = kPieceQueries<kOwnsKeys>;
  static constexpr int K = 3 - Q;
  float score[Q][K];
  float factor[Q][K];  // of dropout: 0 or 1 / (1 - p)

  __device__ __forceinline__ float& score_of(int n) {
    return score[Q == 2 ? n : 0][K == 2 ? n : 0];
  }
  __device__ __forceinline__ float factor_of(int n) const {
    return factor[Q == 2 ? n : 0][K == 2 ? n : 0];
  }

  __device__ __forceinline__ void add_bias(const AttentionProblem& p, std::int64_t batch, int head,
                                           PiecePairs<kOwnsKeys> pairs) {
    float bias[Q][K];
    load_biases<T>(bias, p, batch, head, pairs);
    finish_scores(score, bias, 1.0f);  // the scale is in the weights
  }

  __device__ __forceinline__ void draw(const Dropout& dropout, const AttentionProblem& p,
                                       std::int64_t batch, int head, PiecePairs<kOwnsKeys> pairs) {
    const std::int64_t row = (batch * p.heads + head) * p.query_length + pairs.query;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const PhiloxBlock random = philox(dropout.seed, dropout.offset,
                                        Dropout::block_index(row + q, pairs.key, p.key_length));
      const int first = static_cast<int>(pairs.key % 4);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int n = first + k;
        const std::uint32_t value = n == 0   ? random.value[0]
                                    : n == 1 ? random.value[1]
                                    : n == 2 ? random.value[2]
                                             : random.value[3];
        factor[q][k] = dropout.keep(value) ? static_cast<float>(dropout.keep_scale) : 0.0f;
      }
    }
  }
};

}  // namespace torch_selfattn::kernels::cuda::sm80
