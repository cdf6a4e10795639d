#include "ops/positional_problem.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>

#include "ops/problem.h"

namespace torch_selfattn::ops {

using at::Tensor;
using c10::SymInt;

Tensor empty_rows_like(const Tensor& x) {
  if (x.dim() > 4) return at::empty_symint(x.sym_sizes(), x.options());
  return at::empty_like(x);
}

Tensor empty_sinusoidal_encoding(const Tensor& like, const SymInt& length, const SymInt& dim) {
  return at::empty_symint({length, dim}, like.options());
}

std::tuple<Tensor, Tensor> empty_rotary_tables(const Tensor& like, const SymInt& length,
                                               const SymInt& dim) {
  const SymInt pairs = dim / 2;
  return {at::empty_symint({length, pairs}, like.options()),
          at::empty_symint({length, pairs}, like.options())};
}

Tensor empty_table_grad(const Tensor& grad, const SymInt& rows, at::ScalarType dtype) {
  return at::empty_symint({rows, grad.sym_size(-1)}, grad.options().dtype(dtype));
}

namespace {

// (B, H, L, D) of a tensor of any rank from 2 on; dimensions that it lacks have size 1.
struct Extents {
  int64_t batch = 1;
  int64_t heads = 1;
  int64_t length;
  int64_t dim;

