#pragma once

#include "kernels/cuda/sm80/additive_group_workspace.h"

// Sizes of the backward of the group method, and what its kernels leave for one another.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kStripe = 16;        // tokens: the rows of an MMA
constexpr int kColumnTokens = 32;  // tokens of a step of the loop over columns
constexpr int kMostGradientWarps = 12;
constexpr int kMostStripes = 3;
// A warp for every 16 of the features and for every 16 columns of the values.
constexpr int kMostGradientDims = kMostGradientWarps * kQuadFeatures;

// A block has `stripes` stripes of rows and `quads` warps for each of them.
struct GradientShape {
  int quads = 0;
  int stripes = 0;
  int value_chunks = 0;  // of 8 columns, in a row of shared memory: a multiple of 8

  TSA_HOST_DEVICE constexpr int warps() const { return quads * stripes; }
  TSA_HOST_DEVICE constexpr int threads() const { return 32 * warps(); }
  TSA_HOST_DEVICE constexpr int rows() const { return kStripe * stripes; }

  // Shared memory, in this order; in bytes.
  TSA_HOST_DEVICE constexpr unsigned weighted_at() const { return warps() * 2048U; }
  TSA_HOST_DEVICE constexpr unsigned columns_at() const { return 2 * weighted_at(); }
  TSA_HOST_DEVICE constexpr unsigned column_bytes() const {
    return 2 * quads * 2048U;
  }  // of a stage
  TSA_HOST_DEVICE constexpr unsigned row_values_at() const {
    return columns_at() + 2 * column_bytes();
  }
  TSA_HOST_DEVICE constexpr unsigned column_values_at() const {
    return row_values_at() + rows() * value_chunks * 16U;
  }
  TSA_HOST_DEVICE constexpr unsigned value_bytes() const {
    return kColumnTokens * value_chunks * 16U;
  }
  TSA_HOST_DEVICE constexpr unsigned statistics_at() const {
    return column_values_at() + 2 * value_bytes();
  }
  TSA_HOST_DEVICE constexpr unsigned partials_at() const {
    return statistics_at() + 2 * kColumnTokens * 16U;
  }
  TSA_HOST_DEVICE constexpr unsigned products_at() const { return partials_at() + warps() * 1024U; }
  TSA_HOST_DEVICE constexpr unsigned gradients_at() const {
    return products_at() + stripes * 2048U;
  }
  TSA_HOST_DEVICE constexpr unsigned owner_at() const { return gradients_at() + stripes * 1024U; }
  TSA_HOST_DEVICE constexpr unsigned shared_bytes() const { return owner_at() + kOwnerBytes; }

  static constexpr unsigned kOwnerBytes = 256;  // of a GradientOwner, at most

  bool operator==(const GradientShape&) const = default;

  // As many stripes as fit; at least one.
  static GradientShape of(const AttentionProblem& p, std::int64_t shared_bytes_per_block) {
    const std::int64_t dims = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    GradientShape shape;
    shape.quads = static_cast<int>((dims + kQuadFeatures - 1) / kQuadFeatures);
    shape.value_chunks = static_cast<int>((p.value_dim + 63) / 64 * 8);
    shape.stripes = kMostStripes;
    while (shape.stripes > 1 &&
           (shape.warps() > kMostGradientWarps || shape.shared_bytes() > shared_bytes_per_block)) {
      --shape.stripes;
    }
    return shape;
  }
};
// That of E and Ev from 49 to 64, for which the kernels are compiled: counts are of this one.
constexpr GradientShape kShapeOf64 = {4, 3, 8};
static_assert(kMostStripes * kStripe <= 2 * kColumnTokens);  // the statistics of a block's rows

// Rows of products: (B, heads, stripes, quads, 16 tokens, 8 chunks of 16 bytes), the chunks of a
// token swizzled, so that a part of it is copied to shared memory as it is.
struct GradientWorkspace {
  int quads = 0;
  std::int64_t query_stripes = 0;  // even: of whole tiles of columns
  std::int64_t key_stripes = 0;
  std::int64_t query_blocks = 0;  // of 64 tokens

  GroupCentre centre;
  uint4* queries = nullptr;
  uint4* keys = nullptr;
  float4* statistics = nullptr;   // (B, H, query_stripes * 16): RowStatistics of each query
  float* mean_tanh = nullptr;     // (B, H, query_blocks, features): sums of tanh(q + c)
  float* weight_parts = nullptr;  // (B, H, query_stripes, features)
  std::uint32_t* redo = nullptr;  // (B, Hk): 1 for those that the generic kernel takes
  void* generic = nullptr;        // that kernel's workspace
  std::int64_t bytes = 0;

  static GradientWorkspace of(const AttentionProblem& p, void* memory, std::int64_t generic_bytes) {
    GradientWorkspace w;
    Carver carver(memory);
    const auto stripes = [](std::int64_t tokens) {
      return (tokens + kColumnTokens - 1) / kColumnTokens * (kColumnTokens / kStripe);
    };
    const std::int64_t rows = p.batch * p.heads;
    const std::int64_t kv_rows = p.batch * p.kv_heads;
    w.quads = GradientShape::of(p, 0).quads;
    w.query_stripes = stripes(p.query_length);
    w.key_stripes = stripes(p.key_length);
    w.query_blocks = (p.query_length + kRows - 1) / kRows;
    w.centre = GroupCentre::of(p, w.quads, carver);
    w.queries = carver.take<uint4>(rows * w.query_stripes * w.stripe_size());
    w.keys = carver.take<uint4>(kv_rows * w.key_stripes * w.stripe_size());
    w.statistics = carver.take<float4>(rows * w.query_stripes * kStripe);
    w.mean_tanh = carver.take<float>(rows * w.query_blocks * w.centre.features);
    w.weight_parts = carver.take<float>(rows * w.query_stripes * w.centre.features);
    w.redo = carver.take<std::uint32_t>(kv_rows);
    w.generic = carver.take<char>(generic_bytes);
    w.bytes = carver.bytes();
    return w;
  }
  TSA_HOST_DEVICE std::int64_t stripe_size() const {  // of products, in uint4
    return std::int64_t{quads} * kStripe * 8;
  }
};

}  // namespace torch_selfattn::kernels::cuda::sm80
