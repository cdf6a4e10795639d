#pragma once

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/sm80/additive_exponential_slopes.cuh"

// Backward by the exponential form, deterministic, in one pass over the pairs: a block has a range
// of keys and a range of queries of one (batch, head), and for each tile of them
//   1. operands to shared memory; dP = dO V^T, warps of 16 queries by 32 keys
//   2. scores, p and g = p (f dP - delta), 4 x 4 pairs a thread; p f and g to shared memory
//   3. dv += (p f)^T dO, warps of 16 keys by half of the values
//   4. with h = 1 / x - 1/2, of which tanh = -2 h and 1 - tanh^2 = 1 - 4 h^2:
//      sum_j g h^2 for dq_i, sum_i g h^2 for dk_j, sum_ij g h for dw
//      A lane has two features, which share a reciprocal, a warp 8 keys; it goes over the queries.
//      So dk and dw stay in registers. dq is 8 warps' parts, which go through shared memory, 8
//      queries at a time, and are added to the block's part in global memory.
// Then dq_i = scale w (G_i - 4 sum_j g h^2) with G_i = sum_j g, which is grad_lse_i whatever the
// inputs, so that is what is taken for it: small queries and keys, of which 1 - tanh^2 is all but
// constant, would lose dq to the rounding of delta otherwise. dk likewise, with the sum over i.
// Up to 32 features a warp has two queries at a time, up to 16 four.
//
// Counts per pair and feature: 4 issue slots for the scores, 7.4 for step 4, 2.6 for the rest at
// E = Ev = 64.
// Bound: issue. 4.3e9 pairs and features, at B H = 64, L = 1024, E = 64, take 1.8 ms of 132
// multiprocessors at 1.98 GHz.
// Traffic: a block's part of dq is read and written once per tile of keys, 2 x 16 KiB for 50 000
// clocks of work.
namespace torch_selfattn::kernels::cuda::sm80 {

// Statistics of 64 queries from `first` on, of one (batch, head) of which row 0 is `row`, to shared
// memory; those of queries that do not exist give p = 0 and g = 0.
template <int kWidth>
__device__ __forceinline__ void stage_statistics(const GradientMemory<kWidth>& memory,
                                                 const Workspace<float>& from, std::int64_t row,
                                                 std::int64_t first, std::int64_t length) {
  const int thread = thread_index_here();
  if (thread >= kTileTokens) return;
  const bool exists = first + thread < length;
  const std::int64_t at = row + first + thread;
  memory.statistics[thread] = exists ? from.maximum[at] : 0.0F;
  memory.statistics[kTileTokens + thread] = exists ? from.inverse_sum[at] : 0.0F;
  memory.statistics[2 * kTileTokens + thread] = exists ? from.delta[at] : 0.0F;
}

// What a block works on. Tiles are counted in 32 bits: registers are what the kernel has least of.
struct ExponentialBlock {
  int row;  // batch * H + head
  int batch;
  int head;
  int kv_row;
  int key_range;
  int query_range;

  static __device__ __forceinline__ ExponentialBlock
  of(const AttentionProblem& p, const ExponentialBackwardWorkspace& workspace) {
    // The first keys of a causal problem have the most queries, so they go first.
    const int heads = static_cast<int>(p.heads);
    const int rows = static_cast<int>(p.batch) * heads;
    const int query_ranges = static_cast<int>(workspace.query_ranges);
    const int index = static_cast<int>(blockIdx.x);
    const int row = index % rows;
    const int ranges = index / rows;
    return {row,
            row / heads,
            row % heads,
            row / static_cast<int>(p.group_size()),  // as H / group size is Hk
            ranges / query_ranges,
            ranges % query_ranges};
  }
};

// Whether the mask has an element for every pair, so that its gradient is g, as it is.
TSA_HOST_DEVICE bool has_own_mask_gradient(const AttentionProblem& p) {
  return p.mask_size[0] == p.batch && p.mask_size[1] == p.heads &&
         p.mask_size[2] == p.query_length && p.mask_size[3] == p.key_length;
}

// The gradient of a mask that has an element for every pair, of four consecutive keys.
__device__ __forceinline__ void store_mask_gradient(const AttentionBackward& call, std::int64_t row,
                                                    std::int64_t i, std::int64_t j,
                                                    const float (&g)[4]) {
  const AttentionProblem& p = call.problem;
  if (i >= p.query_length) return;
  const std::int64_t at = (row * p.query_length + i) * p.key_length + j;
  with_element(p.mask_dtype, [&](auto element) {
    using T = typename decltype(element)::type;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (j + k < p.key_length) static_cast<T*>(call.grad_mask)[at + k] = from_acc<T>(g[k]);
    }
  });
}

