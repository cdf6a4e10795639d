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

// A row of values in shared memory is 128 bytes, 64 columns; more columns are more slabs of rows.
// Chunks of 8 columns are swizzled by the token, as in rows of products.
constexpr int kSlabColumns = 64;

// Tokens of v or dO, and how they are read.
struct ValueSource {
  const void* data;  // of the first head
  std::int64_t head_stride;
  std::int64_t token_stride;
  std::int64_t dim_stride;
  KeyRange range;  // of tokens; others count as 0
  bool whole;      // chunks of 16 bytes can be copied

  template <typename T>
  static __device__ __forceinline__ ValueSource of(const ConstView& view, std::int64_t batch,
                                                   std::int64_t head, KeyRange range,
                                                   std::int64_t dims) {
    const auto tokens = Tokens<T>::of(view, batch, head);
    const bool whole = tokens.vectorized && dims % 8 == 0 && view.stride[1] % 8 == 0;
    return {tokens.data, view.stride[1], tokens.token_stride, tokens.dim_stride, range, whole};
  }

  // Copies tokens [first, first + count), of the head-th head from the first one.
  template <typename T>
  __device__ __forceinline__ void stage(T* to, int head, std::int64_t first, int count,
                                        std::int64_t dims, int threads) const {
    const T* const tokens = static_cast<const T*>(data) + head * head_stride;
    const int chunk = thread_index_here() % 8;
    for (int token = thread_index_here() / 8; token < count; token += threads / 8) {
      const std::int64_t t = first + token;
      const bool inside = t >= range.begin && t < range.end;
      const T* const from = tokens + t * token_stride;
      T* destination = to + token * kSlabColumns + (chunk ^ (token & 7)) * 8;
      for (int d = chunk * 8; d - chunk * 8 < dims; d += kSlabColumns) {
        if (whole) {
          const bool read = inside && d < dims;
          cp_async16(destination, read ? from + d : tokens, read);
        } else {
#pragma unroll 1
          for (int e = 0; e < 8; ++e) {
            destination[e] =
                inside && d + e < dims ? from[(d + e) * dim_stride] : from_acc<T>(0.0f);
          }
        }
        destination += count * kSlabColumns;
      }
    }
  }
};

// What a block is about, in shared memory: it is needed once in a tile at most.
template <bool kOwnsKeys>
struct alignas(16) GradientOwner {
  std::int64_t batch;
  std::int64_t first_row;
  int kv_head;
  // What it loops over: heads of queries, and for each of them tiles of columns. First tiles of
  // which the ranges of keys allow any pair, then those of which they allow all.
  int first_head;
  int end_head;
  int first_tile;
  int end_tile;
  int first_full_tile;
  int end_full_tile;
  const uint4* products;  // of the columns of the first head
  std::int64_t products_of_head;
  const float4* statistics;  // of these, if they are queries
  std::int64_t statistics_of_head;
  ValueSource values;  // of the columns
  Dropout dropout;     // if there is any

  static __host__ __device__ std::int64_t blocks_of_head(const AttentionProblem& p,
                                                         const GradientShape& shape) {
    return ((kOwnsKeys ? p.key_length : p.query_length) + shape.rows() - 1) / shape.rows();
  }
  static __host__ __device__ std::int64_t blocks(const AttentionProblem& p,
                                                 const GradientShape& shape) {
    return p.batch * (kOwnsKeys ? p.kv_heads : p.heads) * blocks_of_head(p, shape);
  }

  template <typename T>
  static __device__ __forceinline__ GradientOwner of(const AttentionBackward& call,
                                                     const GradientWorkspace& workspace,
                                                     const GradientShape& shape) {
    const AttentionProblem& p = call.problem;
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

    const KeyRange keys = key_range(p, owner.batch);
    const KeyRange any = kOwnsKeys
                             ? queries_of(p, owner.batch, keys, owner.first_row, shape.rows())
                             : key_range_of_tile(p, owner.batch, owner.first_row, shape.rows());
    const bool exists = any.begin < any.end;
    owner.first_tile = exists ? static_cast<int>(any.begin / kColumnTokens) : 0;
    owner.end_tile = exists ? static_cast<int>((any.end - 1) / kColumnTokens) + 1 : 0;
    const KeyRange all = kOwnsKeys
                             ? queries_of_all(p, owner.batch, keys, owner.first_row, shape.rows())
                             : keys_of_all(p, owner.batch, owner.first_row, shape.rows());
    const bool full = all.begin < all.end && p.mask_kind == MaskKind::kNone && p.slopes == nullptr;
    owner.first_full_tile =
        full ? static_cast<int>((all.begin + kColumnTokens - 1) / kColumnTokens) : 0;
    owner.end_full_tile = full ? static_cast<int>(all.end / kColumnTokens) : 0;

    const std::int64_t stripes = kOwnsKeys ? workspace.query_stripes : workspace.key_stripes;
    const std::int64_t columns = kOwnsKeys ? owner.batch * p.heads + owner.first_head
                                           : owner.batch * p.kv_heads + owner.kv_head;
    owner.products_of_head = stripes * workspace.stripe_size();
    owner.products =
        (kOwnsKeys ? workspace.queries : workspace.keys) + columns * owner.products_of_head;
    owner.statistics_of_head = stripes * kStripe;
    owner.statistics = workspace.statistics + columns * owner.statistics_of_head;
    owner.values = values_of<T>(call, owner, !kOwnsKeys, keys);
    if (p.dropout_p > 0) owner.dropout = Dropout::make(p.dropout_p, p.philox_state);
    return owner;
  }

