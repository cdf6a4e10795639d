#pragma once

#include "kernels/cuda/sm80/additive_exponential_tile.cuh"

// Step 4 of the exponential form's backward (additive_exponential_gradients.cuh): from g and the
// exponentials of a tile to the sums of dq, dk and dw.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kWarpKeys = kTileTokens / (kThreads / 32);  // of a warp in step 4
constexpr int kSliceFeatures = 64;                        // of a warp at once

template <int kWidth>
struct GradientMemory {
  using Shape = ExponentialTile<kWidth>;
  float* queries;  // exponentials
  float* keys;     // exponentials
  float* values;
  float* weight;
  float* statistics;  // maximum, 1 / sum, delta; of 64 queries each
  float* gradient;    // g, [query][key]
  float* grad_out;
  float* dropped;  // dP, then p f
  float* parts;    // of dq, in place of the two above: [2][8 warps][8 queries][64]

  static __device__ __forceinline__ GradientMemory get() {
    constexpr std::uint32_t kWeight = 3 * Shape::kTokens;
    constexpr std::uint32_t kStatistics = kWeight + kWidth;
    constexpr std::uint32_t kGradient = kStatistics + 3 * kTileTokens;
    constexpr std::uint32_t kLast = kGradient + Shape::kPairs;
    float* const last = shared_at<float>(4 * kLast, Shape::kPartsOrOperands);
    return {shared_at<float>(0, Shape::kTokens),
            shared_at<float>(4 * Shape::kTokens, Shape::kTokens),
            shared_at<float>(8 * Shape::kTokens, Shape::kTokens),
            shared_at<float>(4 * kWeight, kWidth),
            shared_at<float>(4 * kStatistics, 3 * kTileTokens),
            shared_at<float>(4 * kGradient, Shape::kPairs),
            last,
            last + Shape::kTokens,
            last};
  }
};

// Where the lanes of a warp are in step 4: `queries` of them at once, two features for a lane.
struct SlopeLanes {
  int queries;  // 1, 2 or 4
  int query;    // of this lane, of those
  int feature;  // the first of this lane's

  static __device__ __forceinline__ SlopeLanes of(std::int64_t head_dim) {
    const int lane = thread_index_here() % 32;
    const int lanes = head_dim > 32 ? 32 : head_dim > 16 ? 16 : 8;  // of a query
    return {32 / lanes, lane / lanes, lane % lanes * 2};
  }
};

// For the reciprocals of x of two features of a pair: x1 / (x0 x1) and x0 / (x0 x1), or each by
// itself where x0 x1 may overflow.
struct ReciprocalPair {
  float x0;
  float x1;
  float inverse;

  template <bool kShared>
  static __device__ __forceinline__ ReciprocalPair of(float2 a, float2 b) {
    const float x0 = fmaf(a.x, b.x, 1.0F);
    const float x1 = fmaf(a.y, b.y, 1.0F);
    if constexpr (kShared) return {x0, x1, reciprocal_approx(x0 * x1)};
    return {reciprocal_approx(x1), reciprocal_approx(x0), 1.0F};
  }
};

