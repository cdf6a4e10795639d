// Every implementation by its name against the reference, where scores are large or overflow.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_checks.h"

using namespace torch_selfattn::kernels;
using namespace torch_selfattn::kernels::testing;

namespace {

constexpr double kLowest = -std::numeric_limits<float>::max();

// What follows from the weights of the pairs; the other gradients also from scores at the limit.
void check_weights(const Results& got, const Results& expected, double limit) {
  CHECK(relative_error(got.out, expected.out) < limit);
  CHECK(relative_error(got.lse, expected.lse) < limit);
  CHECK(relative_error(got.grad_value, expected.grad_value) < limit);
}

}  // namespace

TEST_CASE("scores far from 0, in several blocks of keys") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  // The largest scores are about 1e2, 5e4, 3e6, 5e14, and near the largest number.
  const double amplitude = GENERATE(5.0, 100.0, 800.0, 1e7, 5e18);
  Case c;
  c.name = "large scores";
  c.dtype = dtype;
  c.query_length = 40, c.key_length = 700, c.head_dim = 32;
  c.window_right = GENERATE(-1, 650);
  Instance instance(c);
  // Each key's score is a step above the last one's: no ties, and the maximum rises in every block.
  instance.query.fill([&](auto, auto, auto l, auto) { return amplitude * (l % 2 == 0 ? 1 : -1); });
  instance.key.fill([&](auto, auto, auto l, auto d) {
    return d == 0 ? amplitude * static_cast<double>(l / 8 + 1) / 88.0 : 0.0;
  });
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(2));
    CHECK(relative_error(got.out, expected.out) < tolerance(dtype));
    CHECK(relative_error(got.lse, expected.lse) < 1e-6 + exponential_error(candidate, dtype));
  });
}

TEST_CASE("scores that rise far above those of the first keys") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16, DType::kFloat64);
  const double largest_exponent = dtype == DType::kFloat64 ? 1024.0 : 128.0;
  // Relative to the first keys the weight of the later ones is a number, at the edge, or none; the
  // sums of large values overflow before the weights do.
  const double rise = GENERATE(0.5, 0.99, 1.0, 1.01, 1.6, 50.0);
  const double size_of_values = GENERATE(1.0, 1e30);
  const bool additive = GENERATE(false, true);
  Case c;
  c.name = "rising scores";
  c.dtype = dtype;
  c.score = additive ? ScoreKind::kAdditive : ScoreKind::kDotProduct;
  c.batch = 1, c.query_length = 40, c.key_length = 700, c.head_dim = 32;
  c.scale = 1.0;
  if (GENERATE(false, true)) c.window_left = 100, c.query_offset = 290;
  Instance instance(c);
  const std::int64_t first = GENERATE(40, 340, 699);  // in the first block of keys, or beyond
  const double height = rise * largest_exponent * std::log(2.0);
  instance.query.fill([&](auto, auto, auto, auto d) { return d == 0 && !additive ? 1.0 : 0.0; });
  instance.key.fill([&](auto, auto, auto l, auto d) {
    if (additive) return l < first ? -20.0 : 20.0;  // tanh is -1 and 1
    if (d > 0) return 0.0;
    return l < first ? 0.125 * static_cast<double>(l % 8) : height + static_cast<double>(l % 3);
  });
  if (additive) {
    instance.weight.fill([&](auto, auto, auto, auto d) { return d == 0 ? height / 2 : 0.0; });
  }
  instance.value.fill([&](auto, auto, auto l, auto d) {
    return size_of_values * std::sin(static_cast<double>(7 * l + d));
  });
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(2));
    // A score's rounding is an error of its weight.
    const double epsilon = dtype == DType::kFloat64 ? 2.3e-16 : 1.2e-7;
    CHECK(relative_error(got.out, expected.out) <
          tolerance(dtype) + epsilon * rise * largest_exponent);
    CHECK(relative_error(got.lse, expected.lse) < 1e-6 + exponential_error(candidate, c.dtype));
  });
}

