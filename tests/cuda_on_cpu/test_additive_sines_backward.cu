// The backward of additive attention as dot products of sines against the reference: errors,
// policies, sizes, slices, ranges and their edges, and which (batch, key head)s it leaves to the
// generic kernel.
#include "additive_cases.h"

namespace {

using namespace attention_testing;

// A problem of the sines, unless it says otherwise.
constexpr Case gradients(Case c) {
  if (c.what == What::kAttention) c.what = What::kSinesGradients;
  c.dtype = DType::kBFloat16;
  c.score = ScoreKind::kAdditive;
  if (c.shared_kib == Case{}.shared_kib) c.shared_kib = 227;
  return c;
}

constexpr Case normal_inputs(const char* name, double magnitude, Case c = {}) {
  if (c.gradient_error == 0) c.gradient_error = 1e-2;
  return at_normal_inputs(name, magnitude, c);
}

const Case cases[] = {
    // errors at normal inputs
    normal_inputs("sines gradients", 1),
    normal_inputs("sines gradients, N(0, 0.5)", 0.5),
    normal_inputs("sines gradients, causal", 1, {.window_right = 0}),
    normal_inputs("sines gradients, 301 by 277", 1, {.query_length = 301, .key_length = 277}),
    normal_inputs("sines gradients after the generic forward", 1,
                  {.what = What::kSinesGradientsAlone}),
    normal_inputs("sines gradients, q N(4, 1), k N(-4, 1)", 1, {.query_mean = 4, .key_mean = -4}),
    normal_inputs(
        "sines gradients, one tile of columns", 1,
        {.heads = 1, .kv_heads = 1, .query_length = 140, .key_length = 277, .shared_kib = 163}),
    // sizes
    {.name = "sines gradients E 5, Ev 48", .key_length = 200, .head_dim = 5, .value_dim = 48},
    {.name = "sines gradients E 97, Ev 96",
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 97,
     .value_dim = 96},
    {.name = "sines gradients E 40, Ev 150",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 140,
     .head_dim = 40,
     .value_dim = 150},
    {.name = "sines gradients E 200, Ev 30",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 17,
     .key_length = 35,
     .head_dim = 200,
     .value_dim = 30,
     .weight_magnitude = 0.5},
    // grouped heads, weights
    {.name = "sines gradients grouped heads",
     .batch = 2,
     .heads = 4,
     .kv_heads = 2,
     .query_length = 130,
     .key_length = 50},
    {.name = "sines gradients some weights are 0", .special = Special::kZeroWeights},
    {.name = "sines gradients small weights", .weight_magnitude = 1e-4},
    // masks
    {.name = "sines gradients float mask", .batch = 2, .mask = MaskKind::kFloat},
    {.name = "sines gradients float32 mask", .mask = MaskKind::kFloat, .float32_mask = true},
    {.name = "sines gradients mask of lowest numbers",
     .mask = MaskKind::kFloat,
     .float32_mask = true,
     .special = Special::kLowestMask},
    // ranges of keys
    {.name = "sines gradients causal, long",
     .heads = 1,
     .kv_heads = 1,
     .query_length = 401,
     .key_length = 401,
     .window_right = 0},
    {.name = "sines gradients grouped heads, window",
     .heads = 2,
     .kv_heads = 1,
     .query_length = 300,
     .key_length = 290,
     .window_left = 20,
     .window_right = 0,
     .query_offset = 5},
    {.name = "sines gradients rows without a key", .window_right = 0, .query_offset = -12},
    // ALiBi, dropout, lse
    {.name = "sines gradients slopes, causal",
     .heads = 4,
     .query_length = 70,
     .key_length = 131,
     .offsets = true,
     .slopes = true,
     .window_right = 0},
    {.name = "sines gradients float32 slopes, mask",
     .batch = 2,
     .mask = MaskKind::kFloat,
     .slopes = true,
     .slopes_per_batch = true,
     .float32_slopes = true},
    {.name = "sines gradients dropout, long",
     .query_length = 200,
     .key_length = 140,
     .dropout_p = 0.4},
    {.name = "sines gradients lse gradient", .batch = 2, .window_right = 0, .grad_lse = true},
    // the range
    {.name = "sines gradients of +-3.98",
     .head_dim = 16,
     .magnitude = 3.984375,
     .weight_magnitude = 0.5,
     .special = Special::kRange},
    {.name = "sines gradients beyond all fits",
     .head_dim = 16,
     .magnitude = 6.25,
     .weight_magnitude = 0.001,
     .special = Special::kRange,
     .redo = Redo::kAll},
    {.name = "sines gradients all inputs are 0", .magnitude = 0},
    {.name = "sines gradients keys of 50, queries of -50", .query_mean = -50, .key_mean = 50},
    {.name = "sines gradients queries of -1e4", .query_mean = -1e4, .redo = Redo::kAll},
    {.name = "sines gradients large weights", .weight_magnitude = 30, .redo = Redo::kAll},
};

void refusals() {
  using torch_selfattn::kernels::cuda::sm80::additive_sines_backward_not_supported;
  const auto refused = [](auto change) {
    AttentionProblem p;
    bool bias_gradients = false;
    p.dtype = DType::kBFloat16;
    p.score = ScoreKind::kAdditive;
    p.batch = p.heads = p.kv_heads = 1;
    p.query_length = p.key_length = p.head_dim = p.value_dim = 64;
    torch_selfattn::kernels::cuda::sm80::DeviceLimits device{8, 163 * 1024};
    change(bias_gradients, p, device);
    return additive_sines_backward_not_supported(p, bias_gradients, device) != nullptr;
  };
  CHECK(!refused([](auto&, auto&, auto&) {}));
  CHECK(!refused([](auto&, auto& p, auto&) { p.head_dim = p.value_dim = 256; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.score = ScoreKind::kDotProduct; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.dtype = DType::kFloat16; }));
  CHECK(refused([](auto&, auto&, auto& device) { device.capability_major = 7; }));
  CHECK(refused([](auto&, auto&, auto& device) { device.shared_bytes_per_block = 99 * 1024; }));
  CHECK(refused([](auto& bias_gradients, auto&, auto&) { bias_gradients = true; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.head_dim = 0; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.head_dim = 257; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.query_length = 0; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.key_length = 0; }));
  CHECK(refused([](auto&, auto& p, auto&) { p.batch = std::int64_t{1} << 32; }));
}

const std::vector<testing::Test> common_tests = additive_tests<gradients>("sines gradients ");
const std::vector<testing::Test> tests = method_tests<cases, gradients>();
const testing::Test refusals_test("sines gradients refusals", refusals);

}  // namespace
