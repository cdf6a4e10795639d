#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_case.h"

// What the tests of the kernels ask of the results of one implementation.
namespace torch_selfattn::kernels::testing {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Of the largest element. In 16 bits it is the rounding of the results and, in backward, of the
// output that was saved; in float32 the sum over a few hundred elements.
inline double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 1e-13;
    case DType::kFloat32: return 8e-6;
    case DType::kFloat16: return 3e-3;
    case DType::kBFloat16: return 2e-2;
  }
  return 0.0;
}

// Scores of some hundreds: the lse is saved in the result's precision, and its rounding error is
// one of the weights in backward.
inline double tolerance(const Case& c) {
  return c.amplitude > 5.0 ? std::max(100.0 * tolerance(c.dtype), 3e-4) : tolerance(c.dtype);
}

// Of the log-sum-exp beside rounding: where weights are rounded to bfloat16, `amx` makes do with
// 2^x to 8.6e-5.
inline double exponential_error(const cpu::AttentionImplementation& candidate, DType dtype) {
  return candidate.name == std::string("amx") && dtype == DType::kBFloat16 ? 8.7e-5 : 0.0;
}

inline void check(const Results& got, const Results& expected, double tolerance) {
  CHECK(relative_error(got.out, expected.out) < tolerance);
  CHECK(relative_error(got.lse, expected.lse) < tolerance);
  CHECK(relative_error(got.grad_query, expected.grad_query) < tolerance);
  CHECK(relative_error(got.grad_key, expected.grad_key) < tolerance);
  CHECK(relative_error(got.grad_value, expected.grad_value) < tolerance);
  CHECK(relative_error(got.grad_weight, expected.grad_weight) < tolerance);
  CHECK(relative_error(got.grad_mask, expected.grad_mask) < tolerance);
  CHECK(relative_error(got.grad_slopes, expected.grad_slopes) < tolerance);
}

// The norm of the difference over the norm of what is expected.
inline double norm_error(const std::vector<double>& got, const std::vector<double>& expected) {
  REQUIRE(got.size() == expected.size());
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    if (got[n] == expected[n]) continue;  // the lse of rows without keys
    difference += (got[n] - expected[n]) * (got[n] - expected[n]);
  }
  for (const double x : expected) norm += std::isinf(x) ? 0.0 : x * x;
  return norm == 0.0 ? difference : std::sqrt(difference / norm);
}

// Bits, so that NaN equals NaN.
inline bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}
inline bool identical(const Results& a, const Results& b) {
  return identical(a.out, b.out) && identical(a.lse, b.lse) &&
         identical(a.grad_query, b.grad_query) && identical(a.grad_key, b.grad_key) &&
         identical(a.grad_value, b.grad_value) && identical(a.grad_weight, b.grad_weight) &&
         identical(a.grad_mask, b.grad_mask) && identical(a.grad_slopes, b.grad_slopes);
}

// The implementations under test that run here, and the reference's results for one instance.
template <typename Check>
void for_each_implementation(Instance& instance, Check&& check_one) {
  const Results expected = instance.run(implementation("reference"), threads(1));
  for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
    const std::string name = candidate.name;
    if (name == "reference" || candidate.not_supported(instance.problem) != nullptr) continue;
    INFO(name << ", " << instance.c_.score_name() << ", dtype "
              << static_cast<int>(instance.c_.dtype) << ", " << instance.c_.name);
    check_one(candidate, expected);
  }
}

}  // namespace torch_selfattn::kernels::testing
