// Additive attention by the exponential form, forward and backward, against the reference: sizes,
// policies, dtypes, the two ways of sharing a reciprocal, and what it leaves to the generic kernel.
#include "additive_cases.h"

namespace {

using namespace attention_testing;

constexpr auto kF16 = DType::kFloat16;
constexpr auto kBF16 = DType::kBFloat16;

// Both passes of the exponential form, unless it says otherwise.
constexpr Case exponential(Case c) {
  if (c.what == What::kAttention) c.what = What::kExponentialGradients;
  c.score = ScoreKind::kAdditive;
  return c;
}

constexpr Case normal_inputs(const char* name, double magnitude, Case c = {}) {
  if (c.dtype == DType::kFloat32) {
    if (c.out_error == 0) c.out_error = 2e-6;
    if (c.gradient_error == 0) c.gradient_error = 4e-6;
  }
  return at_normal_inputs(name, magnitude, c);
}

const Case cases[] = {
    // errors at normal inputs
    normal_inputs("exponential", 1),
    normal_inputs("exponential, N(0, 0.03)", 0.03),
    normal_inputs("exponential, N(0, 0.03), lse gradient", 0.03, {.grad_lse = true}),
    normal_inputs("exponential, N(0, 2)", 2),
    normal_inputs("exponential f16", 1, {.dtype = kF16}),
    normal_inputs("exponential bf16", 1, {.dtype = kBF16}),
    normal_inputs("exponential, causal", 1, {.window_right = 0}),
    normal_inputs("exponential, 101 by 77", 1, {.query_length = 101, .key_length = 77}),
    normal_inputs("exponential, q N(4, 1), k N(-4, 1)", 1, {.query_mean = 4, .key_mean = -4}),
    // after the forward of the group method, whose results have errors of their own
    normal_inputs("exponential bf16, after the group method", 1,
                  {.what = What::kGroupAndExponential, .dtype = kBF16, .gradient_error = 1.5e-2}),
    normal_inputs("exponential bf16, N(0, 2), after the group method", 2,
                  {.what = What::kGroupAndExponential, .dtype = kBF16, .gradient_error = 2.5e-2}),
    normal_inputs("exponential bf16, N(0, 0.03), after the group method", 0.03,
                  {.what = What::kGroupAndExponential, .dtype = kBF16, .gradient_error = 6e-3}),
    normal_inputs("exponential bf16, N(0, 0.03)", 0.03, {.dtype = kBF16, .gradient_error = 6e-3}),
    // sizes
    {.name = "exponential one query", .query_length = 1, .key_length = 150},
    {.name = "exponential E 16, Ev 16", .key_length = 100, .head_dim = 16, .value_dim = 16},
    {.name = "exponential E 5, Ev 48", .head_dim = 5, .value_dim = 48},
    {.name = "exponential E 32, Ev 64", .query_length = 67, .head_dim = 32, .value_dim = 64},
    {.name = "exponential E 97, Ev 96",
     .dtype = kF16,
     .heads = 1,
     .kv_heads = 1,
     .query_length = 67,
     .head_dim = 97,
     .value_dim = 96,
     .shared_kib = 227},
    {.name = "exponential E 128, Ev 30",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 17,
     .key_length = 135,
     .head_dim = 128,
     .value_dim = 30,
     .weight_magnitude = 0.5,
     .shared_kib = 227},
    {.name = "exponential E 40, Ev 128",
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 40,
     .value_dim = 128,
     .shared_kib = 227},
    {.name = "exponential no keys", .what = What::kExponential, .key_length = 0},
    {.name = "exponential no features", .what = What::kExponential, .head_dim = 0, .value_dim = 3},
    // More tiles of keys than ranges of them, and of queries.
    {.name = "exponential ranges of keys",
     .batch = 133,
     .heads = 1,
     .kv_heads = 1,
     .query_length = 3,
     .key_length = 280,
     .head_dim = 3,
     .value_dim = 2,
     .window_right = 200},
    // grouped heads, weights
    {.name = "exponential grouped heads",
     .batch = 2,
     .heads = 6,
     .kv_heads = 2,
     .query_length = 40,
     .key_length = 50},
    // masks
    {.name = "exponential float mask", .batch = 2, .mask = MaskKind::kFloat},
    {.name = "exponential bf16 mask", .dtype = kBF16, .mask = MaskKind::kFloat},
    {.name = "exponential bf16, float32 mask",
     .dtype = kBF16,
     .mask = MaskKind::kFloat,
     .float32_mask = true},
    {.name = "exponential float mask, full",
     .batch = 2,
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {false, false, false, false},
     .grad_lse = true},
    {.name = "exponential f16 mask, full, causal",
     .dtype = kF16,
     .query_length = 70,
     .key_length = 132,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {false, false, false, false},
     .window_right = 0},
    {.name = "exponential float mask of keys",
     .batch = 2,
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {true, false, true, false}},
    {.name = "exponential float mask, one huge key",
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kFloat,
     .mask_broadcast = {false, false, false, false},
     .special = Special::kOneHugeKey,
     .redo = Redo::kSome},
    {.name = "exponential broadcast mask, one huge key",
     .query_length = 70,
     .key_length = 67,
     .mask = MaskKind::kFloat,
     .special = Special::kOneHugeKey,
     .redo = Redo::kSome},
    {.name = "exponential slopes, one huge key",
     .query_length = 70,
     .key_length = 67,
     .slopes = true,
     .special = Special::kOneHugeKey,
     .redo = Redo::kSome},
    {.name = "exponential mask of lowest numbers",
     .mask = MaskKind::kFloat,
     .special = Special::kLowestMask},
    // ranges of keys
    {.name = "exponential causal, long", .query_length = 131, .key_length = 131, .window_right = 0},
    {.name = "exponential grouped heads, window",
     .heads = 4,
     .kv_heads = 2,
     .query_length = 100,
     .key_length = 90,
     .window_left = 20,
     .window_right = 0,
     .query_offset = 5},
    {.name = "exponential rows without a key",
     .window_right = 0,
     .query_offset = -12,
     .grad_lse = true},
    // ALiBi, dropout, lse
    {.name = "exponential slopes, causal",
     .heads = 4,
     .query_length = 70,
     .key_length = 131,
     .offsets = true,
     .slopes = true,
     .window_right = 0,
     .largest_term = 50},  // g times a distance
    {.name = "exponential dropout, NaN in the mask",
     .mask = MaskKind::kFloat,
     .mask_broadcast = {true, false, false, false},
     .dropout_p = 0.5,
     .special = Special::kNanMask},
    {.name = "exponential lse gradient", .batch = 2, .window_right = 0, .grad_lse = true},
    // the range
    {.name = "exponential four features",
     .query_length = 70,
     .key_length = 70,
     .magnitude = 5.5,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "exponential two features",
     .query_length = 70,
     .key_length = 70,
     .magnitude = 11,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "exponential one feature",
     .query_length = 70,
     .key_length = 70,
     .magnitude = 32,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "exponential beyond",
     .magnitude = 32.25,
     .weight_magnitude = 0.5,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "exponential N(0, 5)", .query_length = 70, .key_length = 70, .magnitude = 5},
    // dw is a sum of all g, whose sum is 0.
    {.name = "exponential queries of 25", .query_mean = 25, .largest_term = 1},
    {.name = "exponential queries of -25, E 12",
     .head_dim = 12,
     .query_mean = -25,
     .largest_term = 1},
    {.name = "exponential queries of 50", .query_mean = 50, .largest_term = 1, .redo = Redo::kAll},
    {.name = "exponential saturated queries",
     .special = Special::kSaturatedQueries,
     .largest_term = 1,  // dw is 0, a sum of all g
     .redo = Redo::kAll},
    {.name = "exponential small weights",
     .query_length = 70,
     .weight_magnitude = 1e-6,
     .scale = 3e5},
    {.name = "exponential weights of 0", .query_length = 70, .weight_magnitude = 0},
    {.name = "exponential tiny weights", .query_length = 70, .weight_magnitude = 1e-36},
    {.name = "exponential large weights", .weight_magnitude = 30},
    {.name = "exponential large weights, long",
     .what = What::kExponential,
     .key_length = 200,
     .weight_magnitude = 200},
    {.name = "exponential weights from bounded to not",
     .heads = 6,
     .kv_heads = 6,
     .query_length = 70,
     .key_length = 200,
     .window_right = 0,
     .query_offset = 130,
     .weight_magnitude = 1.8},
    {.name = "exponential large values", .what = What::kExponential, .value_magnitude = 1e8},
    {.name = "exponential huge values",
     .what = What::kExponential,
     .value_magnitude = 1e12,
     .redo = Redo::kAll},
    {.name = "exponential huge weights",
     .weight_magnitude = 1e8,
     .scale = 1e-8,
     .redo = Redo::kAll},
    // which tiles of queries are left to the generic kernel in forward
    {.name = "exponential forward",
     .what = What::kExponential,
     .query_length = 131,
     .key_length = 131,
     .window_right = 0},
    {.name = "exponential forward, one huge key",
     .what = What::kExponential,
     .query_length = 70,
     .key_length = 67,
     .special = Special::kOneHugeKey,
     .redo = Redo::kSome},
    {.name = "exponential forward, beyond",
     .what = What::kExponential,
     .magnitude = 50,
     .redo = Redo::kAll},
};

AttentionProblem anchor() {
  AttentionProblem p;
  p.score = ScoreKind::kAdditive;
  p.batch = 8;
  p.heads = p.kv_heads = 8;
  p.query_length = p.key_length = 1024;
  p.head_dim = p.value_dim = 64;
  return p;
}

void refusals() {
  using namespace torch_selfattn::kernels::cuda::sm80;
  const auto refused = [](auto change) {
    AttentionProblem p = anchor();
    DeviceLimits device{8, 110 * 1024};
    change(p, device);
    return additive_exponential_backward_not_supported(p, device) != nullptr;
  };
  const auto refused_forward = [](auto change) {
    AttentionProblem p = anchor();
    DeviceLimits device{8, 110 * 1024};
    change(p, device);
    return additive_exponential_not_supported(p, device) != nullptr;
  };
  CHECK(!refused([](auto&, auto&) {}));
  CHECK(!refused([](auto& p, auto& device) {
    p.head_dim = p.value_dim = 128;
    device.shared_bytes_per_block = 227 * 1024;
  }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 65; }));  // too little shared memory
  CHECK(refused([](auto& p, auto&) { p.score = ScoreKind::kDotProduct; }));
  CHECK(refused([](auto& p, auto&) { p.activation = Activation::kLeakyRelu; }));
  CHECK(refused([](auto& p, auto&) { p.dtype = DType::kFloat64; }));
  CHECK(refused([](auto&, auto& device) { device.capability_major = 7; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 0; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 129; }));
  CHECK(refused([](auto& p, auto&) { p.value_dim = 129; }));
  CHECK(refused([](auto& p, auto&) { p.key_length = 0; }));
  CHECK(refused([](auto& p, auto&) { p.scale = 1e19; }));
  CHECK(refused([](auto& p, auto&) { p.batch = std::int64_t{1} << 32; }));
  CHECK(!refused_forward([](auto&, auto&) {}));
  CHECK(!refused_forward([](auto& p, auto&) { p.key_length = 0; }));
  CHECK(refused_forward([](auto& p, auto&) { p.score = ScoreKind::kDotProduct; }));
  CHECK(refused_forward([](auto& p, auto&) { p.activation = Activation::kLeakyRelu; }));
  CHECK(refused_forward([](auto& p, auto&) { p.dtype = DType::kFloat64; }));
  CHECK(refused_forward([](auto& p, auto&) { p.head_dim = 129; }));
  CHECK(refused_forward([](auto& p, auto&) { p.value_dim = 129; }));
  CHECK(refused_forward([](auto&, auto& device) { device.shared_bytes_per_block = 99 * 1024; }));
  CHECK(refused_forward([](auto& p, auto&) { p.batch = std::int64_t{1} << 32; }));
}

