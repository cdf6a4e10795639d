#pragma once

#include "kernels/cuda/sm80/additive_group_extremes.cuh"
#include "kernels/cuda/sm80/additive_group_gradients_workspace.h"
#include "kernels/cuda/sm80/query_statistics.cuh"

// The products of keys and of queries for the backward of the group method: rows of 16 numbers for
// each group, all times 2^28, from which ldmatrix makes operands of either kind. A block owns 64
// tokens of one (batch, head), a warp 8 of them; a thread makes the 16 products of a token and a
// group at a time, a warp stores 8 lines of 128 bytes.
// Blocks of keys find the centre first, blocks of queries use it. These also leave
//   the statistics of each query as the gradient kernels read them,
//   the sums of tanh(q + c) over their queries, from which those choose what to subtract from num /
//   den before it is rounded,
//   and whether the range is kept: redo is set if any denominator of a query may be too small, for
//   whichever key, or the weights are too large. The forward's bounds, and the same reasons.
// Traffic: the tokens once, 32 bytes of products for each of them and group; at B H = 64, L = 1024,
// E = 64 8.4 MB in and 33.5 MB out. Bound: memory. Counts per token and group: 8 MUFU, 34 FMUL, 8
// conversions, 2 STG.128.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kRowsThreads = 256;

// All 16 products of a token and a group, s = 0 ... 7 and s = 8 ... 15.
__device__ __forceinline__ void all_products(uint4 (&chunks)[2], const float (&smaller)[4],
                                             float factor) {
  const Sides sides[4] = {Sides::of(smaller[0]), Sides::of(smaller[1]), Sides::of(smaller[2]),
                          Sides::of(smaller[3])};
#pragma unroll
  for (int last = 0; last < 2; ++last) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float x =
          factor * sides[1].at((p & 1) != 0) * sides[2].at((p & 2) != 0) * sides[3].at(last != 0);
      pairs[p] = pack<__nv_bfloat16>(x * sides[0].minus, x * sides[0].plus);
    }
    chunks[last] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

