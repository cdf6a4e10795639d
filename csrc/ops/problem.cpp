#include "ops/problem.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "ops/layout.h"

namespace torch_selfattn::ops {

using at::Tensor;

kernels::DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return kernels::DType::kFloat64;
    case at::kFloat: return kernels::DType::kFloat32;
    case at::kHalf: return kernels::DType::kFloat16;
    case at::kBFloat16: return kernels::DType::kBFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "a dtype that the checks refuse: ", dtype);
  }
}

namespace {

template <typename ViewType>
void set_strides(ViewType& view, const Tensor& tensor) {
  const at::IntArrayRef sizes = tensor.sizes();
  const at::IntArrayRef strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) view.stride[d] = sizes[d] == 1 ? 0 : strides[d];
}

const int64_t* index_pointer(const OptionalTensor& index, Tensor& keep_alive) {
  if (!index.has_value()) return nullptr;
  keep_alive = index->to(at::kLong).contiguous();
  return keep_alive.const_data_ptr<int64_t>();
}

at::ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

kernels::ConstView const_view(const Tensor& tensor) {
  kernels::ConstView view{tensor.const_data_ptr(), {}};
  set_strides(view, tensor);
  return view;
}

kernels::View view(const Tensor& tensor) {
  kernels::View view{tensor.mutable_data_ptr(), {}};
  set_strides(view, tensor);
  return view;
}

PreparedProblem prepare_problem(const AttentionTensors& t,
                                const AttentionOptions<int64_t>& options) {
  PreparedProblem prepared;
  kernels::AttentionProblem& p = prepared.problem;
  p.dtype = kernel_dtype(t.query.scalar_type());
  p.score = t.weight.has_value() ? kernels::ScoreKind::kAdditive : kernels::ScoreKind::kDotProduct;
  if (options.negative_slope.has_value()) {
    p.activation = kernels::Activation::kLeakyRelu;
    p.negative_slope = *options.negative_slope;
  }
  p.batch = t.query.size(0);
  p.heads = t.query.size(1);
  p.kv_heads = t.key.size(1);
  p.query_length = t.query.size(2);
  p.key_length = t.key.size(2);
  p.head_dim = t.query.size(3);
  p.value_dim = t.value.size(3);
  p.query = const_view(t.query);
  p.key = const_view(t.key);
  p.value = const_view(t.value);
  if (t.weight.has_value()) {
    const kernels::ConstView weight = const_view(*t.weight);
    p.weight = weight.data;
    const int64_t missing = 3 - t.weight->dim();
    for (int64_t d = missing; d < 3; ++d) p.weight_stride[d] = weight.stride[d - missing];
    for (int64_t d = missing; d < 2; ++d) p.weight_size[d] = t.weight->size(d - missing);
  }
  if (t.attn_mask.has_value()) {
    const Tensor& mask = *t.attn_mask;
    const bool is_bool = mask.scalar_type() == at::kBool;
    p.mask_kind = is_bool ? kernels::MaskKind::kBool : kernels::MaskKind::kFloat;
    if (!is_bool) p.mask_dtype = kernel_dtype(mask.scalar_type());
    p.mask = const_view(mask);
    for (int d = 0; d < 4; ++d) p.mask_size[d] = mask.size(d);
  }
  if (t.alibi_slopes.has_value()) {
    const Tensor& slopes = *t.alibi_slopes;
    const kernels::ConstView slopes_view = const_view(slopes);
    p.slopes = slopes_view.data;
    p.slopes_dtype = kernel_dtype(slopes.scalar_type());
    for (int d = 0; d < 2; ++d) p.slopes_stride[d] = slopes_view.stride[d];
    for (int d = 0; d < 2; ++d) p.slopes_size[d] = slopes.size(d);
  }
  p.key_lengths = index_pointer(t.key_lengths, prepared.key_lengths);
  p.key_starts = index_pointer(t.key_starts, prepared.key_starts);
  p.query_offsets = index_pointer(t.query_offsets, prepared.query_offsets);
  const bool additive = t.weight.has_value();
  p.scale = options.scale.value_or(
      additive ? 1.0 : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(p.head_dim, 1))));
  p.window_left = options.window_left;
  p.window_right = options.window_right;
  p.query_offset = options.query_offset;
  p.dropout_p = options.dropout_p;
  return prepared;
}

ForwardResults empty_forward_results(const AttentionTensors& t, double dropout_p) {
  const c10::SymIntArrayRef sizes = t.query.sym_sizes();
  return {empty_in_order_of(t.query, {sizes[0], sizes[1], sizes[2], t.value.sym_sizes()[3]}),
          at::empty_symint(sizes.slice(0, 3), t.query.options().dtype(lse_dtype(t.query))),
          at::empty({dropout_p > 0 ? 2 : 0}, t.query.options().dtype(at::kLong))};
}

Tensor empty_gradient(const OptionalTensor& x, bool wanted, const Tensor& query) {
  return wanted && x.has_value() ? at::empty_symint(x->sym_sizes(), x->options())
                                 : at::empty({0}, query.options());
}

BackwardResults empty_backward_results(const BackwardInputs& inputs, const AttentionTensors& t) {
  const auto like = [](const Tensor& x) {
    const c10::SymIntArrayRef sizes = x.sym_sizes();
    return empty_in_order_of(x, {sizes[0], sizes[1], sizes[2], sizes[3]});
  };
  return {like(t.query),
          like(t.key),
          like(t.value),
          empty_gradient(t.weight, t.weight.has_value(), t.query),
          empty_gradient(t.attn_mask, inputs.attn_mask_grad, t.query),
          empty_gradient(t.alibi_slopes, inputs.alibi_slopes_grad, t.query)};
}

kernels::AttentionForward forward_arguments(const PreparedProblem& prepared,
                                            const ForwardResults& results) {
  kernels::AttentionForward arguments{prepared.problem, view(results.output),
                                      results.lse.mutable_data_ptr()};
  if (arguments.problem.dropout_p > 0) {
    arguments.problem.philox_state = results.philox_state.const_data_ptr<int64_t>();
  }
  return arguments;
}

kernels::AttentionBackward backward_arguments(const PreparedProblem& prepared,
                                              const Tensor& grad_output, const Tensor& grad_lse,
                                              const Tensor& output, const Tensor& lse,
                                              const BackwardResults& results) {
  kernels::AttentionBackward arguments;
  arguments.problem = prepared.problem;
  arguments.out = const_view(output);
  arguments.grad_out = const_view(grad_output);
  arguments.lse = lse.const_data_ptr();
  arguments.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr() : nullptr;
  arguments.grad_query = view(results.grad_query);
  arguments.grad_key = view(results.grad_key);
  arguments.grad_value = view(results.grad_value);
  if (prepared.problem.weight != nullptr) {
    arguments.grad_weight = results.grad_weight.mutable_data_ptr();
  }
  if (results.grad_attn_mask.numel() > 0) {
    arguments.grad_mask = results.grad_attn_mask.mutable_data_ptr();
  }
  if (results.grad_alibi_slopes.numel() > 0) {
    arguments.grad_slopes = results.grad_alibi_slopes.mutable_data_ptr();
  }
  return arguments;
}

}  // namespace torch_selfattn::ops
