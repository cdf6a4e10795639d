// The reference itself: against values worked out by hand and against differences of its own
// forward, which share nothing with its backward but the formulas of the header.
#include "kernels/common/reference.h"

#include <cmath>
#include <functional>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_case.h"

namespace {

using namespace torch_selfattn::kernels;
using namespace torch_selfattn::kernels::testing;

// sum(out * grad_out) + sum(lse * grad_lse), whose gradients backward gives. Rows without a key
// have an lse of -inf, which no perturbation changes.
double loss(Instance& instance, const std::vector<double>& grad_lse) {
  const Results results = instance.run(implementation("reference"), threads(1));
  const std::vector<double> grad_out = instance.grad_out.numbers();
  double sum = 0.0;
  for (std::size_t n = 0; n < grad_out.size(); ++n) sum += results.out[n] * grad_out[n];
  for (std::size_t n = 0; n < grad_lse.size(); ++n) {
    if (std::isfinite(results.lse[n])) sum += results.lse[n] * grad_lse[n];
  }
  return sum;
}

void check_differences(const Case& c) {
  Instance instance(c);
  const std::vector<double> grad_lse = instance.grad_lse_numbers();
  const Results results = instance.run(implementation("reference"), threads(1));
  const auto difference = [&](double* x) {
    constexpr double step = 1e-5;
    const double before = *x;
    *x = before + step;
    const double above = loss(instance, grad_lse);
    *x = before - step;
    const double below = loss(instance, grad_lse);
    *x = before;
    return (above - below) / (2.0 * step);
  };
  const auto compare = [&](void* data, const std::vector<double>& gradient, const char* what) {
    INFO(c.score_name() << ", " << c.name << ", " << what);
    for (std::size_t n = 0; n < gradient.size(); n += 7) {
      CHECK(gradient[n] == Approx(difference(static_cast<double*>(data) + n)).margin(1e-8));
    }
  };
  compare(instance.query.data(), results.grad_query, "query");
  compare(instance.key.data(), results.grad_key, "key");
  compare(instance.value.data(), results.grad_value, "value");
  if (c.score == ScoreKind::kAdditive) {
    for (std::size_t n = 0; n < results.grad_weight.size(); ++n) {
      double* const w = static_cast<double*>(instance.weight.data()) + n;
      CHECK(results.grad_weight[n] == Approx(difference(w)).margin(1e-8));
    }
  }
  if (c.slopes) {
    auto* slopes = static_cast<double*>(const_cast<void*>(instance.problem.slopes));
    for (std::size_t n = 0; n < results.grad_slopes.size(); ++n) {
      CHECK(results.grad_slopes[n] == Approx(difference(slopes + n)).margin(1e-8));
    }
  }
  if (c.mask == MaskKind::kFloat) {
    auto* mask = static_cast<double*>(const_cast<void*>(instance.problem.mask.data));
    for (std::size_t n = 0; n < results.grad_mask.size(); n += 5) {
      if (!std::isfinite(mask[n])) continue;
      CHECK(results.grad_mask[n] == Approx(difference(mask + n)).margin(1e-8));
    }
  }
}

}  // namespace

TEST_CASE("the reference's gradients are those of its forward") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    Case c;
    c.dtype = DType::kFloat64;
    c.score = score;
    c.batch = 2, c.heads = 4, c.kv_heads = 2, c.weight_per_head = true;
    c.query_length = 5, c.key_length = 6, c.head_dim = 3, c.value_dim = 4;
    c.grad_lse = true;
    check_differences(c);
    c.name = "masks";
    c.mask = MaskKind::kFloat, c.mask_dtype = DType::kFloat64, c.mask_full[1] = false;
    c.window_right = 2, c.key_lengths = {5, 6}, c.scale = 0.6;
    check_differences(c);
    c.name = "slopes";
    c.slopes = c.slopes_of_inputs = true, c.query_offset = 2;
    check_differences(c);
    c.name = "slopes per sample";
    c.slopes_per_sample = true, c.query_offsets = {-1, 3};
    check_differences(c);
    c.name = "dropout";
    c.dropout = 0.4;
    check_differences(c);
  }
}

TEST_CASE("the reference on values worked out by hand") {
  Case c;
  c.dtype = DType::kFloat64;
  c.batch = c.heads = c.kv_heads = 1;
  c.query_length = 2, c.key_length = 3, c.head_dim = 2, c.value_dim = 1;
  c.scale = 1.0;
  c.window_right = 0;  // query 0 sees key 0, query 1 keys 0 and 1
  Instance instance(c);
  const double keys[3] = {1.0, 3.0, 100.0};
  instance.query.fill([](auto, auto, auto, auto d) { return d == 0 ? 1.0 : 0.5; });
  instance.key.fill([&](auto, auto, auto l, auto d) { return d == 0 ? std::log(keys[l]) : 0.0; });
  instance.value.fill([](auto, auto, auto l, auto) { return 4.0 * static_cast<double>(l); });
  Results results = instance.run(implementation("reference"), threads(1));
  CHECK(results.out[0] == Approx(0.0));
  CHECK(results.out[1] == Approx(3.0));  // weights 1/4 and 3/4
  CHECK(results.lse[0] == Approx(0.0).margin(1e-15));
  CHECK(results.lse[1] == Approx(std::log(4.0)));

  SECTION("slopes") {
    c.slopes = c.slopes_of_inputs = true;
    Instance biased(c);
    biased.query.fill([](auto...) { return 0.0; });
    biased.value.fill([](auto, auto, auto l, auto) { return 4.0 * static_cast<double>(l); });
    *static_cast<double*>(const_cast<void*>(biased.problem.slopes)) = std::log(3.0);
    results = biased.run(implementation("reference"), threads(1));
    CHECK(results.out[1] == Approx(3.0));  // weights 1/4 and 3/4: key 0 is one further away
    CHECK(results.lse[1] == Approx(std::log(4.0 / 3.0)));
  }
  SECTION("additive") {
    c.score = ScoreKind::kAdditive;
    Instance additive(c);
    additive.query.fill([](auto...) { return 0.0; });
    additive.key.fill([](auto, auto, auto l, auto d) { return l == 1 && d == 0 ? 1.0 : 0.0; });
    additive.weight.set(0, 0, 0, 0, std::log(3.0) / std::tanh(1.0));
    additive.value.fill([](auto, auto, auto l, auto) { return 4.0 * static_cast<double>(l); });
    results = additive.run(implementation("reference"), threads(1));
    CHECK(results.out[1] == Approx(3.0));
    CHECK(results.lse[1] == Approx(std::log(4.0)));
  }
}

TEST_CASE("the reference gives rows without a key 0 and -inf") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    Case c;
    c.score = score;
    c.key_lengths = {0, 47};
    Instance instance(c);
    const Results results = instance.run(implementation("reference"), threads(1));
    const std::size_t half = results.out.size() / 2;
    for (std::size_t n = 0; n < half; ++n) CHECK(results.out[n] == 0.0);
    for (std::size_t n = 0; n < results.lse.size() / 2; ++n) {
      CHECK(results.lse[n] == -std::numeric_limits<double>::infinity());
    }
    for (std::size_t n = 0; n < results.grad_query.size() / 2; ++n) {
      CHECK(results.grad_query[n] == 0.0);
    }
    CHECK(results.out[half] != 0.0);
  }
}
