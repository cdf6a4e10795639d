#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"

// The weights p(i, j) of a problem, before dropout. Its value and value_dim are not read.
namespace torch_selfattn::kernels {

struct AttentionWeights {
  AttentionProblem problem;
  View weights;                // (B, H, Lq, Lk), or (B, 1, Lq, Lk):
  bool average_heads = false;  // the mean over the heads, added up in their order

  // (B or 1, Lq) or null: what query i counts as in key_range(), where the queries are some rows of
  // a longer sequence; strides [b, i], 0 where broadcast.
  const std::int64_t* query_indices = nullptr;
  std::int64_t query_index_stride[2] = {0, 0};
};

TSA_HOST_DEVICE std::int64_t query_index(const AttentionWeights& call, std::int64_t b,
                                         std::int64_t i) {
  if (call.query_indices == nullptr) return i;
  return call.query_indices[b * call.query_index_stride[0] + i * call.query_index_stride[1]];
}

// Keys that query i of sample b may attend to, before the mask tensor is looked at.
TSA_HOST_DEVICE KeyRange key_range(const AttentionWeights& call, std::int64_t b, std::int64_t i) {
  return key_range(call.problem, b, query_index(call, b, i));
}

}  // namespace torch_selfattn::kernels
