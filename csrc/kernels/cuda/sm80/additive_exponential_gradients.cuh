#pragma once

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/sm80/additive_exponential_tile.cuh"

// Backward by the exponential form, deterministic, in one pass over the pairs: a block has a range
// of keys and a range of queries of one (batch, head), and for each tile of them
//   1. e^2q and dO to shared memory; dP = dO V^T, warps of 16 queries by 32 keys
//   2. scores, p and g = p (f dP - delta), 4 x 4 pairs a thread; p f and g to shared memory
//   3. dv += (p f)^T dO, warps of 16 keys by half of the values
//   4. with r = 1 / x, of which tanh = 1 - 2 r and 1 - tanh^2 = 4 (r - r^2):
//      dq_i += sum_j g (r - r^2), dk_j += sum_i g (r - r^2), dw += sum_ij g r
//      A lane has two features, which share a reciprocal, a warp 8 keys; it goes over the queries. So
//      dk and dw stay in registers. dq is 8 warps' parts, which go through shared memory, 8 queries
//      at a time, and are added to the block's part in global memory.
// Factors w, 4 and scale are applied to sums. (r - r^2 has the absolute error of 1 - tanh^2.)
// Up to 32 features a warp has two queries at a time, up to 16 four.
//
// Counts per pair and feature: 3.75 issue slots for the scores, 7 for 4., of which half a reciprocal
// each; 0.7 for the rest at E = Ev = 64. Bound: issue; 4.3e9 pairs and features, at B H = 64,
// L = 1024, E = 64, take 1.65 ms of 132 multiprocessors at 1.755 GHz.
// Traffic: a block's part of dq is read and written once per tile of keys, 2 x 16 KiB for 24 000
// clocks of work.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kWarpKeys = kTileTokens / (kThreads / 32);  // of a warp in step 4
constexpr int kSliceFeatures = 64;                        // of a warp at once

template <int kWidth>
struct GradientMemory {
  using Shape = ExponentialTile<kWidth>;
  float* queries;   // exponentials
  float* keys;      // exponentials
  float* weight;
  float* values;
  float* gradient;  // g, [query][key]
  float* grad_out;
  float* dropped;   // dP, then p f
  float* parts;     // of dq, in place of the two above: [2][8 warps][8 queries][64]

  static __device__ __forceinline__ GradientMemory get() {
    constexpr std::uint32_t kValues = Shape::kScoreOperands;
    constexpr std::uint32_t kGradient = kValues + Shape::kTokens;
    constexpr std::uint32_t kLast = kGradient + Shape::kPairs;
    float* const last = shared_at<float>(4 * kLast, Shape::kPartsOrOperands);
    return {shared_at<float>(0, Shape::kTokens),
            shared_at<float>(4 * Shape::kTokens, Shape::kTokens),
            shared_at<float>(8 * Shape::kTokens, kWidth),
            shared_at<float>(4 * kValues, Shape::kTokens),
            shared_at<float>(4 * kGradient, Shape::kPairs),
            last,
            last + Shape::kTokens,
            last};
  }
};

// What a block works on.
struct ExponentialBlock {
  std::int64_t row;  // batch * H + head
  std::int64_t key_range;
  std::int64_t query_range;

  static __device__ __forceinline__ ExponentialBlock of(const AttentionProblem& p,
                                                        const ExponentialWorkspace& workspace) {
    // The first keys of a causal problem have the most queries, so they go first.
    std::int64_t index = blockIdx.x;
    const std::int64_t rows = p.batch * p.heads;
    const std::int64_t row = index % rows;
    index /= rows;
    return {row, index / workspace.query_ranges, index % workspace.query_ranges};
  }
};

