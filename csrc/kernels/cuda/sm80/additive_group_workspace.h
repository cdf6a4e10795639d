#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cuda/sm80/additive_tensor_cores.h"
#include "kernels/cuda/sm80/carver.h"

// Sizes of the group method, and what its kernels leave for one another.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kQuadFeatures = 16;  // four groups of four features, the unit of all loops over them
constexpr int kRows = 64;          // queries of a block; the tile of the generic kernel
constexpr int kMostFeatures = kMostAdditiveElements;
constexpr int kMostValues = kMostAdditiveValues;

// Keys of a tile. Half as many for wide values, whose accumulators take the registers.
TSA_HOST_DEVICE constexpr int tile_keys(std::int64_t value_dim) {
  return value_dim > 128 ? 32 : 64;
}

// Where the keys lie, for each feature: s(q, k) is the same for q + c, k - c, and max |k - c| is
// the least for the middle c of least and largest key.
struct GroupCentre {
  std::int64_t features = 0;  // of all quads
  std::int64_t parts = 0;     // of the keys, for their extremes
  float* extremes = nullptr;  // (B, Hk, parts, 2, features): least and largest key
  float* centre = nullptr;    // (B, Hk, features): c
  float* floor = nullptr;     // (B, Hk, features): sigma(-2 max |k - c|)

  static GroupCentre of(const AttentionProblem& p, std::int64_t quads, Carver& carver) {
    GroupCentre c;
    c.features = quads * kQuadFeatures;
    c.parts = (p.key_length + kPartKeys - 1) / kPartKeys;
    if (c.parts > kMostParts) c.parts = kMostParts;
    const std::int64_t numbers = p.batch * p.kv_heads * c.features;
    c.extremes = carver.take<float>(numbers * c.parts * 2);
    c.centre = carver.take<float>(numbers);
    c.floor = carver.take<float>(numbers);
    return c;
  }

 private:
  static constexpr std::int64_t kPartKeys = 128;
  static constexpr std::int64_t kMostParts = 32;
};

// `Vector` is 16 bytes: a lane's part of the MMA operands of two groups and 8 keys.
struct GroupWorkspace {
  std::int64_t quads = 0;
  std::int64_t key_tiles = 0;
  std::int64_t query_tiles = 0;

  uint4* key_products = nullptr;  // (B, Hk, key_tiles, quads, keys / 8, 2, 32 lanes)
  GroupCentre centre;
  std::uint8_t* redo = nullptr;  // (B, H, query_tiles): 1 for a tile that the generic kernel takes
  std::int64_t bytes = 0;

  static GroupWorkspace of(const AttentionProblem& p, void* memory) {
    GroupWorkspace w;
    Carver carver(memory);
    const int keys = tile_keys(p.value_dim);
    w.quads = (p.head_dim + kQuadFeatures - 1) / kQuadFeatures;
    w.key_tiles = (p.key_length + keys - 1) / keys;
    w.query_tiles = (p.query_length + kRows - 1) / kRows;
    w.key_products = carver.take<uint4>(p.batch * p.kv_heads * w.key_tiles * w.quads * keys * 8);
    w.centre = GroupCentre::of(p, w.quads, carver);
    w.redo = carver.take<std::uint8_t>(p.batch * p.heads * w.query_tiles);
    w.bytes = carver.bytes();
    return w;
  }
};

}  // namespace torch_selfattn::kernels::cuda::sm80
