#pragma once

#include <torch/types.h>

// Masks of the modules: their shapes, and how they become one mask of the operators.
namespace torch_selfattn::nn {

// What torch.nn.MultiheadAttention says of inputs that do not fit together, in its sentences; those
// of torch_selfattn/nn/_masks.py to the letter (tests/python/test_cpp_modules.py). `packed`: key
// and value are of the size of the query. Sizes of 1 that broadcast are let through.
void check_inputs(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
                  const torch::Tensor& key_padding_mask, const torch::Tensor& attn_mask,
                  int64_t embed_dim, int64_t num_heads, bool packed, bool batch_first);

// The two masks of torch.nn.MultiheadAttention (true = ignore) as one of the operators' (true =
// attend), broadcastable to (B, H, Lq, Lk); undefined if there is none.
torch::Tensor merge_masks(const torch::Tensor& attn_mask, const torch::Tensor& key_padding_mask,
                          int64_t batch);

// Lengths and window as a boolean mask (1 or B, 1, Lq, Lk), true = attend.
torch::Tensor window_mask(int64_t query_length, int64_t key_length, torch::Device device,
                          const torch::Tensor& key_lengths, const torch::Tensor& key_starts,
                          int64_t window_left, int64_t window_right, int64_t query_offset,
                          const torch::Tensor& query_offsets);

}  // namespace torch_selfattn::nn
