#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_exponential.h"
#include "kernels/cuda/sm80/additive_exponential_gradients.cuh"
#include "kernels/cuda/sm80/additive_exponential_prepare.h"
#include "kernels/cuda/sm80/additive_exponential_sums.cuh"

namespace torch_selfattn::kernels::cuda::sm80 {

namespace {

ExponentialBackwardWorkspace workspace_of(const AttentionProblem& p, void* memory) {
  return ExponentialBackwardWorkspace::of(p, memory, attention_backward_workspace_bytes(p));
}

}  // namespace

const char* additive_exponential_backward_not_supported(const AttentionProblem& p,
                                                        const DeviceLimits& device) {
  if (const char* reason = exponential_form_not_supported(p, device)) return reason;
  if (p.head_dim < 1) return "the queries have no elements";
  if (p.key_length == 0 || p.query_length == 0 || p.batch * p.heads == 0) {
    return "there are no queries or no keys";
  }
  const std::int64_t bytes = with_exponential_width(p, [](auto width) -> std::int64_t {
    return 4 * ExponentialTile<decltype(width)::value>::kBackward;
  });
  if (bytes > device.shared_bytes_per_block) return "this GPU has too little shared memory";
  const auto workspace = workspace_of(p, nullptr);
  const std::int64_t most = 0x7fffffff;
  const std::int64_t elements =
      p.batch * p.heads * (p.query_length + p.key_length) * (workspace.features + workspace.values);
  if (workspace.blocks(p) > most || elements / kThreads > most) {
    return "more than 2^31 tiles of work, split the batch";
  }
  return attention_not_supported(p);  // the generic kernel must be able to take over
}

std::int64_t additive_exponential_backward_workspace_bytes(const AttentionProblem& p) {
  return workspace_of(p, nullptr).bytes;
}

cudaError_t additive_exponential_backward(const AttentionBackward& call, void* memory,
                                          cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const auto workspace = workspace_of(p, memory);
  const std::int64_t kv_rows = p.batch * p.kv_heads;
  const auto blocks = [](std::int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  LaunchSequence launches(stream);
  launches.run(additive_exponential_begin_kernel, blocks(kv_rows), kThreads, 0, workspace.redo,
               kv_rows);
  launches.then([&] { return prepare_operands(p, workspace.operands, &call.grad_out, stream); });
  launches.then([&] { return attention_backward_statistics(call, workspace.generic, stream); });
  with_exponential_width(p, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launches.run(additive_exponential_gradients_kernel<kWidth>, workspace.blocks(p), kThreads,
                 4 * ExponentialTile<kWidth>::kBackward, call, workspace);
  });
  const auto sum = [&](const float* parts, const View& gradient, std::int64_t heads,
                       std::int64_t count, std::int64_t tokens, std::int64_t columns,
                       std::int64_t dims) {
    const GradientParts of = {parts, gradient, p.dtype, heads, p.batch * heads,
                              count, tokens,   columns, dims};
    launches.run(additive_exponential_sum_kernel, of.blocks(), kThreads, 0, of);
  };
  const std::int64_t parts_of_key = p.group_size() * workspace.query_ranges;
  sum(workspace.query_parts, call.grad_query, p.heads, workspace.key_ranges, p.query_length,
      workspace.features, p.head_dim);
  sum(workspace.key_parts, call.grad_key, p.kv_heads, parts_of_key, p.key_length,
      workspace.features, p.head_dim);
  sum(workspace.value_parts, call.grad_value, p.kv_heads, parts_of_key, p.key_length,
      workspace.values, p.value_dim);
  launches.run(additive_exponential_parts_kernel, blocks(p.batch * p.heads * (p.head_dim + 1)),
               kThreads, 0, p, workspace);
  AttentionBackward rest = call;
  if (!has_own_mask_gradient(p)) rest.grad_mask = nullptr;
  launches.then([&] {
    return attention_backward_gradients(rest, workspace.generic, stream, workspace.redo);
  });
  if (call.grad_mask != nullptr && !has_own_mask_gradient(p)) {
    AttentionBackward mask = call;
    mask.grad_query.data = mask.grad_weight = mask.grad_slopes = nullptr;
    launches.then([&] { return attention_backward_gradients(mask, workspace.generic, stream); });
  }
  return launches.error();
}

}  // namespace torch_selfattn::kernels::cuda::sm80
