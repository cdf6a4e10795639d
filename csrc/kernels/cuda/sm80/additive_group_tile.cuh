#pragma once

#include "kernels/cuda/sm80/additive_group_products.cuh"

// What the forward kernel of the group method is made of: its tile, the softmax of its rows,
// dropout and the product with the values, all in the layout of MMA accumulators. Of a warp's 16
// rows lane l has l / 4 and l / 4 + 8; of each 8 keys 2p and 2p + 1, p = l % 4.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kForwardThreads = 128;  // 4 warps of 16 rows

// What a block is about. In shared memory: it is needed once in a step at most, and registers are
// scarce.
struct alignas(16) GroupBlock {
  KeyRange keys;  // that are not padding
  std::int64_t first_query;
  unsigned batch;
  unsigned head;
  unsigned kv_head;
  unsigned batch_head;
  unsigned query_tile;
  // Tiles of keys, as far as the ranges say; 2^31 of them would be 2^36 keys. First those of which
  // any pair is allowed, then those of which all are.
  int first_tile;
  int end_tile;
  int first_full_tile;
  int end_full_tile;
  bool bounded;  // the scores: no running maximum is needed

  static __device__ __forceinline__ GroupBlock of(const AttentionProblem& p,
                                                  const GroupWorkspace& workspace) {
    GroupBlock block;
    // The last tiles of a causal problem have the most keys, so they go first.
    const auto query_tiles = static_cast<unsigned>(workspace.query_tiles);
    block.query_tile = query_tiles - 1 - blockIdx.x % query_tiles;
    block.batch_head = blockIdx.x / query_tiles;
    block.head = block.batch_head % static_cast<unsigned>(p.heads);
    block.batch = block.batch_head / static_cast<unsigned>(p.heads);
    block.kv_head = block.head / static_cast<unsigned>(p.group_size());
    block.first_query = std::int64_t{block.query_tile} * kRows;
    block.keys = key_range(p, block.batch);
    const int size = tile_keys(p.value_dim);
    const KeyRange range = key_range_of_tile(p, block.batch, block.first_query, kRows);
    const bool any = range.begin < range.end;
    block.first_tile = any ? static_cast<int>(range.begin / size) : 0;
    block.end_tile = any ? static_cast<int>((range.end - 1) / size) + 1 : 0;
    const std::int64_t last_query = min(block.first_query + kRows, p.query_length) - 1;
    const std::int64_t begin = key_range(p, block.batch, last_query).begin;
    const std::int64_t end = key_range(p, block.batch, block.first_query).end;
    const bool any_full = begin < end;
    block.first_full_tile = any_full ? static_cast<int>((begin + size - 1) / size) : 0;
    block.end_full_tile = any_full ? static_cast<int>(end / size) : 0;
    block.bounded = false;
    return block;
  }
  __device__ __forceinline__ std::int64_t kv_row(const AttentionProblem& p) const {
    return batch * p.kv_heads + kv_head;
  }
  __device__ __forceinline__ std::uint8_t& redo(const GroupWorkspace& workspace) const {
    return workspace.redo[batch_head * workspace.query_tiles + query_tile];
  }
};

// Shared memory of a block, in this order: stages, values, GroupBlock, weights, queries. Sizes of
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
    return block_at(quads) + sizeof(GroupBlock);
  }
  static TSA_HOST_DEVICE constexpr std::uint32_t queries_at(int quads) {
    return weights_at(quads) + static_cast<std::uint32_t>(quads * kWeightSize * 16);
  }
  static constexpr std::int64_t shared_bytes(std::int64_t quads) {
    return queries_at(static_cast<int>(quads)) + quads * kQuerySize * 16;
  }
};

// For load_biases.
struct FragmentPairs {
  std::int64_t query;
  std::int64_t key;
  static __device__ __forceinline__ FragmentPairs of(std::int64_t first_query,
                                                     std::int64_t first_key) {
    const int thread = thread_index_here();
    return {first_query + thread / 32 * 16 + thread % 32 / 4, first_key + thread % 4 * 2};
  }
  __device__ __forceinline__ int query_step(int q) const { return 8 * q; }
  __device__ __forceinline__ int key_step(int k) const { return k / 2 * 8 + k % 2; }
};

// Running maximum and sum of exp(score - maximum) of the lane's two rows. The four lanes of a row
// agree on the maximum; each has the sum over its own keys until the end.
struct FragmentSoftmax {
  float maximum[2] = {-kInfinity<float>, -kInfinity<float>};
  float sum[2] = {0, 0};