// p f and g of a thread's pairs, in place of dP and beside it. Returns the sum of g.
template <int kWidth>
__device__ __forceinline__ float gradients_of_pairs(
    const AttentionBackward& call, const Workspace<float>& statistics,
    const DropoutFactors<float>& dropout, const GradientMemory<kWidth>& memory, std::int64_t batch,
    std::int64_t head, Pairs pairs, float weight_sum, int quads, bool by_fours) {
  constexpr int kPairStride = ExponentialTile<kWidth>::kPairStride;
  const AttentionProblem& p = call.problem;
  const Thread me = Thread::me();
  float s[4][4];
  float bias[4][4];
  score_pairs<kWidth>(s, memory.queries, memory.keys, memory.weight, weight_sum, quads, by_fours);
  load_biases_of_any(bias, p, batch, head, pairs);
  finish_scores(s, bias, static_cast<float>(p.scale));
  float factor[4][4];
  if (dropout.active) dropout.load(factor, p, batch, head, pairs);
  const std::int64_t first_row = (batch * p.heads + head) * p.query_length + pairs.query;
  float sum = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const bool exists = pairs.query + r < p.query_length;
    const float maximum = exists ? statistics.maximum[first_row + r] : 0.0F;
    const float inverse_sum = exists ? statistics.inverse_sum[first_row + r] : 0.0F;
    const float delta = exists ? statistics.delta[first_row + r] : 0.0F;
    const int at = (4 * me.row + r) * kPairStride + 4 * me.column;
    const float4 from_output = loaded(memory.dropped + at);
    const float grad_weights[4] = {from_output.x, from_output.y, from_output.z, from_output.w};
    float dropped[4];
    float gradient[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float f = dropout.active ? factor[r][c] : 1.0F;
      const float probability =
          s[r][c] == -kInfinity<float> ? 0.0F : expf(s[r][c] - maximum) * inverse_sum;
      gradient[c] = probability == 0 ? 0.0F : probability * (f * grad_weights[c] - delta);
      dropped[c] = probability * f;
      sum += gradient[c];
    }
    put(memory.dropped + at, {dropped[0], dropped[1], dropped[2], dropped[3]});
    put(memory.gradient + at, {gradient[0], gradient[1], gradient[2], gradient[3]});
  }
  return sum;
}

// Where the lanes of a warp are in step 4: `queries` of them at once, two features for a lane.
struct SlopeLanes {
  int queries;  // 1, 2 or 4
  int query;    // of this lane, of those
  int feature;  // the first of this lane's

  static __device__ __forceinline__ SlopeLanes of(std::int64_t head_dim) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int lanes = head_dim > 32 ? 32 : head_dim > 16 ? 16 : 8;  // of a query
    return {32 / lanes, lane / lanes, lane % lanes * 2};
  }
};

// Step 4 for 8 queries from `first` on and the features of slice `slice`: leaves this warp's part of
// dq in `parts`, [8 queries][64].
template <int kWidth>
__device__ __forceinline__ void add_slopes(float (&grad_key)[kWarpKeys][2], float (&grad_weight)[2],
                                           float* parts, const GradientMemory<kWidth>& memory,
                                           const SlopeLanes& lanes, int first, int slice) {
  using Shape = ExponentialTile<kWidth>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int feature = slice * kSliceFeatures + lanes.feature;
  const int first_key = warp * kWarpKeys;
  float2 b[kWarpKeys];
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) {
    b[j] = *reinterpret_cast<const float2*>(
        memory.keys + slot_of_token(first_key + j) * Shape::kStride + feature);
  }
#pragma unroll 2
  for (int n = 0; n < static_cast<int>(Shape::kPartRows); n += lanes.queries) {
    const int local = n + lanes.query;
    const int query = first + local;
    const float2 a = *reinterpret_cast<const float2*>(
        memory.queries + slot_of_token(query) * Shape::kStride + feature);
    const float* const row = memory.gradient + query * Shape::kPairStride + first_key;
    const float4 low = loaded(row);
    const float4 high = loaded(row + 4);
    const float g[kWarpKeys] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float2 sum = {0, 0};
#pragma unroll
    for (int j = 0; j < kWarpKeys; ++j) {
      const float x0 = fmaf(a.x, b[j].x, 1.0F);
      const float x1 = fmaf(a.y, b[j].y, 1.0F);
      const float inverse = reciprocal_approx(x0 * x1);
      const float r0 = x1 * inverse;
      const float r1 = x0 * inverse;
      const float y0 = fmaf(-r0, r0, r0);
      const float y1 = fmaf(-r1, r1, r1);
      sum.x = fmaf(g[j], y0, sum.x);
      sum.y = fmaf(g[j], y1, sum.y);
      grad_key[j][0] = fmaf(g[j], y0, grad_key[j][0]);
      grad_key[j][1] = fmaf(g[j], y1, grad_key[j][1]);
      grad_weight[0] = fmaf(g[j], r0, grad_weight[0]);
      grad_weight[1] = fmaf(g[j], r1, grad_weight[1]);
    }
    *reinterpret_cast<float2*>(parts + local * kSliceFeatures + lanes.feature) = sum;
  }
}

