// Every implementation by its name against the reference, forward and backward.
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "catch2_any.h"
#include "kernels/cpu/attention_checks.h"

namespace {

using namespace torch_selfattn::kernels;
using namespace torch_selfattn::kernels::testing;

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
      make("whole vectors",
           [](Case& c) {
             c.query_length = 64, c.key_length = 128, c.head_dim = 32, c.value_dim = 64;
           }),
      make("several blocks",
           [](Case& c) {
             c.batch = c.heads = c.kv_heads = 1;
             c.query_length = 203, c.key_length = 701, c.head_dim = 32, c.value_dim = 16;
           }),
      make("one query", [](Case& c) { c.query_length = 1, c.key_length = 2100, c.batch = 1; }),
      make("one query, whole vectors",
           [](Case& c) {
             c.query_length = 1, c.key_length = 300, c.head_dim = 64, c.value_dim = 128;
           }),
      make("few queries of a group",
           [](Case& c) {
             c.heads = 6, c.query_length = 2, c.key_length = 1100, c.head_dim = 20;
             c.layout = Layout::kLengthFirst, c.window_right = 0, c.query_offset = 700;
             c.key_lengths = {900, 1100}, c.key_starts = {5, 0}, c.dropout = 0.2;
           }),
      make("few queries of one key head",
           [](Case& c) {
             c.heads = 7, c.kv_heads = 1, c.query_length = 1, c.head_dim = 33, c.value_dim = 70;
             c.mask = MaskKind::kFloat;
           }),
      make("three queries",
           [](Case& c) {
             c.query_length = 3, c.mask = MaskKind::kBool, c.mask_full[0] = false;
             c.layout = Layout::kExpanded;
           }),
      make("one key", [](Case& c) { c.key_length = 1, c.grad_lse = true; }),
      make("causal", [](Case& c) { c.query_length = c.key_length = 150, c.window_right = 0; }),
      make("window",
           [](Case& c) {
             c.query_length = c.key_length = 150;
             c.window_left = 20, c.window_right = 5, c.query_offset = -30;
           }),
      make("left window", [](Case& c) { c.key_length = 300, c.window_left = 3; }),
      make("lengths, starts, offsets",
           [](Case& c) {
             c.key_lengths = {0, 40}, c.key_starts = {0, 7}, c.query_offsets = {3, -5};
             c.window_right = 9;
           }),
      make("grouped heads", [](Case& c) { c.heads = 6, c.weight_per_head = true; }),
      make("one key head", [](Case& c) { c.heads = 3, c.kv_heads = 1, c.window_right = 0; }),
      make("(B, L, H, D) in memory",
           [](Case& c) { c.layout = Layout::kLengthFirst, c.head_dim = 32, c.value_dim = 48; }),
      make("strided", [](Case& c) { c.layout = Layout::kStrided; }),
      make("reversed", [](Case& c) { c.layout = Layout::kReversed; }),
      make("expanded", [](Case& c) { c.layout = Layout::kExpanded; }),
      make("boolean mask with empty rows",
           [](Case& c) { c.mask = MaskKind::kBool, c.mask_probability = 0.3, c.key_length = 5; }),
      make("boolean mask over keys",
           [](Case& c) { c.mask = MaskKind::kBool, c.mask_full[1] = c.mask_full[2] = false; }),
      make("transposed boolean mask",
           [](Case& c) { c.mask = MaskKind::kBool, c.mask_transposed = true; }),
      make("mask", [](Case& c) { c.mask = MaskKind::kFloat; }),
      make("mask of the inputs' dtype",
           [](Case& c) { c.mask = MaskKind::kFloat, c.mask_dtype = c.dtype, c.window_right = 4; }),
      make("mask (Lq, Lk)",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_full[0] = c.mask_full[1] = false;
             c.batch = 5, c.heads = c.kv_heads = 3;
           }),
      make("mask (H, Lq, Lk)",
           [](Case& c) { c.mask = MaskKind::kFloat, c.mask_full[0] = false, c.batch = 7; }),
      make("mask (B, 1, 1, Lk)",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_full[1] = c.mask_full[2] = false, c.heads = 4;
             c.mask_transposed = true;
           }),
      // Its gradient is 0 but for that of the lse.
      make("mask (H, Lq, 1)",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_full[0] = c.mask_full[3] = false;
             c.key_length = 600, c.grad_lse = true;
           }),
      make("slopes", [](Case& c) { c.slopes = true, c.grad_lse = true; }),
      make("slopes of the inputs' dtype, causal",
           [](Case& c) {
             c.slopes = c.slopes_of_inputs = true, c.window_right = 0, c.heads = 6;
             c.query_length = c.key_length = 150, c.query_offset = -3;
           }),
      make("slopes per sample, several blocks",
           [](Case& c) {
             c.slopes = c.slopes_per_sample = true, c.query_offsets = {3, -5};
             c.query_length = 203, c.key_length = 701, c.head_dim = c.value_dim = 8;
           }),
      make("slopes, mask, lengths",
           [](Case& c) {
             c.slopes = true, c.mask = MaskKind::kFloat, c.key_lengths = {0, 40};
             c.mask_full[0] = false, c.grad_lse = true;
           }),
      make("slopes, one query",
           [](Case& c) {
             c.slopes = c.grad_lse = true, c.amplitude = 0.2;  // the near keys win
             c.query_length = 1, c.key_length = 2100, c.query_offset = 2099;
           }),
      make("slopes, few queries of a group",
           [](Case& c) {
             c.slopes = c.grad_lse = true, c.amplitude = 0.2, c.heads = 6, c.query_length = 2;
             c.key_length = 1100, c.query_offset = 1098;
           }),
      make("slopes, no keys", [](Case& c) { c.slopes = true, c.key_length = 0; }),
      make("slopes, no elements",
           [](Case& c) { c.slopes = true, c.head_dim = 0, c.value_dim = 0, c.grad_lse = true; }),
      make("mask (B, 1, Lq, Lk), one key head",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_full[1] = false, c.heads = 3, c.kv_heads = 1;
             c.window_left = 9;
           }),
      make("shared mask, no keys in the first sample",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_full[0] = c.mask_full[1] = false;
             c.key_lengths = {0, 40};
           }),
      make("boolean mask of blocks",
           [](Case& c) {
             c.mask = MaskKind::kBool, c.mask_block = 40, c.mask_probability = 0.3;
             c.batch = 1, c.query_length = 150, c.key_length = 430, c.grad_lse = true;
           }),
      make("mask of blocks, window",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_block = 27, c.mask_probability = 0.4;
             c.mask_full[1] = false;
             c.query_length = c.key_length = 200, c.window_left = 120, c.window_right = 15;
           }),
      make("mask of blocks, few queries",
           [](Case& c) {
             c.mask = MaskKind::kBool, c.mask_block = 50, c.mask_probability = 0.3;
             c.heads = 4, c.query_length = 1, c.key_length = 1300, c.dropout = 0.1;
           }),
      make("transposed mask of blocks",
           [](Case& c) {
             c.mask = MaskKind::kFloat, c.mask_block = 33, c.mask_probability = 0.4;
             c.mask_transposed = true, c.query_length = 70, c.key_length = 300;
           }),
      make("nothing allowed",
           [](Case& c) { c.mask = MaskKind::kFloat, c.mask_probability = 0.0, c.grad_lse = true; }),
      make("gradient of lse", [](Case& c) { c.grad_lse = true; }),
      make("dropout", [](Case& c) { c.dropout = 0.3, c.grad_lse = true; }),
      make("all dropped", [](Case& c) { c.dropout = 1.0, c.grad_lse = true; }),
      make("negative scale", [](Case& c) { c.scale = -0.7; }),
      make("large scores", [](Case& c) { c.amplitude = 20.0; }),
      // So few pairs that what is relative to the wrong maximum overflows into finite numbers.
      make("large scores, negative scale",
           [](Case& c) {
             c.amplitude = 5.5, c.scale = -0.4, c.query_length = 5, c.key_length = 3;
             c.batch = 8, c.heads = c.kv_heads = 4;
           }),
      make("large dimensions", [](Case& c) { c.head_dim = 300, c.value_dim = 259; }),
      make("dimensions of one", [](Case& c) { c.head_dim = 1, c.value_dim = 1; }),
      make("no keys", [](Case& c) { c.key_length = 0; }),
      make("no queries", [](Case& c) { c.query_length = 0; }),
      make("no elements", [](Case& c) { c.head_dim = 0, c.value_dim = 0; }),
      make("no batch", [](Case& c) { c.batch = 0; }),
  };
}