TEST_CASE("single scores that rise above their reference, in shares of keys and before garbage") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  struct Rise {
    std::int64_t keys;
    std::vector<std::pair<std::int64_t, double>> scores;
  };
  const Rise rise =
      GENERATE(Rise{1024, {{0, 88.0}, {800, 88.5}}}, Rise{1024, {{300, 88.5}, {800, 88.5}}},
               Rise{1000, {{300, 88.5}, {600, 88.0}, {601, -1e38}}},
               Rise{9000, {{5000, 86.0}, {8999, 86.5}}});
  Case c;
  c.name = "single rises";
  c.dtype = dtype;
  c.batch = c.heads = c.kv_heads = 1;
  c.query_length = 40, c.key_length = rise.keys, c.head_dim = 32, c.scale = 1.0;
  Instance instance(c);
  instance.query.fill([](auto, auto, auto, auto d) { return d == 0 ? 1.0 : 0.0; });
  instance.key.fill([](auto...) { return 0.0; });
  for (const auto& [key, score] : rise.scores) instance.key.set(0, 0, key, 0, score);
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(2));
    CHECK(relative_error(got.out, expected.out) < tolerance(dtype) + 1e-5);
    CHECK(relative_error(got.lse, expected.lse) < 1e-6 + exponential_error(candidate, dtype));
  });
}

TEST_CASE("scores on both sides of the lowest reference") {
  Case c;
  c.name = "low scores";
  c.dtype = DType::kBFloat16;
  c.batch = c.heads = c.kv_heads = 1;
  c.query_length = 40, c.key_length = 128, c.head_dim = 2, c.scale = 1.0;
  Instance instance(c);
  instance.query.fill([](auto, auto, auto, auto d) { return d == 0 ? 256.0 : 1.0; });
  instance.key.fill(
      [](auto, auto, auto l, auto d) { return d == 0 ? -177.0 : (l < 64 ? -115.0 : -113.0); });
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(1));
    CHECK(relative_error(got.out, expected.out) < tolerance(c.dtype));
  });
}

TEST_CASE("biases that cancel scores") {
  // Scores of 2^36 less biases that leave 4096.
  constexpr double score = 68719476736.0;
  const std::int64_t key_length = GENERATE(70, 257, 700);
  Case c;
  c.name = "cancelling biases, " + std::to_string(key_length);
  c.dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  c.batch = c.heads = c.kv_heads = 1;
  c.query_length = 40, c.key_length = key_length, c.head_dim = 64, c.scale = 1.0;
  c.mask = MaskKind::kFloat, c.mask_probability = 1.0;
  const bool others = GENERATE(false, true);  // are allowed, with scores of 0
  Instance instance(c);
  auto* mask = static_cast<float*>(const_cast<void*>(instance.problem.mask.data));
  const auto is_large = [&](std::int64_t key) {
    return key == 0 || (others && key == key_length - 1);
  };
  instance.query.fill([](auto, auto, auto, auto d) { return d == 0 ? 262144.0 : 0.0; });
  instance.key.fill(
      [&](auto, auto, auto l, auto d) { return d == 0 && is_large(l) ? 262144.0 : 0.0; });
  for (std::int64_t n = 0; n < c.query_length * key_length; ++n) {
    const double bias = is_large(n % key_length) ? 4096.0 - score : (others ? 0.0 : -kInfinity);
    mask[n] = static_cast<float>(bias);
  }
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(1));
    CHECK(relative_error(got.out, expected.out) < tolerance(c.dtype));
    // The score and its bias are rounded to 8192 in units of log2.
    CHECK(std::abs(got.lse[0] - expected.lse[0]) < 8192);
  });
}

