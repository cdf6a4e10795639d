// How many digits results have, by every implementation: what bounds of single elements do not
// tell, such as a product of parts that is missing (csrc/kernels/cpu/float_parts.h), or a magnitude
// that leaves the range of an operand.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_checks.h"

using namespace torch_selfattn::kernels;
using namespace torch_selfattn::kernels::testing;

namespace {

void check_norms(const Results& got, const Results& expected, double limit) {
  CHECK(norm_error(got.out, expected.out) < limit);
  CHECK(norm_error(got.lse, expected.lse) < limit);
  CHECK(norm_error(got.grad_query, expected.grad_query) < limit);
  CHECK(norm_error(got.grad_key, expected.grad_key) < limit);
  CHECK(norm_error(got.grad_value, expected.grad_value) < limit);
}

Case case_of(DType dtype, std::int64_t query_length, std::int64_t key_length,
             std::int64_t head_dim) {
  Case c;
  c.dtype = dtype;
  c.batch = 1, c.heads = c.kv_heads = 1;
  c.query_length = query_length, c.key_length = key_length;
  c.head_dim = c.value_dim = head_dim;
  c.name = std::to_string(query_length) + " x " + std::to_string(key_length) + ", " +
           std::to_string(head_dim);
  return c;
}

// Row l times 2^power(l).
template <typename Power>
void scale(Tensor& tensor, const Power& power) {
  tensor.fill(
      [&](auto b, auto h, auto l, auto d) { return std::ldexp(tensor.get(b, h, l, d), power(l)); });
}

}  // namespace

TEST_CASE("float32: the norm of the error is that of a few roundings") {
  struct Size {
    std::int64_t query_length, key_length, head_dim;
  };
  for (const Size size : {Size{70, 300, 64}, Size{130, 40, 96}, Size{33, 65, 17},
                          Size{40, 2200, 32}}) {  // the last: keys in shares
    for (const int way : {0, 1, 2, 3, 4}) {
      Case c = case_of(DType::kFloat32, size.query_length, size.key_length, size.head_dim);
      c.name += ", way " + std::to_string(way);
      if (way == 1) c.window_right = 0, c.query_offset = size.key_length - size.query_length;
      if (way == 2) c.mask = MaskKind::kBool;
      if (way == 3) c.slopes = true;
      if (way == 4) c.dropout = 0.3;
      Instance instance(c);
      for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
        check_norms(instance.run(candidate, threads(2)), expected, 1.2e-6);
      });
    }
  }
}

TEST_CASE("float16: the log-sum-exp has the digits of float") {
  for (const double amplitude : {1.0, 4.0}) {
    Case c = case_of(DType::kFloat16, 70, 300, 64);
    c.amplitude = amplitude;
    Instance instance(c);
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      CHECK(norm_error(instance.run(candidate, threads(2)).lse, expected.lse) < 4e-7);
    });
  }
}

// Queries, keys, values and the output's gradient, each far from 1, alone or so that another one
// makes up for it. Results are compared relative to their size, whatever it is.
TEST_CASE("float32: magnitudes far from 1") {
  struct Powers {
    int query, key, value, grad_out;
  };
  std::vector<Powers> all;
  for (const int power : {30, 42, 44, 60, 100, 120}) {
    for (const int sign : {-1, 1}) {
      const int n = sign * power;
      all.push_back({n, -n, 0, 0});
      all.push_back({-power, 0, 0, 0});  // scores near 0
      if (n > 100) continue;             // sums would overflow
      all.push_back({0, 0, n, 0});
      all.push_back({0, 0, 0, n});
      if (power <= 60) all.push_back({0, 0, n, -n});
    }
  }
  for (const int n : {-38, -30, -19}) all.push_back({n, n, n, n});  // products of all of them
  all.push_back({-19, -19, -19, -42});
  for (const Powers& powers : all) {
    for (const bool causal : {false, true}) {
      Case c = case_of(DType::kFloat32, 70, 130, 32);
      c.name = "powers " + std::to_string(powers.query) + ", " + std::to_string(powers.key) + ", " +
               std::to_string(powers.value) + ", " + std::to_string(powers.grad_out);
      if (causal) c.window_right = 0, c.query_offset = 60;
      Instance instance(c);
      scale(instance.query, [&](auto) { return powers.query; });
      scale(instance.key, [&](auto) { return powers.key; });
      scale(instance.value, [&](auto) { return powers.value; });
      scale(instance.grad_out, [&](auto) { return powers.grad_out; });
      for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
        check_norms(instance.run(candidate, threads(2)), expected, 1.2e-6);
      });
    }
  }
}

TEST_CASE("float32: rows of all magnitudes in one block") {
  Case c = case_of(DType::kFloat32, 64, 96, 32);
  c.name = "all magnitudes";
  Instance instance(c);
  for (Tensor* const tensor : {&instance.key, &instance.value, &instance.grad_out}) {
    scale(*tensor, [](std::int64_t row) { return -15 * static_cast<int>(row % 8); });
  }
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    check_norms(instance.run(candidate, threads(2)), expected, 1.2e-6);
  });
}

TEST_CASE("float32: scales far from the default") {
  for (const double scale : {-0.125, 0.0, 1e-30, 1e12, -1e12}) {
    Case c = case_of(DType::kFloat32, 70, 130, 32);
    c.name = "scale " + std::to_string(scale);
    Instance instance(c);
    instance.problem.scale = scale;
    if (std::abs(scale) > 1.0) {  // scores of size 1 again
      instance.query.fill([&](auto b, auto h, auto l, auto d) {
        return instance.query.get(b, h, l, d) / std::abs(scale) * 0.125;
      });
    }
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      check_norms(instance.run(candidate, threads(2)), expected, 1.2e-6);
    });
  }
}

TEST_CASE("a NaN of any payload stays one") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kFloat16);
  for (const std::uint32_t high :
       {0x7fffu, 0xffffu, dtype == DType::kFloat16 ? 0x7e01u : 0x7fc0u}) {
    for (const int which : {0, 1, 2, 3}) {
      Case c = case_of(dtype, 64, 64, 32);
      c.name = "payload " + std::to_string(high) + ", tensor " + std::to_string(which);
      Instance instance(c);
      Tensor* const tensors[] = {&instance.query, &instance.key, &instance.value,
                                 &instance.grad_out};
      auto* const bytes = static_cast<char*>(tensors[which]->data());
      if (dtype == DType::kFloat16) {
        const auto bits = static_cast<std::uint16_t>(high);
        std::memcpy(bytes + 2 * 5, &bits, 2);
      } else {
        const std::uint32_t bits = high << 16 | 0xffffu;
        std::memcpy(bytes + 4 * 5, &bits, 4);
      }
      for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
        check(instance.run(candidate, threads(2)), expected, tolerance(c));
      });
    }
  }
}

TEST_CASE("nothing to do: no batches, heads, queries, keys or elements") {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int way : {0, 1, 2, 3, 4, 5}) {
      Case c = case_of(dtype, 40, 50, 32);
      c.name = "nothing, way " + std::to_string(way);
      if (way == 0) c.batch = 0;
      if (way == 1) c.heads = c.kv_heads = 0;
      if (way == 2) c.query_length = 0;
      if (way == 3) c.key_length = 0;
      if (way == 4) c.head_dim = 0;
      if (way == 5) c.value_dim = 0;
      Instance instance(c);
      for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
        check(instance.run(candidate, threads(2)), expected, tolerance(c));
      });
    }
  }
}
