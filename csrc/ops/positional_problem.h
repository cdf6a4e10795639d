#pragma once

#include "kernels/common/positional_problem.h"
#include "ops/positional.h"

// Tensors that positional_checks.h has accepted, as the problems of the kernels of their device.
// Shared by every backend; the results' shapes, dtypes and strides also by Meta.
namespace torch_selfattn::ops {

// A result with the shape, dtype and memory order of x; contiguous if x has more than four
// dimensions, since the kernels see at most (B, H, L, D).
at::Tensor empty_rows_like(const at::Tensor& x);
at::Tensor empty_sinusoidal_encoding(const at::Tensor& like, const c10::SymInt& length,
                                     const c10::SymInt& dim);
std::tuple<at::Tensor, at::Tensor> empty_rotary_tables(const at::Tensor& like,
                                                       const c10::SymInt& length,
                                                       const c10::SymInt& dim);
at::Tensor empty_table_grad(const at::Tensor& grad, const c10::SymInt& rows, at::ScalarType dtype);

// A problem and the tensors it points into that no argument of the operator keeps alive.
template <typename Problem>
struct Prepared {
  Problem problem;
  at::Tensor x;
  at::Tensor ids;
  at::Tensor order;
};

kernels::SinusoidTable prepare_sinusoidal_encoding(const at::Tensor& out, double base,
                                                   int64_t offset);
kernels::SinusoidTable prepare_rotary_tables(const at::Tensor& cos, const at::Tensor& sin,
                                             double base, int64_t offset, double scaling);
Prepared<kernels::AddSinusoid> prepare_add_sinusoid(const at::Tensor& x, const at::Tensor& out,
                                                    const OptionalTensor& positions, double scale,
                                                    double base, int64_t offset);
Prepared<kernels::AddLearned> prepare_add_learned(const at::Tensor& x, const at::Tensor& out,
                                                  const at::Tensor& table,
                                                  const OptionalTensor& positions, int64_t offset);
Prepared<kernels::LearnedTableGrad> prepare_table_grad(const at::Tensor& grad,
                                                       const at::Tensor& grad_table,
                                                       const OptionalTensor& positions,
                                                       int64_t offset);
Prepared<kernels::Rotary> prepare_rotary(const at::Tensor& x, const at::Tensor& out,
                                         const at::Tensor& cos, const at::Tensor& sin,
                                         const OptionalTensor& position_ids, bool interleaved,
                                         bool conjugate);

}  // namespace torch_selfattn::ops