// Adds the 8 warps' parts of 8 queries to the block's part of dq, of which `out` is the first
// element of the first query; `fresh`: nothing has been added to it before.
__device__ __forceinline__ void add_query_parts(float* out, const float* parts,
                                                const AttentionProblem& p, std::int64_t features,
                                                const float* weight, float factor,
                                                std::int64_t first_query, int slice, bool fresh) {
  const int thread = static_cast<int>(threadIdx.x);
  const int local = thread / 32;
  const int feature = thread % 32 * 2;
  const int d = slice * kSliceFeatures + feature;
  if (first_query + local >= p.query_length || d >= features) return;
  float2 sum = {0, 0};
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    const float2 x = *reinterpret_cast<const float2*>(
        parts + (warp * (kThreads / 32) + local) * kSliceFeatures + feature);
    sum.x += x.x;
    sum.y += x.y;
  }
  float2* const to = reinterpret_cast<float2*>(out + local * features + d);
  float2 before = {0, 0};
  if (!fresh) before = *to;
  *to = {fmaf(factor * weight[d], sum.x, before.x), fmaf(factor * weight[d + 1], sum.y, before.y)};
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 2 : 1)
    additive_exponential_gradients_kernel(const __grid_constant__ AttentionBackward call,
                                          const __grid_constant__ ExponentialWorkspace workspace) {
  using Shape = ExponentialTile<kWidth>;
  constexpr int kTiles = kWidth / 16;  // of 8 values, for a warp
  constexpr int kSlices = kWidth / kSliceFeatures;
  constexpr int kPartRows = static_cast<int>(Shape::kPartRows);
  constexpr int kPartSize = kThreads / 32 * kPartRows * kSliceFeatures;
  static_assert(kPartRows == kThreads / 32);
  const AttentionProblem& p = call.problem;
  const auto memory = GradientMemory<kWidth>::get();
  const auto block = ExponentialBlock::of(p, workspace);
  const auto statistics = Workspace<float>::of(p, workspace.generic);
  const auto dropout = DropoutFactors<float>::of(p);
  const auto lanes = SlopeLanes::of(p.head_dim);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int warp_row = warp % 4 * 16;
  const int warp_column = warp / 4 * (kWidth / 2);
  const int warp_key = warp / 4 * 32;
  const int quads = static_cast<int>((p.head_dim + 3) / 4);
  const int value_depth = static_cast<int>((p.value_dim + 7) / 8 * 8);
  const int slices = static_cast<int>((p.head_dim + kSliceFeatures - 1) / kSliceFeatures);

  const std::int64_t head = block.row % p.heads;
  const std::int64_t batch = block.row / p.heads;
  const std::int64_t kv_head = head / p.group_size();
  const auto query_tokens = AnyTokens::of(p.query, p.dtype, batch, head, p.head_dim);
  const auto key_tokens = AnyTokens::of(p.key, p.dtype, batch, kv_head, p.head_dim);
  const auto value_tokens = AnyTokens::of(p.value, p.dtype, batch, kv_head, p.value_dim);
  const auto grad_tokens = AnyTokens::of(call.grad_out, p.dtype, batch, head, p.value_dim);
  const float scale = static_cast<float>(p.scale);
  float* const query_part =
      workspace.query_parts +
      (block.row * workspace.key_ranges + block.key_range) * p.query_length * workspace.features;
  const std::int64_t key_part = block.row * workspace.query_ranges + block.query_range;

  bool beyond = stage_weight<kWidth>(memory.weight, p, batch, head);
  __syncthreads();
  float weight_sum = 0;
  for (int d = 0; d < p.head_dim; ++d) weight_sum += memory.weight[d];
  float grad_weight[kSlices][2] = {};
  float gradient_sum = 0;

  const std::int64_t first_tile = block.key_range * workspace.keys_of_range;
  const std::int64_t end_tile = min(first_tile + workspace.keys_of_range, workspace.key_tiles);
  const std::int64_t first_query_tile = block.query_range * workspace.queries_of_range;
  const std::int64_t end_query_tile =
      min(first_query_tile + workspace.queries_of_range, workspace.query_tiles);
  for (std::int64_t key_tile = first_tile; key_tile < end_tile; ++key_tile) {
    const std::int64_t first_key = key_tile * kTileTokens;
    const bool fresh = key_tile == first_tile;
    const KeyRange existing = key_range(p, batch);
    __syncthreads();
    const float largest_key = stage_tokens<kWidth, true>(memory.keys, key_tokens, first_key,
                                                         existing.begin, existing.end);
    const float largest_value = stage_tokens<kWidth, false>(memory.values, value_tokens, first_key,
                                                            existing.begin, existing.end);
    beyond = beyond || largest_key > kLimitOfTwo || !(largest_value <= kLargestValue);
    const bool keys_by_fours = __syncthreads_or(largest_key > kLimitOfFour) == 0;

    float grad_key[kSlices][kWarpKeys][2] = {};
    float grad_value[kTiles][4] = {};
    for (std::int64_t tile = first_query_tile; tile < end_query_tile; ++tile) {
      const std::int64_t first_query = tile * kTileTokens;
      const auto pairs = Pairs::of<float>(first_query, first_key);
      const KeyRange range = key_range_of_tile(p, batch, first_query, kTileTokens);
      bool any = range.begin < first_key + kTileTokens && range.end > first_key;
      if (any && p.mask_kind != MaskKind::kNone) {
        float bias[4][4];
        any = __syncthreads_or(load_biases_of_any(bias, p, batch, head, pairs)) != 0;
      }
      float* const query_out = query_part + first_query * workspace.features;
      if (!any) {
        if (!fresh) continue;
        const std::int64_t count =
            min(p.query_length - first_query, std::int64_t{kTileTokens}) * workspace.features;
        for (std::int64_t n = thread; n < count; n += kThreads) query_out[n] = 0;
        continue;
      }
      __syncthreads();
      const float largest_query =
          stage_tokens<kWidth, true>(memory.queries, query_tokens, first_query, 0, p.query_length);
      const float largest_grad = stage_tokens<kWidth, false>(memory.grad_out, grad_tokens,
                                                             first_query, 0, p.query_length);
      beyond = beyond || largest_query > kLimitOfTwo || !(largest_grad <= kLargestValue);
      const bool by_fours = __syncthreads_or(largest_query > kLimitOfFour) == 0 && keys_by_fours;
      if (__syncthreads_or(beyond) != 0) {
        if (thread == 0) {
          atomicMax(workspace.redo + batch * p.kv_heads + kv_head, 1U);
        }
        return;
      }
      float product[4][4];
      multiply(product, {memory.grad_out, Shape::kStride, 1}, warp_row,
               {memory.values, Shape::kStride, 1}, warp_key, value_depth);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float* const to = memory.dropped + (warp_row + lane / 4) * Shape::kPairStride + warp_key +
                          8 * n + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {product[n][0], product[n][1]};
        *reinterpret_cast<float2*>(to + 8 * Shape::kPairStride) = {product[n][2], product[n][3]};
      }
      __syncthreads();
      gradient_sum += gradients_of_pairs(call, statistics, dropout, memory, batch, head, pairs,
                                         weight_sum, quads, by_fours);
      __syncthreads();
      if (p.value_dim > 0) {
        float of_tile[kTiles][4];
        multiply(of_tile, {memory.dropped, 1, Shape::kPairStride}, warp_row,
                 {memory.grad_out, 1, Shape::kStride}, warp_column, kTileTokens);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) grad_value[n][e] += of_tile[n][e];
        }
      }
      __syncthreads();
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if (slice >= slices) break;
#pragma unroll 1
        for (int first = 0; first < kTileTokens; first += kPartRows) {
          float* const parts = memory.parts + first / kPartRows % 2 * kPartSize;
          add_slopes<kWidth>(grad_key[slice], grad_weight[slice],
                             parts + warp * kPartRows * kSliceFeatures, memory, lanes, first, slice);
          __syncthreads();
          add_query_parts(query_out + first * workspace.features, parts, p, workspace.features,
                          memory.weight, 4 * scale, first_query + first, slice, fresh);
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t j = first_key + warp_row + lane / 4 + 8 * half;
      if (j >= p.key_length) continue;
      float* const to = workspace.value_parts + (key_part * p.key_length + j) * workspace.values;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int d = warp_column + 8 * n + lane % 4 * 2;
        if (d >= workspace.values) continue;
        *reinterpret_cast<float2*>(to + d) = {grad_value[n][2 * half], grad_value[n][2 * half + 1]};
      }
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const int d = slice * kSliceFeatures + lanes.feature;
#pragma unroll
      for (int j = 0; j < kWarpKeys; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = grad_key[slice][j][e];
          for (int other = 32 / lanes.queries; other < 32; other *= 2) {
            x += __shfl_xor_sync(~0U, x, other);
          }
        }
        const std::int64_t key = first_key + warp * kWarpKeys + j;
        if (lanes.query != 0 || key >= p.key_length || d >= workspace.features) continue;
        *reinterpret_cast<float2*>(
            workspace.key_parts + (key_part * p.key_length + key) * workspace.features + d) = {
            4 * scale * memory.weight[d] * grad_key[slice][j][0],
            4 * scale * memory.weight[d + 1] * grad_key[slice][j][1]};
      }
    }
  }

  // The part of dw: sum g tanh = sum g - 2 sum g r, over the warps in order.
  __syncthreads();
  float* const sums = memory.parts;  // [8 warps][kWidth], then of g
  float* const sums_of_g = sums + kThreads / 32 * kWidth;
