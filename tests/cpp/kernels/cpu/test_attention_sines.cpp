// The additive score as dot products of sines (csrc/kernels/cpu/sine_features.h): how exact its
// results are, and that what its fits do not reach is computed by the other kernels. "Like those of
// avx512" means every bit; where it is said that bits differ, the fits were used.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_checks.h"

using namespace torch_selfattn::kernels;
using namespace torch_selfattn::kernels::testing;

namespace {

Case additive_case(std::int64_t query_length, std::int64_t key_length, std::int64_t head_dim) {
  Case c;
  c.dtype = DType::kBFloat16;
  c.score = ScoreKind::kAdditive;
  c.batch = 1;
  c.query_length = query_length, c.key_length = key_length;
  c.head_dim = head_dim, c.value_dim = 64;
  c.weight_per_head = true;
  return c;
}

// Weights of half their size: the scores of a network at its start.
void halve_weights(Instance& instance) {
  Tensor& weight = instance.weight;
  weight.fill([&](auto b, auto h, auto l, auto d) { return 0.5 * weight.get(b, h, l, d); });
}

bool runs(const Instance& instance) {
  return implementation("amx_sines").not_supported(instance.problem) == nullptr;
}

// Errors of the norms beside those of the definition.
void check_norms(const Results& got, const Results& expected, double out, double gradients) {
  CHECK(norm_error(got.out, expected.out) < out);
  CHECK(norm_error(got.grad_query, expected.grad_query) < gradients);
  CHECK(norm_error(got.grad_key, expected.grad_key) < gradients);
  CHECK(norm_error(got.grad_value, expected.grad_value) < gradients);
  CHECK(norm_error(got.grad_weight, expected.grad_weight) < gradients);
}

Results by_sines(Instance& instance) {
  return instance.run(implementation("amx_sines"), threads(2));
}
Results by_avx512(Instance& instance) { return instance.run(implementation("avx512"), threads(2)); }
Results by_definition(Instance& instance) {
  return instance.run(implementation("reference"), threads(1));
}

}  // namespace

TEST_CASE("sines: errors by the scale of the inputs") {
  struct Scale {
    double amplitude, out, gradients;
  };
  const Scale scale = GENERATE(Scale{0.05, 4e-3, 8e-3}, Scale{0.3, 4e-3, 1.3e-2},
                               Scale{1.0, 4e-3, 8e-3}, Scale{1.4, 5e-3, 1.2e-2});
  const int way = GENERATE(0, 1, 2, 3);
  Case c = additive_case(260, 310, 64);
  c.amplitude = scale.amplitude;
  c.grad_lse = true;
  c.name = "amplitude " + std::to_string(scale.amplitude) + ", way " + std::to_string(way);
  if (way == 1) c.window_right = 0, c.query_offset = 50;
  if (way == 2) c.mask = MaskKind::kBool;
  if (way == 3) c.heads = 4, c.slopes = c.constant = true;
  Instance instance(c);
  if (!runs(instance)) return;
  INFO(c.name);
  halve_weights(instance);
  const Results expected = by_definition(instance);
  const Results got = by_sines(instance);
  check_norms(got, expected, scale.out, scale.gradients);
  CHECK(relative_error(got.lse, expected.lse) < 3e-3);
  CHECK_FALSE(identical(got.out, by_avx512(instance).out));
}

TEST_CASE("sines: the gradient of queries is more than rounding where they are small") {
  Case c = additive_case(128, 256, 64);
  c.amplitude = 0.02;
  Instance instance(c);
  if (!runs(instance)) return;
  const Results expected = by_definition(instance);
  // 1 - tanh^2 is nearly the same for all keys, and G, which adds up to 0, was made with an output
  // that had been rounded: by the sums as they come out the error is of the size of the gradient.
  CHECK(norm_error(by_sines(instance).grad_query, expected.grad_query) < 2e-2);
  CHECK_FALSE(identical(by_sines(instance).out, by_avx512(instance).out));
}

