#pragma once

#include <type_traits>

#include "kernels/cuda/sm80/additive_group_workspace.h"

// Sizes of the exponential form, and what its kernels leave for one another.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kTileTokens = 64;  // queries and keys of a tile; the tile of the generic kernel
constexpr int kMostExponentialDims = 128;

// Shared memory of a block, in floats. kWidth: features and values, 64 or 128.
template <int kWidth>
struct ExponentialTile {
  // A vector more than needed: the 8 rows that a quarter warp reads at once lie in other banks.
  static constexpr int kStride = kWidth + 4;
  static constexpr int kPairStride = kTileTokens + 4;
  static constexpr std::uint32_t kTokens = kTileTokens * kStride;     // 64 tokens
  static constexpr std::uint32_t kPairs = kTileTokens * kPairStride;  // 64 x 64 pairs

  // Queries, keys, weight.
  static constexpr std::uint32_t kScoreOperands = 2 * kTokens + kWidth;
  // Forward: values, weights of pairs, factors of rows.
  static constexpr std::uint32_t kForward = kScoreOperands + kTokens + kPairs + kTileTokens;
  // Backward: values, g; gradients of the output and p, in place of which come the parts of dq.
  static constexpr std::uint32_t kPartRows = 8;  // queries of which 8 warps leave parts at once
  static constexpr std::uint32_t kParts = 2 * 8 * kPartRows * 64;
  static constexpr std::uint32_t kPartsOrOperands =
      kTokens + kPairs > kParts ? kTokens + kPairs : kParts;
  static constexpr std::uint32_t kBackward = kScoreOperands + kTokens + kPairs + kPartsOrOperands;
};

// body(std::integral_constant<int, width>)
template <typename Body>
auto with_exponential_width(const AttentionProblem& p, Body body) {
  const std::int64_t dims = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  return dims <= 64 ? body(std::integral_constant<int, 64>())
                    : body(std::integral_constant<int, 128>());
}

// Forward leaves the tiles of queries that the generic kernel takes: (B, H, query tiles) bytes.

// A block of the backward has the pairs of a range of key tiles and a range of query tiles of one
// (batch, head). What it adds up of dq, dk, dv and dw is a part of its own; the parts are added in
// order. Their number follows from the problem alone, so results do not depend on the GPU.
struct ExponentialWorkspace {
  std::int64_t query_tiles = 0;
  std::int64_t key_tiles = 0;
  std::int64_t key_ranges = 0;        // parts of dq
  std::int64_t query_ranges = 0;      // parts of dk and dv
  std::int64_t keys_of_range = 0;     // tiles
  std::int64_t queries_of_range = 0;  // tiles
  std::int64_t features = 0;          // E, rounded up to vectors
  std::int64_t values = 0;            // Ev likewise

  float* query_parts = nullptr;   // (B, H, key_ranges, Lq, features)
  float* key_parts = nullptr;     // (B, H, query_ranges, Lk, features)
  float* value_parts = nullptr;   // (B, H, query_ranges, Lk, values)
  float* weight_parts = nullptr;  // (B, H, key_ranges, query_ranges, features)
  std::uint32_t* redo = nullptr;  // (B, Hk): not 0 for those that the generic kernel takes
  void* generic = nullptr;        // that kernel's workspace
  std::int64_t bytes = 0;

  static ExponentialWorkspace of(const AttentionProblem& p, void* memory,
                                 std::int64_t generic_bytes) {
    ExponentialWorkspace w;
    Carver carver(memory);
    const auto divided = [](std::int64_t n, std::int64_t by) { return (n + by - 1) / by; };
    const std::int64_t rows = p.batch * p.heads;
    w.query_tiles = divided(p.query_length, kTileTokens);
    w.key_tiles = divided(p.key_length, kTileTokens);
    w.features = divided(p.head_dim, 4) * 4;
    w.values = divided(p.value_dim, 4) * 4;
    // Enough blocks, if there are tiles for them and memory for their parts.
    const auto ranges = [&](std::int64_t blocks, std::int64_t columns, std::int64_t least) {
      const std::int64_t affordable = kAffordableFloats / (rows * columns);
      const std::int64_t most = affordable > least ? affordable : least;
      const std::int64_t wanted = divided(kEnoughBlocks, blocks);
      return wanted < most ? wanted : most;
    };
    w.keys_of_range = divided(w.key_tiles, ranges(rows, p.query_length * w.features, 4));
    w.key_ranges = divided(w.key_tiles, w.keys_of_range);
    w.queries_of_range =
        divided(w.query_tiles,
                ranges(rows * w.key_ranges * 2, p.key_length * (w.features + w.values), 2));
    w.query_ranges = divided(w.query_tiles, w.queries_of_range);
    w.query_parts = carver.take<float>(rows * w.key_ranges * p.query_length * w.features);
    w.key_parts = carver.take<float>(rows * w.query_ranges * p.key_length * w.features);
    w.value_parts = carver.take<float>(rows * w.query_ranges * p.key_length * w.values);
    w.weight_parts = carver.take<float>(rows * w.key_ranges * w.query_ranges * w.features);
    w.redo = carver.take<std::uint32_t>(p.batch * p.kv_heads);
    w.generic = carver.take<char>(generic_bytes);
    w.bytes = carver.bytes();
    return w;
  }
  TSA_HOST_DEVICE std::int64_t blocks(const AttentionProblem& p) const {
    return p.batch * p.heads * key_ranges * query_ranges;
  }

 private:
  // Two waves of two blocks on each of 132 multiprocessors; queries are divided as well where keys
  // give less than half of that.
  static constexpr std::int64_t kEnoughBlocks = 528;
  static constexpr std::int64_t kAffordableFloats = std::int64_t{1} << 26;
};

}  // namespace torch_selfattn::kernels::cuda::sm80
