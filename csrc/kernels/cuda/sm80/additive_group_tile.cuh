#pragma once

#include "kernels/cuda/sm80/additive_group_products.cuh"

// What the forward kernel of the group method is made of: its tile and the product with the values,
// in the layout of MMA accumulators (fragments.cuh).
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kForwardThreads = 128;  // 4 warps of 16 rows

// Shared memory of a block, in this order: stages, values, QueryBlock, weights, queries. Sizes of
// uint4 but for the values.
template <int kWidth>
struct GroupTile {
  static constexpr int kKeys = tile_keys(kWidth);
  static constexpr int kColumns = kKeys / 8;
  // Of a multiprocessor: what registers and shared memory at E = 64 allow.
  static constexpr int kBlocks = kWidth == 64 ? 3 : 2;
  static constexpr int kStages = 2;
  static constexpr int kQuadSize = kKeys * 8;             // a quad of a tile of keys
  static constexpr int kValueSize = kKeys * kWidth;       // of 16-bit numbers
  static constexpr int kWeightSize = 8;                   // per quad
  static constexpr int kQuerySize = 4 * kForwardThreads;  // per quad

  // Quads of a step, which fills a stage: each step costs a barrier, each stage shared memory.
  static TSA_HOST_DEVICE constexpr int step_quads(int quads) {
    return quads > 1 && quads <= 4 ? 2 : 1;
  }
  static TSA_HOST_DEVICE constexpr int stage_size(int quads) {
    return step_quads(quads) * kQuadSize;
  }
  static TSA_HOST_DEVICE constexpr std::uint32_t values_at(int quads) {
    return static_cast<std::uint32_t>(kStages * stage_size(quads) * 16);
  }
  static TSA_HOST_DEVICE constexpr std::uint32_t block_at(int quads) {
    return values_at(quads) + kValueSize * 2;
  }
  static TSA_HOST_DEVICE constexpr std::uint32_t weights_at(int quads) {
    return block_at(quads) + sizeof(QueryBlock);
  }
  static TSA_HOST_DEVICE constexpr std::uint32_t queries_at(int quads) {
    return weights_at(quads) + static_cast<std::uint32_t>(quads * kWeightSize * 16);
  }
  static constexpr std::int64_t shared_bytes(std::int64_t quads) {
    return queries_at(static_cast<int>(quads)) + quads * kQuerySize * 16;
  }
};

// Copies the values of a tile of keys to shared memory, zeros for those outside `range` and for
// columns beyond `dims`. Chunks of 8 columns are swizzled by the key: ldmatrix reads 8 keys at
// once.
template <typename T, int kWidth>
__device__ __forceinline__ void stage_values(T* to, const Tokens<T>& values, std::int64_t first,
                                             KeyRange range, std::int64_t dims) {
  constexpr int kKeys = GroupTile<kWidth>::kKeys;
  constexpr int kChunks = kWidth / 8;
  const int thread = thread_index_here();
  const int chunk = thread % kChunks;
  const int first_key = thread / kChunks;
  // Within the tile.
  const int begin = static_cast<int>(max(range.begin - first, std::int64_t{0}));
  const int end = static_cast<int>(min(range.end - first, std::int64_t{kKeys}));
  const T* token = values.data + (first + first_key) * values.token_stride;
  const auto for_each_key = [&](auto copy) {
#pragma unroll
    for (int row = 0; row < kKeys; row += kForwardThreads / kChunks) {
      const int key = first_key + row;
      copy(to + key * kWidth + (chunk ^ (key & 7)) * 8, key >= begin && key < end);
      token += kForwardThreads / kChunks * values.token_stride;
    }
  };
  if (values.vectorized && dims % 8 == 0) {
    const bool exists = chunk * 8 < dims;
    for_each_key([&](T* destination, bool inside) {
      const bool read = inside && exists;
      cp_async16(destination, read ? token + chunk * 8 : values.data, read);
    });
  } else {
    for_each_key([&](T* destination, bool inside) {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        const int d = chunk * 8 + e;
        destination[e] = inside && d < dims ? token[d * values.dim_stride] : from_acc<T>(0.0f);
      }
    });
  }
}

// out += weights V, over the keys of a tile.
template <typename T, int kWidth, int kSteps>
__device__ __forceinline__ void add_values(float (&out)[kWidth / 8][4],
                                           const std::uint32_t (&weights)[kSteps][4],
                                           const T* values, std::int64_t dims) {
  const int lane = thread_index_here() % 32;
  // ldmatrix: lanes give rows lane % 8 of keys 0-7 and 8-15, of two chunks of columns.
  const int key = lane % 16;
  const int chunk = lane / 16;
#pragma unroll
  for (int columns = 0; columns < kWidth / 16; ++columns) {
    if (columns * 16 < dims) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int row = step * 16 + key;
        const T* const from = values + row * kWidth + ((columns * 2 + chunk) ^ (key & 7)) * 8;
        std::uint32_t b[4];
        ldmatrix<true>(b, shared_address(from));
        mma_m16n8k16<T>(out[2 * columns], weights[step], {b[0], b[1]});
        mma_m16n8k16<T>(out[2 * columns + 1], weights[step], {b[2], b[3]});
      }
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
