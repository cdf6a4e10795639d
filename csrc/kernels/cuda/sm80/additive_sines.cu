#include "kernels/cuda/sm80/additive_sines.h"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_sines_forward.cuh"
#include "kernels/cuda/sm80/additive_sines_plan.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

static_assert(Tile<float>::kTokens == 64);  // the generic kernel takes over tile by tile

namespace {

template <int width, int row_tiles, bool resident>
struct Shape {
  static constexpr int kWidth = width;
  static constexpr int kRowTiles = row_tiles;
  static constexpr bool kResident = resident;
  using Tile = SineTile<width, row_tiles, resident>;
};

// body(Shape<kWidth, kRowTiles, kResident>()): the columns of the values, rounded up to what is
// compiled, and as many queries as the problem leaves registers for.
template <typename Body>
auto with_shape(const AttentionProblem& p, bool resident, Body&& body) {
  const auto with_tile = [&]<int width, int row_tiles>() {
    return resident ? body(Shape<width, row_tiles, true>())
                    : body(Shape<width, row_tiles, false>());
  };
  const bool biased = p.mask_kind != MaskKind::kNone || p.slopes != nullptr;
  if (p.value_dim <= 64) return with_tile.template operator()<64, 2>();
  if (p.value_dim > 128) return with_tile.template operator()<kMostSineValues, 1>();
  return sine_row_tiles(p.value_dim, biased) == 1 ? with_tile.template operator()<128, 1>()
                                                  : with_tile.template operator()<128, 2>();
}

std::int64_t shared_bytes(const AttentionProblem& p, bool resident) {
  const std::int64_t chunks = SineWorkspace::of(p, false, nullptr).chunks;
  return with_shape(p, resident,
                    [&](auto shape) { return decltype(shape)::Tile::shared_bytes(chunks); });
}

template <typename T>
cudaError_t forward(const AttentionForward& call, bool resident, void* memory,
                    cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const auto workspace = SineWorkspace::of(p, !resident, memory);
  LaunchSequence launches(stream);
  const std::int64_t heads = p.batch * p.heads;
  prepare_sines<T>(launches, p, workspace, !resident);
  with_shape(p, resident, [&](auto shape) {
    using S = decltype(shape);
    constexpr int kQueries = S::Tile::kQueries;
    launches.run(additive_sines_forward_kernel<T, S::kWidth, S::kRowTiles, S::kResident>,
                 heads * ((p.query_length + kQueries - 1) / kQueries), kSineThreads,
                 S::Tile::shared_bytes(workspace.chunks), call, workspace);
  });
  launches.then([&] { return attention_forward(call, stream, workspace.redo); });
  return launches.error();
}

}  // namespace

bool additive_sines_queries_stay(const AttentionProblem& p, const DeviceLimits& device) {
  return shared_bytes(p, true) <= device.shared_bytes_per_block;
}

const char* additive_sines_not_supported(const AttentionProblem& p, const DeviceLimits& device) {
  if (const char* reason = additive_on_tensor_cores_not_supported(p, device)) return reason;
  if (shared_bytes(p, false) > device.shared_bytes_per_block) {
    return "this GPU has too little shared memory";
  }
  const std::int64_t tokens = p.query_length > p.key_length ? p.query_length : p.key_length;
  if (p.batch * p.heads > 0x7fffffff / 64 / ((tokens + kSineKeys - 1) / kSineKeys)) {
    return "more than 2^31 tiles of work, split the batch";
  }
  return attention_not_supported(p);  // the generic kernel must be able to take over
}

std::int64_t additive_sines_workspace_bytes(const AttentionProblem& p, const DeviceLimits& device) {
  return SineWorkspace::of(p, !additive_sines_queries_stay(p, device), nullptr).bytes;
}

cudaError_t additive_sines_forward(const AttentionForward& call, const DeviceLimits& device,
                                   void* workspace, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  if (p.batch * p.heads * p.query_length == 0) return cudaSuccess;
  const bool resident = additive_sines_queries_stay(p, device);
  return p.dtype == DType::kFloat16 ? forward<__half>(call, resident, workspace, stream)
                                    : forward<__nv_bfloat16>(call, resident, workspace, stream);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
