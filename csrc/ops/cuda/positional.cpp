#include "ops/positional.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/positional.h"
#include "ops/positional_checks.h"
#include "ops/positional_problem.h"
#include "ops/registration.h"

// Position ids are not read here, that would wait for the device: the kernels assert.
namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;
using c10::cuda::getCurrentCUDAStream;
namespace cuda = kernels::cuda;

Tensor sinusoidal_encoding_forward_cuda(const Tensor& like, int64_t length, int64_t dim,
                                        double base, int64_t offset) {
  check_sinusoidal_encoding(like, length, dim, base);
  const CUDAGuard device_guard(like.device());
  const Tensor out = empty_sinusoidal_encoding(like, length, dim);
  C10_CUDA_CHECK(
      cuda::sinusoid_table(prepare_sinusoidal_encoding(out, base, offset), getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor> rotary_tables_forward_cuda(const Tensor& like, int64_t length,
                                                      int64_t dim, double base, int64_t offset,
                                                      double scaling) {
  check_rotary_tables(like, length, dim, base, scaling);
  const CUDAGuard device_guard(like.device());
  auto [cos, sin] = empty_rotary_tables(like, length, dim);
  C10_CUDA_CHECK(cuda::sinusoid_table(prepare_rotary_tables(cos, sin, base, offset, scaling),
                                      getCurrentCUDAStream()));
  return {cos, sin};
}

Tensor add_sinusoidal_encoding_forward_cuda(const Tensor& x, const OptionalTensor& positions,
                                            double scale, double base, int64_t offset) {
  check_add_sinusoidal_encoding(x, positions, base);
  const CUDAGuard device_guard(x.device());
  const Tensor out = empty_rows_like(x);
  const auto prepared = prepare_add_sinusoid(x, out, positions, scale, base, offset);
  C10_CUDA_CHECK(cuda::add_sinusoid(prepared.problem, getCurrentCUDAStream()));
  return out;
}

Tensor add_learned_encoding_forward_cuda(const Tensor& x, const Tensor& table,
                                         const OptionalTensor& positions, int64_t offset) {
  check_add_learned_encoding(x, table, positions, offset);
  const CUDAGuard device_guard(x.device());
  const Tensor out = empty_rows_like(x);
  const auto prepared = prepare_add_learned(x, out, table, positions, offset);
  C10_CUDA_CHECK(cuda::add_learned(prepared.problem, getCurrentCUDAStream()));
  return out;
}

Tensor add_learned_encoding_backward_cuda(const Tensor& grad, const OptionalTensor& positions,
                                          int64_t offset, int64_t rows, at::ScalarType dtype) {
  check_add_learned_encoding_backward(grad, positions, offset, rows, dtype);
  const CUDAGuard device_guard(grad.device());
  const Tensor grad_table = empty_table_grad(grad, rows, dtype);
  const auto prepared = prepare_table_grad(grad, grad_table, positions, offset);
  C10_CUDA_CHECK(cuda::learned_table_grad(prepared.problem, getCurrentCUDAStream()));
  return grad_table;
}

Tensor rotary_embedding_forward_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                     const OptionalTensor& position_ids, bool interleaved,
                                     bool conjugate) {
  check_rotary_embedding(x, cos, sin, position_ids);
  const CUDAGuard device_guard(x.device());
  const Tensor out = empty_rows_like(x);
  const auto prepared = prepare_rotary(x, out, cos, sin, position_ids, interleaved, conjugate);
  C10_CUDA_CHECK(cuda::rotary(prepared.problem, getCurrentCUDAStream()));
  return out;
}

}  // namespace

TORCH_SELFATTN_IMPL(CUDA, m) {
  m.impl("_sinusoidal_encoding_forward", TORCH_FN(sinusoidal_encoding_forward_cuda));
  m.impl("_rotary_tables_forward", TORCH_FN(rotary_tables_forward_cuda));
  m.impl("_add_sinusoidal_encoding_forward", TORCH_FN(add_sinusoidal_encoding_forward_cuda));
  m.impl("_add_learned_encoding_forward", TORCH_FN(add_learned_encoding_forward_cuda));
  m.impl("_add_learned_encoding_backward", TORCH_FN(add_learned_encoding_backward_cuda));
  m.impl("_rotary_embedding_forward", TORCH_FN(rotary_embedding_forward_cuda));
}

}  // namespace torch_selfattn::ops