template <typename T, bool kQueries>
__global__ void __launch_bounds__(kRowsThreads)
    additive_group_rows_kernel(const __grid_constant__ AttentionProblem p,
                               const __grid_constant__ GradientWorkspace workspace,
                               const float* grad_lse) {
  constexpr int kWarps = kRowsThreads / 32;
  static_assert(kWarps * 8 == kRows);
  const int features = static_cast<int>(workspace.centre.features);
  const auto features_u = static_cast<std::uint32_t>(features);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const std::int64_t stripes = kQueries ? workspace.query_stripes : workspace.key_stripes;
  const std::int64_t blocks = (stripes * kStripe + kRows - 1) / kRows;
  const std::int64_t block = blockIdx.x % blocks;
  const std::int64_t row = blockIdx.x / blocks;  // (batch, head) or (batch, key head)
  const std::int64_t heads = kQueries ? p.heads : p.kv_heads;
  const std::int64_t batch = row / heads;
  const std::int64_t head = row % heads;
  const std::int64_t kv_row =
      kQueries ? batch * p.kv_heads + head / p.group_size() : batch * p.kv_heads + head;
  const auto tokens = Tokens<T>::of(kQueries ? p.query : p.key, batch, head);
  const KeyRange range = kQueries ? KeyRange{0, p.query_length} : key_range(p, batch);

  float* const shared = shared_at<float>(0, features_u);  // the centre
  float* const sums = shared_at<float>(features_u * 4, kQueries ? kWarps * features_u : 0);
  if constexpr (!kQueries) {
    find_centre<kRowsThreads>(shared, workspace.centre, kv_row, block == 0);
    if (block == 0 && thread == 0) workspace.redo[kv_row] = 0;
  } else {
    for (int d = thread; d < features; d += kRowsThreads) {
      shared[d] = workspace.centre.centre[kv_row * features + d];
    }
    __syncthreads();
  }
  const float* const floor = workspace.centre.floor + kv_row * features;

  const std::int64_t token = block * kRows + warp * 8 + lane / 4;
  const bool inside = token >= range.begin && token < range.end;
  const bool stored = token < stripes * kStripe;
  const T* const data = tokens.data + token * tokens.token_stride;
  uint4* const out = (kQueries ? workspace.queries : workspace.keys) +
                     (row * stripes + token / kStripe) * workspace.stripe_size() +
                     token % kStripe * 8;
  bool kept = true;
#pragma unroll 1
  for (int quad = 0; quad < workspace.quads; ++quad) {
    const int group = lane % 4;
    const int first = quad * kQuadFeatures + group * 4;
    float smaller[4];
    float lowest = 1;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int d = first + e;
      float x = 0;
      if (inside && d < p.head_dim) {
        x = to_acc(data[d * tokens.dim_stride]);
        x = kQueries ? x + shared[d] : x - shared[d];
      }
      smaller[e] = smaller_side(x);
      if constexpr (kQueries) {
        lowest *= fmaxf(fabsf(smaller[e]), floor[d]);
        float tanh = inside ? copysignf(1 - 2 * fabsf(smaller[e]), smaller[e]) : 0.0f;
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) tanh += __shfl_xor_sync(~0u, tanh, lanes);
        if (lane < 4) sums[warp * features + d] = tanh;
      }
    }
    if constexpr (kQueries) {  // factors come before the product, which would underflow
      constexpr float kBoth = kFactor * kFactor;
      const float joined = lowest * kBoth * (__shfl_xor_sync(~0u, lowest, 1) * kBoth);
      kept = kept && joined >= kLeastDenominator;
    }
    uint4 chunks[2];
    all_products(chunks, smaller, kFactor);
    if (stored) {
      uint4* const to = out + quad * kStripe * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) to[(2 * group + h) ^ (token & 7)] = chunks[h];
    }
  }
  if constexpr (!kQueries) return;

  const auto norms =
      WeightNorms::of(Weight<T>::of(p, batch, head), p.head_dim, static_cast<float>(p.scale));
  kept = kept && norms.squares <= kLargestWeightNorm * kLargestWeightNorm;
  if (__syncthreads_and(kept) == 0 && thread == 0) atomicMax(workspace.redo + kv_row, 1U);
  for (int d = thread; d < features; d += kRowsThreads) {
    float sum = 0;
    for (int other = 0; other < kWarps; ++other) sum += sums[other * features + d];
    workspace.mean_tanh[(row * workspace.query_blocks + block) * features + d] = sum;
  }
  const std::int64_t mine = block * kRows + thread;
  if (thread < kRows && mine < stripes * kStripe) {
    workspace.statistics[row * stripes * kStripe + mine] =
        mine < p.query_length
            ? statistics_of(Workspace<float>::of(p, workspace.generic), row * p.query_length + mine,
                            grad_lse != nullptr ? grad_lse[row * p.query_length + mine] : 0.0f)
            : float4{kInfinity<float>, 0, 0, 0};
  }
}

// Adds up the parts of dw of 16 queries each to those that the generic kernel would leave.
constexpr int kWeightPartsThreads = 256;

__global__ void __launch_bounds__(kWeightPartsThreads)
    additive_group_weight_parts_kernel(const __grid_constant__ AttentionProblem p,
                                       const GradientWorkspace workspace) {
  constexpr std::int64_t kStripes = Tile<float>::kTokens / kStripe;
  const auto generic = Workspace<float>::of(p, workspace.generic);
  const std::int64_t tiles = Workspace<float>::query_tiles(p);
  const std::int64_t index = std::int64_t{blockIdx.x} * kWeightPartsThreads + threadIdx.x;
  const std::int64_t d = index % p.head_dim;
  const std::int64_t tile = index / p.head_dim % tiles;
  const std::int64_t row = index / p.head_dim / tiles;
  if (row >= p.batch * p.heads) return;
  float sum = 0;
  const std::int64_t stripes = (p.query_length + kStripe - 1) / kStripe;  // that a block owns
  const std::int64_t end = min((tile + 1) * kStripes, stripes);
  for (std::int64_t stripe = tile * kStripes; stripe < end; ++stripe) {
    sum +=
        workspace
            .weight_parts[(row * workspace.query_stripes + stripe) * workspace.centre.features + d];
  }
  generic.weight_parts[index] = sum;
}

}  // namespace torch_selfattn::kernels::cuda::sm80