TEST_CASE("sines: every width of heads, and tails of tiles") {
  const std::int64_t head_dim = GENERATE(1, 2, 5, 15, 16, 17, 40, 100, 130);
  const std::int64_t length = GENERATE(1, 31, 33, 97, 257, 300);
  Case c = additive_case(length, 340 - length, head_dim);
  c.value_dim = 17;
  c.layout = GENERATE(Layout::kHeadsFirst, Layout::kStrided);
  c.name = std::to_string(length) + " queries, head dim " + std::to_string(head_dim);
  Instance instance(c);
  if (!runs(instance)) return;
  INFO(c.name);
  halve_weights(instance);
  const Results expected = by_definition(instance);
  const Results got = by_sines(instance);
  check(got, expected, tolerance(c.dtype));
  CHECK_FALSE(identical(got.lse, by_avx512(instance).lse));
}

TEST_CASE("sines: what the fits do not reach is computed like by avx512") {
  const int way = GENERATE(0, 1, 2, 3, 4, 5, 6);
  Case c = additive_case(60, 200, 32);
  Instance instance(c);
  if (!runs(instance)) return;
  const double infinity = kInfinity;
  const auto set_all = [](Tensor& tensor, double value) {
    tensor.fill([&](auto...) { return value; });
  };
  if (way == 0)
    c.name = "scale 20",
    instance.query.fill([](auto, auto, auto l, auto d) { return 20.0 * std::sin(l + d); });
  if (way == 1) c.name = "one large query", instance.query.set(0, 1, 5, 3, 30.0);
  if (way == 2) c.name = "1e4", set_all(instance.query, 1e4), set_all(instance.key, -1e4);
  if (way == 3) c.name = "an infinite key", instance.key.set(0, 0, 7, 3, infinity);
  if (way == 4) c.name = "a NaN in a query", instance.query.set(0, 1, 9, 3, kNaN);
  if (way == 5) c.name = "an infinite weight", instance.weight.set(0, 0, 0, 2, infinity);
  if (way == 6) c.name = "an infinite value", instance.value.set(0, 0, 3, 2, infinity);
  INFO(c.name);
  CHECK(identical(by_sines(instance), by_avx512(instance)));
}

TEST_CASE("sines: what they would not be exact enough for is computed like by avx512") {
  const int way = GENERATE(0, 1, 2, 3, 4);
  Case c = additive_case(260, 300, 32);
  if (way == 2) c.heads = 4, c.kv_heads = 1;
  if (way == 4) c.query_length = 100;
  Instance instance(c);
  if (!runs(instance)) return;
  halve_weights(instance);
  const auto noise = [](auto l, auto d) { return 0.1 * std::sin(12.9898 * l + 78.233 * d); };
  if (way == 0) {
    c.name = "keys that saturate tanh on either side";
    instance.query.fill([&](auto, auto, auto l, auto d) { return noise(l, d); });
    instance.key.fill([&](auto, auto, auto l, auto d) {
      return (static_cast<int>(std::sin(3.7 * l + d) * 8) % 2 == 0 ? 4.0 : -4.0) + noise(l, d);
    });
  } else if (way == 1) {
    c.name = "all tokens saturate tanh";
    instance.query.fill([&](auto, auto, auto l, auto d) { return 3.0 + noise(l, d); });
    instance.key.fill([&](auto, auto, auto l, auto d) { return 3.0 + noise(l + 500, d); });
  } else if (way == 2) {
    c.name = "heads of a group far from each other";
    instance.query.fill(
        [&](auto, auto h, auto l, auto d) { return (h % 2 == 0 ? 4.0 : -4.0) + noise(l, d); });
    instance.key.fill([&](auto, auto, auto l, auto d) { return noise(l + 500, d); });
  } else if (way == 3) {
    c.name = "large scores";
    instance.problem.scale = 12.0;
  } else {
    c.name = "many terms for few queries";
    instance.query.fill([&](auto, auto, auto l, auto d) { return 5.0 * std::sin(l * d + l); });
    instance.key.fill([&](auto, auto, auto l, auto d) { return 5.0 * std::sin(l * d - d); });
  }
  INFO(c.name);
  CHECK(identical(by_sines(instance), by_avx512(instance)));
}

TEST_CASE("sines: tokens far from 0 whose sums are not") {
  Case c = additive_case(150, 200, 32);
  c.amplitude = 0.3;
  c.offset = GENERATE(3.0, 100.0);
  Instance instance(c);
  if (!runs(instance)) return;
  INFO("offset " << c.offset);
  halve_weights(instance);
  const Results got = by_sines(instance);
  check_norms(got, by_definition(instance), 4e-3, 1.5e-2);
  CHECK_FALSE(identical(got.out, by_avx512(instance).out));
}