// p f and g of a thread's pairs, in place of dP and beside it. Returns the sum of g times the
// distance, where ALiBi slopes want it.
template <int kWidth>
__device__ __forceinline__ float gradients_of_pairs(const AttentionBackward& call,
                                                    const GradientMemory<kWidth>& memory,
                                                    const ExponentialBlock& block, int query_tile,
                                                    int key_tile, float weight_sum, int quads,
                                                    Sharing sharing, bool plain) {
  constexpr int kPairStride = ExponentialTile<kWidth>::kPairStride;
  const AttentionProblem& p = call.problem;
  const Thread me = thread_here();
  float s[4][4];
  const bool has_dropout = p.dropout_p > 0;
  const bool stores_mask = call.grad_mask != nullptr && has_own_mask_gradient(p);
  const auto pairs = Pairs::of<float>(std::int64_t{query_tile} * kTileTokens,
                                      std::int64_t{key_tile} * kTileTokens);
  score_pairs<kWidth>(s, memory.queries, memory.keys, memory.weight, weight_sum, quads, sharing);
  finish_scores_of_any(s, p, block.batch, block.head, pairs, plain);
  float slope = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float* const statistics = memory.statistics + 4 * me.row + r;
    const float maximum = statistics[0];
    const float inverse_sum = statistics[kTileTokens];
    const float delta = statistics[2 * kTileTokens];
    const int at = (4 * me.row + r) * kPairStride + 4 * me.column;
    const float4 from_output = loaded(memory.dropped + at);
    const float grad_weights[4] = {from_output.x, from_output.y, from_output.z, from_output.w};
    float factor[4] = {1, 1, 1, 1};
    if (has_dropout) {
      DropoutFactors<float>::of(p).load_row(factor, p, block.batch, block.head, pairs, r);
    }
    float dropped[4];
    float gradient[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float probability = s[r][c] == -kInfinity<float>
                                    ? 0.0F
                                    : exponential_of_difference(s[r][c] - maximum) * inverse_sum;
      // Never 0 times what may be infinite or NaN.
      const float from_weight = factor[c] == 0 ? 0.0F : factor[c] * grad_weights[c];
      gradient[c] = probability == 0 ? 0.0F : probability * (from_weight - delta);
      dropped[c] = factor[c] == 0 ? 0.0F : probability * factor[c];
    }
    put(memory.dropped + at, {dropped[0], dropped[1], dropped[2], dropped[3]});
    put(memory.gradient + at, {gradient[0], gradient[1], gradient[2], gradient[3]});
    if (stores_mask) store_mask_gradient(call, block.row, pairs.query + r, pairs.key, gradient);
    if (call.grad_slopes != nullptr) {
      const auto distances = Distances<float>::of(p, block.batch, pairs);
#pragma unroll
      for (int c = 0; c < 4; ++c) slope = fmaf(gradient[c], distances.at(r, c), slope);
    }
  }
  return slope;
}

// The gradient of the mask where no pair of a tile is allowed.
__device__ __forceinline__ void clear_mask_gradient(const AttentionBackward& call,
                                                    const ExponentialBlock& block, int query_tile,
                                                    int key_tile) {
  const auto pairs = Pairs::of<float>(std::int64_t{query_tile} * kTileTokens,
                                      std::int64_t{key_tile} * kTileTokens);
  for (int r = 0; r < 4; ++r) {
    store_mask_gradient(call, block.row, pairs.query + r, pairs.key, {0, 0, 0, 0});
  }
}

// The sum of g over 16 queries, those of this lane, for one of its warp's keys, lane % 8.
template <int kWidth>
__device__ __forceinline__ float sum_of_gradients(const GradientMemory<kWidth>& memory) {
  constexpr int kPairStride = ExponentialTile<kWidth>::kPairStride;
  const int thread = thread_index_here();
  const float* const from = memory.gradient + thread % 32 / kWarpKeys * 16 * kPairStride +
                            thread / 32 * kWarpKeys + thread % kWarpKeys;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += from[i * kPairStride];
  return sum;
}