// Additive scores grow with the head dim and with |w|, and their rounding error with them.
double scaled_tolerance(const Case& c) {
  const bool additive = c.score == ScoreKind::kAdditive;
  return tolerance(c) * (additive && c.head_dim > 100 ? 5.0 : 1.0);
}

}  // namespace

TEST_CASE("implementations agree with the reference") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const DType dtype :
         {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (Case c : problems()) {
        const bool mask_of_inputs = c.name == "mask of the inputs' dtype";
        c.score = score;
        c.dtype = dtype;
        if (mask_of_inputs) c.mask_dtype = dtype;
        Instance instance(c);
        for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
          check(instance.run(candidate, threads(2)), expected, scaled_tolerance(c));
        });
      }
    }
  }
}

TEST_CASE("sizes around the tiles agree with the reference") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const std::int64_t query_length : {2, 7, 8, 9, 63, 65, 129}) {
      for (const std::int64_t key_length : {2, 15, 17, 31, 33, 127, 129, 257}) {
        Case c;
        c.name = std::to_string(query_length) + " x " + std::to_string(key_length);
        c.score = score;
        c.batch = 1, c.heads = c.kv_heads = 1;
        c.query_length = query_length, c.key_length = key_length;
        c.head_dim = 5 + query_length % 13, c.value_dim = 3 + key_length % 17;
        c.window_right = (query_length + key_length) % 2 == 0 ? 3 : -1;
        c.query_offset = key_length - query_length;
        Instance instance(c);
        for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
          check(instance.run(candidate, threads(1)), expected, tolerance(c));
        });
      }
    }
  }
}