  explicit Extents(const Tensor& x) : length(x.size(-2)), dim(x.size(-1)) {
    if (x.dim() >= 3) batch = x.size(0);
    for (int64_t d = 1; d < x.dim() - 2; ++d) heads *= x.size(d);
  }
};

// Only beyond four dimensions a tensor may have to be copied.
Tensor at_most_4d(const Tensor& x) { return x.dim() <= 4 ? x : x.flatten(1, -3); }

template <typename ViewType>
void set_row_strides(ViewType& view, const Tensor& x) {
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  view.stride[0] = x.dim() >= 3 ? stride(0) : 0;
  view.stride[1] = x.dim() >= 4 ? stride(1) : 0;
  view.stride[2] = stride(-2);
  view.stride[3] = x.size(-1) == 1 ? 1 : x.stride(-1);
}

kernels::ConstView row_view(const Tensor& x) {
  kernels::ConstView view{x.const_data_ptr(), {}};
  set_row_strides(view, x);
  return view;
}

kernels::View mutable_row_view(const Tensor& x) {
  const Tensor rows = at_most_4d(x);  // a view: results of more dimensions are contiguous
  kernels::View view{rows.mutable_data_ptr(), {}};
  set_row_strides(view, rows);
  return view;
}

kernels::Positions positions_of(const OptionalTensor& ids, int64_t offset, Tensor& keep_alive) {
  kernels::Positions positions;
  positions.offset = offset;
  if (!ids.has_value()) return positions;
  keep_alive = ids->to(at::kLong);
  positions.ids = keep_alive.const_data_ptr<int64_t>();
  positions.stride[0] = keep_alive.dim() == 2 && keep_alive.size(0) > 1 ? keep_alive.stride(0) : 0;
  positions.stride[1] = keep_alive.stride(-1);
  return positions;
}

// x is replaced by what the views point into.
kernels::RowProblem row_problem(Tensor& x, const Tensor& out) {
  const Extents extents(x);
  x = at_most_4d(x);
  kernels::RowProblem rows;
  rows.dtype = kernel_dtype(x.scalar_type());
  rows.batch = extents.batch;
  rows.heads = extents.heads;
  rows.length = extents.length;
  rows.dim = extents.dim;
  rows.x = row_view(x);
  rows.out = mutable_row_view(out);
  return rows;
}

}  // namespace

kernels::SinusoidTable prepare_sinusoidal_encoding(const Tensor& out, double base, int64_t offset) {
  kernels::SinusoidTable table;
  table.dtype = kernel_dtype(out.scalar_type());
  table.length = out.size(0);
  table.offset = offset;
  table.frequencies = {out.size(1), base, 1.0};
  table.sine = out.mutable_data_ptr();
  table.cosine = static_cast<char*>(table.sine) + out.element_size();
  table.sines = (out.size(1) + 1) / 2;
  table.cosines = out.size(1) / 2;
  table.row_stride = out.size(1);
  table.pair_stride = 2;
  return table;
}

kernels::SinusoidTable prepare_rotary_tables(const Tensor& cos, const Tensor& sin, double base,
                                             int64_t offset, double scaling) {
  kernels::SinusoidTable table;
  table.dtype = kernel_dtype(cos.scalar_type());
  table.length = cos.size(0);
  table.offset = offset;
  table.frequencies = {2 * cos.size(1), base, scaling};
  table.sine = sin.mutable_data_ptr();
  table.cosine = cos.mutable_data_ptr();
  table.sines = cos.size(1);
  table.cosines = cos.size(1);
  table.row_stride = cos.size(1);
  table.pair_stride = 1;
  return table;
}

Prepared<kernels::AddSinusoid> prepare_add_sinusoid(const Tensor& x, const Tensor& out,
                                                    const OptionalTensor& positions, double scale,
                                                    double base, int64_t offset) {
  Prepared<kernels::AddSinusoid> prepared;
  prepared.x = x;
  prepared.problem.rows = row_problem(prepared.x, out);
  prepared.problem.rows.positions = positions_of(positions, offset, prepared.ids);
  prepared.problem.scale = scale;
  prepared.problem.base = base;
  return prepared;
}

Prepared<kernels::AddLearned> prepare_add_learned(const Tensor& x, const Tensor& out,
                                                  const Tensor& table,
                                                  const OptionalTensor& positions, int64_t offset) {
  Prepared<kernels::AddLearned> prepared;
  prepared.x = x;
  prepared.problem.rows = row_problem(prepared.x, out);
  prepared.problem.rows.positions = positions_of(positions, offset, prepared.ids);
  prepared.problem.table_dtype = kernel_dtype(table.scalar_type());
  prepared.problem.table = table.const_data_ptr();
  prepared.problem.table_rows = table.size(0);
  prepared.problem.table_stride[0] = table.stride(0);
  prepared.problem.table_stride[1] = table.stride(1);
  return prepared;
}

Prepared<kernels::LearnedTableGrad> prepare_table_grad(const Tensor& grad, const Tensor& grad_table,
                                                       const OptionalTensor& positions,
                                                       int64_t offset) {
  const Extents extents(grad);
  Prepared<kernels::LearnedTableGrad> prepared;
  prepared.x = at_most_4d(grad);
  kernels::LearnedTableGrad& p = prepared.problem;
  p.dtype = kernel_dtype(grad.scalar_type());
  p.table_dtype = kernel_dtype(grad_table.scalar_type());
  p.batch = extents.batch;
  p.heads = extents.heads;
  p.length = extents.length;
  p.dim = extents.dim;
  p.table_rows = grad_table.size(0);
  p.offset = offset;
  p.grad = row_view(prepared.x);
  p.grad_table = grad_table.mutable_data_ptr();
  if (!positions.has_value()) return prepared;
  std::tie(prepared.ids, prepared.order) =
      at::sort(positions->to(at::kLong).reshape({-1}), /*stable=*/true, 0, /*descending=*/false);
  p.sorted_ids = prepared.ids.const_data_ptr<int64_t>();
  p.order = prepared.order.const_data_ptr<int64_t>();
  p.entries = prepared.ids.numel();
  p.per_sample = positions->dim() == 2 && positions->size(0) > 1;
  return prepared;
}

Prepared<kernels::Rotary> prepare_rotary(const Tensor& x, const Tensor& out, const Tensor& cos,
                                         const Tensor& sin, const OptionalTensor& position_ids,
                                         bool interleaved, bool conjugate) {
  Prepared<kernels::Rotary> prepared;
  prepared.x = x;
  kernels::Rotary& r = prepared.problem;
  r.rows = row_problem(prepared.x, out);
  r.rows.positions = positions_of(position_ids, 0, prepared.ids);
  r.pairs = cos.size(-1);
  r.interleaved = interleaved;
  r.conjugate = conjugate;
  r.cosine = cos.const_data_ptr();
  r.sine = sin.const_data_ptr();
  r.table_rows = cos.size(-2);
  const auto set_strides = [](int64_t (&stride)[3], const Tensor& table) {
    stride[0] = table.dim() == 3 && table.size(0) > 1 ? table.stride(0) : 0;
    stride[1] = table.stride(-2);
    stride[2] = table.size(-1) == 1 ? 1 : table.stride(-1);
  };
  set_strides(r.cosine_stride, cos);
  set_strides(r.sine_stride, sin);
  return prepared;
}

}  // namespace torch_selfattn::ops
