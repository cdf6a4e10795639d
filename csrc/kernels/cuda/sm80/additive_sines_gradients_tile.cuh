#pragma once

#include "kernels/cuda/sm80/additive_sines_gradients_workspace.h"
#include "kernels/cuda/sm80/additive_sines_tile.cuh"
#include "kernels/cuda/sm80/query_statistics.cuh"

// What the gradient kernels of the sines are made of: what a block owns, its shared memory, the
// bias of a warp's pairs, and the product of gradients of scores with a chunk of features. Rows are
// the tokens that a block owns, queries or keys, columns those it loops over.
namespace torch_selfattn::kernels::cuda::sm80 {

using SineNumber = __nv_bfloat16;

// Shared memory of a block, in this order: two slots, p or the gradients g of the scores of kTiles
// tiles of columns, terms and statistics of rows and columns (of two tiles), sums of g of the rows
// by either half of the warps, parts of w dw by four warps. A slot holds a chunk of features, or of
// values, of the rows and of a tile of columns; or a chunk of features of all tiles of columns and
// of the rows.
template <int kTiles>
struct SineGradientTile {
  static constexpr std::uint32_t kOperandBytes = 256;
  static constexpr std::uint32_t kChunkBytes = kSineRows * kRowBytes;
  static constexpr std::uint32_t kSlotBytes = (kTiles + 1) * kChunkBytes;
  static constexpr std::uint32_t kSlotNumbers = kSlotBytes / sizeof(SineNumber);
  static constexpr std::uint32_t kChunkNumbers = kChunkBytes / sizeof(SineNumber);
  static constexpr std::uint32_t kPairsAt = 2 * kSlotBytes;
  static constexpr std::uint32_t kPairNumbers = kTiles * 2 * kChunkNumbers;
  static constexpr std::uint32_t kGradientsAt = kPairsAt + kPairNumbers * sizeof(SineNumber);
  static constexpr std::uint32_t kGradients = kSineThreads * 11;
  static constexpr std::uint32_t kTermsAt = kGradientsAt + kGradients * sizeof(float4);
  static constexpr std::uint32_t kTerms = 3 * kSineRows;  // of the rows, of two tiles of columns
  static constexpr std::uint32_t kStatisticsAt = kTermsAt + kTerms * sizeof(float);
  static constexpr std::uint32_t kStatistics = 2 * kSineRows;
  static constexpr std::uint32_t kSumsAt = kStatisticsAt + kStatistics * sizeof(float4);
  static constexpr std::uint32_t kSums = 2 * kSineRows;
  static constexpr std::uint32_t kWeightSumsAt = kSumsAt + kSums * sizeof(float);
  static constexpr std::uint32_t kWeightSums = 4 * kSliceElements;
  static constexpr std::uint32_t kOperandsAt = kWeightSumsAt + kWeightSums * sizeof(float);
  static constexpr std::uint32_t kSharedBytes = kOperandsAt + kOperandBytes;
};

// What a block owns: rows of a (batch, head), or of a (batch, key head), and a slice of their
// elements.
template <bool kKeys>
struct SineOwner {
  std::int64_t batch;
  int kv_head;
  int first_head;  // of the queries
  int end_head;
  int slice;
  std::int64_t row_tile;

  static __device__ __forceinline__ SineOwner of(const AttentionProblem& p,
                                                 const SineWorkspace& workspace) {
    const std::int64_t slices = sine_slices(p, kKeys);
    const std::int64_t tiles =
        (kKeys ? workspace.padded_keys : workspace.padded_queries) / kSineRows;
    const std::int64_t heads = kKeys ? p.kv_heads : p.heads;
    const std::int64_t row = blockIdx.x / slices / tiles;
    SineOwner owner{};
    owner.slice = static_cast<int>(blockIdx.x % slices);
    owner.row_tile = blockIdx.x / slices % tiles;
    // The last queries of a causal problem have the most keys, so they go first, as the first keys.
    if (!kKeys) owner.row_tile = tiles - 1 - owner.row_tile;
    owner.batch = row / heads;
    const auto head = static_cast<int>(row % heads);
    const auto group = static_cast<int>(p.group_size());
    owner.kv_head = kKeys ? head : head / group;
    owner.first_head = kKeys ? head * group : head;
    owner.end_head = kKeys ? owner.first_head + group : head + 1;
    return owner;
  }
  __device__ __forceinline__ std::int64_t first_row() const { return row_tile * kSineRows; }

