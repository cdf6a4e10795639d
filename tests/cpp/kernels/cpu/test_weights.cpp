// The weights themselves: every implementation against the reference, and the reference against its
// own output.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_case.h"

namespace {

using namespace torch_selfattn::kernels;
using namespace torch_selfattn::kernels::testing;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Of the largest weight: rounding of the result, and of scores.
double tolerance(const Case& c) {
  const double rounding = c.dtype == DType::kFloat64   ? 1e-13
                          : c.dtype == DType::kFloat32 ? 8e-6
                          : c.dtype == DType::kFloat16 ? 3e-3
                                                       : 2e-2;
  return c.amplitude > 5.0 ? std::max(100.0 * rounding, 3e-4) : rounding;
}

// indices: what the queries count as, from sample to sample `per_sample` apart.
std::vector<double> weights_of(Instance& instance, const cpu::AttentionImplementation& by,
                               bool average, int thread_count = 2,
                               const std::int64_t* indices = nullptr, std::int64_t per_sample = 0) {
  const Case& c = instance.c_;
  Tensor result(c.dtype, c.batch, average ? 1 : c.heads, c.query_length, c.key_length,
                c.layout == Layout::kExpanded ? Layout::kHeadsFirst : c.layout);
  result.fill([](auto...) { return kNaN; });  // what is not written
  by.weights({instance.problem, result.mutable_view(), average, indices, {per_sample, 1}},
             threads(thread_count));
  return result.numbers();
}

template <typename Check>
void for_each_implementation(Instance& instance, bool average, Check&& check) {
  const std::vector<double> expected =
      weights_of(instance, implementation("reference"), average, 1);
  for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
    const std::string name = candidate.name;
    if (name == "reference" || candidate.not_supported(instance.problem) != nullptr) continue;
    INFO(name << ", " << instance.c_.score_name() << ", dtype "
              << static_cast<int>(instance.c_.dtype) << ", " << instance.c_.name << ", average "
              << average);
    check(candidate, expected);
  }
}

template <typename Change>
Case make(const char* name, Change&& change) {
  Case c;
  c.name = name;
  change(c);
  return c;
}

std::vector<Case> problems() {
  return {
      make("plain", [](Case&) {}),
      make("whole vectors", [](Case& c) { c.query_length = 64, c.key_length = 128; }),
      make("long rows",
           [](Case& c) { c.batch = 1, c.query_length = 21, c.key_length = 2500, c.head_dim = 8; }),
      make("many rows", [](Case& c) { c.query_length = 1100, c.key_length = 9, c.head_dim = 8; }),
      make("one query", [](Case& c) { c.query_length = 1, c.batch = 1; }),
      make("one key", [](Case& c) { c.key_length = 1; }),
      make("causal", [](Case& c) { c.query_length = c.key_length = 150, c.window_right = 0; }),
      make("window",
           [](Case& c) {
             c.query_length = c.key_length = 150;
             c.window_left = 20, c.window_right = 5, c.query_offset = -30;
           }),
      make("lengths, starts, offsets",
           [](Case& c) {
             c.key_lengths = {0, 40}, c.key_starts = {0, 7}, c.query_offsets = {3, -5};
             c.window_right = 9;
           }),
      make("grouped heads", [](Case& c) { c.heads = 6, c.weight_per_head = true; }),
      make("one head", [](Case& c) { c.heads = c.kv_heads = 1; }),
      make("(B, L, H, D) in memory", [](Case& c) { c.layout = Layout::kLengthFirst; }),
      make("strided", [](Case& c) { c.layout = Layout::kStrided; }),
      make("reversed", [](Case& c) { c.layout = Layout::kReversed; }),
      make("boolean mask with empty rows",
           [](Case& c) { c.mask = MaskKind::kBool, c.mask_probability = 0.3, c.key_length = 5; }),
      make("transposed boolean mask",
           [](Case& c) { c.mask = MaskKind::kBool, c.mask_transposed = true; }),
      make("mask and window", [](Case& c) { c.mask = MaskKind::kFloat, c.window_right = 4; }),
      make("mask (B, 1, 1, Lk)",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_full[1] = c.mask_full[2] = false, c.heads = 4;
           }),
      make("slopes", [](Case& c) { c.slopes = true, c.heads = 6, c.query_offset = -3; }),
      make("slopes per sample, window, mask",
           [](Case& c) {
             c.slopes = c.slopes_per_sample = true, c.window_right = 9;
             c.mask = MaskKind::kFloat, c.query_offsets = {5, -4};
           }),
      make("negative scale", [](Case& c) { c.scale = -0.7; }),
      make("large scores", [](Case& c) { c.amplitude = 20.0; }),
      make("no keys", [](Case& c) { c.key_length = 0; }),
      make("no queries", [](Case& c) { c.query_length = 0; }),
      make("no elements", [](Case& c) { c.head_dim = 0; }),
      make("no batch", [](Case& c) { c.batch = 0; }),
  };
}

}  // namespace

TEST_CASE("weights agree with the reference") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const DType dtype :
         {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (Case c : problems()) {
        c.score = score;
        c.dtype = dtype;
        Instance instance(c);
        for (const bool average : {false, true}) {
          for_each_implementation(instance, average, [&](const auto& candidate, const auto& want) {
            CHECK(relative_error(weights_of(instance, candidate, average), want) < tolerance(c));
          });
        }
      }
    }
  }
}