TEST_CASE("the log-sum-exp of a few and of many keys") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16, DType::kFloat64);
  Case c;
  c.dtype = dtype;
  c.batch = 1, c.query_length = 33, c.head_dim = 8;
  c.key_length = GENERATE(1, 2, 3, 30, 65, 700, 3000);
  c.amplitude = GENERATE(0.01, 1.0, 4.0);
  c.name = "lse of " + std::to_string(c.key_length) + ", " + std::to_string(c.amplitude);
  Instance instance(c);
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(1));
    double largest = 1.0;
    double error = 0.0;
    for (std::size_t row = 0; row < expected.lse.size(); ++row) {
      largest = std::max(largest, std::abs(expected.lse[row]));
      error = std::max(error, std::abs(got.lse[row] - expected.lse[row]));
    }
    CHECK(error <= 4 * (dtype == DType::kFloat64 ? 2.3e-16 : 1.2e-7) * largest +
                       exponential_error(candidate, dtype));
  });
}

TEST_CASE("scores that overflow give no NaN") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  const double limit = dtype == DType::kFloat32 ? 1e-5 : tolerance(dtype);
  for (const double amplitude : {1e19, 1e25, 3e37}) {
    Case c;
    c.name = "overflow";
    c.dtype = dtype;
    c.query_length = 9, c.key_length = 40, c.head_dim = 1;  // no ties but at the limit
    Instance instance(c);
    instance.query.fill([&](auto, auto, auto l, auto) { return amplitude * (l % 3 - 1.0); });
    instance.key.fill([&](auto, auto, auto l, auto) { return amplitude * (l % 5 - 2.0) / 2.0; });
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      // The sign of a score is exact, so is the set of keys at the limit.
      const Results got = instance.run(candidate, threads(1));
      check_weights(got, expected, limit);
      for (const auto* grad : {&got.grad_query, &got.grad_key}) {
        for (const double x : *grad) CHECK_FALSE(std::isnan(x));
      }
    });
  }
  SECTION("products overflow upwards, scores downwards") {
    Case c;
    c.name = "negative scale";
    c.dtype = dtype;
    c.query_length = c.key_length = 64, c.head_dim = 1;
    c.scale = -0x1p-126;
    Instance instance(c);
    instance.query.fill([](auto...) { return 0x1p64; });
    instance.key.fill([](auto, auto, auto l, auto) { return l % 2 == 1 ? 0x1p64 : 0.0; });
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      check(instance.run(candidate, threads(1)), expected, tolerance(dtype));
    });
  }
  SECTION("all scores of a row overflow downwards") {
    Case c;
    if (GENERATE(false, true)) c.mask = MaskKind::kBool;
    c.name = "all low";
    c.dtype = dtype;
    c.query_length = 5, c.key_length = 40, c.head_dim = 2;
    Instance instance(c);
    instance.query.fill([](auto...) { return -1e30; });
    instance.key.fill([](auto...) { return 1e30; });
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      const Results got = instance.run(candidate, threads(1));
      check_weights(got, expected, limit);
    });
  }
  SECTION("all biases of a row overflow") {
    Case c;
    c.name = "steep slopes";
    c.dtype = dtype;
    c.query_length = 5, c.key_length = 40;
    c.slopes = true, c.query_offset = -100;
    Instance instance(c);
    auto* slopes = static_cast<float*>(const_cast<void*>(instance.problem.slopes));
    slopes[0] = slopes[1] = 1e38F;
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      const Results got = instance.run(candidate, threads(1));
      check_weights(got, expected, limit);
      for (const double x : got.grad_slopes) CHECK_FALSE(std::isnan(x));
    });
  }
  SECTION("sums that overflow on the way to a small number") {
    const auto mask = GENERATE(MaskKind::kNone, MaskKind::kBool, MaskKind::kFloat);
    const double large = GENERATE(1e40, 3e38);  // the sum is NaN, or inf and stays it
    Case c;
    c.mask = mask;
    c.name = "cancelling";
    c.dtype = dtype;
    c.query_length = 4, c.key_length = 21, c.head_dim = 4;
    Instance instance(c);
    instance.query.fill([&](auto...) { return large > 1e39 ? 1e20 : 1.0; });
    instance.key.fill([&](auto, auto, auto l, auto d) {
      if (large > 1e39) return d % 2 == 0 ? 1e20 : -1e20;
      return (d < 2) == (l % 3 == 0) ? large : -large;
    });
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      const Results got = instance.run(candidate, threads(1));
      check_weights(got, expected, limit);
    });
  }
}

