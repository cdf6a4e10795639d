#pragma once

#include <type_traits>

#include "kernels/cuda/sm80/additive_group_workspace.h"
#include "kernels/cuda/sm80/device_limits.h"

// Sizes of the exponential form, and what its kernels leave for one another.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kTileTokens = 64;  // queries and keys of a tile; the tile of the generic kernel
constexpr int kMostExponentialDims = 128;
constexpr double kLargestScale = 0x1p60;  // with the largest weight, scores are far from overflow

// Shared memory of a block, in floats. kWidth: features and values, 64 or 128.
template <int kWidth>
struct ExponentialTile {
  // A vector more than needed: the 8 rows that a quarter warp reads at once lie in other banks.
  static constexpr int kStride = kWidth + 4;
  static constexpr int kPairStride = kTileTokens + 4;
  static constexpr std::uint32_t kTokens = kTileTokens * kStride;     // 64 tokens
  static constexpr std::uint32_t kPairs = kTileTokens * kPairStride;  // 64 x 64 pairs

  // Queries, weight; two stages of keys and values; weights of pairs, factors of rows.
  static constexpr std::uint32_t kForward = kTokens + kWidth + 4 * kTokens + kPairs + kTileTokens;

  // Queries, keys, values, weight; statistics of the queries; g; gradients of the output and p, in
  // place of which come the parts of dq.
  static constexpr std::uint32_t kPartRows = 8;  // queries of which 8 warps leave parts at once
  static constexpr std::uint32_t kParts = 2 * 8 * kPartRows * 64;
  static constexpr std::uint32_t kPartsOrOperands =
      kTokens + kPairs > kParts ? kTokens + kPairs : kParts;
  static constexpr std::uint32_t kBackward =
      3 * kTokens + kWidth + 3 * kTileTokens + kPairs + kPartsOrOperands;
};

// What both passes ask of a problem: a reason against it, or null.
inline const char* exponential_form_not_supported(const AttentionProblem& p,
                                                  const DeviceLimits& device) {
  if (p.score != ScoreKind::kAdditive) return "it has the additive score only";
  if (p.activation != Activation::kTanh) return "it has tanh only";
  if (p.dtype == DType::kFloat64) return "it computes in float32";
  if (device.capability_major < 8) return "this GPU's compute capability is below 8.0";
  if (p.head_dim > kMostExponentialDims) return "the head dim of query and key is above 128";
  if (p.value_dim > kMostExponentialDims) return "the head dim of value is above 128";
  if (!(p.scale <= kLargestScale && p.scale >= -kLargestScale)) return "the scale is above 2^60";
  const std::int64_t tokens = p.query_length + p.key_length + 2 * kTileTokens;
  if (p.batch * p.heads * 2 * (tokens / kTileTokens) > 0x7fffffff || tokens > 0x7fffffff) {
    return "more than 2^31 tokens, or tiles of work; split the batch";
  }
  return nullptr;
}

// body(std::integral_constant<int, width>)
template <typename Body>
auto with_exponential_width(const AttentionProblem& p, Body body) {
  const std::int64_t dims = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  return dims <= 64 ? body(std::integral_constant<int, 64>())
                    : body(std::integral_constant<int, 128>());
}

// How many features share a reciprocal: the product of their x must not overflow, and x is at most
// 1 + e^(2 (|q| + |k|)). Four where |q| + |k| <= 11 in a pair of tiles, two up to 22, else one: an
// x that overflows by itself has the reciprocal 0, which is right.
enum class Sharing : std::uint8_t { kFour, kTwo, kOne };

// A tensor as the kernels read it: float32, or e^2x of that; tiles of 64 tokens, zeros where there
// is no token.
struct PreparedTensor {
  std::int64_t tiles = 0;
  int columns = 0;        // a multiple of 4 for exponentials, of 8 for others
  float* data = nullptr;  // (B, heads, tiles, 64, columns)
  // (B, heads, tiles): the largest magnitude; infinity if one is NaN, or more than may be.
  float* largest = nullptr;

  static PreparedTensor of(Carver& carver, std::int64_t rows, std::int64_t length,
                           std::int64_t dims, int multiple) {
    PreparedTensor t;
    t.tiles = (length + kTileTokens - 1) / kTileTokens;
    t.columns = static_cast<int>((dims + multiple - 1) / multiple * multiple);
    t.data = carver.take<float>(rows * t.tiles * kTileTokens * t.columns);
    t.largest = carver.take<float>(rows * t.tiles);
    return t;
  }
  TSA_HOST_DEVICE const float* tile(std::int64_t row, std::int64_t n) const {
    return data + (row * tiles + n) * kTileTokens * columns;
  }
  TSA_HOST_DEVICE float largest_of(std::int64_t row, std::int64_t n) const {
    return largest[row * tiles + n];
  }
};

