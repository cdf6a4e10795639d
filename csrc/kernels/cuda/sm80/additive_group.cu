#include "kernels/cuda/sm80/additive_group.h"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_group_extremes.cuh"
#include "kernels/cuda/sm80/additive_group_forward.cuh"
#include "kernels/cuda/sm80/additive_group_keys.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

static_assert(kRows == Tile<float>::kTokens);  // the generic kernel takes over tile by tile

namespace {

template <int width>
struct Width {
  static constexpr int value = width;
};

// body(Width<kWidth>()): the columns of the values, rounded up to what is compiled.
template <typename Body>
auto with_width(std::int64_t value_dim, Body&& body) {
  if (value_dim <= 64) return body(Width<64>());
  if (value_dim <= 128) return body(Width<128>());
  return body(Width<kMostValues>());
}

std::int64_t shared_bytes(const AttentionProblem& p) {
  const std::int64_t quads = GroupWorkspace::of(p, nullptr).quads;
  return with_width(p.value_dim, [&](auto width) {
    return GroupTile<decltype(width)::value>::shared_bytes(quads);
  });
}

template <typename T>
cudaError_t forward(const AttentionForward& call, void* memory, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const auto workspace = GroupWorkspace::of(p, memory);
  LaunchSequence launches(stream);
  const std::int64_t kv_rows = p.batch * p.kv_heads;
  const std::int64_t feature_bytes =
      workspace.centre.features * static_cast<std::int64_t>(sizeof(float));
  launches.run(additive_group_extremes_kernel<T>, kv_rows * workspace.centre.parts,
               kExtremesThreads, 2 * kExtremesThreads * static_cast<std::int64_t>(sizeof(float)), p,
               workspace.centre);
  launches.run(additive_group_keys_kernel<T>, kv_rows * workspace.key_tiles, kKeysThreads,
               feature_bytes, p, workspace);
  with_width(p.value_dim, [&](auto width) {
    launches.run(additive_group_forward_kernel<T, decltype(width)::value>,
                 p.batch * p.heads * workspace.query_tiles, kForwardThreads, shared_bytes(p), call,
                 workspace);
  });
  launches.then([&] { return attention_forward(call, stream, workspace.redo); });
  return launches.error();
}

}  // namespace

const char* additive_group_not_supported(const AttentionProblem& p, const DeviceLimits& device) {
  if (const char* reason = additive_on_tensor_cores_not_supported(p, device)) return reason;
  if (shared_bytes(p) > device.shared_bytes_per_block) {
    return "this GPU has too little shared memory for these head dims";
  }
  const auto workspace = GroupWorkspace::of(p, nullptr);
  const std::int64_t most = 0x7fffffff;
  if (p.batch * p.heads * workspace.query_tiles > most ||
      p.batch * p.kv_heads * workspace.key_tiles > most) {
    return "more than 2^31 tiles of work, split the batch";
  }
  return attention_not_supported(p);  // the generic kernel must be able to take over
}

std::int64_t additive_group_workspace_bytes(const AttentionProblem& p) {
  return GroupWorkspace::of(p, nullptr).bytes;
}

cudaError_t additive_group_forward(const AttentionForward& call, void* workspace,
                                   cudaStream_t stream) {
  if (call.problem.batch * call.problem.heads * call.problem.query_length == 0) return cudaSuccess;
  return call.problem.dtype == DType::kFloat16 ? forward<__half>(call, workspace, stream)
                                               : forward<__nv_bfloat16>(call, workspace, stream);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