  // v if `of_keys`, else dO of the first head.
  template <typename T>
  static __device__ __forceinline__ ValueSource values_of(const AttentionBackward& call,
                                                          const GradientOwner& owner, bool of_keys,
                                                          KeyRange keys) {
    const AttentionProblem& p = call.problem;
    return of_keys ? ValueSource::of<T>(p.value, owner.batch, owner.kv_head, keys, p.value_dim)
                   : ValueSource::of<T>(call.grad_out, owner.batch, owner.first_head,
                                        {0, p.query_length}, p.value_dim);
  }

 private:
  // The queries that may see any of the keys.
  static __device__ __forceinline__ KeyRange queries_of(const AttentionProblem& p,
                                                        std::int64_t batch, KeyRange exist,
                                                        std::int64_t first_key, int keys) {
    const std::int64_t offset = query_position(p, batch, 0);
    const std::int64_t first = max(first_key, exist.begin);
    const std::int64_t last = min(first_key + keys, exist.end) - 1;
    if (last < first) return {0, 0};
    KeyRange queries = {0, p.query_length};
    if (p.window_right >= 0) {
      queries.begin = max(queries.begin, first - offset - p.window_right);
    }
    if (p.window_left >= 0) queries.end = min(queries.end, last - offset + p.window_left + 1);
    return queries;
  }

  // Those that may see all of the keys; queries that do not exist see what they like.
  static __device__ __forceinline__ KeyRange queries_of_all(const AttentionProblem& p,
                                                            std::int64_t batch, KeyRange exist,
                                                            std::int64_t first_key, int keys) {
    const std::int64_t offset = query_position(p, batch, 0);
    const std::int64_t last = first_key + keys - 1;
    if (first_key < exist.begin || last >= exist.end) return {0, 0};
    KeyRange queries = {0, p.query_length + kColumnTokens};
    if (p.window_right >= 0) queries.begin = max(queries.begin, last - offset - p.window_right);
    if (p.window_left >= 0) {
      queries.end = min(queries.end, first_key - offset + p.window_left + 1);
    }
    return queries;
  }

  // The keys that all of the queries may see.
  static __device__ __forceinline__ KeyRange keys_of_all(const AttentionProblem& p,
                                                         std::int64_t batch,
                                                         std::int64_t first_query, int queries) {
    const std::int64_t last = min(first_query + queries, p.query_length) - 1;
    return {key_range(p, batch, last).begin, key_range(p, batch, first_query).end};
  }
};

// The stripe of a warp's rows, among all of the workspace.
template <bool kOwnsKeys>
struct RowStripe {
  std::int64_t index;  // the last one of the head in place of those beyond
  bool exists;

  static __device__ __forceinline__ RowStripe of(const AttentionProblem& p,
                                                 const GradientWorkspace& workspace,
                                                 const GradientOwner<kOwnsKeys>& owner,
                                                 int stripe) {
    const std::int64_t stripes = kOwnsKeys ? workspace.key_stripes : workspace.query_stripes;
    const std::int64_t head = kOwnsKeys ? owner.batch * p.kv_heads + owner.kv_head
                                        : owner.batch * p.heads + owner.first_head;
    const std::int64_t of_head = owner.first_row / kStripe + stripe;
    return {head * stripes + min(of_head, stripes - 1), of_head < stripes};
  }
};

// The rows that a lane gives to ldmatrix, from the first token on: rows of 128 bytes, swizzled. The
// chunk of other features or columns is 16 times its number, by exclusive or.
struct LaneRows {
  std::uint32_t of_a;  // A operands, and transposed ones of B: rows l % 16, chunks l / 16
  std::uint32_t of_b;  // B operands of 16 tokens: rows l % 8 + 8 (l / 16), chunks l / 8 % 2
  std::uint32_t of_8;  // B operands of 8 tokens and 32 columns: rows l % 8, chunks l / 8
  static __device__ __forceinline__ LaneRows get() {
    const std::uint32_t lane = static_cast<std::uint32_t>(thread_index_here()) % 32;
    return {lane % 16 * 128 + ((lane / 16) ^ (lane & 7)) * 16,
            (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ (lane & 7)) * 16,
            lane % 8 * 128 + ((lane / 8) ^ (lane & 7)) * 16};
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