// The operands of a problem; the gradient of the output in backward only.
struct PreparedOperands {
  PreparedTensor query;
  PreparedTensor key;
  PreparedTensor value;
  PreparedTensor grad_out;

  static PreparedOperands of(Carver& carver, const AttentionProblem& p, bool backward) {
    const std::int64_t rows = p.batch * p.heads;
    const std::int64_t kv_rows = p.batch * p.kv_heads;
    PreparedOperands o;
    o.query = PreparedTensor::of(carver, rows, p.query_length, p.head_dim, 4);
    o.key = PreparedTensor::of(carver, kv_rows, p.key_length, p.head_dim, 4);
    o.value = PreparedTensor::of(carver, kv_rows, p.key_length, p.value_dim, 8);
    if (backward) o.grad_out = PreparedTensor::of(carver, rows, p.query_length, p.value_dim, 8);
    return o;
  }
};

struct ExponentialForwardWorkspace {
  PreparedOperands operands;
  std::uint8_t* redo = nullptr;  // (B, H, query tiles): 1 for one that the generic kernel takes
  std::int64_t bytes = 0;

  static ExponentialForwardWorkspace of(const AttentionProblem& p, void* memory) {
    ExponentialForwardWorkspace w;
    Carver carver(memory);
    w.operands = PreparedOperands::of(carver, p, /*backward=*/false);
    w.redo = carver.take<std::uint8_t>(p.batch * p.heads * w.operands.query.tiles);
    w.bytes = carver.bytes();
    return w;
  }
};

// A block of the backward has the pairs of a range of key tiles and a range of query tiles of one
// (batch, head). What it adds up of dq, dk, dv and dw is a part of its own; the parts are added in
// order. Their number follows from the problem alone, so results do not depend on the GPU.
struct ExponentialBackwardWorkspace {
  PreparedOperands operands;
  std::int64_t key_ranges = 0;        // parts of dq
  std::int64_t query_ranges = 0;      // parts of dk and dv
  std::int64_t keys_of_range = 0;     // tiles
  std::int64_t queries_of_range = 0;  // tiles
  std::int64_t features = 0;          // columns of the prepared operands
  std::int64_t values = 0;

  float* query_parts = nullptr;   // (B, H, key_ranges, Lq, features)
  float* key_parts = nullptr;     // (B, H, query_ranges, Lk, features)
  float* value_parts = nullptr;   // (B, H, query_ranges, Lk, values)
  float* weight_parts = nullptr;  // (B, H, key_ranges, query_ranges, features)
  float* slope_parts = nullptr;   // (B, H, key_ranges, query_ranges)
  std::uint32_t* redo = nullptr;  // (B, Hk): not 0 for those that the generic kernel takes
  void* generic = nullptr;        // that kernel's workspace
  std::int64_t bytes = 0;

  static ExponentialBackwardWorkspace of(const AttentionProblem& p, void* memory,
                                         std::int64_t generic_bytes) {
    ExponentialBackwardWorkspace w;
    Carver carver(memory);
    const auto divided = [](std::int64_t n, std::int64_t by) { return (n + by - 1) / by; };
    const std::int64_t rows = p.batch * p.heads;
    w.operands = PreparedOperands::of(carver, p, /*backward=*/true);
    w.features = w.operands.query.columns;
    w.values = w.operands.value.columns;
    // Enough blocks, if there are tiles for them and memory for their parts.
    const auto ranges = [&](std::int64_t blocks, std::int64_t columns, std::int64_t least) {
      const std::int64_t affordable = kAffordableFloats / (rows * columns);
      const std::int64_t most = affordable > least ? affordable : least;
      const std::int64_t wanted = divided(kEnoughBlocks, blocks);
      return wanted < most ? wanted : most;
    };
    w.keys_of_range = divided(w.operands.key.tiles, ranges(rows, p.query_length * w.features, 4));
    w.key_ranges = divided(w.operands.key.tiles, w.keys_of_range);
    w.queries_of_range =
        divided(w.operands.query.tiles,
                ranges(rows * w.key_ranges * 2, p.key_length * (w.features + w.values), 2));
    w.query_ranges = divided(w.operands.query.tiles, w.queries_of_range);
    w.query_parts = carver.take<float>(rows * w.key_ranges * p.query_length * w.features);
    w.key_parts = carver.take<float>(rows * w.query_ranges * p.key_length * w.features);
    w.value_parts = carver.take<float>(rows * w.query_ranges * p.key_length * w.values);
    w.weight_parts = carver.take<float>(rows * w.key_ranges * w.query_ranges * w.features);
    w.slope_parts = carver.take<float>(rows * w.key_ranges * w.query_ranges);
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