  // The columns of which any pair may be allowed, before the mask is looked at.
  __device__ __forceinline__ KeyRange columns(const AttentionProblem& p) const {
    if constexpr (!kKeys) return key_range_of_tile(p, batch, first_row(), kSineRows);
    const KeyRange keys = key_range(p, batch);
    const std::int64_t begin = max(keys.begin, first_row());
    const std::int64_t end = min(keys.end, first_row() + kSineRows);
    KeyRange queries{0, begin < end ? p.query_length : 0};
    const std::int64_t position = query_position(p, batch, 0);
    if (p.window_right >= 0) queries.begin = max(queries.begin, begin - p.window_right - position);
    if (p.window_left >= 0) queries.end = min(queries.end, end + p.window_left - position);
    return queries;
  }
};

// Where a block finds what it loads, for a head. In shared memory: registers are scarce.
struct alignas(16) SineOperands {
  std::int64_t batch;
  std::int64_t query_row;  // (batch, head)
  std::int64_t first_row;
  const float* vectors;
  const std::uint32_t* rows;     // features of the block's rows
  const std::uint32_t* columns;  // of all columns
  const float* terms;            // of these
  const float4* statistics;
  Tokens<SineNumber> row_values;  // or gradients of the output
  Tokens<SineNumber> column_values;
  KeyRange row_range;  // that exists
  KeyRange column_range;
  int head;

