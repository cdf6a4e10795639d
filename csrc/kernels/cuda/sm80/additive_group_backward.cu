#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_group.h"
#include "kernels/cuda/sm80/additive_group_gradients.cuh"
#include "kernels/cuda/sm80/additive_group_rows.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

namespace {

GradientWorkspace workspace_of(const AttentionProblem& p, void* memory) {
  return GradientWorkspace::of(p, memory, attention_backward_workspace_bytes(p));
}

template <typename T>
class Launches {
 public:
  Launches(const AttentionBackward& call, const DeviceLimits& device, void* memory,
           cudaStream_t stream)
      : call_(call),
        workspace_(workspace_of(call.problem, memory)),
        shape_(GradientShape::of(call.problem, device.shared_bytes_per_block)),
        stream_(stream),
        launches_(stream) {}

  cudaError_t all() {
    const AttentionProblem& p = call_.problem;
    const std::int64_t kv_rows = p.batch * p.kv_heads;
    const std::int64_t feature_bytes =
        workspace_.centre.features * static_cast<std::int64_t>(sizeof(float));
    const auto* const grad_lse = static_cast<const float*>(call_.grad_lse);
    launches_.run(additive_group_extremes_kernel<T>, kv_rows * workspace_.centre.parts,
                  kExtremesThreads, 2 * kExtremesThreads * static_cast<std::int64_t>(sizeof(float)),
                  p, workspace_.centre);
    launches_.run(additive_group_rows_kernel<T, false>,
                  kv_rows * row_blocks(workspace_.key_stripes), kRowsThreads, feature_bytes, p,
                  workspace_, grad_lse);
    launches_.then(
        [&] { return attention_backward_statistics(call_, workspace_.generic, stream_); });
    launches_.run(additive_group_rows_kernel<T, true>,
                  p.batch * p.heads * row_blocks(workspace_.query_stripes), kRowsThreads,
                  feature_bytes * (1 + kRowsThreads / 32), p, workspace_, grad_lse);
    gradients<false>();
    gradients<true>();
    const std::int64_t parts = p.batch * p.heads * Workspace<float>::query_tiles(p) * p.head_dim;
    launches_.run(additive_group_weight_parts_kernel,
                  (parts + kWeightPartsThreads - 1) / kWeightPartsThreads, kWeightPartsThreads, 0,
                  p, workspace_);
    launches_.then([&] {
      return attention_backward_gradients(call_, workspace_.generic, stream_, workspace_.redo);
    });
    return launches_.error();
  }

 private:
  static std::int64_t row_blocks(std::int64_t stripes) {
    return (stripes * kStripe + kRows - 1) / kRows;
  }

  template <bool kOwnsKeys>
  void gradients() {
    const auto start = [&](auto kernel) {
      launches_.run(kernel, GradientOwner<kOwnsKeys>::blocks(call_.problem, shape_),
                    shape_.threads(), shape_.shared_bytes(), call_, workspace_, shape_);
    };
    if (shape_ == kShapeOf64) return start(additive_group_gradients_kernel<T, kOwnsKeys, true>);
    start(additive_group_gradients_kernel<T, kOwnsKeys, false>);
  }

  const AttentionBackward& call_;
  GradientWorkspace workspace_;
  GradientShape shape_;
  cudaStream_t stream_;
  LaunchSequence launches_;
};

}  // namespace

const char* additive_group_backward_not_supported(const AttentionProblem& p, bool bias_gradients,
                                                  const DeviceLimits& device) {
  if (const char* reason = kind_not_on_tensor_cores(p, device)) return reason;
  if (bias_gradients) return "it has no gradient of a mask or of ALiBi slopes";
  if (p.head_dim < 1) return "the queries have no elements";
  if (p.head_dim > kMostGradientDims) return "the head dim of query and key is above 192";
  if (p.value_dim > kMostGradientDims) return "the head dim of value is above 192";
  if (p.key_length == 0 || p.query_length == 0 || p.batch * p.heads == 0) {
    return "there are no queries or no keys";
  }
  const auto shape = GradientShape::of(p, device.shared_bytes_per_block);
  if (shape.shared_bytes() > device.shared_bytes_per_block) {
    return "this GPU has too little shared memory for these head dims";
  }
  const std::int64_t most = 0x7fffffff;
  if (GradientOwner<true>::blocks(p, shape) > most ||
      GradientOwner<false>::blocks(p, shape) > most) {
    return "more than 2^31 tiles of work, split the batch";
  }
  return attention_not_supported(p);  // the generic kernel must be able to take over
}

std::int64_t additive_group_backward_workspace_bytes(const AttentionProblem& p) {
  return workspace_of(p, nullptr).bytes;
}

cudaError_t additive_group_backward(const AttentionBackward& call, const DeviceLimits& device,
                                    void* workspace, cudaStream_t stream) {
  return call.problem.dtype == DType::kFloat16
             ? Launches<__half>(call, device, workspace, stream).all()
             : Launches<__nv_bfloat16>(call, device, workspace, stream).all();
}

}  // namespace torch_selfattn::kernels::cuda::sm80
