#include "nn/common.h"

#include <torch/nn/init.h>

#include <cmath>
#include <limits>
#include <sstream>

namespace torch_selfattn::nn {

using torch::Tensor;

void check_score(const char* module, const std::string& score) {
  TORCH_CHECK_VALUE(score == "dot" || score == "additive", module,
                    ": score must be 'dot' or 'additive' (got score='", score, "')");
}

void check_dropout(const char* module, double dropout) {
  TORCH_CHECK_VALUE(0.0 <= dropout && dropout <= 1.0, module,
                    ": dropout must be between 0 and 1 (got dropout=", dropout, ")");
}

void init_score_weight(Tensor& score_weight) {
  const double bound = 1 / std::sqrt(static_cast<double>(score_weight.size(-1)));
  torch::nn::init::uniform_(score_weight, -bound, bound);
}

std::string shape(const Tensor& tensor) {
  std::ostringstream stream;
  stream << "torch.Size(" << tensor.sizes() << ')';
  return stream.str();
}

Tensor merge_masks(const Tensor& attn_mask, const Tensor& key_padding_mask, int64_t batch) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  Tensor mask = attn_mask;
  if (mask.defined() && mask.dim() == 3) {  // (B * H, Lq, Lk)
    mask = mask.view({batch, -1, mask.size(1), mask.size(2)});
  }
  if (key_padding_mask.defined()) {
    const Tensor padding = key_padding_mask.unsqueeze(1).unsqueeze(1);  // (B, 1, 1, Lk)
    const bool boolean = padding.scalar_type() == torch::kBool;
    if (!mask.defined()) {
      mask = padding;
    } else if (mask.scalar_type() == torch::kBool) {
      mask = boolean ? mask.logical_or(padding) : padding.masked_fill(mask, -infinity);
    } else {
      mask = boolean ? mask.masked_fill(padding, -infinity) : mask + padding;
    }
  }
  if (mask.defined() && mask.scalar_type() == torch::kBool) mask = mask.logical_not();
  return mask;
}

Tensor window_mask(int64_t query_length, int64_t key_length, torch::Device device,
                   const Tensor& key_lengths, const Tensor& key_starts, int64_t window_left,
                   int64_t window_right, int64_t query_offset, const Tensor& query_offsets) {
  const auto per_sample = [](const Tensor& x) { return x.view({-1, 1, 1, 1}); };
  const Tensor j = torch::arange(key_length, device);
  Tensor position = torch::arange(query_length, device).view({1, 1, -1, 1}) + query_offset;
  if (query_offsets.defined()) position = position + per_sample(query_offsets);
  Tensor allowed = torch::ones({1, 1, query_length, key_length},
                               torch::TensorOptions().dtype(torch::kBool).device(device));
  if (window_left >= 0) allowed = allowed.logical_and(j >= position - window_left);
  if (window_right >= 0) allowed = allowed.logical_and(j <= position + window_right);
  if (key_lengths.defined()) allowed = allowed.logical_and(j < per_sample(key_lengths));
  if (key_starts.defined()) allowed = allowed.logical_and(j >= per_sample(key_starts));
  return allowed;
}

}  // namespace torch_selfattn::nn
