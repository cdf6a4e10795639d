#pragma once

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/sm80/additive_exponential_tile.cuh"

// The small kernels of the exponential form's backward: what comes before the gradients, and the
// sums of the parts that their blocks leave. Bound: memory; the parts are read once.
namespace torch_selfattn::kernels::cuda::sm80 {

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
            static_cast<int>(d), call.dims, {sum.x, sum.y, sum.z, sum.w});
}

// Parts of the gradients of weight and slopes where the generic kernel would leave them, whose last
// launches add them up: all of a (batch, head) in the first tile's place.
__global__ void __launch_bounds__(kThreads) additive_exponential_parts_kernel(
    const __grid_constant__ AttentionProblem p,
    const __grid_constant__ ExponentialBackwardWorkspace workspace) {
  const auto generic = Workspace<float>::of(p, workspace.generic);
  const std::int64_t tiles = Workspace<float>::query_tiles(p);
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t d = index % (p.head_dim + 1);
  const std::int64_t row = index / (p.head_dim + 1);
  const bool of_slope = d == p.head_dim;
  if (row >= p.batch * p.heads || (of_slope && p.slopes == nullptr)) return;
  const std::int64_t count = workspace.key_ranges * workspace.query_ranges;
  float sum = 0;
  for (std::int64_t n = row * count; n < (row + 1) * count; ++n) {
    sum += of_slope ? workspace.slope_parts[n] : workspace.weight_parts[n * workspace.features + d];
  }
  for (std::int64_t tile = row * tiles; tile < (row + 1) * tiles; ++tile) {
    (of_slope ? generic.slope_parts[tile] : generic.weight_parts[tile * p.head_dim + d]) = sum;
    sum = 0;
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