  template <bool kKeys>
  static __device__ __forceinline__ SineOperands of(const AttentionBackward& call,
                                                    const SineGradientWorkspace& workspace,
                                                    const SineOwner<kKeys>& owner, int head) {
    const AttentionProblem& p = call.problem;
    const SineWorkspace& sines = workspace.sines;
    const std::int64_t query_row = owner.batch * p.heads + head;
    const std::int64_t kv_row = owner.batch * p.kv_heads + owner.kv_head;
    const auto grad_out = Tokens<SineNumber>::of(call.grad_out, owner.batch, head);
    const auto value = Tokens<SineNumber>::of(p.value, owner.batch, owner.kv_head);
    const std::uint32_t* const queries =
        sines.query_features + query_row * sines.padded_queries * sines.words;
    const std::uint32_t* const keys = sines.key_features + kv_row * sines.padded_keys * sines.words;
    const KeyRange all_queries{0, p.query_length};
    const KeyRange all_keys = key_range(p, owner.batch);
    SineOperands operands{};
    operands.batch = owner.batch;
    operands.query_row = query_row;
    operands.first_row = owner.first_row();
    operands.vectors = sines.vectors + query_row * kSineVectors * sines.words;
    operands.rows = (kKeys ? keys : queries) + owner.first_row() * sines.words;
    operands.columns = kKeys ? queries : keys;
    operands.terms = kKeys ? sines.query_terms + query_row * sines.padded_queries
                           : sines.key_terms + query_row * sines.padded_keys;
    operands.statistics = workspace.statistics + query_row * sines.padded_queries;
    operands.row_values = kKeys ? value : grad_out;
    operands.column_values = kKeys ? grad_out : value;
    operands.row_range = kKeys ? all_keys : all_queries;
    operands.column_range = kKeys ? all_queries : all_keys;
    operands.head = head;
    return operands;
  }
};

static_assert(sizeof(SineOperands) <= SineGradientTile<1>::kOperandBytes);

// Whether all pairs of a tile are allowed, the mask aside.
__device__ __forceinline__ bool all_are_allowed(const AttentionProblem& p, std::int64_t batch,
                                                std::int64_t first_query, std::int64_t first_key) {
  const std::int64_t last = first_query + kSineRows - 1;
  return last < p.query_length && key_range(p, batch, last).begin <= first_key &&
         key_range(p, batch, first_query).end >= first_key + kSineKeys;
}

// For load_biases, where rows are keys.
struct TurnedPairs {
  std::int64_t query;
  std::int64_t key;
  __device__ __forceinline__ int query_step(int q) const { return q / 2 * 8 + q % 2; }
  __device__ __forceinline__ int key_step(int k) const { return 8 * k; }
};

// Adds the bias to the scores of the lane's pairs in 16 rows and 64 columns, a part at a time, for
// the registers.
template <bool kKeys>
__device__ __forceinline__ void add_biases(float (&s)[kSineColumns][4], const AttentionProblem& p,
                                           std::int64_t batch, int head, std::int64_t query,
                                           std::int64_t key) {
  if constexpr (kKeys) {
#pragma unroll
    for (int n = 0; n < kSineColumns; n += 2) {
      float bias[4][2];
      float part[4][2];
      load_biases<SineNumber>(bias, p, batch, head, TurnedPairs{query + 8 * n, key});
#pragma unroll
      for (int i = 0; i < 8; ++i) part[i / 2][i % 2] = s[n + i / 4][i % 2 * 2 + i / 2 % 2];
      finish_scores(part, bias, 1.0f);  // the scale is in the features
#pragma unroll
      for (int i = 0; i < 8; ++i) s[n + i / 4][i % 2 * 2 + i / 2 % 2] = part[i / 2][i % 2];
    }
  } else {
#pragma unroll
    for (int n = 0; n < kSineColumns; n += 2) {
      float bias[2][4];
      float part[2][4];
      load_biases<SineNumber>(bias, p, batch, head, FragmentPairs{query, key + 8 * n});
#pragma unroll
      for (int i = 0; i < 8; ++i) part[i / 4][i % 4] = s[n + i % 4 / 2][i / 4 * 2 + i % 2];
      finish_scores(part, bias, 1.0f);
#pragma unroll
      for (int i = 0; i < 8; ++i) s[n + i % 4 / 2][i / 4 * 2 + i % 2] = part[i / 4][i % 4];
    }
  }
}

// Which of the lane's pairs in 16 rows and 64 columns are kept, as draw_kept().
template <bool kKeys>
__device__ __forceinline__ std::uint32_t draw_kept_pairs(const Dropout& dropout,
                                                         const AttentionProblem& p,
                                                         std::int64_t first_query,
                                                         std::int64_t query, std::int64_t key) {
  if constexpr (!kKeys) {
    return draw_kept<2 * kSineColumns>(dropout, p, first_query + query,
                                       key - thread_index_here() % 4 * 2);
  } else {
    std::uint32_t kept = 0;
#pragma unroll 1
    for (int bit = 0; bit < 4 * kSineColumns; ++bit) {
      const int column = bit / 4 * 8 + bit % 2;
      const std::int64_t j = key + bit / 2 % 2 * 8;
      const PhiloxBlock random =
          philox(dropout.seed, dropout.offset,
                 Dropout::block_index(first_query + query + column, j, p.key_length));
      const int n = static_cast<int>(j % 4);
      const std::uint32_t value = n == 0   ? random.value[0]
                                  : n == 1 ? random.value[1]
                                  : n == 2 ? random.value[2]
                                           : random.value[3];
      kept |= std::uint32_t{dropout.keep(value)} << bit;
    }
    return kept;
  }
}

// sums += pairs features: of the warp's 32 rows, 64 columns, and half of the chunk, which it is.
// `pairs`: the warp's first row of a chunk of columns; `features`: of these columns.
__device__ __forceinline__ void multiply_pairs(float (&sums)[2][4][4], const SineNumber* pairs,
                                               const SineNumber* features, int half) {
  const int lane = thread_index_here() % 32;
  const std::uint32_t pair = shared_address(pairs + at_piece(lane % 16, lane / 16));
  const std::uint32_t feature =
      shared_address(features + at_piece(lane % 16, 4 * half + lane / 16));
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) ldmatrix(a[t], (pair ^ (k * 32)) + t * 16 * kRowBytes);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      std::uint32_t b[4];
      ldmatrix<true>(b, (feature ^ (n * 32)) + k * 16 * kRowBytes);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        mma_m16n8k16<SineNumber>(sums[t][2 * n], a[t], {b[0], b[1]});
        mma_m16n8k16<SineNumber>(sums[t][2 * n + 1], a[t], {b[2], b[3]});
      }
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