TEST_CASE("a mask of the smallest number leaves a uniform row, not an empty one") {
  Case c;
  c.name = "finfo.min";
  c.dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  c.mask = MaskKind::kFloat, c.mask_probability = 1.0;
  Instance instance(c);
  auto* mask = static_cast<float*>(const_cast<void*>(instance.problem.mask.data));
  const auto row = static_cast<std::int64_t>(c.key_length);
  for (std::int64_t n = 0; n < row; ++n) mask[n] = -std::numeric_limits<float>::max();
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(1));
    const double limit = c.dtype == DType::kFloat32 ? 1e-5 : tolerance(c.dtype);
    CHECK(relative_error(got.out, expected.out) < limit);
    CHECK(relative_error(got.grad_value, expected.grad_value) < limit);
    CHECK(relative_error(got.grad_query, expected.grad_query) < limit);
  });
}

TEST_CASE("biases that change along the keys") {
  // Of the first keys, up to `change`, and of the others.
  const auto [before, after] = GENERATE(
      std::pair{kLowest, 0.0}, std::pair{0.0, kLowest}, std::pair{-kInfinity, kLowest},
      std::pair{kLowest, -kInfinity}, std::pair{-kInfinity, 0.0}, std::pair{0.0, 300.0},
      std::pair{0.0, 5e4}, std::pair{-5e4, 0.0}, std::pair{1e4, 1e4}, std::pair{1e30, 1e30});
  const std::int64_t change = GENERATE(1, 70, 340);
  Case c;
  c.name = "bias " + std::to_string(before) + ", then " + std::to_string(after);
  c.dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  c.batch = 1, c.query_length = 40, c.key_length = 421;
  c.mask = MaskKind::kFloat, c.mask_probability = 1.0;
  if (GENERATE(false, true)) c.window_left = 60, c.query_offset = 30;
  Instance instance(c);
  auto* mask = static_cast<float*>(const_cast<void*>(instance.problem.mask.data));
  const std::int64_t elements = c.heads * c.query_length * c.key_length;
  for (std::int64_t n = 0; n < elements; ++n) {
    mask[n] = static_cast<float>(n % c.key_length < change ? before : after);
  }
  for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
    const Results got = instance.run(candidate, threads(2));
    // A score of 5e4 is rounded to 1 / 256.
    const bool large =
        std::max(std::abs(before), std::abs(after)) >= 1e4 && before != kLowest && after != kLowest;
    CHECK(relative_error(got.out, expected.out) < tolerance(c.dtype) + (large ? 1e-2 : 1e-5));
    CHECK(relative_error(got.lse, expected.lse) < 1e-6 + exponential_error(candidate, c.dtype));
  });
}

TEST_CASE("the additive score keeps its accuracy far from 0") {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const double offset : {0.0, 12.0, 31.0, 40.0, 300.0}) {
      for (const double amplitude : {0.1, 4.0, 30.0, 1e4}) {
        Case c;
        c.name = "offset " + std::to_string(offset) + ", amplitude " + std::to_string(amplitude);
        c.score = ScoreKind::kAdditive;
        c.dtype = dtype;
        c.query_length = 13, c.key_length = 45, c.offset = offset, c.amplitude = amplitude;
        Instance instance(c);
        for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
          const Results got = instance.run(candidate, threads(1));
          const double limit = dtype == DType::kFloat64 ? 1e-12 : 1e-5;
          CHECK(relative_error(got.out, expected.out) < limit);
          CHECK(relative_error(got.lse, expected.lse) < limit);
          CHECK(relative_error(got.grad_query, expected.grad_query) < 3 * limit);
          CHECK(relative_error(got.grad_key, expected.grad_key) < 3 * limit);
          CHECK(relative_error(got.grad_weight, expected.grad_weight) < limit);
        });
      }
    }
  }
}
