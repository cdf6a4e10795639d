// The forward of additive attention by the group method against the reference: policies, sizes,
// ranges and their edges, and which tiles it leaves to the generic kernel.
#include "additive_cases.h"

namespace {

using namespace attention_testing;

constexpr auto kF16 = DType::kFloat16;
constexpr auto kBF16 = DType::kBFloat16;

// A problem of the group method, unless it says otherwise.
constexpr Case group(Case c) {
  if (c.what == What::kAttention) c.what = What::kGroup;
  if (c.dtype == DType::kFloat32) c.dtype = kBF16;
  c.score = ScoreKind::kAdditive;
  return c;
}

const Case cases[] = {
    // dtypes, and errors at normal inputs
    {.name = "group bf16",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 128,
     .key_length = 128,
     .head_dim = 64,
     .value_dim = 64,
     .weight_magnitude = 0.5,
     .scale = 1,
     .out_error = 6e-3},
    {.name = "group bf16, N(0, 2)",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 64,
     .key_length = 128,
     .head_dim = 64,
     .value_dim = 64,
     .magnitude = 2,
     .weight_magnitude = 0.5,
     .scale = 1,
     .out_error = 6e-3},
    {.name = "group f16",
     .dtype = kF16,
     .heads = 1,
     .kv_heads = 1,
     .query_length = 64,
     .key_length = 128,
     .head_dim = 64,
     .value_dim = 64,
     .weight_magnitude = 0.5,
     .scale = 1,
     .out_error = 6e-3},
    // sizes
    {.name = "group one quad", .key_length = 200, .head_dim = 16, .value_dim = 16},
    {.name = "group two quads", .key_length = 200, .head_dim = 32, .value_dim = 8},
    {.name = "group E 97, Ev 96", .heads = 1, .kv_heads = 1, .head_dim = 97, .value_dim = 96},
    {.name = "group E 40, Ev 256",
     .heads = 1,
     .kv_heads = 1,
     .key_length = 70,
     .head_dim = 40,
     .value_dim = 256},
    {.name = "group E 240, Ev 130",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 17,
     .key_length = 35,
     .head_dim = 240,
     .value_dim = 130},
    // grouped heads, weights
    {.name = "group grouped heads", .batch = 2, .heads = 4, .kv_heads = 2},
    // masks
    {.name = "group float mask",
     .what = What::kGroupAndBackward,
     .batch = 2,
     .mask = MaskKind::kFloat},
    {.name = "group float32 mask", .mask = MaskKind::kFloat, .float32_mask = true},
    {.name = "group mask of lowest numbers",
     .mask = MaskKind::kFloat,
     .float32_mask = true,
     .special = Special::kLowestMask},
    // ranges of keys
    {.name = "group causal",
     .what = What::kGroupAndBackward,
     .query_length = 131,
     .key_length = 131,
     .window_right = 0},
    {.name = "group rows without a key", .window_right = 0, .query_offset = -12},
    // ALiBi, dropout
    {.name = "group slopes, causal",
     .heads = 4,
     .query_length = 70,
     .key_length = 131,
     .offsets = true,
     .slopes = true,
     .window_right = 0},
    {.name = "group float32 slopes, mask",
     .batch = 2,
     .mask = MaskKind::kFloat,
     .slopes = true,
     .slopes_per_batch = true,
     .float32_slopes = true},
    // the range: four groups to a reciprocal, two, and what is left to the generic kernel
    {.name = "group four joined, edge",
     .head_dim = 16,
     .magnitude = 4.9375,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "group two joined, near edge",
     .head_dim = 16,
     .magnitude = 4.96875,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "group two joined, far edge",
     .head_dim = 16,
     .magnitude = 9.875,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "group beyond",
     .head_dim = 16,
     .magnitude = 9.9375,
     .weight_magnitude = 0.5,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "group queries of 50", .query_mean = 50},
    {.name = "group queries of -1e4", .query_mean = -1e4},
    {.name = "group keys of 50, queries of -50", .query_mean = -50, .key_mean = 50},
    {.name = "group keys of -1e4, queries of 1e4",
     .dtype = kF16,
     .query_mean = 1e4,
     .key_mean = -1e4},
    {.name = "group large weights", .weight_magnitude = 30, .redo = Redo::kAll},
};

void refusals() {
  using torch_selfattn::kernels::cuda::sm80::additive_group_not_supported;
  const auto refused = [](auto change) {
    AttentionProblem p;
    p.dtype = kBF16;
    p.score = ScoreKind::kAdditive;
    p.batch = p.heads = p.kv_heads = 1;
    p.query_length = p.key_length = p.head_dim = p.value_dim = 64;
    torch_selfattn::kernels::cuda::sm80::DeviceLimits device{8, 99 * 1024};
    change(p, device);
    return additive_group_not_supported(p, device) != nullptr;
  };
  CHECK(!refused([](auto&, auto&) {}));
  CHECK(!refused([](auto& p, auto&) { p.head_dim = 128; }));
  CHECK(!refused([](auto& p, auto& device) {
    p.head_dim = p.value_dim = 256;
    device.shared_bytes_per_block = 163 * 1024;
  }));
  CHECK(refused([](auto& p, auto&) { p.score = ScoreKind::kDotProduct; }));
  CHECK(refused([](auto& p, auto&) { p.dtype = DType::kFloat32; }));
  CHECK(refused([](auto&, auto& device) { device.capability_major = 7; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 0; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 257; }));
  CHECK(refused([](auto& p, auto&) { p.value_dim = 257; }));
  CHECK(refused([](auto& p, auto&) { p.key_length = 0; }));
  CHECK(refused([](auto& p, auto&) { p.head_dim = 256; }));  // too little shared memory
  CHECK(refused([](auto& p, auto&) { p.batch = std::int64_t{1} << 32; }));
}

const std::vector<testing::Test> common_tests = additive_tests<group>("group ");
const std::vector<testing::Test> tests = method_tests<cases, group>();
const testing::Test refusals_test("group refusals", refusals);

}  // namespace
