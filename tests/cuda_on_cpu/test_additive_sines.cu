// The forward of additive attention as dot products of sines against the reference: policies,
// sizes, shapes of the blocks, ranges of the fits and their edges, and which tiles it leaves to the
// generic kernel.
#include "additive_cases.h"

namespace {

using namespace attention_testing;

constexpr auto kF16 = DType::kFloat16;
constexpr auto kBF16 = DType::kBFloat16;

// A problem of the sines, unless it says otherwise.
constexpr Case sines(Case c) {
  if (c.what == What::kAttention) c.what = What::kSines;
  if (c.dtype == DType::kFloat32) c.dtype = kBF16;
  c.score = ScoreKind::kAdditive;
  return c;
}

const Case cases[] = {
    // dtypes, and errors at normal inputs
    {.name = "sines bf16",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 128,
     .key_length = 128,
     .head_dim = 64,
     .value_dim = 64,
     .weight_magnitude = 0.5,
     .scale = 1,
     .out_error = 4e-3,
     .shared_kib = 227},
    {.name = "sines f16",
     .dtype = kF16,
     .heads = 1,
     .kv_heads = 1,
     .query_length = 64,
     .key_length = 128,
     .head_dim = 64,
     .value_dim = 64,
     .weight_magnitude = 0.5,
     .scale = 1,
     .out_error = 1.5e-3,
     .shared_kib = 227},
    {.name = "sines bf16, N(0, 0.1)",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 64,
     .key_length = 128,
     .head_dim = 64,
     .value_dim = 64,
     .magnitude = 0.1,
     .weight_magnitude = 0.5,
     .scale = 1,
     .out_error = 4e-3},
    // sizes: queries that stay in shared memory and queries that do not, columns of values
    {.name = "sines few elements", .key_length = 200, .head_dim = 5, .value_dim = 16},
    {.name = "sines 32 elements", .key_length = 200, .head_dim = 32, .value_dim = 8},
    {.name = "sines many queries",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 300,
     .key_length = 270,
     .head_dim = 10,
     .value_dim = 64},
    {.name = "sines Ev 72", .query_length = 140, .key_length = 140, .value_dim = 72},
    {.name = "sines Ev 128, mask",
     .query_length = 140,
     .key_length = 140,
     .value_dim = 128,
     .mask = MaskKind::kBool},
    {.name = "sines E 97, Ev 96", .heads = 1, .kv_heads = 1, .head_dim = 97, .value_dim = 96},
    {.name = "sines E 40, Ev 256",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 70,
     .key_length = 140,
     .head_dim = 40,
     .value_dim = 256},
    {.name = "sines E 240, Ev 130",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 17,
     .key_length = 35,
     .head_dim = 240,
     .value_dim = 130,
     .weight_magnitude = 0.5},
    {.name = "sines little shared memory",
     .batch = 2,
     .query_length = 131,
     .key_length = 140,
     .head_dim = 64,
     .value_dim = 40,
     .shared_kib = 96},
    {.name = "sines little shared memory, Ev 200, causal",
     .query_length = 131,
     .key_length = 140,
     .head_dim = 64,
     .value_dim = 200,
     .window_right = 0,
     .shared_kib = 96},
    {.name = "sines little shared memory, Ev 100, dropout",
     .query_length = 131,
     .key_length = 140,
     .head_dim = 64,
     .value_dim = 100,
     .dropout_p = 0.2,
     .shared_kib = 96},
    // grouped heads, weights
    {.name = "sines grouped heads", .batch = 2, .heads = 4, .kv_heads = 2},
    {.name = "sines grouped heads, little shared memory",
     .batch = 2,
     .heads = 4,
     .kv_heads = 2,
     .head_dim = 64,
     .shared_kib = 96},
    {.name = "sines no weight", .weight_magnitude = 0},
    {.name = "sines some weights are 0", .special = Special::kZeroWeights},
    {.name = "sines large weights", .weight_magnitude = 30, .redo = Redo::kAll},
    // masks
    {.name = "sines float mask",
     .what = What::kSinesAndBackward,
     .batch = 2,
     .mask = MaskKind::kFloat},
    {.name = "sines float32 mask", .mask = MaskKind::kFloat, .float32_mask = true},
    {.name = "sines mask of lowest numbers",
     .mask = MaskKind::kFloat,
     .float32_mask = true,
     .special = Special::kLowestMask},
    // ranges of keys
    {.name = "sines causal",
     .what = What::kSinesAndBackward,
     .query_length = 261,
     .key_length = 261,
     .window_right = 0},
    {.name = "sines window of few",
     .query_length = 300,
     .key_length = 300,
     .window_left = 5,
     .window_right = 0},
    {.name = "sines rows without a key", .window_right = 0, .query_offset = -12},
    // ALiBi
    {.name = "sines slopes, causal",
     .heads = 4,
     .query_length = 70,
     .key_length = 131,
     .offsets = true,
     .slopes = true,
     .window_right = 0},
    {.name = "sines float32 slopes, mask",
     .batch = 2,
     .mask = MaskKind::kFloat,
     .slopes = true,
     .slopes_per_batch = true,
     .float32_slopes = true},
    // the range: the first fit, the last that is exact enough, the last, and what is beyond
    {.name = "sines all inputs are 0", .magnitude = 0},
    {.name = "sines of +-2.375",
     .head_dim = 16,
     .magnitude = 2.375,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "sines of +-2.375, +-4.75, and more",
     .head_dim = 16,
     .magnitude = 3.984375,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "sines exact enough for their weights",
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 64,
     .magnitude = 4.34375,
     .scale = 1,
     .special = Special::kRange},
    {.name = "sines f16, not exact enough for float16",
     .dtype = kF16,
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 64,
     .magnitude = 4.34375,
     .scale = 1,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "sines not exact enough",
     .head_dim = 16,
     .magnitude = 4.75,
     .weight_magnitude = 0.5,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "sines small weights, derivative at its bound",
     .head_dim = 16,
     .magnitude = 4.75,
     .weight_magnitude = 0.05,
     .special = Special::kRange},
    {.name = "sines beyond all fits",
     .head_dim = 16,
     .magnitude = 6.25,
     .weight_magnitude = 0.001,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "sines queries of 3", .query_mean = 3, .redo = Redo::kAny},
    {.name = "sines queries of 50", .query_mean = 50, .redo = Redo::kAll},
    {.name = "sines queries of -1e4", .query_mean = -1e4, .redo = Redo::kAll},
    {.name = "sines keys of 50, queries of -50", .query_mean = -50, .key_mean = 50},
    {.name = "sines f16, keys of -300, queries of 300",
     .dtype = kF16,
     .query_mean = 300,
     .key_mean = -300},
    {.name = "sines keys of -1e4, queries of 1e4",
     .dtype = kF16,
     .query_mean = 1e4,
     .key_mean = -1e4,
     .redo = Redo::kAll},
};

void refusals() {
  using torch_selfattn::kernels::cuda::sm80::additive_sines_not_supported;
  using torch_selfattn::kernels::cuda::sm80::additive_sines_queries_stay;
  using torch_selfattn::kernels::cuda::sm80::DeviceLimits;
  const auto problem = [] {
    AttentionProblem p;
    p.dtype = kBF16;
    p.score = ScoreKind::kAdditive;
    p.batch = p.heads = p.kv_heads = 1;
    p.query_length = p.key_length = p.head_dim = p.value_dim = 64;
    return p;
  };
  const auto refused = [&](auto change) {
    AttentionProblem p = problem();
    DeviceLimits device{8, 99 * 1024};
    change(p, device);
    return additive_sines_not_supported(p, device) != nullptr;
  };
  CHECK(!refused([](auto&, auto&) {}));
  CHECK(!refused([](auto& p, auto&) { p.head_dim = p.value_dim = 256; }));
  CHECK(refused([](auto& p, auto&) { p.score = ScoreKind::kDotProduct; }));
  CHECK(refused([](auto& p, auto&) { p.activation = Activation::kLeakyRelu; }));
  CHECK(refused([](auto& p, auto&) { p.dtype = DType::kFloat32; }));
  CHECK(refused([](auto&, auto& device) { device.capability_major = 7; }));
  CHECK(refused([](auto&, auto& device) { device.shared_bytes_per_block = 48 * 1024; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 0; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 257; }));
  CHECK(refused([](auto& p, auto&) { p.value_dim = 257; }));
  CHECK(refused([](auto& p, auto&) { p.key_length = 0; }));
  CHECK(refused([](auto& p, auto&) { p.batch = std::int64_t{1} << 32; }));
  CHECK(additive_sines_queries_stay(problem(), {9, 227 * 1024}));
  CHECK(!additive_sines_queries_stay(problem(), {8, 163 * 1024}));
}

const std::vector<testing::Test> common_tests = additive_tests<sines>("sines ");
const std::vector<testing::Test> tests = method_tests<cases, sines>();
const testing::Test refusals_test("sines refusals", refusals);

}  // namespace