// Tiles of AMX have 16 rows of 32 elements, register tiles 32 x 32.
TEST_CASE("sizes around the tiles of AMX agree with the reference") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const std::int64_t dims[] = {1, 7, 15, 16, 17, 31, 33, 64, 72, 96, 128, 256};
  std::size_t n = 0;
  for (const std::int64_t query_length : {5, 15, 16, 17, 31, 32, 33, 48, 63, 65, 97}) {
    for (const std::int64_t key_length : {1, 15, 16, 17, 31, 32, 33, 63, 65, 95, 130, 255, 513}) {
      Case c;
      c.dtype = dtype;
      c.batch = 1, c.heads = 2, c.kv_heads = 1 + static_cast<std::int64_t>(n % 2);
      c.query_length = query_length, c.key_length = key_length;
      c.head_dim = dims[n % std::size(dims)], c.value_dim = dims[n / 2 % std::size(dims)];
      c.name = std::to_string(query_length) + " x " + std::to_string(key_length) + ", " +
               std::to_string(c.head_dim) + ", " + std::to_string(c.value_dim);
      if (n % 3 == 0) c.window_right = 0, c.query_offset = key_length - query_length;
      if (n % 5 == 0) c.window_left = 40;
      c.grad_lse = key_length == 1 || n % 7 == 0;  // dq and dk of one key are that of the lse
      if (n % 11 == 0) c.scale = -0.3;
      if (n % 4 == 1) c.mask = MaskKind::kBool;
      if (n % 4 == 3) c.mask = MaskKind::kFloat, c.mask_dtype = n % 8 == 3 ? c.dtype : c.mask_dtype;
      ++n;
      Instance instance(c);
      for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
        check(instance.run(candidate, threads(2)), expected, tolerance(c));
      });
    }
  }
}