#pragma unroll
  for (int lanes_left = 16; lanes_left > 0; lanes_left /= 2) {
    gradient_sum += __shfl_xor_sync(~0U, gradient_sum, lanes_left);
  }
  if (lane == 0) sums_of_g[warp] = gradient_sum;
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = grad_weight[slice][e];
      for (int other = 32 / lanes.queries; other < 32; other *= 2) {
        x += __shfl_xor_sync(~0U, x, other);
      }
      if (lanes.query == 0) sums[warp * kWidth + slice * kSliceFeatures + lanes.feature + e] = x;
    }
  }
  __syncthreads();
  if (thread < workspace.features) {
    float of_r = 0;
    float of_g = 0;
    for (int other = 0; other < kThreads / 32; ++other) {
      of_r += sums[other * kWidth + thread];
      of_g += sums_of_g[other];
    }
    const std::int64_t part = (block.row * workspace.key_ranges + block.key_range) *
                                  workspace.query_ranges +
                              block.query_range;
    workspace.weight_parts[part * workspace.features + thread] = of_g - 2 * of_r;
  }
}

// Before the gradients: no (batch, key head) is left to the generic kernel yet.
__global__ void __launch_bounds__(kThreads)
    additive_exponential_begin_kernel(std::uint32_t* redo, std::int64_t count) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < count) redo[n] = 0;
}