TEST_CASE("sines: the size of the weights, if the scale makes up for it, is no matter") {
  const double size = GENERATE(1e-12, 1e-6, 1e6, 1e20);
  Case c = additive_case(128, 128, 64);
  c.amplitude = 0.5;
  Instance instance(c);
  if (!runs(instance)) return;
  INFO("weights of " << size);
  Tensor& weight = instance.weight;
  weight.fill(
      [&](auto b, auto h, auto l, auto d) { return d < 50 ? size * weight.get(b, h, l, d) : 0.0; });
  instance.problem.scale = 0.5 / size;
  const Results got = by_sines(instance);
  check_norms(got, by_definition(instance), 4e-3, 1.2e-2);
  CHECK_FALSE(identical(got.out, by_avx512(instance).out));
}

TEST_CASE("sines: constants, and the ends of the fits") {
  const double size = GENERATE(0.5, 0.7071067, 1.0, 1.68, 1.99);  // X = 1, sqrt 2, ...
  Case c = additive_case(40, 130, 24);
  Instance instance(c);
  if (!runs(instance)) return;
  INFO("q, k of " << size);
  halve_weights(instance);
  // The largest sum is at the end of an interval; half of the elements are constants.
  instance.query.fill(
      [&](auto, auto, auto l, auto d) { return d % 2 == 0 ? size : size * std::cos(l + d); });
  instance.key.fill(
      [&](auto, auto, auto l, auto d) { return d % 2 == 0 ? size : size * std::sin(2 * l - d); });
  const Results got = by_sines(instance);
  check(got, by_definition(instance), tolerance(c.dtype));
  CHECK_FALSE(identical(got.lse, by_avx512(instance).lse));
}

TEST_CASE("sines: keys that nobody sees change no bit") {
  Case c = additive_case(140, 300, 48);
  c.batch = 2;
  c.key_lengths = {211, 300};
  c.key_starts = {0, 37};
  Instance instance(c);
  if (!runs(instance)) return;
  const Results expected = by_sines(instance);
  CHECK_FALSE(identical(expected.out, by_avx512(instance).out));
  for (const double value : {kNaN, kInfinity, 1e30}) {
    for (std::int64_t d = 0; d < c.head_dim; ++d) {
      for (std::int64_t j = 211; j < 300; ++j) instance.key.set(0, 1, j, d, value);
      for (std::int64_t j = 0; j < 37; ++j) instance.key.set(1, 0, j, d, value);
    }
    CHECK(identical(by_sines(instance), expected));
  }
}

TEST_CASE("sines: weights of 0, and heads without any") {
  Case c = additive_case(100, 150, 32);
  c.heads = c.kv_heads = 3;
  Instance instance(c);
  if (!runs(instance)) return;
  instance.weight.fill([](auto, auto h, auto, auto d) {
    if (h == 0) return 0.0;
    return d % 3 == 0 ? 0.0 : (d % 3 == 1 ? 1e-30 : std::cos(d));
  });
  const Results expected = by_definition(instance);
  const Results got = by_sines(instance);
  check(got, expected, tolerance(c.dtype));
  CHECK_FALSE(identical(got.lse, by_avx512(instance).lse));
  // Not through 0 / 0, and not by the size that stands in for such a weight.
  std::size_t n = 0;
  for (std::int64_t i = 0; i < c.heads * c.query_length; ++i) {
    for (std::int64_t d = 0; d < c.head_dim; ++d, ++n) {
      if (i < c.query_length || d % 3 == 0) CHECK(got.grad_query[n] == 0.0);
    }
  }
}

TEST_CASE("sines: the same bits by one thread and by three") {
  Case c = additive_case(330, 700, 64);
  c.kv_heads = 1;
  c.grad_lse = true;
  c.dropout = GENERATE(0.0, 0.3);
  Instance instance(c);
  if (!runs(instance)) return;
  const Results expected = instance.run(implementation("amx_sines"), threads(1));
  CHECK_FALSE(identical(expected.out, by_avx512(instance).out));
  CHECK(identical(instance.run(implementation("amx_sines"), threads(3)), expected));
}
