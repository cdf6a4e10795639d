#pragma once

#include "kernels/cuda/attention_policies.cuh"

// What forward kernels on tensor cores share: what a block is about, and in the layout of MMA
// accumulators the softmax of its rows, dropout, rows of the output. Of a warp's 16 rows lane l has
// l / 4 and l / 4 + 8; of each 8 keys 2p and 2p + 1, p = l % 4.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr float kLog2E = 1.44269504f;

// Two numbers in a register, the first one in the lower half.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  }
}

// Of the weights times scale, for all lanes of a warp.
struct WeightNorms {
  float squares;  // |w|_2 squared
  float sum;      // |w|_1, which no score exceeds

  template <typename T>
  static __device__ __forceinline__ WeightNorms of(const Weight<T>& weight, std::int64_t dims,
                                                   float scale) {
    WeightNorms norms = {0, 0};
    for (std::int64_t d = threadIdx.x % 32; d < dims; d += 32) {
      const float w = scale * weight.at(d);
      norms.squares += w * w;
      norms.sum += fabsf(w);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      norms.squares += __shfl_xor_sync(~0u, norms.squares, lanes);
      norms.sum += __shfl_xor_sync(~0u, norms.sum, lanes);
    }
    return norms;
  }
};

// What a block is about. In shared memory: it is needed once in a step at most, and registers are
// scarce.
struct alignas(16) QueryBlock {
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

  // Of the blockIdx.x-th block, of `rows` queries, with tiles of `size` keys.
  static __device__ __forceinline__ QueryBlock of(const AttentionProblem& p,
                                                  std::int64_t all_query_tiles, int rows,
                                                  int size) {
    QueryBlock block;
    // The last tiles of a causal problem have the most keys, so they go first.
    const auto query_tiles = static_cast<unsigned>(all_query_tiles);
    block.query_tile = query_tiles - 1 - blockIdx.x % query_tiles;
    block.batch_head = blockIdx.x / query_tiles;
    block.head = block.batch_head % static_cast<unsigned>(p.heads);
    block.batch = block.batch_head / static_cast<unsigned>(p.heads);
    block.kv_head = block.head / static_cast<unsigned>(p.group_size());
    block.first_query = std::int64_t{block.query_tile} * rows;
    block.keys = key_range(p, block.batch);
    const KeyRange range = key_range_of_tile(p, block.batch, block.first_query, rows);
    const bool any = range.begin < range.end;
    block.first_tile = any ? static_cast<int>(range.begin / size) : 0;
    block.end_tile = any ? static_cast<int>((range.end - 1) / size) + 1 : 0;
    const std::int64_t last_query = min(block.first_query + rows, p.query_length) - 1;
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

// Which weights are kept: bits 4 n ... 4 n + 3 are of keys 2 n and 2 n + 1, first row, second row.
// Two lanes need the same Philox block in either of their rows: the even one draws for the first
// row, the odd one for the second, and each gives the other two of its four numbers.
template <int K>
__device__ __forceinline__ std::uint32_t draw_kept(const Dropout& dropout,
                                                   const AttentionProblem& p,
                                                   std::int64_t first_row, std::int64_t first_key) {
  const int lane = thread_index_here() % 32;
  const bool odd = lane % 2 != 0;
  const std::int64_t row = first_row + (odd ? 8 : 0);
  std::uint32_t kept = 0;
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
  return kept;
}

// Of the h-th row of the lane and its k-th key.
__device__ __forceinline__ bool is_kept(std::uint32_t kept, int h, int k) {
  return (kept >> (k / 2 * 4 + 2 * h + k % 2) & 1) != 0;
}

// Sets the weights that are dropped to 0; the others are not scaled.
template <int K>
__device__ __forceinline__ void drop(float (&s)[2][K], const Dropout& dropout,
                                     const AttentionProblem& p, std::int64_t first_row,
                                     std::int64_t first_key) {
  const std::uint32_t kept = draw_kept<K>(dropout, p, first_row, first_key);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!is_kept(kept, 0, k)) s[0][k] = 0;
    if (!is_kept(kept, 1, k)) s[1][k] = 0;
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
