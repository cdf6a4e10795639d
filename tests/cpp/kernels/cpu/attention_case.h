#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/common/reference.h"
#include "kernels/cpu/attention.h"

// Attention problems made from a few words, with their data, and the results of one implementation
// as numbers in double: what the tests of the kernels compare.
namespace torch_selfattn::kernels::testing {

// Tasks on threads of its own, so that a sanitizer for threads sees everything.
inline Parallel threads(int count) {
  Parallel parallel;
  parallel.threads = count;
  parallel.run_tasks = [](std::int64_t tasks, int workers,
                          void (*task)(void* context, std::int64_t index, int thread),
                          void* context) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int thread) {
      for (std::int64_t index = next++; index < tasks; index = next++) {
        task(context, index, thread);
      }
    };
    std::vector<std::thread> pool;
    for (int thread = 1; thread < workers; ++thread) pool.emplace_back(work, thread);
    work(0);
    for (std::thread& thread : pool) thread.join();
  };
  return parallel;
}

enum class Layout { kHeadsFirst, kLengthFirst, kStrided, kReversed, kExpanded };

struct Case {
  std::string name = "plain";
  DType dtype = DType::kFloat32;
  ScoreKind score = ScoreKind::kDotProduct;
  std::int64_t batch = 2, heads = 2, kv_heads = 2;
  std::int64_t query_length = 33, key_length = 47, head_dim = 24, value_dim = 24;
  Layout layout = Layout::kHeadsFirst;

  MaskKind mask = MaskKind::kNone;
  DType mask_dtype = DType::kFloat32;
  bool mask_full[4] = {true, true, true, true};  // else the dimension is 1
  bool mask_transposed = false;                  // keys are not the fastest dimension
  double mask_probability = 0.7;                 // that a pair is allowed
  std::int64_t mask_block = 1;                   // for squares of so many queries and keys at once

  std::vector<std::int64_t> key_lengths, key_starts, query_offsets;
  std::int64_t window_left = -1, window_right = -1, query_offset = 0;
  bool slopes = false, slopes_per_sample = false, slopes_of_inputs = false;  // ALiBi; their dtype
  double scale = 0.0;                                                        // 0: the default
  double dropout = 0.0;
  bool grad_lse = false;
  bool constant = false;  // mask and slopes: no gradient is wanted
  bool weight_per_head = false;
  double amplitude = 1.0;  // of queries and keys
  double offset = 0.0;     // added to queries, subtracted from keys

  const char* score_name() const { return score == ScoreKind::kDotProduct ? "dot" : "additive"; }
};

// A tensor (B, H, L, D) of a dtype in some memory layout.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::int64_t b, std::int64_t h, std::int64_t l, std::int64_t d, Layout layout)
      : dtype_(dtype), size_{b, h, l, d} {
    std::int64_t step = layout == Layout::kStrided ? 3 : 1;
    stride_[3] = step;
    const std::int64_t row = layout == Layout::kStrided ? d * step + 5 : d;
    if (layout == Layout::kLengthFirst) {
      stride_[1] = row, stride_[2] = row * h, stride_[0] = stride_[2] * l;
    } else {
      stride_[2] = row, stride_[1] = row * l, stride_[0] = stride_[1] * h;
    }
    std::int64_t elements = std::max<std::int64_t>(stride_[0] * b, 1);
    if (layout == Layout::kExpanded) {
      elements = std::max<std::int64_t>(stride_[0], 1);
      stride_[0] = 0;
    }
    if (layout == Layout::kReversed) {
      for (int dim = 2; dim < 4; ++dim) {
        start_ += std::max<std::int64_t>(size_[dim] - 1, 0) * stride_[dim];
        stride_[dim] = -stride_[dim];
      }
    }
    data_.resize(static_cast<std::size_t>(elements * size_of(dtype)));
  }

  // A read or write beyond the tensor is one beyond its allocation, for the address sanitizer.
  void* data() { return data_.data() + start_ * size_of(dtype_); }
  ConstView view() { return {data(), {stride_[0], stride_[1], stride_[2], stride_[3]}}; }
  View mutable_view() { return {data(), {stride_[0], stride_[1], stride_[2], stride_[3]}}; }

  double get(std::int64_t b, std::int64_t h, std::int64_t l, std::int64_t d) {
    return reference::load(dtype_, data(), at(b, h, l, d));
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t l, std::int64_t d, double value) {
    reference::store(dtype_, data(), at(b, h, l, d), value);
  }
  template <typename Fill>
  void fill(Fill&& fill) {
    for (std::int64_t b = 0; b < size_[0]; ++b) {
      for (std::int64_t h = 0; h < size_[1]; ++h) {
        for (std::int64_t l = 0; l < size_[2]; ++l) {
          for (std::int64_t d = 0; d < size_[3]; ++d) set(b, h, l, d, fill(b, h, l, d));
        }
      }
    }
  }
  std::vector<double> numbers() {
    std::vector<double> result;
    for (std::int64_t b = 0; b < size_[0]; ++b) {
      for (std::int64_t h = 0; h < size_[1]; ++h) {
        for (std::int64_t l = 0; l < size_[2]; ++l) {
          for (std::int64_t d = 0; d < size_[3]; ++d) result.push_back(get(b, h, l, d));
        }
      }
    }
    return result;
  }

 private:
  std::int64_t at(std::int64_t b, std::int64_t h, std::int64_t l, std::int64_t d) const {
    return b * stride_[0] + h * stride_[1] + l * stride_[2] + d * stride_[3];
  }
  DType dtype_ = DType::kFloat32;
  std::int64_t size_[4] = {0, 0, 0, 0};
  std::int64_t stride_[4] = {0, 0, 0, 0};
  std::int64_t start_ = 0;
  std::vector<char> data_;
};

