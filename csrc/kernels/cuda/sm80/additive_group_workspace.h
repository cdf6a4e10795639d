#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"

// Sizes of the group method, and what its kernels leave for one another.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kQuadFeatures = 16;  // four groups of four features, the unit of all loops over them
constexpr int kRows = 64;          // queries of a block; the tile of the generic kernel
constexpr int kMostFeatures = 256;
constexpr int kMostValues = 256;

// Keys of a tile. Half as many for wide values, whose accumulators take the registers.
TSA_HOST_DEVICE constexpr int tile_keys(std::int64_t value_dim) {
  return value_dim > 128 ? 32 : 64;
}

// `Vector` is 16 bytes: a lane's part of the MMA operands of two groups and 8 keys.
struct GroupWorkspace {
  std::int64_t quads = 0;
  std::int64_t key_tiles = 0;
  std::int64_t query_tiles = 0;
  std::int64_t parts = 0;  // of the keys, for their extremes

  uint4* key_products = nullptr;  // (B, Hk, key_tiles, quads, keys / 8, 2, 32 lanes)
  float* extremes = nullptr;      // (B, Hk, parts, 2, features): least and largest key
  float* centre = nullptr;        // (B, Hk, features): c
  float* floor = nullptr;         // (B, Hk, features): sigma(-2 max |k - c|)
  std::uint8_t* redo = nullptr;   // (B, H, query_tiles): 1 for a tile that the generic kernel takes
  std::int64_t bytes = 0;

  TSA_HOST_DEVICE std::int64_t features() const { return quads * kQuadFeatures; }

  static GroupWorkspace of(const AttentionProblem& p, void* memory) {
    GroupWorkspace w;
    const int keys = tile_keys(p.value_dim);
    const std::int64_t kv_rows = p.batch * p.kv_heads;
    w.quads = (p.head_dim + kQuadFeatures - 1) / kQuadFeatures;
    w.key_tiles = (p.key_length + keys - 1) / keys;
    w.query_tiles = (p.query_length + kRows - 1) / kRows;
    w.parts = (p.key_length + kPartKeys - 1) / kPartKeys;
    if (w.parts > kMostParts) w.parts = kMostParts;
    const auto take = [&](std::int64_t bytes) {
      char* const begin = memory == nullptr ? nullptr : static_cast<char*>(memory) + w.bytes;
      w.bytes += (bytes + 15) / 16 * 16;
      return begin;
    };
    const std::int64_t numbers = kv_rows * w.features() * static_cast<std::int64_t>(sizeof(float));
    w.key_products = reinterpret_cast<uint4*>(take(kv_rows * w.key_tiles * w.quads * keys * 8 *
                                                   static_cast<std::int64_t>(sizeof(uint4))));
    w.extremes = reinterpret_cast<float*>(take(numbers * w.parts * 2));
    w.centre = reinterpret_cast<float*>(take(numbers));
    w.floor = reinterpret_cast<float*>(take(numbers));
    w.redo = reinterpret_cast<std::uint8_t*>(take(p.batch * p.heads * w.query_tiles));
    return w;
  }

 private:
  static constexpr std::int64_t kPartKeys = 128;
  static constexpr std::int64_t kMostParts = 32;
};

}  // namespace torch_selfattn::kernels::cuda::sm80