TEST_CASE("few queries agree with the reference") {
  const DType dtype = GENERATE(DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const std::int64_t dims[] = {1, 3, 7, 8, 15, 16, 17, 40, 64, 129};
  const std::int64_t lengths[] = {1, 2, 3, 5, 15, 16, 63, 64, 65, 130, 255, 257, 513, 700, 1030};
  const Layout layouts[] = {Layout::kHeadsFirst, Layout::kLengthFirst, Layout::kExpanded};
  struct Rows {
    std::int64_t queries, group;
  };
  const Rows rows[] = {{1, 1}, {1, 2}, {2, 1}, {3, 1}, {4, 2}, {1, 7}};
  std::size_t n = 0;
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const auto& [queries, group] : rows) {
      for (const std::int64_t key_length : lengths) {
        Case c;
        c.score = score, c.dtype = dtype;
        c.batch = 1 + static_cast<std::int64_t>(n % 3), c.kv_heads = 1 + (c.batch + 1) % 2;
        c.heads = group * c.kv_heads;
        c.query_length = queries, c.key_length = key_length;
        c.head_dim = dims[n % std::size(dims)], c.value_dim = dims[n / 3 % std::size(dims)];
        c.layout = layouts[n % std::size(layouts)];
        c.name = std::to_string(n) + ": " + std::to_string(queries) + " x " +
                 std::to_string(key_length) + " in a group of " + std::to_string(group);
        c.constant = n % 3 != 1, c.weight_per_head = n % 2 == 0;
        c.grad_lse = key_length == 1 || n % 5 == 0;  // dq and dk of one key are that of the lse
        if (n % 3 == 0) c.window_right = 0, c.query_offset = key_length - queries;
        if (n % 7 == 0) c.window_left = 50;
        if (n % 4 == 1) c.mask = MaskKind::kBool;
        if (n % 4 == 3) c.mask = MaskKind::kFloat, c.mask_full[1] = n % 8 == 3;
        if (n % 6 == 1) c.key_lengths.assign(static_cast<std::size_t>(c.batch), key_length / 2);
        if (n % 6 == 4) c.key_starts.assign(static_cast<std::size_t>(c.batch), key_length / 3);
        if (n % 9 == 2) c.slopes = true, c.amplitude = 0.2;
        if (n % 5 == 3) c.dropout = 0.2;
        if (n % 11 == 0) c.scale = -0.3;
        ++n;
        Instance instance(c);
        for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
          const Results got = instance.run(candidate, threads(2));
          // Gradients of one row are small sums of few terms.
          check(got, expected, 5.0 * scaled_tolerance(c));
          CHECK(identical(got, instance.run(candidate, threads(1))));
        });
      }
    }
  }
}

TEST_CASE("results do not depend on the number of threads") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (Case c : {make("one long head",
                        [](Case& c) {
                          c.batch = c.heads = c.kv_heads = 1;
                          c.query_length = 150, c.key_length = 2200, c.head_dim = c.value_dim = 8;
                        }),
                   make("one short head, in two",
                        [](Case& c) {
                          c.batch = c.heads = c.kv_heads = 1;
                          c.query_length = 100, c.key_length = 129;
                        }),
                   make("two blocks of rows of grouped heads",
                        [](Case& c) {
                          c.batch = 1, c.heads = 2, c.kv_heads = 1;
                          c.query_length = 110, c.key_length = 70;
                        }),
                   make("heads that are dealt out whole by 2 threads, not by 3",
                        [](Case& c) {
                          c.batch = 1, c.heads = 4, c.kv_heads = 2;
                          c.query_length = 200, c.key_length = 600, c.mask = MaskKind::kBool;
                        }),
                   make("few queries of a group",
                        [](Case& c) { c.heads = 6, c.query_length = 1, c.key_length = 2100; }),
                   make("shared mask",
                        [](Case& c) {
                          c.batch = 3, c.key_length = 600, c.head_dim = c.value_dim = 8;
                          c.mask = MaskKind::kFloat, c.mask_full[0] = c.mask_full[1] = false;
                        }),
                   make("shared slopes",
                        [](Case& c) {
                          c.batch = 3, c.key_length = 600, c.head_dim = c.value_dim = 8;
                          c.slopes = true;
                        }),
                   make("grouped, causal, dropout", [](Case& c) {
                     c.heads = 4, c.query_length = c.key_length = 140, c.window_right = 0;
                     c.dropout = 0.2, c.grad_lse = true;
                   })}) {
      c.score = score, c.dtype = dtype;
      Instance instance(c);
      for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
        if (candidate.not_supported(instance.problem) != nullptr) continue;
        INFO(candidate.name << ", " << c.score_name() << ", " << c.name);
        const Results first = instance.run(candidate, threads(1));
        for (const int count : {1, 2, 3, 4, 17}) {
          CHECK(identical(instance.run(candidate, threads(count)), first));
        }
      }
    }
  }
}

