#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <tuple>

// The inner layers of the positional encodings, as typed dispatcher calls. They are linear in x
// (and in the table): the gradient of an added encoding to x is the identity and needs no operator,
// and the transpose of a rotation is the rotation by minus the angle, so rotary_embedding_forward
// is its own backward.
namespace torch_selfattn::ops {

using OptionalTensor = std::optional<at::Tensor>;

// `like` only gives the dtype and the device of the result.
at::Tensor sinusoidal_encoding_forward(const at::Tensor& like, c10::SymInt length, c10::SymInt dim,
                                       double base, c10::SymInt offset);
std::tuple<at::Tensor, at::Tensor> rotary_tables_forward(const at::Tensor& like, c10::SymInt length,
                                                         c10::SymInt dim, double base,
                                                         c10::SymInt offset, double scaling);

at::Tensor add_sinusoidal_encoding_forward(const at::Tensor& x, const OptionalTensor& positions,
                                           double scale, double base, c10::SymInt offset);

at::Tensor add_learned_encoding_forward(const at::Tensor& x, const at::Tensor& table,
                                        const OptionalTensor& positions, c10::SymInt offset);
// The gradient of a (rows, D) table of this dtype.
at::Tensor add_learned_encoding_backward(const at::Tensor& grad, const OptionalTensor& positions,
                                         c10::SymInt offset, c10::SymInt rows,
                                         at::ScalarType dtype);

at::Tensor rotary_embedding_forward(const at::Tensor& x, const at::Tensor& cos,
                                    const at::Tensor& sin, const OptionalTensor& position_ids,
                                    bool interleaved, bool conjugate);

}  // namespace torch_selfattn::ops
