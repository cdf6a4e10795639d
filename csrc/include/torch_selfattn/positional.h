#pragma once

#include <ATen/core/Tensor.h>
#include <torch_selfattn/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Positional encodings. x is (..., L, D), at least 2-D, of any strides, float64, float32, float16
// or bfloat16; the result has its shape, dtype and memory order. Position ids are int64 or int32 of
// shape (L), or (B, L) with B = x.size(0); `offset` is added to them, or is the position of the
// first row without them. Formulas and gradients: docs/positional.md.
namespace torch_selfattn {

// (length, dim): column 2i is sin(p / base^(2i / dim)), column 2i + 1 the cosine, for the positions
// p = offset ... offset + length - 1 (Vaswani et al., 2017). dim may be odd. Default dtype:
// torch's.
TORCH_SELFATTN_API at::Tensor sinusoidal_encoding(
    c10::SymInt length, c10::SymInt dim, double base = 10000.0, c10::SymInt offset = 0,
    std::optional<at::ScalarType> dtype = std::nullopt,
    std::optional<at::Device> device = std::nullopt);

// x + scale * encoding, without a table in memory. Gradient to x.
TORCH_SELFATTN_API at::Tensor add_sinusoidal_encoding(
    const at::Tensor& x, double scale = 1.0, double base = 10000.0, c10::SymInt offset = 0,
    const std::optional<at::Tensor>& positions = std::nullopt);

// x + table[position], table (N, D) of the dtype of x or float32. Gradient to x and table,
// deterministic. A position outside [0, N) is a ValueError; on CUDA, where reading position ids
// would wait for the device, a device-side assertion.
TORCH_SELFATTN_API at::Tensor add_learned_encoding(
    const at::Tensor& x, const at::Tensor& table, c10::SymInt offset = 0,
    const std::optional<at::Tensor>& positions = std::nullopt);

// Rotates pairs of the first R elements of each row of x (Su et al., 2021); the rest, if R < D,
// passes through. Pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved.
// cos, sin: (L, R/2), or (B, L, R/2), or tables (N, R/2) with position_ids (L) or (B, L); float32,
// float64 for a float64 x. rotary_dim: R, to check it against cos. Gradient to x, cos and sin.
// A position id outside [0, N): as in add_learned_encoding.
TORCH_SELFATTN_API at::Tensor rotary_embedding(
    const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved = false,
    std::optional<c10::SymInt> rotary_dim = std::nullopt,
    const std::optional<at::Tensor>& position_ids = std::nullopt);

// (cos, sin), each (length, dim / 2), of p / (scaling * base^(2i / dim)) for the positions
// p = offset ... offset + length - 1; angles in float64, tables float32 by default, or float64.
TORCH_SELFATTN_API std::tuple<at::Tensor, at::Tensor> rotary_tables(
    c10::SymInt length, c10::SymInt dim, double base = 10000.0, c10::SymInt offset = 0,
    double scaling = 1.0, std::optional<at::ScalarType> dtype = std::nullopt,
    std::optional<at::Device> device = std::nullopt);

// The slopes of ALiBi (Press et al., 2022), (num_heads), for the argument alibi_slopes of the
// attention functions: head h = 1 ... H of a power of two has 2^(-8h/H); otherwise the first n
// heads those of n heads, with the largest power of two n < H, and the others every second of 2n
// heads.
TORCH_SELFATTN_API at::Tensor alibi_slopes(int64_t num_heads, at::ScalarType dtype = at::kFloat,
                                           std::optional<at::Device> device = std::nullopt);

}  // namespace torch_selfattn