struct Results {
  std::vector<double> out, lse, grad_query, grad_key, grad_value, grad_weight, grad_mask;
  std::vector<double> grad_slopes;
};

class Instance {
 public:
  explicit Instance(const Case& c, unsigned seed = 1) : c_(c), random_(seed) {
    AttentionProblem& p = problem;
    p.dtype = c.dtype;
    p.score = c.score;
    p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads;
    p.query_length = c.query_length, p.key_length = c.key_length;
    p.head_dim = c.head_dim, p.value_dim = c.value_dim;
    query = Tensor(c.dtype, c.batch, c.heads, c.query_length, c.head_dim, c.layout);
    key = Tensor(c.dtype, c.batch, c.kv_heads, c.key_length, c.head_dim, c.layout);
    value = Tensor(c.dtype, c.batch, c.kv_heads, c.key_length, c.value_dim, c.layout);
    out = Tensor(c.dtype, c.batch, c.heads, c.query_length, c.value_dim, written_layout());
    grad_out = Tensor(c.dtype, c.batch, c.heads, c.query_length, c.value_dim, c.layout);
    grad_query = Tensor(c.dtype, c.batch, c.heads, c.query_length, c.head_dim, written_layout());
    grad_key = Tensor(c.dtype, c.batch, c.kv_heads, c.key_length, c.head_dim, written_layout());
    grad_value = Tensor(c.dtype, c.batch, c.kv_heads, c.key_length, c.value_dim, written_layout());
    const auto normal = [&](auto...) { return normal_(random_); };
    query.fill([&](auto...) { return normal_(random_) * c.amplitude + c.offset; });
    key.fill([&](auto...) { return normal_(random_) * c.amplitude - c.offset; });
    value.fill(normal);
    grad_out.fill(normal);
    p.query = query.view(), p.key = key.view(), p.value = value.view();

    if (c.score == ScoreKind::kAdditive) {
      weight =
          Tensor(c.dtype, 1, c.weight_per_head ? c.heads : 1, 1, c.head_dim, Layout::kHeadsFirst);
      weight.fill(normal);
      if (c.head_dim > 1) weight.set(0, 0, 0, 1, 0.0);  // dw must be right there as well
      p.weight = weight.data();
      p.weight_size[1] = c.weight_per_head ? c.heads : 1;
      p.weight_stride[1] = c.weight_per_head ? c.head_dim : 0;
      p.weight_stride[2] = 1;
    }
    if (c.mask != MaskKind::kNone) make_mask();
    if (c.slopes) make_slopes();
    p.key_lengths = c.key_lengths.empty() ? nullptr : c.key_lengths.data();
    p.key_starts = c.key_starts.empty() ? nullptr : c.key_starts.data();
    p.query_offsets = c.query_offsets.empty() ? nullptr : c.query_offsets.data();
    p.window_left = c.window_left, p.window_right = c.window_right;
    p.query_offset = c.query_offset;
    p.scale = c.scale;
    if (c.scale == 0.0) {
      p.scale = c.score == ScoreKind::kAdditive
                    ? 1.0
                    : 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(c.head_dim, 1)));
    }
    p.dropout_p = c.dropout;
    p.philox_state = philox_state_;

    const auto rows = static_cast<std::size_t>(c.batch * c.heads * c.query_length);
    lse_.resize(rows * lse_size());
    grad_lse_.resize(rows * lse_size());
    for (std::size_t row = 0; row < rows; ++row) {
      reference::store(lse_dtype(), grad_lse_.data(), static_cast<std::int64_t>(row),
                       normal_(random_));
    }
    grad_weight_.resize(static_cast<std::size_t>(p.weight_size[0] * p.weight_size[1] * p.head_dim *
                                                 size_of(c.dtype)));
    grad_mask_.resize(static_cast<std::size_t>(mask_elements() * size_of(c.mask_dtype)));
    grad_slopes_.resize(slopes_.size());
  }

  // Views point into this object.
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  Results run(const cpu::AttentionImplementation& implementation, const Parallel& parallel) {
    // What is not written shows as a NaN.
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (Tensor* tensor : {&out, &grad_query, &grad_key, &grad_value}) {
      tensor->fill([&](auto...) { return nan; });
    }
    for (std::vector<char>* bytes : {&lse_, &grad_weight_, &grad_mask_, &grad_slopes_}) {
      std::fill(bytes->begin(), bytes->end(), '\xff');
    }

    AttentionForward forward{problem, out.mutable_view(), lse_.data()};
    implementation.forward(forward, parallel);
    AttentionBackward backward;
    backward.problem = problem;
    backward.out = out.view();
    backward.grad_out = grad_out.view();
    backward.lse = lse_.data();
    backward.grad_lse = c_.grad_lse ? grad_lse_.data() : nullptr;
    backward.grad_query = grad_query.mutable_view();
    backward.grad_key = grad_key.mutable_view();
    backward.grad_value = grad_value.mutable_view();
    const bool additive = c_.score == ScoreKind::kAdditive;
    backward.grad_weight = additive ? grad_weight_.data() : nullptr;
    const bool float_mask = c_.mask == MaskKind::kFloat && !c_.constant;
    const bool slopes = c_.slopes && !c_.constant;
    backward.grad_mask = float_mask ? grad_mask_.data() : nullptr;
    backward.grad_slopes = slopes ? grad_slopes_.data() : nullptr;
    implementation.backward(backward, parallel);

    Results results;
    results.out = out.numbers();
    results.grad_query = grad_query.numbers();
    results.grad_key = grad_key.numbers();
    results.grad_value = grad_value.numbers();
    results.lse = numbers(lse_dtype(), lse_);
    if (additive) results.grad_weight = numbers(c_.dtype, grad_weight_);
    if (float_mask) results.grad_mask = numbers(c_.mask_dtype, grad_mask_);
    if (slopes) results.grad_slopes = numbers(problem.slopes_dtype, grad_slopes_);
    return results;
  }

  std::vector<double> grad_lse_numbers() const { return numbers(lse_dtype(), grad_lse_); }

  Case c_;
  AttentionProblem problem;
  Tensor query, key, value, weight, mask, out, grad_out, grad_query, grad_key, grad_value;

 private:
  Layout written_layout() const {  // operators never write to expanded memory
    return c_.layout == Layout::kExpanded ? Layout::kHeadsFirst : c_.layout;
  }
  DType lse_dtype() const {
    return c_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  std::size_t lse_size() const { return static_cast<std::size_t>(size_of(lse_dtype())); }
  std::int64_t mask_elements() const {
    return problem.mask_size[0] * problem.mask_size[1] * problem.mask_size[2] *
           problem.mask_size[3];
  }
  static std::vector<double> numbers(DType dtype, const std::vector<char>& bytes) {
    std::vector<double> result(bytes.size() / static_cast<std::size_t>(size_of(dtype)));
    for (std::size_t n = 0; n < result.size(); ++n) {
      result[n] = reference::load(dtype, bytes.data(), static_cast<std::int64_t>(n));
    }
    return result;
  }

  void make_mask() {
    AttentionProblem& p = problem;
    const std::int64_t full[4] = {c_.batch, c_.heads, c_.query_length, c_.key_length};
    for (int dim = 0; dim < 4; ++dim) p.mask_size[dim] = c_.mask_full[dim] ? full[dim] : 1;
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    p.mask_kind = c_.mask;
    p.mask_dtype = c_.mask_dtype;
    std::int64_t stride = 1;
    const int order[2][4] = {{3, 2, 1, 0}, {2, 3, 1, 0}};
    for (const int dim : order[c_.mask_transposed ? 1 : 0]) {
      p.mask.stride[dim] = p.mask_size[dim] == 1 ? 0 : stride;
      stride *= p.mask_size[dim];
    }
    const bool boolean = c_.mask == MaskKind::kBool;
    const std::int64_t size = boolean ? 1 : size_of(c_.mask_dtype);
    mask_bytes_.resize(static_cast<std::size_t>(std::max<std::int64_t>(stride, 1) * size));
    std::map<std::array<std::int64_t, 4>, bool> blocks;
    for (std::int64_t n = 0; n < stride; ++n) {
      std::array<std::int64_t, 4> at{};
      for (std::size_t dim = 0; dim < 4; ++dim) {
        const std::int64_t step = p.mask.stride[dim];
        at[dim] = step == 0 ? 0 : n / step % p.mask_size[dim] / (dim < 2 ? 1 : c_.mask_block);
      }
      const auto found = blocks.try_emplace(at, false);
      if (found.second) found.first->second = uniform(random_) < c_.mask_probability;
      const bool allowed = found.first->second;
      if (boolean) {
        mask_bytes_[static_cast<std::size_t>(n)] = allowed ? 1 : 0;
      } else {
        reference::store(c_.mask_dtype, mask_bytes_.data(), n,
                         allowed ? normal_(random_) : -std::numeric_limits<double>::infinity());
      }
    }
    p.mask.data = mask_bytes_.data();
  }

  void make_slopes() {
    AttentionProblem& p = problem;
    p.slopes_dtype = c_.slopes_of_inputs ? c_.dtype : DType::kFloat32;
    p.slopes_size[0] = c_.slopes_per_sample ? c_.batch : 1;
    p.slopes_size[1] = c_.heads;
    p.slopes_stride[0] = c_.slopes_per_sample ? c_.heads : 0;
    p.slopes_stride[1] = 1;
    const std::int64_t count = p.slopes_size[0] * p.slopes_size[1];
    slopes_.resize(static_cast<std::size_t>(count * size_of(p.slopes_dtype)));
    for (std::int64_t n = 0; n < count; ++n) {
      reference::store(p.slopes_dtype, slopes_.data(), n, n == 1 ? 0.1 : std::exp2(-1.0 - n));
    }
    p.slopes = slopes_.data();
  }

  std::mt19937 random_;
  std::normal_distribution<double> normal_{0.0, 1.0};
  std::vector<char> lse_, grad_lse_, grad_weight_, grad_mask_, mask_bytes_;
  std::vector<char> slopes_, grad_slopes_;
  std::int64_t philox_state_[2] = {1234567890123, 42};
};

inline const cpu::AttentionImplementation& implementation(const std::string& name) {
  for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
    if (candidate.name == name) return candidate;
  }
  throw std::runtime_error("no implementation " + name);
}

// Largest |got - expected| relative to the largest |expected|; NaN and inf must be in the same
// places (else the result is infinity).
inline double relative_error(const std::vector<double>& got, const std::vector<double>& expected) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (got.size() != expected.size()) return infinity;
  double largest = 0.0;
  double error = 0.0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    if (std::isfinite(expected[n]) && std::isfinite(got[n])) {
      largest = std::max(largest, std::abs(expected[n]));
      error = std::max(error, std::abs(got[n] - expected[n]));
    } else if (!(std::isnan(expected[n]) && std::isnan(got[n])) && got[n] != expected[n]) {
      return infinity;
    }
  }
  return error == 0.0 ? 0.0 : error / std::max(largest, 1e-30);
}

}  // namespace torch_selfattn::kernels::testing