// What a thread accumulates for a tile of keys.
template <int kWidth>
struct KeyGradients {
  static constexpr int kTiles = kWidth / 16;  // of 8 values, for a warp
  static constexpr int kSlices = kWidth / kSliceFeatures;
  float key[kSlices][kWarpKeys][2];  // sum g h^2 of a warp's keys, two features
  float value[kTiles][4];            // of a warp's 16 keys and half of the values: see multiply()
  float sum;                         // of g of one of the warp's keys over a quarter of the queries

  __device__ __forceinline__ void store_values(const ExponentialBackwardWorkspace& workspace,
                                               std::int64_t part, std::int64_t first_key,
                                               std::int64_t key_length) const {
    const int lane = thread_index_here() % 32;
    const int warp = thread_index_here() / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t j = first_key + warp % 4 * 16 + lane / 4 + 8 * half;
      if (j >= key_length) continue;
      float* const to = workspace.value_parts + (part * key_length + j) * workspace.values;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int d = warp / 4 * (kWidth / 2) + 8 * n + lane % 4 * 2;
        if (d >= workspace.values) continue;
        *reinterpret_cast<float2*>(to + d) = {value[n][2 * half], value[n][2 * half + 1]};
      }
    }
  }

  __device__ __forceinline__ void store_keys(const ExponentialBackwardWorkspace& workspace,
                                             const float* weight, const SlopeLanes& lanes,
                                             float scale, std::int64_t part, std::int64_t first_key,
                                             std::int64_t key_length) {
    // All lanes of a key have its sum of g, then all keys' sums.
#pragma unroll
    for (int other = kWarpKeys; other < 32; other *= 2) sum += __shfl_xor_sync(~0U, sum, other);
#pragma unroll
    for (int j = 0; j < kWarpKeys; ++j) {
      const float of_key = __shfl_sync(~0U, sum, j);
      const std::int64_t at = first_key + thread_index_here() / 32 * kWarpKeys + j;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const int d = slice * kSliceFeatures + lanes.feature;
        const float x = sum_of_lanes(key[slice][j][0], lanes);
        const float y = sum_of_lanes(key[slice][j][1], lanes);
        if (lanes.query != 0 || at >= key_length || d >= workspace.features) continue;
        *reinterpret_cast<float2*>(workspace.key_parts +
                                   (part * key_length + at) * workspace.features +
                                   d) = {scale * weight[d] * fmaf(-4.0F, x, of_key),
                                         scale * weight[d + 1] * fmaf(-4.0F, y, of_key)};
      }
    }
  }
};

// Begins a block's part of dq: scale w G_i, of the first range of keys, or 0.
__device__ __forceinline__ void begin_query_part(float* part, const AttentionBackward& call,
                                                 const ExponentialBackwardWorkspace& workspace,
                                                 const Workspace<float>& statistics,
                                                 const ExponentialBlock& block, const float* weight,
                                                 std::int64_t first, std::int64_t end) {
  const AttentionProblem& p = call.problem;
  const auto* const grad_lse = static_cast<const float*>(call.grad_lse);
  const std::int64_t vectors = workspace.features / 4;
  for (std::int64_t n = thread_index_here(); n < (end - first) * vectors; n += kThreads) {
    const std::int64_t i = first + n / vectors;
    const int d = static_cast<int>(n % vectors) * 4;
    const std::int64_t at = block.row * p.query_length + i;
    float x = 0;
    if (grad_lse != nullptr && block.key_range == 0 &&
        statistics.maximum[at] != -kInfinity<float> && statistics.inverse_sum[at] != 0) {
      x = static_cast<float>(p.scale) * grad_lse[at];
    }
    put(part + i * workspace.features + d,
        {weight[d] * x, weight[d + 1] * x, weight[d + 2] * x, weight[d + 3] * x});
  }
}

// dP of a tile, to where p f comes. Rounded: where p is close to 1, dP - delta is the difference of
// two numbers that are all but equal.
template <int kWidth>
__device__ __forceinline__ void store_grad_weights(const GradientMemory<kWidth>& memory,
                                                   int value_columns, DType dtype) {
  using Shape = ExponentialTile<kWidth>;
  const int lane = thread_index_here() % 32;
  const int warp = thread_index_here() / 32;
  const int first_query = warp % 4 * 16;
  const int first_key = warp / 4 * 32;
  float product[4][4];
  multiply<Precision::kRounded, Precision::kShort>(product, {memory.grad_out, Shape::kStride, 1},
                                                   first_query, {memory.values, Shape::kStride, 1},
                                                   first_key, value_columns, dtype);
  float* const to =
      memory.dropped + (first_query + lane / 4) * Shape::kPairStride + first_key + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    *reinterpret_cast<float2*>(to + 8 * n) = {product[n][0], product[n][1]};
    *reinterpret_cast<float2*>(to + 8 * n + 8 * Shape::kPairStride) = {product[n][2],
                                                                       product[n][3]};
  }
}