TEST_CASE("the reference's weights times the values are its output") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    Case c;
    c.dtype = DType::kFloat64;
    c.score = score;
    c.heads = 4;
    c.window_right = 3;
    Instance instance(c);
    const auto& reference = implementation("reference");
    const std::vector<double> weights = weights_of(instance, reference, false);
    const std::vector<double> average = weights_of(instance, reference, true);
    const std::vector<double> out = instance.run(reference, threads(1)).out;
    std::vector<double> products;
    std::vector<double> mean(average.size());
    std::size_t at = 0;
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        for (std::int64_t i = 0; i < c.query_length; ++i, at += c.key_length) {
          for (std::int64_t d = 0; d < c.value_dim; ++d) {
            double sum = 0;
            for (std::int64_t j = 0; j < c.key_length; ++j) {
              sum += weights[at + j] * instance.value.get(b, h / 2, j, d);
            }
            products.push_back(sum);
          }
          for (std::int64_t j = 0; j < c.key_length; ++j) {
            mean[static_cast<std::size_t>((b * c.query_length + i) * c.key_length + j)] +=
                weights[at + j] / 4;
          }
        }
      }
    }
    CHECK(relative_error(products, out) < 1e-13);
    CHECK(relative_error(mean, average) < 1e-13);
  }
}

TEST_CASE("rows out of a longer sequence") {
  // Rows 9, 2 and 17 of the queries by themselves: what they see depends on where they came from.
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const bool per_sample : {false, true}) {
      Case c;
      c.name = per_sample ? "indices per sample" : "indices";
      c.score = score;
      c.window_left = 5, c.window_right = 2, c.query_offsets = {1, -3};
      c.slopes = true;
      Instance all(c);
      const std::int64_t indices[2][3] = {{9, 2, 17}, {30, 0, 30}};
      Case few = c;
      few.query_length = 3;
      Instance chosen(few);
      chosen.problem.key = all.problem.key;
      const auto index = [&](std::int64_t b, std::int64_t l) {
        return indices[per_sample ? b : 0][l];
      };
      chosen.query.fill(
          [&](auto b, auto h, auto l, auto d) { return all.query.get(b, h, index(b, l), d); });
      if (score == ScoreKind::kAdditive) chosen.problem.weight = all.problem.weight;
      for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
        if (candidate.not_supported(all.problem) != nullptr) continue;
        INFO(candidate.name << ", " << c.score_name() << ", " << c.name);
        const std::vector<double> whole = weights_of(all, candidate, false);
        const std::vector<double> rows =
            weights_of(chosen, candidate, false, 2, indices[0], per_sample ? 3 : 0);
        std::vector<double> want;
        for (std::int64_t b = 0; b < c.batch; ++b) {
          for (std::int64_t h = 0; h < c.heads; ++h) {
            for (std::int64_t l = 0; l < 3; ++l) {
              const auto row =
                  whole.begin() + ((b * c.heads + h) * c.query_length + index(b, l)) * c.key_length;
              want.insert(want.end(), row, row + c.key_length);
            }
          }
        }
        CHECK(relative_error(rows, want) < 1e-6);
      }
    }
  }
}

TEST_CASE("weights do not depend on the number of threads") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    Case c;
    c.score = score;
    c.heads = 4, c.query_length = c.key_length = 140, c.window_right = 0;
    Instance instance(c);
    for (const bool average : {false, true}) {
      for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
        if (candidate.not_supported(instance.problem) != nullptr) continue;
        INFO(candidate.name << ", " << c.score_name() << ", average " << average);
        const std::vector<double> first = weights_of(instance, candidate, average, 1);
        for (const int count : {2, 3}) {
          CHECK(weights_of(instance, candidate, average, count) == first);
        }
      }
    }
  }
}

TEST_CASE("NaN in a key changes the weights of rows that see it, and of these no other key's") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const double poison : {kNaN, std::numeric_limits<double>::infinity()}) {
      Case c;
      c.name = "poisoned key " + std::to_string(poison);
      c.score = score;
      c.query_length = c.key_length = 70, c.window_left = 30, c.window_right = 0;
      c.mask = MaskKind::kBool;
      Instance instance(c);
      instance.key.set(1, 0, 45, 2, poison);
      instance.query.set(0, 1, 20, 3, poison);
      for (const bool average : {false, true}) {
        for_each_implementation(instance, average, [&](const auto& candidate, const auto& want) {
          CHECK(relative_error(weights_of(instance, candidate, average), want) < tolerance(c));
        });
      }
    }
  }
}

TEST_CASE("weights of scores that overflow") {
  Case c;
  c.name = "overflow";
  c.query_length = 9, c.key_length = 40, c.head_dim = 1;
  Instance instance(c);
  instance.query.fill([&](auto, auto, auto l, auto) { return 1e25 * (l % 3 - 1.0); });
  instance.key.fill([&](auto, auto, auto l, auto) { return 1e25 * (l % 5 - 2.0) / 2.0; });
  for_each_implementation(instance, false, [&](const auto& candidate, const auto& want) {
    CHECK(relative_error(weights_of(instance, candidate, false), want) < 1e-5);
  });
}
