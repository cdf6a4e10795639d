#pragma once

#include <cstddef>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "attention_case.h"

// The problems that every method of the additive score is tested with: sizes, layouts, heads,
// weights, masks, ranges, dropout, and numbers that must not spread.
namespace attention_testing {

inline const Case additive_cases[] = {
    {.name = "length 1", .query_length = 1, .key_length = 1, .head_dim = 1, .value_dim = 1},
    {.name = "odd sizes", .batch = 2, .query_length = 70, .key_length = 131},
    {.name = "no values", .value_dim = 0},
    {.name = "heads inside",
     .batch = 2,
     .heads = 3,
     .kv_heads = 3,
     .head_dim = 16,
     .value_dim = 8,
     .layout = Layout::kHeadsInside},
    {.name = "every other feature",
     .dtype = DType::kFloat16,
     .value_dim = 24,
     .layout = Layout::kEveryOther},
    {.name = "shared batch", .batch = 2, .layout = Layout::kSharedBatch},
    {.name = "weight per sample", .batch = 2, .weight_per_batch = true},
    {.name = "one weight", .batch = 2, .weight_per_head = false},
    {.name = "bool mask",
     .batch = 2,
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kBool},
    {.name = "bool mask of keys",
     .dtype = DType::kFloat16,
     .batch = 2,
     .mask = MaskKind::kBool,
     .mask_broadcast = {false, true, true, false}},
    {.name = "blocks hidden by a mask",
     .query_length = 70,
     .key_length = 330,
     .mask = MaskKind::kBool,
     .special = Special::kHiddenBlocks},
    {.name = "window",
     .query_length = 131,
     .key_length = 100,
     .window_left = 9,
     .window_right = 3,
     .query_offset = -20},
    {.name = "lengths, starts, offsets",
     .batch = 3,
     .lengths = true,
     .starts = true,
     .offsets = true,
     .window_right = 0},
    {.name = "no row has a key", .window_right = 0, .query_offset = -100},
    {.name = "dropout", .batch = 2, .query_length = 66, .key_length = 67, .dropout_p = 0.3},
    {.name = "f16 dropout, mask",
     .dtype = DType::kFloat16,
     .mask = MaskKind::kBool,
     .dropout_p = 0.6},
    {.name = "dropout of all", .dropout_p = 1.0},
    {.name = "NaN behind a mask",
     .mask = MaskKind::kBool,
     .special = Special::kNanBehindMask,
     .redo = Redo::kAll},
    {.name = "NaN behind lengths", .lengths = true, .special = Special::kNanBehindMask},
    {.name = "inf behind lengths", .lengths = true, .special = Special::kInfBehindMask},
    {.name = "NaN inside",
     .query_length = 70,
     .window_right = 0,
     .query_offset = -15,
     .special = Special::kNanInside,
     .redo = Redo::kSome},
    {.name = "N(0, 50)", .magnitude = 50, .redo = Redo::kAll},
    {.name = "N(0, 1e4)", .magnitude = 1e4, .redo = Redo::kAll},
    {.name = "one huge key",
     .query_length = 70,
     .key_length = 67,
     .head_dim = 40,
     .special = Special::kOneHugeKey,
     .redo = Redo::kSome},
    {.name = "huge numbers", .special = Special::kHugeScores, .redo = Redo::kSome},
};

// E = Ev = 64, one head, the distributions that errors are stated for.
constexpr Case at_normal_inputs(const char* name, double magnitude, Case c) {
  c.name = name;
  c.heads = c.kv_heads = 1;
  c.query_length = c.query_length == Case{}.query_length ? 128 : c.query_length;
  c.key_length = c.key_length == Case{}.key_length ? 128 : c.key_length;
  c.head_dim = c.value_dim = 64;
  c.magnitude = magnitude;
  c.weight_magnitude = 0.5;
  c.scale = 1;
  return c;
}

template <const auto& cases, Case (*of_method)(Case), std::size_t n>
void run_method_case() {
  run_case(of_method(cases[n]));
}

template <const auto& cases, Case (*of_method)(Case), std::size_t... n>
std::vector<testing::Test> method_tests(std::index_sequence<n...>) {
  return {testing::Test(cases[n].name, run_method_case<cases, of_method, n>)...};
}

// Tests of a method's own problems.
template <const auto& cases, Case (*of_method)(Case)>
std::vector<testing::Test> method_tests() {
  return method_tests<cases, of_method>(std::make_index_sequence<std::size(cases)>());
}

template <Case (*of_method)(Case), std::size_t... n>
std::vector<testing::Test> additive_tests(const std::string& method, std::index_sequence<n...>) {
  static const std::string names[] = {method + additive_cases[n].name...};
  return {testing::Test(names[n].c_str(), run_method_case<additive_cases, of_method, n>)...};
}

// Tests of these problems, made ones of a method, whose name stands before theirs.
template <Case (*of_method)(Case)>
std::vector<testing::Test> additive_tests(const std::string& method) {
  return additive_tests<of_method>(method, std::make_index_sequence<std::size(additive_cases)>());
}

}  // namespace attention_testing
