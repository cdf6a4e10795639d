// The generic attention kernels against the reference: each policy, dtype and option at odd sizes.
#include "attention_case.h"

namespace {

using namespace attention_testing;

constexpr auto kAdditive = ScoreKind::kAdditive;
constexpr auto kF64 = DType::kFloat64;
constexpr auto kF32 = DType::kFloat32;
constexpr auto kF16 = DType::kFloat16;
constexpr auto kBF16 = DType::kBFloat16;

const Case cases[] = {
    // dtypes; head dims that are multiples of 16 bytes and others
    {.name = "dot f64", .dtype = kF64},
    {.name = "dot f32", .dtype = kF32, .batch = 2, .query_length = 70, .key_length = 131},
    {.name = "dot f16", .dtype = kF16, .head_dim = 32, .value_dim = 40},
    {.name = "dot bf16", .dtype = kBF16, .key_length = 67, .head_dim = 16, .value_dim = 24},
    {.name = "additive f64", .dtype = kF64, .score = kAdditive},
    {.name = "additive f32", .score = kAdditive, .batch = 2, .query_length = 70, .key_length = 67},
    {.name = "additive f16", .dtype = kF16, .score = kAdditive, .head_dim = 32, .value_dim = 40},
    {.name = "additive bf16", .dtype = kBF16, .score = kAdditive, .head_dim = 16},
    // sizes
    {.name = "dot length 1", .query_length = 1, .key_length = 1, .head_dim = 1, .value_dim = 1},
    {.name = "dot one query", .query_length = 1, .key_length = 150},
    {.name = "dot large head dims",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 5,
     .key_length = 7,
     .head_dim = 512,
     .value_dim = 300},
    {.name = "additive large head dims",
     .score = kAdditive,
     .heads = 1,
     .kv_heads = 1,
     .query_length = 5,
     .key_length = 7,
     .head_dim = 300,
     .value_dim = 512},
    {.name = "dot f64 large head dims",
     .dtype = kF64,
     .heads = 1,
     .kv_heads = 1,
     .query_length = 3,
     .key_length = 4,
     .head_dim = 130,
     .value_dim = 512},
    {.name = "dot no keys", .key_length = 0},
    {.name = "dot no features", .head_dim = 0, .value_dim = 3},
    {.name = "dot no values", .head_dim = 3, .value_dim = 0},
    // layouts
    {.name = "dot heads inside",
     .batch = 2,
     .heads = 3,
     .kv_heads = 3,
     .head_dim = 16,
     .value_dim = 8,
     .layout = Layout::kHeadsInside},
    {.name = "dot every other feature", .layout = Layout::kEveryOther},
    {.name = "additive heads inside",
     .dtype = kBF16,
     .score = kAdditive,
     .batch = 2,
     .layout = Layout::kHeadsInside},
    {.name = "dot shared batch", .batch = 2, .layout = Layout::kSharedBatch},
    // grouped heads
    {.name = "dot grouped heads", .batch = 2, .heads = 6, .kv_heads = 2, .grad_lse = true},
    {.name = "additive grouped heads", .score = kAdditive, .heads = 4, .kv_heads = 2},
    {.name = "additive one weight",
     .score = kAdditive,
     .batch = 2,
     .heads = 4,
     .kv_heads = 1,
     .weight_per_head = false},
    {.name = "additive weight per sample",
     .score = kAdditive,
     .batch = 2,
     .query_length = 70,
     .weight_per_batch = true},
    // masks
    {.name = "dot bool mask",
     .batch = 2,
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kBool},
    {.name = "dot bool mask of keys",
     .batch = 2,
     .mask = MaskKind::kBool,
     .mask_broadcast = {false, true, true, false}},
    {.name = "dot float mask",
     .batch = 2,
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kFloat},
    {.name = "dot float mask, full",
     .batch = 2,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {false, false, false, false},
     .grad_lse = true},
    {.name = "dot float mask of keys",
     .batch = 2,
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {true, false, true, false}},
    {.name = "dot float mask of queries",
     .batch = 2,
     .query_length = 67,
     .key_length = 70,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {false, true, false, true}},
    {.name = "dot float mask, one number",
     .mask = MaskKind::kFloat,
     .mask_broadcast = {true, true, true, true},
     .largest_term = 1},  // the gradient is 0, a sum of all others
    {.name = "dot f16, float32 mask",
     .dtype = kF16,
     .mask = MaskKind::kFloat,
     .float32_mask = true},
    {.name = "dot bf16, mask of bf16", .dtype = kBF16, .mask = MaskKind::kFloat},
    {.name = "dot f64 float mask", .dtype = kF64, .mask = MaskKind::kFloat},
    {.name = "additive float mask", .score = kAdditive, .mask = MaskKind::kFloat, .grad_lse = true},
    {.name = "additive bool mask", .score = kAdditive, .mask = MaskKind::kBool},
    // ranges
    {.name = "dot causal", .query_length = 131, .key_length = 131, .window_right = 0},
    {.name = "dot window",
     .query_length = 131,
     .key_length = 100,
     .window_left = 9,
     .window_right = 3,
     .query_offset = -20},
    {.name = "dot lengths, starts, offsets",
     .batch = 3,
     .lengths = true,
     .starts = true,
     .offsets = true,
     .window_right = 0},
    {.name = "additive causal",
     .score = kAdditive,
     .query_length = 70,
     .key_length = 70,
     .lengths = true,
     .window_left = 30,
     .window_right = 0,
     .grad_lse = true},
    {.name = "dot rows without a key", .window_right = 0, .query_offset = -12, .grad_lse = true},
    // ALiBi
    {.name = "dot slopes", .batch = 2, .query_length = 70, .key_length = 131, .slopes = true},
    {.name = "dot slopes, causal, groups",
     .heads = 4,
     .query_length = 131,
     .key_length = 131,
     .offsets = true,
     .slopes = true,
     .window_right = 0,
     .grad_lse = true},
    {.name = "dot slopes per sample, mask",
     .batch = 2,
     .mask = MaskKind::kFloat,
     .lengths = true,
     .slopes = true,
     .slopes_per_batch = true,
     .grad_lse = true},
    {.name = "dot f64 slopes", .dtype = kF64, .query_length = 67, .slopes = true},
    {.name = "dot f64, float32 slopes", .dtype = kF64, .slopes = true, .float32_slopes = true},
    {.name = "dot f16, float32 slopes", .dtype = kF16, .slopes = true, .float32_slopes = true},
    {.name = "dot bf16 slopes", .dtype = kBF16, .slopes = true, .grad_lse = true},
    {.name = "dot slopes, no features",
     .head_dim = 0,
     .value_dim = 3,
     .slopes = true,
     .grad_lse = true},
    {.name = "dot slopes, no keys", .key_length = 0, .slopes = true},
    {.name = "dot slopes, NaN behind a mask",
     .mask = MaskKind::kBool,
     .slopes = true,
     .special = Special::kNanBehindMask},
    {.name = "additive slopes",
     .score = kAdditive,
     .batch = 2,
     .heads = 4,
     .query_length = 70,
     .head_dim = 140,
     .slopes = true,
     .query_offset = -9,
     .grad_lse = true},
    // dropout
    {.name = "dot dropout", .batch = 2, .query_length = 66, .key_length = 67, .dropout_p = 0.3},
    {.name = "dot f64 dropout",
     .dtype = kF64,
     .key_length = 43,
     .dropout_p = 0.6,
     .grad_lse = true},
    {.name = "additive dropout", .score = kAdditive, .dropout_p = 0.3, .grad_lse = true},
    {.name = "dot dropout of all", .dropout_p = 1.0},
    // numbers
    {.name = "dot lse gradient", .grad_lse = true},
    {.name = "dot NaN behind a mask", .mask = MaskKind::kBool, .special = Special::kNanBehindMask},
    {.name = "dot inf behind a mask", .mask = MaskKind::kFloat, .special = Special::kInfBehindMask},
    {.name = "dot NaN behind lengths", .lengths = true, .special = Special::kNanBehindMask},
    {.name = "additive NaN behind a mask",
     .score = kAdditive,
     .mask = MaskKind::kBool,
     .special = Special::kNanBehindMask},
    {.name = "additive inf behind lengths",
     .score = kAdditive,
     .lengths = true,
     .special = Special::kInfBehindMask},
    {.name = "dot NaN inside",
     .window_right = 0,
     .query_offset = -15,
     .special = Special::kNanInside},
    {.name = "additive NaN inside",
     .score = kAdditive,
     .window_right = 0,
     .query_offset = -15,
     .special = Special::kNanInside},
    {.name = "dot mask of lowest numbers",
     .mask = MaskKind::kFloat,
     .special = Special::kLowestMask},
    {.name = "dot huge scores", .special = Special::kHugeScores, .largest_term = 1e25},
    {.name = "dot f64 large scores",
     .dtype = kF64,
     .special = Special::kLargeScores,
     .largest_term = 1000},
    {.name = "additive beyond the exponential form", .score = kAdditive, .magnitude = 12},
    {.name = "additive f64 beyond the exponential form",
     .dtype = kF64,
     .score = kAdditive,
     .magnitude = 90},
    {.name = "additive one huge key",
     .score = kAdditive,
     .query_length = 70,
     .key_length = 67,
     .head_dim = 40,
     .grad_lse = true,
     .special = Special::kOneHugeKey},
};

template <std::size_t n>
void run() {
  run_case(cases[n]);
}

template <std::size_t... n>
std::vector<testing::Test> all(std::index_sequence<n...>) {
  return {testing::Test(cases[n].name, run<n>)...};
}
void dropout_factors() {
  const std::int64_t rows = 5;
  const std::int64_t keys = 300;  // more than a block has threads
  const std::vector<std::int64_t> state = {7, 11};
  const testing::DeviceArray<std::int64_t> device_state(state);
  const testing::DeviceArray<double> factors(static_cast<std::size_t>(rows * keys));
  CHECK(torch_selfattn::kernels::cuda::attention_dropout_factors(
            device_state.data(), 0.4, rows, keys, factors.data(), nullptr) == cudaSuccess);
  const Dropout dropout = Dropout::make(0.4, state.data());
  const std::vector<double> got = factors.copy();
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t j = 0; j < keys; ++j) {
      CHECK(got[static_cast<std::size_t>(row * keys + j)] == dropout.factor(row, j, keys));
    }
  }
}
const testing::Test dropout_test("dropout factors", dropout_factors);

const std::vector<testing::Test> tests = all(std::make_index_sequence<std::size(cases)>());

}  // namespace
