#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attention_runs.h"
#include "kernels/common/reference.h"
#include "kernels/cuda/attention.h"
#include "testing.h"

// One attention problem with random tensors, run by the CUDA kernels and by the reference.
namespace attention_testing {

using namespace torch_selfattn::kernels;

inline double normal() {
  const double u = (testing::random() + 1.0) / 4294967297.0;
  const double v = testing::random() / 4294967296.0;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
}

// A tensor on the host and a copy of it on the device.
struct Tensor {
  DType dtype;
  std::int64_t size[4];
  std::int64_t stride[4];
  std::vector<char> host;
  std::unique_ptr<testing::DeviceArray<char>> device;

  Tensor(DType type, const std::int64_t (&sizes)[4], Layout layout = Layout::kHeadsOutside)
      : dtype(type) {
    std::memcpy(size, sizes, sizeof size);
    const std::int64_t step = layout == Layout::kEveryOther ? 2 : 1;
    const std::int64_t d = size[3] * step;
    stride[3] = step;
    stride[2] = layout == Layout::kHeadsInside ? size[1] * d : d;
    stride[1] = layout == Layout::kHeadsInside ? d : size[2] * d;
    stride[0] = layout == Layout::kSharedBatch ? 0 : size[1] * size[2] * d;
    const std::int64_t batches = layout == Layout::kSharedBatch ? 1 : size[0];
    host.resize(static_cast<std::size_t>(batches * size[1] * size[2] * d * size_of(dtype)));
  }
  std::int64_t count() const { return static_cast<std::int64_t>(host.size()) / size_of(dtype); }
  void fill_normal(double magnitude, double mean = 0) {
    for (std::int64_t n = 0; n < count(); ++n) {
      reference::store(dtype, host.data(), n, mean + magnitude * normal());
    }
  }
  // Sets row l of (b, h).
  void set_row(std::int64_t b, std::int64_t h, std::int64_t l, double value) {
    for (std::int64_t d = 0; d < size[3]; ++d) {
      reference::store(dtype, host.data(), reference::offset(stride, b, h, l) + d * stride[3],
                       value);
    }
  }
  void upload() { device = std::make_unique<testing::DeviceArray<char>>(host); }
  double at(std::int64_t n) const { return reference::load(dtype, host.data(), n); }

  ConstView view(bool on_device) const {
    ConstView result{on_device ? device->data() : host.data(), {}};
    std::memcpy(result.stride, stride, sizeof stride);
    return result;
  }
};

// Results of the kernels on the device, filled with NaN until they are written, and the
// reference's.
struct Result {
  const char* name = nullptr;
  Tensor expected;
  std::unique_ptr<testing::DeviceArray<char>> device;

  Result(const char* what, DType dtype, const std::int64_t (&sizes)[4],
         Layout layout = Layout::kHeadsOutside)
      : name(what), expected(dtype, sizes, layout) {
    device = std::make_unique<testing::DeviceArray<char>>(expected.host.size());
  }
  View view(bool on_device) {
    View result{on_device ? device->data() : expected.host.data(), {}};
    if (expected.host.empty()) result.data = nullptr;  // as that of empty tensors
    std::memcpy(result.stride, expected.stride, sizeof result.stride);
    return result;
  }
  void* data(bool on_device) { return on_device ? device->data() : expected.host.data(); }

  void check(double tolerance, double largest_term) const {
    Tensor got = Tensor(expected.dtype, expected.size);
    got.host = device->copy();
    double largest = largest_term;
    for (std::int64_t n = 0; n < expected.count(); ++n) {
      const double x = std::abs(expected.at(n));
      if (x < 1e30) largest = std::max(largest, x);
    }
    for (std::int64_t n = 0; n < expected.count(); ++n) {
      const double want = expected.at(n);
      const double have = got.at(n);
      const bool same = want == have || (std::isnan(want) && std::isnan(have)) ||
                        std::abs(want - have) <= tolerance * std::max(largest, std::abs(want));
      if (!same) ::testing::report_failure(name, static_cast<int>(n), "differs", have, want);
    }
  }