TEST_CASE("NaN and inf at keys that no query sees do not leak") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  const std::int64_t key_length = GENERATE(70, 600);  // the groups of one head meet NaN, too
  // The careful path adds up in another order, which may round a 16-bit result differently.
  const double limit = dtype == DType::kFloat32 ? 2e-6 : tolerance(dtype);
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const double poison : {kNaN, kInfinity, -kInfinity}) {
      for (const bool by_mask : {false, true}) {
        Case c;
        c.name = by_mask ? "mask" : "key_lengths";
        c.score = score, c.dtype = dtype;
        c.query_length = 37, c.key_length = key_length;
        if (key_length > 70) c.heads = c.kv_heads = 1;
        if (by_mask) {
          c.mask = MaskKind::kBool, c.mask_full[1] = c.mask_full[2] = false;
        } else {
          c.key_lengths = {40, 63};
        }
        Instance instance(c);
        const auto allowed = [&](std::int64_t b, std::int64_t j) {
          if (!by_mask) return j < c.key_lengths[static_cast<std::size_t>(b)];
          const auto* mask = static_cast<const unsigned char*>(instance.problem.mask.data);
          return mask[b * instance.problem.mask.stride[0] + j] != 0;
        };
        for (const cpu::AttentionImplementation& candidate : cpu::attention_implementations()) {
          if (candidate.not_supported(instance.problem) != nullptr) continue;
          INFO(candidate.name << ", " << c.score_name() << ", " << c.name << ", " << poison);
          Instance clean(c);
          const Results expected = clean.run(candidate, threads(1));
          Instance poisoned(c);
          for (Tensor* tensor : {&poisoned.key, &poisoned.value}) {
            for (std::int64_t b = 0; b < c.batch; ++b) {
              for (std::int64_t j = 0; j < c.key_length; ++j) {
                if (!allowed(b, j)) tensor->set(b, c.kv_heads - 1, j, j % 24, poison);
              }
            }
          }
          const Results got = poisoned.run(candidate, threads(1));
          CHECK(relative_error(got.out, expected.out) < limit);
          CHECK(relative_error(got.lse, expected.lse) < limit);
          CHECK(relative_error(got.grad_query, expected.grad_query) < 3 * limit);
          CHECK(relative_error(got.grad_key, expected.grad_key) < 3 * limit);
          CHECK(relative_error(got.grad_value, expected.grad_value) < 3 * limit);
          CHECK(relative_error(got.grad_weight, expected.grad_weight) < 3 * limit);
        }
      }
    }
  }
}

