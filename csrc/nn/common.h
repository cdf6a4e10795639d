#pragma once

#include <torch/types.h>

#include <optional>
#include <string>

// What the modules share: checks, texts of errors, masks.
namespace torch_selfattn::nn {

void check_score(const char* module, const std::string& score);
void check_dropout(const char* module, double dropout);

// As torch::nn::Linear(head_dim, 1) starts: uniform within 1 / sqrt(head dim).
void init_score_weight(torch::Tensor& score_weight);

// An undefined tensor is one that was not given.
inline std::optional<torch::Tensor> given(const torch::Tensor& tensor) {
  return tensor.defined() ? std::optional<torch::Tensor>(tensor) : std::nullopt;
}

// A shape and a truth value as Python prints them, so that errors read alike.
std::string shape(const torch::Tensor& tensor);
inline const char* text(bool value) { return value ? "True" : "False"; }

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