// Step 4 for 8 queries from `first` on and the features of slice `slice`: leaves this warp's part
// of dq in `parts`, [8 queries][64]. The reciprocal of each pair is asked for before the pair
// before it is used: left alone, the compiler waits for each of them.
template <int kWidth, int kQueries, bool kShared>
__device__ __forceinline__ void add_slopes(float (&grad_key)[kWarpKeys][2], float (&grad_weight)[2],
                                           float* parts, const GradientMemory<kWidth>& memory,
                                           const SlopeLanes& lanes, int first, int slice) {
  using Shape = ExponentialTile<kWidth>;
  constexpr int kSteps = static_cast<int>(Shape::kPartRows) / kQueries;
  const int warp = thread_index_here() / 32;
  const int feature = slice * kSliceFeatures + lanes.feature;
  const int first_key = warp * kWarpKeys;
  // Tokens 4 m and on are slots m, m + 16, m + 32, m + 48.
  const float* const key = memory.keys + first_key / 4 * Shape::kStride + feature;
  const float* const query =
      memory.queries + (first / 4 + lanes.query * 16) * Shape::kStride + feature;
  const float* const row = memory.gradient + (first + lanes.query) * Shape::kPairStride + first_key;
  float* const to = parts +
                    (warp * static_cast<int>(Shape::kPartRows) + lanes.query) * kSliceFeatures +
                    lanes.feature;
  const auto query_of = [&](int step) {
    return *reinterpret_cast<const float2*>(query +
                                            slot_of_token(step * kQueries) * Shape::kStride);
  };
  const auto gradients_of = [&](int step, int half) {
    return loaded(row + step * kQueries * Shape::kPairStride + 4 * half);
  };
  float2 b[kWarpKeys];
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) {
    b[j] = *reinterpret_cast<const float2*>(key + slot_of_token(j) * Shape::kStride);
  }
  float2 a = query_of(0);
  float4 g[2] = {gradients_of(0, 0), gradients_of(0, 1)};
  ReciprocalPair next = ReciprocalPair::of<kShared>(a, b[0]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const bool last = step + 1 == kSteps;
    const float2 next_a = last ? a : query_of(step + 1);
    float2 sum = {0, 0};
#pragma unroll
    for (int j = 0; j < kWarpKeys; ++j) {
      const ReciprocalPair pair = next;
      if (j + 1 < kWarpKeys) {
        next = ReciprocalPair::of<kShared>(a, b[j + 1]);
      } else if (!last) {
        next = ReciprocalPair::of<kShared>(next_a, b[0]);
      }
      const float4 of_four = g[j / 4];
      const float gradient = j % 4 == 0   ? of_four.x
                             : j % 4 == 1 ? of_four.y
                             : j % 4 == 2 ? of_four.z
                                          : of_four.w;
      if (j % 4 == 3 && !last) g[j / 4] = gradients_of(step + 1, j / 4);
      const float h0 = fmaf(pair.x1, pair.inverse, -0.5F);
      const float h1 = fmaf(pair.x0, pair.inverse, -0.5F);
      const float z0 = h0 * h0;
      const float z1 = h1 * h1;
      sum.x = fmaf(gradient, z0, sum.x);
      sum.y = fmaf(gradient, z1, sum.y);
      grad_key[j][0] = fmaf(gradient, z0, grad_key[j][0]);
      grad_key[j][1] = fmaf(gradient, z1, grad_key[j][1]);
      grad_weight[0] = fmaf(gradient, h0, grad_weight[0]);
      grad_weight[1] = fmaf(gradient, h1, grad_weight[1]);
    }
    a = next_a;
    *reinterpret_cast<float2*>(to + step * kQueries * kSliceFeatures) = sum;
  }
}

template <int kWidth, bool kShared>
__device__ __forceinline__ void add_slopes_of_any(float (&grad_key)[kWarpKeys][2],
                                                  float (&grad_weight)[2], float* parts,
                                                  const GradientMemory<kWidth>& memory,
                                                  const SlopeLanes& lanes, int first, int slice) {
  if (lanes.queries == 1) {
    add_slopes<kWidth, 1, kShared>(grad_key, grad_weight, parts, memory, lanes, first, slice);
  } else if (lanes.queries == 2) {
    add_slopes<kWidth, 2, kShared>(grad_key, grad_weight, parts, memory, lanes, first, slice);
  } else {
    add_slopes<kWidth, 4, kShared>(grad_key, grad_weight, parts, memory, lanes, first, slice);
  }
}

// What a thread adds up of the block's part of dq: of 8 queries, whose 8 warps' parts are in shared
// memory, two features of one.
struct QueryPart {
  float2* to;  // in global memory; null: nothing
  int at;      // in the parts of a warp
  float2 before;

  // Reads what was added before, well before it is needed. `first` is the first of the queries,
  // `end` the number of them.
  static __device__ __forceinline__ QueryPart of(float* part, int first, int end, int features,
                                                 int slice) {
    const int thread = thread_index_here();
    const int d = slice * kSliceFeatures + thread % 32 * 2;
    const int i = first + thread / 32;
    QueryPart result = {nullptr, thread * 2, {0, 0}};
    if (i >= end || d >= features) return result;
    result.to = reinterpret_cast<float2*>(part + std::int64_t{i} * features + d);
    result.before = *result.to;
    return result;
  }

  __device__ __forceinline__ void add(const float* parts, const float* weight, float factor) const {
    if (to == nullptr) return;
    float2 sum = {0, 0};
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      const float2 x =
          *reinterpret_cast<const float2*>(parts + warp * (kThreads / 32) * kSliceFeatures + at);
      sum.x += x.x;
      sum.y += x.y;
    }
    const float2 w = *reinterpret_cast<const float2*>(weight + at % kSliceFeatures);
    *to = {fmaf(factor * w.x, sum.x, before.x), fmaf(factor * w.y, sum.y, before.y)};
  }
};
static_assert(kSliceFeatures == 64);  // a thread's two features are 2 thread of [8 queries][64]

// The sum over the lanes of a feature; all of them have it.
__device__ __forceinline__ float sum_of_lanes(float x, const SlopeLanes& lanes) {
  for (int other = 32 / lanes.queries; other < 32; other *= 2) {
    x += __shfl_xor_sync(~0U, x, other);
  }
  return x;
}

}  // namespace torch_selfattn::kernels::cuda::sm80
