#pragma once

#include "kernels/cuda/sm80/additive_group_gradients_workspace.h"
#include "kernels/cuda/sm80/additive_group_tile.cuh"

// What the gradient kernels of the group method are made of. "Rows" are the tokens that a block
// owns, "columns" those that it loops over: queries and keys for dq, keys and queries for dk and
// dv.
//
// A warp owns 16 rows and the 16 features of a quad. What it has of 16 rows by 16 columns lies as
// in MMA accumulators, in four pieces of two numbers a lane: piece i has rows l / 4 + 8 (i % 2) and
// columns 2p, 2p + 1 of the i / 2-th 8, p = l % 4. The four also are the registers of an A operand.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kPieces = 4;

__device__ __forceinline__ float lower(std::uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float upper(std::uint32_t x) { return __uint_as_float(x & 0xffff0000U); }

// For load_biases: a lane's two pairs of a piece.
template <bool kOwnsKeys>
struct PiecePairs {
  std::int64_t query;
  std::int64_t key;
  static __device__ __forceinline__ PiecePairs of(std::int64_t row, std::int64_t column) {
    return kOwnsKeys ? PiecePairs{column, row} : PiecePairs{row, column};
  }
  __device__ __forceinline__ int query_step(int q) const { return q; }
  __device__ __forceinline__ int key_step(int k) const { return k; }
};
template <bool kOwnsKeys>
constexpr int kPieceQueries = kOwnsKeys ? 2 : 1;

// Which pairs of a tile the ranges of keys allow.
enum class Coverage : std::uint8_t { kNone, kSome, kAll };

__device__ __forceinline__ Coverage coverage(const AttentionProblem& p, std::int64_t batch,
                                             std::int64_t first_query, int queries,
                                             std::int64_t first_key, int keys) {
  // Ranges never move to the left from a query to the next.
  const std::int64_t last_query = min(first_query + queries, p.query_length) - 1;
  const KeyRange first = key_range(p, batch, first_query);
  const KeyRange last = key_range(p, batch, last_query);
  if (last.end <= first_key || first.begin >= min(first_key + keys, last.end)) {
    return Coverage::kNone;
  }
  return last.begin <= first_key && first.end >= first_key + keys ? Coverage::kAll
                                                                  : Coverage::kSome;
}

// What a block is about.
template <bool kOwnsKeys>
struct GradientOwner {
  std::int64_t batch;
  std::int64_t kv_head;
  std::int64_t first_row;
  // What it loops over: heads of queries, and for each of them tiles of columns.
  int first_head;
  int end_head;
  int first_tile;
  int end_tile;

  static __host__ __device__ std::int64_t blocks_of_head(const AttentionProblem& p,
                                                         const GradientShape& shape) {
    return ((kOwnsKeys ? p.key_length : p.query_length) + shape.rows() - 1) / shape.rows();
  }
  static __host__ __device__ std::int64_t blocks(const AttentionProblem& p,
                                                 const GradientShape& shape) {
    return p.batch * (kOwnsKeys ? p.kv_heads : p.heads) * blocks_of_head(p, shape);
  }

  static __device__ __forceinline__ GradientOwner of(const AttentionProblem& p,
                                                     const GradientShape& shape) {
    GradientOwner owner;
    const std::int64_t blocks = blocks_of_head(p, shape);
    const std::int64_t block = blockIdx.x % blocks;
    const std::int64_t row = blockIdx.x / blocks;
    const std::int64_t heads = kOwnsKeys ? p.kv_heads : p.heads;
    const auto head = static_cast<int>(row % heads);
    const auto group = static_cast<int>(p.group_size());
    owner.batch = row / heads;
    owner.kv_head = kOwnsKeys ? head : head / group;
    owner.first_head = kOwnsKeys ? head * group : head;
    owner.end_head = kOwnsKeys ? owner.first_head + group : head + 1;
    // Of a causal problem the first keys and the last queries have the most to do: they go first.
    owner.first_row = (kOwnsKeys ? block : blocks - 1 - block) * shape.rows();
    const KeyRange columns = kOwnsKeys
                                 ? queries_of(p, owner.batch, owner.first_row, shape.rows())
                                 : key_range_of_tile(p, owner.batch, owner.first_row, shape.rows());
    const bool any = columns.begin < columns.end;
    owner.first_tile = any ? static_cast<int>(columns.begin / kColumnTokens) : 0;
    owner.end_tile = any ? static_cast<int>((columns.end - 1) / kColumnTokens) + 1 : 0;
    return owner;
  }

 private:
  // The queries that may see any of the keys.
  static __device__ __forceinline__ KeyRange queries_of(const AttentionProblem& p,
                                                        std::int64_t batch, std::int64_t first_key,
                                                        int keys) {
    const KeyRange exist = key_range(p, batch);
    const std::int64_t offset = query_position(p, batch, 0);
    const std::int64_t first = max(first_key, exist.begin);
    const std::int64_t last = min(first_key + keys, exist.end) - 1;
    if (last < first) return {0, 0};
    std::int64_t begin = 0;
    std::int64_t end = p.query_length;
    if (p.window_right >= 0) begin = max(begin, first - offset - p.window_right);
    if (p.window_left >= 0) end = min(end, last - offset + p.window_left + 1);
    return {begin, end};
  }
};

// Copies `count` tokens to shared memory, zeros for those outside `range` and for columns beyond
// `dims`. Chunks of 8 columns are swizzled by the token.
template <typename T>
__device__ __forceinline__ void stage_tokens(T* to, const Tokens<T>& tokens, std::int64_t first,
                                             int count, KeyRange range, std::int64_t dims,
                                             int chunks) {
  const bool whole = tokens.vectorized && dims % 8 == 0;
  for (int index = thread_index_here(); index < count * chunks;
       index += static_cast<int>(blockDim.x)) {
    const int token = index / chunks;
    const int chunk = index % chunks;
    const std::int64_t t = first + token;
    const bool inside = t >= range.begin && t < range.end;
    const T* const from = tokens.data + t * tokens.token_stride;
    T* const destination = to + (token * chunks + (chunk ^ (token & 7))) * 8;
    if (whole) {
      const bool read = inside && chunk * 8 < dims;
      cp_async16(destination, read ? from + chunk * 8 : tokens.data, read);
    } else {
#pragma unroll 1
      for (int d = chunk * 8; d < chunk * 8 + 8; ++d) {
        destination[d % 8] = inside && d < dims ? from[d * tokens.dim_stride] : from_acc<T>(0.0f);
      }
    }
  }
}

// A warp's operands: addresses of lane-wise rows for ldmatrix. Rows of products and of tokens are
// swizzled; `row_bytes` is a multiple of 128.
struct LaneRows {
  std::uint32_t of_a;  // A operands, and transposed ones of B: rows l % 16, chunks l / 16
  std::uint32_t of_b;  // B operands of 16 columns: rows l % 8 + 8 (l / 16), chunks l / 8 % 2
  static __device__ __forceinline__ LaneRows get() {
    const std::uint32_t lane = static_cast<std::uint32_t>(thread_index_here()) % 32;
    return {lane % 16 * 128 + ((lane / 16) ^ (lane & 7)) * 16,
            (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ (lane & 7)) * 16};
  }
};

// num/den and 1/den of a quad's four groups, kept in bfloat16 as A operands.
struct KeptRatios {
  std::uint32_t inverse[4][kPieces];
  std::uint32_t ratio[4][kPieces];

  // Adds the quad's scores of 16 rows and 16 columns to `scores`. The addresses are those of the
  // lane's rows, of the quad.
  __device__ __forceinline__ void compute(float (&scores)[2][4], std::uint32_t rows,
                                          std::uint32_t weighted, std::uint32_t columns) {
    using BFloat16 = __nv_bfloat16;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      std::uint32_t a[2][4];
      std::uint32_t wa[2][4];
      std::uint32_t b[2][4];
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const std::uint32_t chunk = (2 * pair + g) * 32;
        ldmatrix(a[g], rows ^ chunk);
        ldmatrix(wa[g], weighted ^ chunk);
        ldmatrix(b[g], columns ^ chunk);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float num[2][4];
        float den[2][4];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          mma_product_m16n8k16<BFloat16>(den[g], a[g], {b[g][2 * half], b[g][2 * half + 1]});
          mma_product_m16n8k16<BFloat16>(num[g], wa[g], {b[g][2 * half], b[g][2 * half + 1]});
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float both = reciprocal_approx(den[0][e] * den[1][e]);
          const float first = both * den[1][e];
          const float second = both * den[0][e];
          den[0][e] = first;
          den[1][e] = second;
          num[0][e] *= first;
          num[1][e] *= second;
          scores[half][e] += num[0][e] + num[1][e];
        }
#pragma unroll
        for (int g = 0; g < 2; ++g) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int piece = 2 * half + h;
            inverse[2 * pair + g][piece] = pack<BFloat16>(den[g][2 * h], den[g][2 * h + 1]);
            ratio[2 * pair + g][piece] = pack<BFloat16>(num[g][2 * h], num[g][2 * h + 1]);
          }
        }
      }
    }
  }
};

}  // namespace torch_selfattn::kernels::cuda::sm80