// Parts (rows, count, tokens, columns) of a gradient of `dims` columns.
struct GradientParts {
  const float* parts;
  View gradient;  // (B, heads, tokens, dims)
  DType dtype;
  std::int64_t heads;
  std::int64_t rows;  // B * heads
  std::int64_t count;
  std::int64_t tokens;
  std::int64_t columns;  // a multiple of 4
  std::int64_t dims;

  __host__ __device__ std::int64_t blocks() const {
    return (rows * tokens * (columns / 4) + kThreads - 1) / kThreads;
  }
};

// Adds parts up, in order, four columns a thread.
__global__ void __launch_bounds__(kThreads)
    additive_exponential_sum_kernel(const __grid_constant__ GradientParts call) {
  std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t vectors = call.columns / 4;
  const std::int64_t d = index % vectors * 4;
  index /= vectors;
  const std::int64_t token = index % call.tokens;
  const std::int64_t row = index / call.tokens;
  if (row >= call.rows) return;
  const std::int64_t part = call.tokens * call.columns;
  const float* from = call.parts + row * call.count * part + token * call.columns + d;
  float4 sum = loaded(from);
  for (std::int64_t n = 1; n < call.count; ++n) {
    const float4 x = loaded(from + n * part);
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }
  store_any(call.gradient, call.dtype, row / call.heads, row % call.heads, token,
            static_cast<int>(d), call.dims, {sum.x, sum.y, sum.z, sum.w}, 4);
}

// Parts of dw where the generic kernel would leave them, whose last launch adds them up: all of a
// (batch, head) in the first tile's place.
__global__ void __launch_bounds__(kThreads)
    additive_exponential_weight_kernel(const __grid_constant__ AttentionProblem p,
                                       const __grid_constant__ ExponentialWorkspace workspace) {
  const auto generic = Workspace<float>::of(p, workspace.generic);
  const std::int64_t tiles = Workspace<float>::query_tiles(p);
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t d = index % p.head_dim;
  const std::int64_t row = index / p.head_dim;
  if (row >= p.batch * p.heads) return;
  const std::int64_t count = workspace.key_ranges * workspace.query_ranges;
  float sum = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    sum += workspace.weight_parts[(row * count + n) * workspace.features + d];
  }
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    generic.weight_parts[(row * tiles + tile) * p.head_dim + d] = tile == 0 ? sum : 0.0F;
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
