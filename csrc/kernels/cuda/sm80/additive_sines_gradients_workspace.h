#pragma once

#include "kernels/cuda/sm80/additive_sines_workspace.h"

// Sizes of the backward of the additive score as dot products of sines, and what its kernels leave
// for one another.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kSineRows = 128;   // tokens that a block owns
constexpr int kSliceGroups = 2;  // of 32 elements, whose gradients a block has
constexpr int kSliceElements = kSliceGroups * kChunkWords;
static_assert(kSineRows == kSineKeys);    // tiles of queries are like those of keys
static_assert(kSliceElements == kChunk);  // a slice has as many columns of the values

struct SineGradientWorkspace {
  SineWorkspace sines;
  std::int64_t weight_parts_of_head = 0;  // tiles of queries, then tiles of keys

  float4* statistics = nullptr;   // (B, H, padded_queries): query_statistics.cuh
  float* weight_parts = nullptr;  // (B, H, weight_parts_of_head, E): w dw
  std::uint32_t* redo = nullptr;  // (B, Hk): 1 for those that the generic kernel takes
  void* generic = nullptr;        // that kernel's workspace
  std::int64_t bytes = 0;

  static SineGradientWorkspace of(const AttentionProblem& p, void* memory,
                                  std::int64_t generic_bytes) {
    SineGradientWorkspace w;
    Carver carver(memory);
    w.sines = SineWorkspace::of(p, true, carver);
    w.weight_parts_of_head = (w.sines.padded_queries + w.sines.padded_keys) / kSineRows;
    const std::int64_t heads = p.batch * p.heads;
    w.statistics = carver.take<float4>(heads * w.sines.padded_queries);
    w.weight_parts = carver.take<float>(heads * w.weight_parts_of_head * p.head_dim);
    w.redo = carver.take<std::uint32_t>(p.batch * p.kv_heads);
    w.generic = carver.take<char>(generic_bytes);
    w.bytes = carver.bytes();
    return w;
  }
};

// Slices of a block's gradients: of elements and, for keys, of columns of the values.
TSA_HOST_DEVICE std::int64_t sine_slices(const AttentionProblem& p, bool keys) {
  const std::int64_t dims = keys && p.value_dim > p.head_dim ? p.value_dim : p.head_dim;
  return (dims + kSliceElements - 1) / kSliceElements;
}

}  // namespace torch_selfattn::kernels::cuda::sm80