// Enough blocks for a GPU, and memory that grows with the length, not with its square.
void ranges() {
  using torch_selfattn::kernels::cuda::sm80::ExponentialBackwardWorkspace;
  const auto workspace = [](std::int64_t heads, std::int64_t length) {
    AttentionProblem p = anchor();
    p.batch = 1;
    p.heads = p.kv_heads = heads;
    p.query_length = p.key_length = length;
    return ExponentialBackwardWorkspace::of(p, nullptr, 0);
  };
  const auto anchored = workspace(64, 1024);
  CHECK(anchored.key_ranges == 8);
  CHECK(anchored.query_ranges == 1);
  const auto one_head = workspace(1, 1024);
  CHECK(one_head.key_ranges == 16);
  CHECK(one_head.query_ranges >= 8);
  for (const std::int64_t heads : {1, 16, 512}) {
    const auto w = workspace(heads, 65536);
    CHECK(w.key_ranges * w.keys_of_range >= w.operands.key.tiles);
    CHECK(w.query_ranges * w.queries_of_range >= w.operands.query.tiles);
    CHECK(w.bytes <= 13 * 4 * heads * 65536 * 64 + (std::int64_t{1} << 30));
  }
}

const std::vector<testing::Test> common_tests = additive_tests<exponential>("exponential ");
const std::vector<testing::Test> tests = method_tests<cases, exponential>();
const testing::Test other_tests[] = {{"exponential refusals", refusals},
                                     {"exponential ranges", ranges}};

}  // namespace