TEST_CASE("NaN and inf behind a mask of blocks do not leak") {
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    for (const MaskKind kind : {MaskKind::kBool, MaskKind::kFloat}) {
      Case c;
      c.name = kind == MaskKind::kBool ? "boolean" : "floating";
      c.score = score;
      c.mask = kind, c.mask_block = 35, c.mask_probability = 0.4;
      c.mask_full[0] = c.mask_full[1] = c.mask_full[2] = false;
      c.query_length = 70, c.key_length = 330;
      Instance instance(c);
      Instance clean(c);
      for (std::int64_t j = 0; j < c.key_length; ++j) {
        const void* mask = instance.problem.mask.data;
        const bool allowed = kind == MaskKind::kBool
                                 ? static_cast<const unsigned char*>(mask)[j] != 0
                                 : reference::load(DType::kFloat32, mask, j) != -kInfinity;
        if (allowed) continue;
        instance.key.set(0, 1, j, j % 24, j % 3 == 0 ? kNaN : kInfinity);
        instance.value.set(1, 0, j, j % 24, j % 3 == 0 ? kNaN : -kInfinity);
      }
      const Results expected = clean.run(implementation("reference"), threads(1));
      for_each_implementation(instance, [&](const auto& candidate, const Results&) {
        check(instance.run(candidate, threads(2)), expected, tolerance(c));
      });
    }
  }
}

TEST_CASE("few queries: NaN and inf stay with the rows that see them") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16, DType::kFloat64);
  const double poison = GENERATE(kNaN, kInfinity, -kInfinity);
  struct Rows {
    std::int64_t heads, kv_heads, queries;
  };
  const Rows rows = GENERATE(Rows{4, 2, 2}, Rows{2, 2, 1}, Rows{2, 1, 1});
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    Case c;
    c.name = "few queries";
    c.dtype = dtype, c.score = score;
    c.heads = rows.heads, c.kv_heads = rows.kv_heads, c.query_length = rows.queries;
    c.key_length = 70, c.mask = MaskKind::kBool, c.mask_full[1] = false;
    Instance instance(c);
    for (std::int64_t j = 3; j < c.key_length; j += 5) {
      instance.key.set(0, c.kv_heads - 1, j, j % 24, poison);
      instance.value.set(1, 0, j, j % 24, poison);
    }
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      const Results got = instance.run(candidate, threads(2));
      CHECK(relative_error(got.out, expected.out) < tolerance(c));
      CHECK(relative_error(got.lse, expected.lse) < tolerance(c));
    });
    // Where nobody sees them they change nothing.
    Case hidden = c;
    hidden.mask = MaskKind::kNone, hidden.key_lengths = {40, 50}, hidden.key_starts = {3, 0};
    Instance clean(hidden);
    Instance dirty(hidden);
    for (std::int64_t b = 0; b < 2; ++b) {
      for (const std::int64_t j : {b == 0 ? 1 : 69, b == 0 ? 40 : 50, b == 0 ? 41 : 60}) {
        dirty.key.set(b, 0, j, 5, poison);
        dirty.value.set(b, 0, j, 7, poison);
      }
    }
    for_each_implementation(clean, [&](const auto& candidate, const Results& expected) {
      const Results got = dirty.run(candidate, threads(2));
      check(got, expected, tolerance(c));
      // In parts of bfloat16 what is not finite is computed in another way, the additive score may.
      const bool parts = std::string(candidate.name) == "amx" && dtype == DType::kFloat32;
      const bool exact = score == ScoreKind::kDotProduct && !parts;
      CHECK((!exact || identical(got, clean.run(candidate, threads(2)))));
    });
  }
}

TEST_CASE("a NaN stays with the rows and keys that see it") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  for (const ScoreKind score : {ScoreKind::kDotProduct, ScoreKind::kAdditive}) {
    Case c;
    c.name = "causal with NaN";
    c.score = score, c.dtype = dtype;
    c.query_length = c.key_length = 70, c.window_left = 30, c.window_right = 0;
    Instance instance(c);
    instance.query.set(0, 1, 20, 3, kNaN);
    instance.key.set(1, 0, 45, 2, kNaN);
    instance.value.set(1, 1, 60, 5, kNaN);
    instance.grad_out.set(0, 0, 5, 5, kNaN);
    for_each_implementation(instance, [&](const auto& candidate, const Results& expected) {
      check(instance.run(candidate, threads(2)), expected, tolerance(c));
    });
  }
}