template <int kWidth>
__device__ __forceinline__ void add_value_gradients(float (&grad_value)[kWidth / 16][4],
                                                    const GradientMemory<kWidth>& memory,
                                                    DType dtype) {
  using Shape = ExponentialTile<kWidth>;
  const int warp = thread_index_here() / 32;
  float product[kWidth / 16][4];
  multiply<Precision::kFull, Precision::kShortColumns>(
      product, {memory.dropped, 1, Shape::kPairStride}, warp % 4 * 16,
      {memory.grad_out, 1, Shape::kStride}, warp / 4 * (kWidth / 2), kTileTokens, dtype);
#pragma unroll
  for (int n = 0; n < kWidth / 16; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) grad_value[n][e] += product[n][e];
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 2 : 1)
    additive_exponential_gradients_kernel(const __grid_constant__ AttentionBackward call,
                                          const __grid_constant__ ExponentialBackwardWorkspace
                                              workspace) {
  using Shape = ExponentialTile<kWidth>;
  constexpr int kSlices = kWidth / kSliceFeatures;
  constexpr int kPartRows = static_cast<int>(Shape::kPartRows);
  constexpr int kPartSize = kPartRows * kSliceFeatures;  // of a warp
  static_assert(kPartRows == kThreads / 32);
  const AttentionProblem& p = call.problem;
  const auto memory = GradientMemory<kWidth>::get();
  const auto block = ExponentialBlock::of(p, workspace);
  const auto& [query, key, value, grad_out] = workspace.operands;
  const int first_key_tile = block.key_range * static_cast<int>(workspace.keys_of_range);
  const int end_key_tile =
      min(first_key_tile + static_cast<int>(workspace.keys_of_range), static_cast<int>(key.tiles));
  const int first_query_tile = block.query_range * static_cast<int>(workspace.queries_of_range);
  const int end_query_tile = min(first_query_tile + static_cast<int>(workspace.queries_of_range),
                                 static_cast<int>(query.tiles));

  bool beyond = stage_weight<kWidth>(memory.weight, p, block.batch, block.head);
  beyond = beyond || any_beyond(key, block.kv_row, first_key_tile, end_key_tile) ||
           any_beyond(value, block.kv_row, first_key_tile, end_key_tile) ||
           any_beyond(query, block.row, first_query_tile, end_query_tile) ||
           any_beyond(grad_out, block.row, first_query_tile, end_query_tile);
  if (__syncthreads_or(beyond) != 0) {
    if (thread_index_here() == 0) atomicMax(workspace.redo + block.kv_row, 1U);
    return;
  }
  float weight_sum = 0;
  for (int d = 0; d < query.columns; ++d) weight_sum += memory.weight[d];
  float* const query_part =
      workspace.query_parts +
      (block.row * workspace.key_ranges + block.key_range) * p.query_length * workspace.features;
  begin_query_part(query_part, call, workspace, Workspace<float>::of(p, workspace.generic), block,
                   memory.weight, std::int64_t{first_query_tile} * kTileTokens,
                   min(std::int64_t{end_query_tile} * kTileTokens, p.query_length));

  float grad_weight[kSlices][2] = {};
  float grad_slope = 0;
  for (int key_tile = first_key_tile; key_tile < end_key_tile; ++key_tile) {
    cp_async_wait<0>();
    __syncthreads();
    copy_tile<kWidth>(memory.keys, key.tile(block.kv_row, key_tile), key.columns);
    copy_tile<kWidth>(memory.values, value.tile(block.kv_row, key_tile), value.columns);
    cp_async_commit();

    KeyGradients<kWidth> sums = {};
    for (int tile = first_query_tile; tile < end_query_tile; ++tile) {
      Sharing sharing = Sharing::kOne;
      bool plain = false;
      {
        const std::int64_t first_query = std::int64_t{tile} * kTileTokens;
        const std::int64_t first_key = std::int64_t{key_tile} * kTileTokens;
        const Pattern pattern = pattern_of(p, block.batch, first_query, first_key);
        plain = pattern == Pattern::kPlain;
        bool any = pattern != Pattern::kNone;
        if (pattern == Pattern::kSome && p.mask_kind != MaskKind::kNone) {
          float bias[4][4];
          any = __syncthreads_or(load_biases_of_any(bias, p, block.batch, block.head,
                                                    Pairs::of<float>(first_query, first_key))) != 0;
        }
        if (!any) {
          if (call.grad_mask != nullptr && has_own_mask_gradient(p)) {
            clear_mask_gradient(call, block, tile, key_tile);
          }
          continue;
        }
        __syncthreads();
        copy_tile<kWidth>(memory.queries, query.tile(block.row, tile), query.columns);
        copy_tile<kWidth>(memory.grad_out, grad_out.tile(block.row, tile), grad_out.columns);
        cp_async_commit();
        stage_statistics(memory, Workspace<float>::of(p, workspace.generic),
                         block.row * p.query_length, first_query, p.query_length);
        sharing =
            sharing_of(query.largest_of(block.row, tile), key.largest_of(block.kv_row, key_tile));
      }
      cp_async_wait<0>();
      __syncthreads();
      store_grad_weights(memory, value.columns, p.dtype);
      __syncthreads();
      grad_slope += gradients_of_pairs(call, memory, block, tile, key_tile, weight_sum,
                                       query.columns / 4, sharing, plain);
      __syncthreads();
      sums.sum += sum_of_gradients(memory);
      if (p.value_dim > 0) add_value_gradients(sums.value, memory, p.dtype);
      __syncthreads();
      const auto lanes = SlopeLanes::of(p.head_dim);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if (slice * kSliceFeatures >= query.columns) break;
#pragma unroll 1
        for (int first = 0; first < kTileTokens; first += kPartRows) {
          float* const parts = memory.parts + first / kPartRows % 2 * (kThreads / 32 * kPartSize);
          const auto query_sum =
              QueryPart::of(query_part, tile * kTileTokens + first,
                            static_cast<int>(p.query_length), query.columns, slice);
          if (sharing != Sharing::kOne) {
            add_slopes_of_any<kWidth, true>(sums.key[slice], grad_weight[slice], parts, memory,
                                            lanes, first, slice);
          } else {
            add_slopes_of_any<kWidth, false>(sums.key[slice], grad_weight[slice], parts, memory,
                                             lanes, first, slice);
          }
          __syncthreads();
          query_sum.add(parts, memory.weight + slice * kSliceFeatures,
                        -4 * static_cast<float>(p.scale));
        }
      }
    }
    const std::int64_t part = block.row * workspace.query_ranges + block.query_range;
    const std::int64_t first_key = std::int64_t{key_tile} * kTileTokens;
    sums.store_values(workspace, part, first_key, p.key_length);
    sums.store_keys(workspace, memory.weight, SlopeLanes::of(p.head_dim),
                    static_cast<float>(p.scale), part, first_key, p.key_length);
  }

  // The parts of dw, sum g tanh, and of the slope's gradient, over the warps in order.
  cp_async_wait<0>();
  __syncthreads();
  float* const sums = memory.parts;  // [8 warps][kWidth]
  const int thread = thread_index_here();
  const auto lanes = SlopeLanes::of(p.head_dim);
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float x = sum_of_lanes(grad_weight[slice][e], lanes);
      if (lanes.query == 0) {
        sums[thread / 32 * kWidth + slice * kSliceFeatures + lanes.feature + e] = x;
      }
    }
  }
  float* const slope_sums = sums + kThreads / 32 * kWidth;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    grad_slope += __shfl_xor_sync(~0U, grad_slope, other);
  }
  if (thread % 32 == 0) slope_sums[thread / 32] = grad_slope;
  __syncthreads();
  const std::int64_t part =
      (block.row * workspace.key_ranges + block.key_range) * workspace.query_ranges +
      block.query_range;
  if (thread < workspace.features) {
    float sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += sums[warp * kWidth + thread];
    workspace.weight_parts[part * workspace.features + thread] = -2 * sum;
  }
  if (thread == 0) {
    float sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += slope_sums[warp];
    workspace.slope_parts[part] = sum;
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
