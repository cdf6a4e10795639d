// The backward of additive attention by the group method against the reference: errors, policies,
// sizes, ranges and their edges, and which (batch, key head)s it leaves to the generic kernel.
#include "additive_cases.h"

namespace {

using namespace attention_testing;

constexpr auto kF16 = DType::kFloat16;

// A problem of the group method, unless it says otherwise.
constexpr Case gradients(Case c) {
  if (c.what == What::kAttention) c.what = What::kGroupGradients;
  if (c.dtype == DType::kFloat32) c.dtype = DType::kBFloat16;
  c.score = ScoreKind::kAdditive;
  return c;
}

constexpr Case normal_inputs(const char* name, double magnitude, Case c = {}) {
  if (c.gradient_error == 0) c.gradient_error = 2e-2;
  return at_normal_inputs(name, magnitude, c);
}

const Case cases[] = {
    // errors at normal inputs
    normal_inputs("group gradients", 1),
    normal_inputs("group gradients, N(0, 0.5)", 0.5),
    normal_inputs("group gradients, N(0, 2)", 2),
    normal_inputs("group gradients, N(0, 3)", 3),
    normal_inputs("group gradients f16", 1, {.dtype = kF16}),
    normal_inputs("group gradients, causal", 1, {.window_right = 0}),
    normal_inputs("group gradients, 101 by 77", 1, {.query_length = 101, .key_length = 77}),
    normal_inputs("group gradients after the generic forward", 1,
                  {.what = What::kGroupGradientsAlone}),
    normal_inputs("group gradients, q N(5, 1), k N(-2, 1)", 1,
                  {.query_mean = 5, .key_mean = -2, .gradient_error = 9.5e-3}),
    normal_inputs("group gradients, q N(4, 1), k N(-4, 1)", 1, {.query_mean = 4, .key_mean = -4}),
    // sizes
    {.name = "group gradients one quad", .key_length = 100, .head_dim = 16, .value_dim = 16},
    {.name = "group gradients E 5, Ev 48", .head_dim = 5, .value_dim = 48},
    {.name = "group gradients E 97, Ev 96",
     .dtype = kF16,
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 97,
     .value_dim = 96},
    {.name = "group gradients E 40, Ev 150",
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 40,
     .value_dim = 150,
     .shared_kib = 227},
    {.name = "group gradients E 192, Ev 30",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 17,
     .key_length = 35,
     .head_dim = 192,
     .value_dim = 30,
     .weight_magnitude = 0.5,
     .shared_kib = 227},
    {.name = "group gradients little shared memory",
     .query_length = 70,
     .head_dim = 64,
     .value_dim = 64,
     .shared_kib = 99},
    // grouped heads, weights
    {.name = "group gradients grouped heads",
     .batch = 2,
     .heads = 6,
     .kv_heads = 2,
     .query_length = 40,
     .key_length = 50},
    // masks
    {.name = "group gradients float mask", .batch = 2, .mask = MaskKind::kFloat},
    {.name = "group gradients float32 mask", .mask = MaskKind::kFloat, .float32_mask = true},
    {.name = "group gradients mask of lowest numbers",
     .mask = MaskKind::kFloat,
     .float32_mask = true,
     .special = Special::kLowestMask},
    // ranges of keys
    {.name = "group gradients causal, long",
     .query_length = 131,
     .key_length = 131,
     .window_right = 0},
    {.name = "group gradients grouped heads, window",
     .heads = 4,
     .kv_heads = 2,
     .query_length = 100,
     .key_length = 90,
     .window_left = 20,
     .window_right = 0,
     .query_offset = 5},
    {.name = "group gradients rows without a key", .window_right = 0, .query_offset = -12},
    // ALiBi, dropout, lse
    {.name = "group gradients slopes, causal",
     .heads = 4,
     .query_length = 70,
     .key_length = 131,
     .offsets = true,
     .slopes = true,
     .window_right = 0},
    {.name = "group gradients float32 slopes, mask",
     .batch = 2,
     .mask = MaskKind::kFloat,
     .slopes = true,
     .slopes_per_batch = true,
     .float32_slopes = true},
    {.name = "group gradients lse gradient", .batch = 2, .window_right = 0, .grad_lse = true},
    // the range
    {.name = "group gradients far edge",
     .head_dim = 16,
     .magnitude = 9.875,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "group gradients beyond",
     .head_dim = 16,
     .magnitude = 9.9375,
     .weight_magnitude = 0.5,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "group gradients saturated queries", .special = Special::kSaturatedQueries},
    {.name = "group gradients queries of 50", .query_mean = 50},
    {.name = "group gradients queries of -1e4", .query_mean = -1e4},
    {.name = "group gradients keys of 50, queries of -50", .query_mean = -50, .key_mean = 50},
    {.name = "group gradients large weights", .weight_magnitude = 30, .redo = Redo::kAll},
};

void refusals() {
  using torch_selfattn::kernels::cuda::sm80::additive_group_backward_not_supported;
  const auto refused = [](auto change) {
    AttentionProblem p;
    bool bias_gradients = false;
    p.dtype = DType::kBFloat16;
    p.score = ScoreKind::kAdditive;
    p.batch = p.heads = p.kv_heads = 1;
    p.query_length = p.key_length = p.head_dim = p.value_dim = 64;
    torch_selfattn::kernels::cuda::sm80::DeviceLimits device{8, 99 * 1024};
    change(bias_gradients, p, device);
    return additive_group_backward_not_supported(p, bias_gradients, device) != nullptr;
  };
  CHECK(!refused([](auto&, auto&, auto&) {}));
  CHECK(!refused([](auto&, auto& p, auto&) { p.head_dim = 96; }));
  CHECK(!refused([](auto&, auto& p, auto& device) {
    p.head_dim = p.value_dim = 192;
    device.shared_bytes_per_block = 227 * 1024;
  }));
  CHECK(refused([](auto&, auto& p, auto&) { p.score = ScoreKind::kDotProduct; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.dtype = DType::kFloat32; }));
  CHECK(refused([](auto&, auto&, auto& device) { device.capability_major = 7; }));
  CHECK(refused([](auto& bias_gradients, auto&, auto&) { bias_gradients = true; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.head_dim = 0; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.head_dim = 193; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.value_dim = 193; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.key_length = 0; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.head_dim = 192; }));  // too little shared memory
  CHECK(refused([](auto&, auto& p, auto&) { p.batch = std::int64_t{1} << 32; }));
}

const std::vector<testing::Test> common_tests = additive_tests<gradients>("group gradients ");
const std::vector<testing::Test> tests = method_tests<cases, gradients>();
const testing::Test refusals_test("group gradients refusals", refusals);

}  // namespace
