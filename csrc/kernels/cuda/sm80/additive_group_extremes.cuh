#pragma once

#include "kernels/cuda/sm80/additive_group_products.cuh"

// Least and largest key of each feature, for the centre and the range of the group method. A block
// of 8 warps owns a part of the keys of one (batch, key head); a warp reads every eighth of them, a
// lane one feature of 32. Padding is not read, NaN is passed over.
// Traffic: keys once. Bound: memory. At B H = 64, L = 1024, E = 64: 8.4 MB.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kExtremesThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kExtremesThreads)
    additive_group_extremes_kernel(const __grid_constant__ AttentionProblem p,
                                   const GroupCentre centre) {
  constexpr int kWarps = kExtremesThreads / 32;
  float* const lows = shared_at<float>(0, kExtremesThreads);
  float* const highs = shared_at<float>(kExtremesThreads * sizeof(float), kExtremesThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const std::int64_t part = blockIdx.x % centre.parts;
  const std::int64_t kv_row = blockIdx.x / centre.parts;
  const std::int64_t batch = kv_row / p.kv_heads;
  const auto keys = Tokens<T>::of(p.key, batch, kv_row % p.kv_heads);
  const KeyRange range = key_range(p, batch);
  const std::int64_t size = (p.key_length + centre.parts - 1) / centre.parts;
  const std::int64_t begin = max(range.begin, part * size);
  const std::int64_t end = min(range.end, (part + 1) * size);
  float* const result = centre.extremes + blockIdx.x * 2 * centre.features;

  for (std::int64_t first = 0; first < centre.features; first += 32) {
    const std::int64_t d = first + lane;
    float low = kInfinity<float>;
    float high = -kInfinity<float>;
    if (d < p.head_dim) {
#pragma unroll 8
      for (std::int64_t j = begin + warp; j < end; j += kWarps) {
        const float x = to_acc(keys.data[j * keys.token_stride + d * keys.dim_stride]);
        low = fminf(low, x);
        high = fmaxf(high, x);
      }
    }
    lows[thread] = low;
    highs[thread] = high;
    __syncthreads();
    if (warp == 0 && d < centre.features) {
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        low = fminf(low, lows[other * 32 + lane]);
        high = fmaxf(high, highs[other * 32 + lane]);
      }
      result[d] = low;
      result[centre.features + d] = high;
    }
    __syncthreads();
  }
}

// Prologue of a block that needs the centre of the keys of a (batch, key head), in shared memory.
// With `leave` it also leaves centre and floor in the workspace.
template <int kThreads>
__device__ __forceinline__ void find_centre(float* shared, const GroupCentre& of,
                                            std::int64_t kv_row, bool leave) {
  for (std::int64_t d = threadIdx.x; d < of.features; d += kThreads) {
    const float* const extremes = of.extremes + kv_row * of.parts * 2 * of.features + d;
    float low = kInfinity<float>;
    float high = -kInfinity<float>;
    for (std::int64_t part = 0; part < of.parts; ++part) {
      low = fminf(low, extremes[part * 2 * of.features]);
      high = fmaxf(high, extremes[(part * 2 + 1) * of.features]);
    }
    // Without keys, or features beyond E: the range of 0. An infinite key: anything may come.
    const float radius = low <= high ? 0.5f * high - 0.5f * low : 0.0f;
    const bool infinite = !(radius <= kLargest<float>);
    const float middle = low <= high && !infinite ? 0.5f * high + 0.5f * low : 0.0f;
    shared[d] = middle;
    if (leave) {
      of.centre[kv_row * of.features + d] = middle;
      of.floor[kv_row * of.features + d] = infinite ? 0.0f : smaller_side(radius);
    }
  }
  __syncthreads();
}

}  // namespace torch_selfattn::kernels::cuda::sm80