  // Replaces scores by weights relative to the new maximum; `rescale` is for what was accumulated.
  template <int K>
  __device__ __forceinline__ void update(float (&s)[2][K], float (&rescale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = maximum[h];
#pragma unroll
      for (int k = 0; k < K; ++k) largest = fmaxf(largest, s[h][k]);
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      // Any number does for a row that has seen no key: 2^(-inf - number) = 0.
      const float reference = largest == -kInfinity<float> ? 0.0f : largest;
      rescale[h] = exp2_approx((maximum[h] - reference) * kLog2E);
      maximum[h] = largest;
      float total = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        s[h][k] = exp2_approx((s[h][k] - reference) * kLog2E);
        total += s[h][k];
      }
      sum[h] = sum[h] * rescale[h] + total;
    }
  }

  // Of scores that are known to be small: relative to 0, so nothing is rescaled.
  template <int K>
  __device__ __forceinline__ void add_bounded(float (&s)[2][K]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[h] = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        s[h][k] = exp2_approx(s[h][k] * kLog2E);
        sum[h] += s[h][k];
      }
    }
  }

  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }
};

// Sets the weights that are dropped to 0; the others are not scaled. Two lanes need the same Philox
// block in either of their rows: the even one draws for the first row, the odd one for the second,
// and each gives the other two of its four numbers.
template <int K>
__device__ __forceinline__ void drop(float (&s)[2][K], const Dropout& dropout,
                                     const AttentionProblem& p, std::int64_t first_row,
                                     std::int64_t first_key) {
  const int lane = thread_index_here() % 32;
  const bool odd = lane % 2 != 0;
  const std::int64_t row = first_row + (odd ? 8 : 0);
  std::uint32_t kept = 0;  // bits 4 n ... 4 n + 3: first row, second row
#pragma unroll 1
  for (int n = 0; n < K / 2; ++n) {
    const std::int64_t key = first_key + 8 * n + (lane % 4 / 2) * 4;
    const PhiloxBlock random =
        philox(dropout.seed, dropout.offset, Dropout::block_index(row, key, p.key_length));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::uint32_t own = odd ? random.value[c + 2] : random.value[c];
      const std::uint32_t given = odd ? random.value[c] : random.value[c + 2];
      const std::uint32_t other = __shfl_xor_sync(~0u, given, 1);
      kept |= std::uint32_t{dropout.keep(odd ? other : own)} << (4 * n + c);
      kept |= std::uint32_t{dropout.keep(odd ? own : other)} << (4 * n + 2 + c);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int bit = k / 2 * 4 + k % 2;
    if ((kept >> bit & 1) == 0) s[0][k] = 0;
    if ((kept >> (bit + 2) & 1) == 0) s[1][k] = 0;
  }
}

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

// The weights of a tile as A operands, 16 keys each.
template <typename T, int K>
__device__ __forceinline__ void pack_weights(std::uint32_t (&packed)[K / 4][4],
                                             const float (&weights)[2][K]) {
#pragma unroll
  for (int step = 0; step < K / 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = 4 * step + i / 2 * 2;
      packed[step][i] = pack<T>(weights[i % 2][k], weights[i % 2][k + 1]);
    }
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

// Rows of the output, which the lanes of an MMA accumulator write two columns at a time.
template <typename T>
struct OutputRows {
  T* data;
  std::int64_t token_stride;
  std::int64_t dim_stride;
  std::int64_t dims;
  bool in_pairs;  // two columns are one aligned word

  static __device__ __forceinline__ OutputRows of(const View& view, std::int64_t batch,
                                                  std::int64_t head, std::int64_t dims) {
    T* const data = static_cast<T*>(view.data) + batch * view.stride[0] + head * view.stride[1];
    const bool aligned =
        (reinterpret_cast<std::uintptr_t>(data) | (view.stride[2] * sizeof(T))) % 4 == 0;
    return {data, view.stride[2], view.stride[3], dims,
            aligned && view.stride[3] == 1 && dims % 2 == 0};
  }
  // Columns d and d + 1 of a token, as far as they exist.
  __device__ __forceinline__ void store_pair(std::int64_t token, int d, float x, float y) const {
    if (d >= dims) return;
    T* const row = data + token * token_stride;
    if (in_pairs) {
      *reinterpret_cast<std::uint32_t*>(row + d) = pack<T>(x, y);
    } else {
      row[d * dim_stride] = from_acc<T>(x);
      if (d + 1 < dims) row[(d + 1) * dim_stride] = from_acc<T>(y);
    }
  }
};

}  // namespace torch_selfattn::kernels::cuda::sm80
