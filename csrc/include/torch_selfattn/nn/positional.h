#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch_selfattn/export.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>

// Positional encodings. Row l of x stands at position `offset + l`, or, with integer `positions`
// (L) or (B, L), at `offset + positions[b, l]`.
namespace torch_selfattn::nn {

struct TORCH_SELFATTN_API SinusoidalPositionalEncodingOptions {
  TORCH_ARG(double, scale) = 1.0;     // factor of the encoding
  TORCH_ARG(double, base) = 10000.0;  // the longest wavelength is 2 pi * base
  TORCH_ARG(double, dropout) = 0.0;   // probability of dropping an element of the sum in training
};

// Adds scale * sines and cosines of the position, then drops out (Vaswani et al., 2017). No
// parameters, no table, hence no longest length.
class TORCH_SELFATTN_API SinusoidalPositionalEncodingImpl
    : public torch::nn::Cloneable<SinusoidalPositionalEncodingImpl> {
 public:
  explicit SinusoidalPositionalEncodingImpl(SinusoidalPositionalEncodingOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // x (..., L, D) -> the same shape and dtype.
  torch::Tensor forward(const torch::Tensor& x, int64_t offset = 0,
                        const torch::Tensor& positions = {});

  SinusoidalPositionalEncodingOptions options;
  torch::nn::Dropout dropout{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(int64_t{0})},
                           {2, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(SinusoidalPositionalEncoding);

struct TORCH_SELFATTN_API LearnedPositionalEncodingOptions {
  LearnedPositionalEncodingOptions(int64_t max_length, int64_t embed_dim)
      : max_length_(max_length), embed_dim_(embed_dim) {}
  TORCH_ARG(int64_t, max_length);    // number of positions; one beyond it is an error
  TORCH_ARG(int64_t, embed_dim);     // size of the last dimension of the input
  TORCH_ARG(double, dropout) = 0.0;  // probability of dropping an element of the sum in training
};

// Adds row `position` of a trained table, then drops out (Gehring et al., 2017).
// State-dict keys: weight (max_length, embed_dim).
class TORCH_SELFATTN_API LearnedPositionalEncodingImpl
    : public torch::nn::Cloneable<LearnedPositionalEncodingImpl> {
 public:
  LearnedPositionalEncodingImpl(int64_t max_length, int64_t embed_dim)
      : LearnedPositionalEncodingImpl(LearnedPositionalEncodingOptions(max_length, embed_dim)) {}
  explicit LearnedPositionalEncodingImpl(LearnedPositionalEncodingOptions options_);
  void reset() override;
  void reset_parameters();  // normal with standard deviation 0.02
  void pretty_print(std::ostream& stream) const override;

  // x (..., L, embed_dim) -> the same shape and dtype.
  torch::Tensor forward(const torch::Tensor& x, int64_t offset = 0,
                        const torch::Tensor& positions = {});

  LearnedPositionalEncodingOptions options;
  torch::Tensor weight;
  torch::nn::Dropout dropout{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(int64_t{0})},
                           {2, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(LearnedPositionalEncoding);

struct TORCH_SELFATTN_API RotaryEmbeddingOptions {
  RotaryEmbeddingOptions(int64_t dim) : dim_(dim) {}  // NOLINT(google-explicit-constructor)
  TORCH_ARG(int64_t, dim);                // how many elements of each row are rotated, even
  TORCH_ARG(int64_t, max_length) = 4096;  // length of the tables
  TORCH_ARG(double, base) = 10000.0;      // the longest wavelength is 2 pi * base
  TORCH_ARG(bool, interleaved) = false;   // pairs are (2i, 2i + 1) instead of (i, i + dim / 2)
  TORCH_ARG(double, scaling) = 1.0;       // divides the positions
};

// Rotates pairs of elements of queries and keys by angles proportional to their position (Su et
// al., 2021). Nothing in the state dict: the tables are neither parameters nor buffers. They move
// with module->to, and stay float32 when the module becomes half precision. A clone shares them.
class TORCH_SELFATTN_API RotaryEmbeddingImpl : public torch::nn::Cloneable<RotaryEmbeddingImpl> {
 public:
  explicit RotaryEmbeddingImpl(int64_t dim) : RotaryEmbeddingImpl(RotaryEmbeddingOptions(dim)) {}
  explicit RotaryEmbeddingImpl(RotaryEmbeddingOptions options_);
  void reset() override;
  void reset_parameters();  // fills the tables again
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  // Cosines and sines (length, dim / 2) of the positions offset ... offset + length - 1, for inputs
  // of this dtype.
  std::tuple<torch::Tensor, torch::Tensor> tables(int64_t offset, int64_t length,
                                                  torch::Dtype dtype) const;

  // x (B, H, L, D) with D >= dim -> the same shape and dtype. With positions, offset must be 0, and
  // positions lie below max_length.
  torch::Tensor forward(const torch::Tensor& x, int64_t offset = 0,
                        const torch::Tensor& positions = {});

  RotaryEmbeddingOptions options;
  torch::Tensor cos;  // (max_length, dim / 2)
  torch::Tensor sin;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(int64_t{0})},
                           {2, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(RotaryEmbedding);

// The slopes of torch_selfattn::alibi_slopes where a module needs them: on its device, float32 when
// it is cast to half precision, with nothing in the state dict.
class TORCH_SELFATTN_API AlibiSlopesImpl : public torch::nn::Cloneable<AlibiSlopesImpl> {
 public:
  explicit AlibiSlopesImpl(int64_t num_heads);
  void reset() override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  torch::Tensor forward() { return slopes; }

  int64_t num_heads;
  torch::Tensor slopes;  // (H)
};
TORCH_MODULE(AlibiSlopes);

}  // namespace torch_selfattn::nn
