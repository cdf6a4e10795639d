#pragma once

#include "kernels/cuda/sm80/additive_group_extremes.cuh"

// The products of the keys, in the order in which the lanes of the forward kernel read them. A
// block of 4 warps owns a tile of keys of one (batch, key head); a warp takes 8 keys at a time and
// goes over all groups, two to a 16-byte store, 512 bytes a warp, consecutive. First the block
// finds the centre c of each feature; tile 0 leaves it for the queries.
// Per lane and group: 2 MUFU, 4 SHFL, about 30 others. Traffic: keys once, and 32 bytes of products
// per key and group: at B H = 64, L = 1024, E = 64 8.4 MB in and 33.5 MB out. Bound: memory.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kKeysThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kKeysThreads, 8)
    additive_group_keys_kernel(const __grid_constant__ AttentionProblem p,
                               const GroupWorkspace workspace) {
  const std::int64_t features = workspace.centre.features;
  float* const centre = shared_at<float>(0, static_cast<std::uint32_t>(features));
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const std::int64_t tile = blockIdx.x % workspace.key_tiles;
  const std::int64_t kv_row = blockIdx.x / workspace.key_tiles;
  const std::int64_t batch = kv_row / p.kv_heads;
  const auto keys = Tokens<T>::of(p.key, batch, kv_row % p.kv_heads);
  const KeyRange range = key_range(p, batch);

  find_centre<kKeysThreads>(centre, workspace.centre, kv_row, tile == 0);

  const int columns = tile_keys(p.value_dim) / 8;
  uint4* const out = workspace.key_products +
                     (kv_row * workspace.key_tiles + tile) * workspace.quads * columns * 64;
  for (int column = thread / 32; column < columns; column += kKeysThreads / 32) {
    const std::int64_t j = tile * columns * 8 + column * 8 + lane / 4;
    const bool inside = j >= range.begin && j < range.end;
    const T* const key = keys.data + j * keys.token_stride;
#pragma unroll 2
    for (int pair = 0; pair < 2 * workspace.quads; ++pair) {
      uint2 of_group[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = pair * 8 + half * 4 + lane % 4;
        const float x =
            inside && d < p.head_dim ? to_acc(key[d * keys.dim_stride]) - centre[d] : 0.0f;
        float smaller[4];
        exchange(smaller, smaller_side(x));
        of_group[half] = products(smaller, kFactor);
      }
      out[((pair / 2) * columns + column) * 64 + pair % 2 * 32 + lane] =
          make_uint4(of_group[0].x, of_group[0].y, of_group[1].x, of_group[1].y);
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
