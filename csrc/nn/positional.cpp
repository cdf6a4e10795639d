#include <torch/nn/init.h>
#include <torch/utils.h>
#include <torch_selfattn/nn/positional.h>
#include <torch_selfattn/positional.h>

#include "nn/common.h"

namespace torch_selfattn::nn {

using torch::Tensor;

SinusoidalPositionalEncodingImpl::SinusoidalPositionalEncodingImpl(
    SinusoidalPositionalEncodingOptions options_)
    : options(std::move(options_)) {
  SinusoidalPositionalEncodingImpl::reset();
}

void SinusoidalPositionalEncodingImpl::reset() {
  dropout = register_module("dropout", torch::nn::Dropout(options.dropout()));
}

void SinusoidalPositionalEncodingImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::SinusoidalPositionalEncoding(scale=" << options.scale()
         << ", base=" << options.base() << ')';
}

Tensor SinusoidalPositionalEncodingImpl::forward(const Tensor& x, int64_t offset,
                                                 const Tensor& positions) {
  return dropout->forward(
      add_sinusoidal_encoding(x, options.scale(), options.base(), offset, given(positions)));
}

LearnedPositionalEncodingImpl::LearnedPositionalEncodingImpl(
    LearnedPositionalEncodingOptions options_)
    : options(std::move(options_)) {
  LearnedPositionalEncodingImpl::reset();
}

void LearnedPositionalEncodingImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.max_length(), options.embed_dim()}));
  dropout = register_module("dropout", torch::nn::Dropout(options.dropout()));
  reset_parameters();
}

void LearnedPositionalEncodingImpl::reset_parameters() {
  torch::nn::init::normal_(weight, 0.0, 0.02);
}

void LearnedPositionalEncodingImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::LearnedPositionalEncoding(max_length=" << options.max_length()
         << ", embed_dim=" << options.embed_dim() << ')';
}

Tensor LearnedPositionalEncodingImpl::forward(const Tensor& x, int64_t offset,
                                              const Tensor& positions) {
  return dropout->forward(add_learned_encoding(x, weight, offset, given(positions)));
}

namespace {

// Tables are as exact as the dtype of a module needs, and not less than float32.
torch::Dtype table_dtype(torch::Dtype dtype) {
  return dtype == torch::kDouble ? torch::kDouble : torch::kFloat;
}

}  // namespace

RotaryEmbeddingImpl::RotaryEmbeddingImpl(RotaryEmbeddingOptions options_)
    : options(std::move(options_)) {
  RotaryEmbeddingImpl::reset();
}

void RotaryEmbeddingImpl::reset() {
  TORCH_CHECK_VALUE(options.dim() > 0 && options.dim() % 2 == 0,
                    "RotaryEmbedding: dim must be even and positive (got dim=", options.dim(), ")");
  if (!cos.defined()) reset_parameters();  // a clone has them
}

void RotaryEmbeddingImpl::reset_parameters() {
  const auto like = cos.defined() ? cos.options() : torch::TensorOptions(torch::kFloat);
  std::tie(cos, sin) =
      rotary_tables(options.max_length(), options.dim(), options.base(), 0, options.scaling(),
                    table_dtype(c10::typeMetaToScalarType(like.dtype())), like.device());
}

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_selfattn::nn::RotaryEmbedding(dim=" << options.dim()
         << ", max_length=" << options.max_length() << ", base=" << options.base()
         << ", interleaved=" << text(options.interleaved()) << ", scaling=" << options.scaling()
         << ')';
}

std::shared_ptr<torch::nn::Module> RotaryEmbeddingImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = Cloneable::clone(device);
  if (device.has_value()) copy->to(*device);
  return copy;
}

void RotaryEmbeddingImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const bool recompute = table_dtype(dtype) != cos.scalar_type();
  cos = cos.to(device, table_dtype(dtype), non_blocking);
  sin = sin.to(device, table_dtype(dtype), non_blocking);
  if (recompute) reset_parameters();  // as exact as float64 can be
}

void RotaryEmbeddingImpl::to(torch::Dtype dtype, bool non_blocking) {
  to(cos.device(), dtype, non_blocking);
}

void RotaryEmbeddingImpl::to(torch::Device device, bool non_blocking) {
  to(device, cos.scalar_type(), non_blocking);
}

std::tuple<Tensor, Tensor> RotaryEmbeddingImpl::tables(int64_t offset, int64_t length,
                                                       torch::Dtype dtype) const {
  const int64_t end = offset + length;
  if (end > options.max_length() || cos.scalar_type() != table_dtype(dtype)) {
    return rotary_tables(length, options.dim(), options.base(), offset, options.scaling(),
                         table_dtype(dtype), cos.device());
  }
  return {cos.slice(0, offset, end), sin.slice(0, offset, end)};
}

Tensor RotaryEmbeddingImpl::forward(const Tensor& x, int64_t offset, const Tensor& positions) {
  const auto [c, s] = positions.defined() ? tables(0, options.max_length(), x.scalar_type())
                                          : tables(offset, x.size(-2), x.scalar_type());
  return rotary_embedding(x, c, s, options.interleaved(), options.dim(), given(positions));
}

AlibiSlopesImpl::AlibiSlopesImpl(int64_t num_heads_) : num_heads(num_heads_) {
  AlibiSlopesImpl::reset();
}

void AlibiSlopesImpl::reset() {
  if (!slopes.defined()) slopes = alibi_slopes(num_heads);  // a clone has them
}

std::shared_ptr<torch::nn::Module> AlibiSlopesImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = Cloneable::clone(device);
  if (device.has_value()) copy->to(*device);
  return copy;
}

void AlibiSlopesImpl::to(torch::Device device, torch::Dtype dtype, bool /*non_blocking*/) {
  if (device != slopes.device() || table_dtype(dtype) != slopes.scalar_type()) {
    slopes = alibi_slopes(num_heads, table_dtype(dtype), device);
  }
}

void AlibiSlopesImpl::to(torch::Dtype dtype, bool non_blocking) {
  to(slopes.device(), dtype, non_blocking);
}

void AlibiSlopesImpl::to(torch::Device device, bool non_blocking) {
  to(device, slopes.scalar_type(), non_blocking);
}

}  // namespace torch_selfattn::nn