  // The norm of the error relative to the norm of the result.
  double relative_error() const {
    Tensor got = Tensor(expected.dtype, expected.size);
    got.host = device->copy();
    double error = 0;
    double size = 0;
    for (std::int64_t n = 0; n < expected.count(); ++n) {
      error += std::pow(got.at(n) - expected.at(n), 2);
      size += std::pow(expected.at(n), 2);
    }
    return std::sqrt(error / size);
  }
};

inline double tolerance(const Case& c) {
  if (has_group_gradients(c) || has_sines_gradients(c)) return 4e-2;
  if (is_group(c) || is_sines(c)) return 3e-2;  // bfloat16 inside, whatever the inputs
  switch (c.dtype) {
    case DType::kFloat64: return 1e-11;
    case DType::kFloat32: return 1e-5;
    case DType::kFloat16: return 4e-3;
    case DType::kBFloat16: return 3e-2;
  }
  return 0;
}

// The weights against the reference, twice, in two orders of threads.
template <typename MakeProblem>
void run_weights(const Case& c, const MakeProblem& problem) {
  const bool average = c.what == What::kMeanWeights;
  std::vector<std::int64_t> indices;
  for (std::int64_t i = 0; i < c.query_length; ++i) {
    indices.push_back(7 * i % c.query_length + (i % 3 == 0 ? 20 : 0));
  }
  const testing::DeviceArray<std::int64_t> device_indices(indices);
  Result weights("weights", c.dtype, {c.batch, average ? 1 : c.heads, c.query_length, c.key_length},
                 c.layout == Layout::kHeadsInside ? Layout::kHeadsInside : Layout::kHeadsOutside);
  const auto call = [&](bool on_device) {
    AttentionWeights result{problem(on_device), weights.view(on_device), average};
    if (c.query_indices) {
      result.query_indices = on_device ? device_indices.data() : indices.data();
      result.query_index_stride[1] = 1;
    }
    return result;
  };
  reference::weights(call(false), Parallel());
  const AttentionWeights on_device = call(true);
  CHECK(cuda::attention_weights_not_supported(on_device) == nullptr);
  const testing::DeviceArray<char> workspace(
      static_cast<std::size_t>(cuda::attention_weights_workspace_bytes(on_device.problem)));
  CHECK(cuda::attention_weights(on_device, workspace.data(), nullptr) == cudaSuccess);
  weights.check(tolerance(c), 0.1);
  const std::vector<char> first = weights.device->copy();
  CHECK(cuda::attention_weights(on_device, workspace.data(), nullptr) == cudaSuccess);
  CHECK(weights.device->copy() == first);
}

// Forward and backward against the reference, twice: the second run, in another order of threads,
// must give the same bits.
inline void run_case(const Case& c) {
  using torch_selfattn::kernels::cuda::attention_backward;
  const std::int64_t B = c.batch, H = c.heads, Hk = c.kv_heads;
  const std::int64_t Lq = c.query_length, Lk = c.key_length, E = c.head_dim, Ev = c.value_dim;
  const DType statistics = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();

  Tensor query(c.dtype, {B, H, Lq, E}, c.layout);
  Tensor key(c.dtype, {B, Hk, Lk, E}, c.layout);
  Tensor value(c.dtype, {B, Hk, Lk, Ev}, c.layout);
  Tensor grad_out(c.dtype, {B, H, Lq, Ev}, c.layout);
  Tensor grad_lse(statistics, {B, H, Lq, 1});
  Tensor weight(c.dtype, {c.weight_per_batch ? B : 1, c.weight_per_head ? H : 1, 1, E});
  const std::int64_t full[4] = {B, H, Lq, Lk};
  std::int64_t mask_size[4];
  for (int d = 0; d < 4; ++d) mask_size[d] = c.mask_broadcast[d] ? 1 : full[d];
  const DType mask_dtype = c.float32_mask ? DType::kFloat32 : c.dtype;
  Tensor mask(mask_dtype, mask_size);
  const DType slopes_dtype = c.float32_slopes ? DType::kFloat32 : c.dtype;
  const std::int64_t slopes_size[4] = {c.slopes_per_batch ? B : 1, H, 1, 1};
  Tensor slopes(slopes_dtype, slopes_size);
  std::vector<char> bool_mask(static_cast<std::size_t>(mask.count()));
  query.fill_normal(c.magnitude, c.query_mean);
  key.fill_normal(c.magnitude, c.key_mean);
  value.fill_normal(c.value_magnitude);
  grad_out.fill_normal(1);
  grad_lse.fill_normal(1);
  weight.fill_normal(c.weight_magnitude);
  mask.fill_normal(1);
  for (std::int64_t n = 0; n < mask.count(); ++n) {
    bool_mask[static_cast<std::size_t>(n)] = testing::random() % 4 != 0 ? 1 : 0;
    if (testing::random() % 4 == 0) reference::store(mask_dtype, mask.host.data(), n, -inf);
  }
  if (c.slopes) slopes.fill_normal(0.1);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(B));
  std::vector<std::int64_t> starts(static_cast<std::size_t>(B));
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(B));
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    lengths[b] = Lk - 3 - 5 * static_cast<std::int64_t>(b);
    starts[b] = 2 + static_cast<std::int64_t>(b);
    offsets[b] = 3 * static_cast<std::int64_t>(b) - 4;
  }

  switch (c.special) {
    case Special::kNone: break;
    case Special::kNanBehindMask:
    case Special::kInfBehindMask: {  // the mask is (1, 1, Lq, Lk) and bool or lengths are given
      const double bad = c.special == Special::kNanBehindMask ? nan : inf;
      const std::int64_t hidden = Lk - 1;  // a key
      const std::int64_t empty = 1;        // a query
      for (std::int64_t i = 0; i < Lq && c.mask != MaskKind::kNone; ++i) {
        bool_mask[static_cast<std::size_t>(i * Lk + hidden)] = 0;
        reference::store(mask_dtype, mask.host.data(), i * Lk + hidden, -inf);
      }
      for (std::int64_t j = 0; j < Lk && c.mask != MaskKind::kNone; ++j) {
        bool_mask[static_cast<std::size_t>(empty * Lk + j)] = 0;
        reference::store(mask_dtype, mask.host.data(), empty * Lk + j, -inf);
      }
      for (std::int64_t b = 0; b < B; ++b) {
        for (std::int64_t h = 0; h < Hk; ++h) {
          key.set_row(b, h, hidden, bad);
          value.set_row(b, h, hidden, bad);
        }
        for (std::int64_t h = 0; h < H && c.mask != MaskKind::kNone; ++h) {
          query.set_row(b, h, empty, bad);
          grad_out.set_row(b, h, empty, bad);
        }
      }
      break;
    }
    case Special::kNanInside: key.set_row(0, 0, Lk / 2, nan); break;
    case Special::kLowestMask:
      for (std::int64_t n = 0; n < 3 * Lk; ++n) {
        reference::store(mask_dtype, mask.host.data(), n,
                         mask_dtype == DType::kFloat64 ? -1.7e308 : -3.4e38);
      }
      break;
    case Special::kHugeScores:
      query.set_row(0, 0, 2, 1e25);
      key.set_row(0, 0, 3, 1e25);
      key.set_row(0, 0, 4, -1e25);
      break;
    case Special::kLargeScores: break;
    case Special::kOneHugeKey:
      key.set_row(0, 0, 5, 40.0);
      query.set_row(0, 0, 7, -40.0);
      break;
    case Special::kHiddenBlocks:
      for (std::int64_t n = 0; n < mask.count(); ++n) {
        if (n % Lk >= 60 && n % Lk < 200) bool_mask[static_cast<std::size_t>(n)] = 0;
      }
      break;
    case Special::kSaturatedQueries:
      query.fill_normal(1, 30);
      for (std::int64_t h = 0; h < Hk; ++h) key.set_row(0, h, 0, -2);
      break;
    case Special::kNanMask: reference::store(mask_dtype, mask.host.data(), 3 * Lk + 5, nan); break;
    case Special::kZeroWeights:
      for (std::int64_t n = 0; n < weight.count(); n += 2) {
        reference::store(c.dtype, weight.host.data(), n, 0);
      }
      break;
    case Special::kRange:
      for (std::int64_t b = 0; b < B; ++b) {
        const auto at = [&](std::int64_t n, std::int64_t count) {
          return c.magnitude * (2.0 * static_cast<double>(n) / static_cast<double>(count - 1) - 1);
        };
        for (std::int64_t h = 0; h < H; ++h) {
          for (std::int64_t i = 0; i < Lq; ++i) query.set_row(b, h, i, -at(i, Lq));
        }
        for (std::int64_t h = 0; h < Hk; ++h) {
          for (std::int64_t j = 0; j < Lk; ++j) key.set_row(b, h, j, at(j, Lk));
        }
      }
      break;
  }

  Tensor* const inputs[] = {&query, &key, &value, &grad_out, &grad_lse, &weight, &mask, &slopes};
  for (Tensor* tensor : inputs) tensor->upload();
  const testing::DeviceArray<char> device_bool_mask(bool_mask);
  const testing::DeviceArray<std::int64_t> device_lengths(lengths);
  const testing::DeviceArray<std::int64_t> device_starts(starts);
  const testing::DeviceArray<std::int64_t> device_offsets(offsets);
  const std::vector<std::int64_t> philox = {0x123456789abcdef, 42};
  const testing::DeviceArray<std::int64_t> device_philox(philox);

  const auto problem = [&](bool on_device) {
    AttentionProblem p;
    p.dtype = c.dtype;
    p.score = c.score;
    p.activation = c.activation;
    p.negative_slope = c.negative_slope;
    p.batch = B;
    p.heads = H;
    p.kv_heads = Hk;
    p.query_length = Lq;
    p.key_length = Lk;
    p.head_dim = E;
    p.value_dim = Ev;
    p.query = query.view(on_device);
    p.key = key.view(on_device);
    p.value = value.view(on_device);
    if (c.score == ScoreKind::kAdditive) {
      p.weight = weight.view(on_device).data;
      p.weight_size[0] = weight.size[0];
      p.weight_size[1] = weight.size[1];
      p.weight_stride[0] = weight.size[0] > 1 ? weight.stride[0] : 0;
      p.weight_stride[1] = weight.size[1] > 1 ? weight.stride[1] : 0;
      p.weight_stride[2] = 1;
    }
    p.mask_kind = c.mask;
    if (c.mask != MaskKind::kNone) {
      p.mask = mask.view(on_device);
      if (c.mask == MaskKind::kBool) {
        p.mask.data = on_device ? device_bool_mask.data() : bool_mask.data();
      } else {
        p.mask_dtype = mask_dtype;
      }
      for (int d = 0; d < 4; ++d) {
        p.mask_size[d] = mask_size[d];
        if (mask_size[d] == 1) p.mask.stride[d] = 0;
      }
    }
    if (c.slopes) {
      p.slopes = slopes.view(on_device).data;
      p.slopes_dtype = slopes_dtype;
      p.slopes_size[0] = slopes_size[0];
      p.slopes_size[1] = H;
      p.slopes_stride[0] = c.slopes_per_batch ? H : 0;
      p.slopes_stride[1] = 1;
    }
    if (c.lengths) p.key_lengths = on_device ? device_lengths.data() : lengths.data();
    if (c.starts) p.key_starts = on_device ? device_starts.data() : starts.data();
    if (c.offsets) p.query_offsets = on_device ? device_offsets.data() : offsets.data();
    p.scale = c.score == ScoreKind::kAdditive ? c.scale : 1 / std::sqrt(static_cast<double>(E) + 1);
    if (c.special == Special::kLargeScores) p.scale = 1000;
    p.window_left = c.window_left;
    p.window_right = c.window_right;
    p.query_offset = c.query_offset;
    p.dropout_p = c.dropout_p;
    p.philox_state = on_device ? device_philox.data() : philox.data();
    return p;
  };
  if (c.what == What::kWeights || c.what == What::kMeanWeights) {
    run_weights(c, problem);
    return;
  }

  Result out("out", c.dtype, {B, H, Lq, Ev},
             c.layout == Layout::kHeadsInside ? Layout::kHeadsInside : Layout::kHeadsOutside);
  Result lse("lse", statistics, {B, H, Lq, 1});
  Result grad_query("grad_query", c.dtype, {B, H, Lq, E});
  Result grad_key("grad_key", c.dtype, {B, Hk, Lk, E});
  Result grad_value("grad_value", c.dtype, {B, Hk, Lk, Ev});
  Result grad_weight("grad_weight", c.dtype, {weight.size[0], weight.size[1], 1, E});
  Result grad_mask("grad_mask", mask_dtype, mask_size);
  Result grad_slopes("grad_slopes", slopes_dtype, slopes_size);
  std::vector<Result*> results = {&out, &lse};
  const bool backward =
      c.what != What::kGroup && c.what != What::kExponential && c.what != What::kSines;
  if (backward) results.insert(results.end(), {&grad_query, &grad_key, &grad_value});
  if (backward && c.score == ScoreKind::kAdditive) results.push_back(&grad_weight);
  const bool all_gradients = backward && !has_group_gradients(c) && !has_sines_gradients(c);
  if (all_gradients && c.mask == MaskKind::kFloat) results.push_back(&grad_mask);
  if (all_gradients && c.slopes) results.push_back(&grad_slopes);

  const auto forward_call = [&](bool on_device) {
    return AttentionForward{problem(on_device), out.view(on_device), lse.data(on_device)};
  };
  const auto backward_call = [&](bool on_device) {
    AttentionBackward call;
    call.problem = problem(on_device);
    const View output = out.view(on_device);
    call.out.data = output.data;
    std::memcpy(call.out.stride, output.stride, sizeof output.stride);
    call.grad_out = grad_out.view(on_device);
    call.lse = lse.data(on_device);
    call.grad_lse = c.grad_lse ? grad_lse.view(on_device).data : nullptr;
    call.grad_query = grad_query.view(on_device);
    call.grad_key = grad_key.view(on_device);
    call.grad_value = grad_value.view(on_device);
    if (c.score == ScoreKind::kAdditive) call.grad_weight = grad_weight.data(on_device);
    if (!all_gradients) return call;
    if (c.mask == MaskKind::kFloat) call.grad_mask = grad_mask.data(on_device);
    if (c.slopes) call.grad_slopes = grad_slopes.data(on_device);
    return call;
  };
  reference::forward(forward_call(false), Parallel());
  if (backward) reference::backward(backward_call(false), Parallel());

  const AttentionProblem p = problem(true);
  CHECK(cuda::attention_not_supported(p) == nullptr);
  const testing::DeviceArray<char> workspace(
      static_cast<std::size_t>(cuda::attention_backward_workspace_bytes(p)));
  const GroupRun group(c);
  const ExponentialRun exponential(c);
  const SinesRun sines(c);
  std::vector<std::vector<char>> first;
  for (int run = 0; run < 2; ++run) {
    if (is_group(c)) {
      group.forward(forward_call(true));
    } else if (is_exponential(c)) {
      exponential.forward(forward_call(true));
    } else if (is_sines(c)) {
      sines.forward(forward_call(true));
    } else {
      CHECK(cuda::attention_forward(forward_call(true), nullptr) == cudaSuccess);
    }
    if (has_group_gradients(c)) {
      group.backward(backward_call(true));
    } else if (has_sines_gradients(c)) {
      sines.backward(backward_call(true));
    } else if (has_exponential_gradients(c)) {
      exponential.backward(backward_call(true));
    } else if (backward) {
      CHECK(attention_backward(backward_call(true), workspace.data(), nullptr) == cudaSuccess);
    }
    for (std::size_t n = 0; n < results.size(); ++n) {
      if (run == 0) {
        const bool is_gradient = n > 1;
        results[n]->check(tolerance(c), is_gradient ? c.largest_term : 0.1);
        first.push_back(results[n]->device->copy());
      } else {
        CHECK(results[n]->device->copy() == first[n]);
      }
    }
  }
  const bool print = std::getenv("TORCH_SELFATTN_PRINT_ERRORS") != nullptr;
  for (std::size_t n = 0; n < results.size(); ++n) {
    const double bound = n == 0 ? c.out_error : n == 1 ? 0 : c.gradient_error;
    if (bound == 0 && !print) continue;
    const double error = results[n]->relative_error();
    if (print) std::printf("%s: %s %.2e\n", c.name, results[n]->name, error);
    if (bound != 0 && !(error <= bound)) {
      ::testing::report_failure(results[n]->name, 0, "relative error", error, bound);
    }
  }
}

}  // namespace attention_testing
