// The error of the additive score against the scale of q and k, for each path of the kernels: with
// the environment variable TORCH_SELFATTN_PRINT_ERRORS the errors are printed, and
// benchmarks/errors.py draws them.
#include "attention_case.h"

namespace {

using namespace attention_testing;

// Normal q and k of these standard deviations meet every rule of range: four groups to a
// reciprocal, two, and one; the generic kernel's exponential form, and tanh itself. With small ones
// the gradient of q is a difference of much larger numbers, with large ones few features are not
// saturated.
constexpr double kScales[] = {0.03, 0.1, 0.3, 1, 1.5, 2, 3, 4, 6, 10, 30, 100, 1e3, 1e4};

struct Path {
  const char* name;
  What what;
  DType dtype;
  double out_error;       // bounds of the norm of the error relative to the norm of the result
  double gradient_error;  // at scales from 0.3 to 2
};

constexpr Path kPaths[] = {
    {"generic float32", What::kAttention, DType::kFloat32, 2e-6, 5e-6},
    {"generic bfloat16", What::kAttention, DType::kBFloat16, 1e-3, 1.5e-2},
    {"additive_exponential float32", What::kExponentialGradients, DType::kFloat32, 2e-6, 5e-6},
    {"additive_exponential bfloat16", What::kExponentialGradients, DType::kBFloat16, 1e-3, 8e-3},
    {"additive_group bfloat16", What::kGroupGradients, DType::kBFloat16, 8e-3, 2e-2},
};

template <std::size_t path>
void sweep() {
  const Path& of = kPaths[path];
  for (const double scale : kScales) {
    char name[80];
    std::snprintf(name, sizeof name, "%s, N(0, %g)", of.name, scale);
    Case c;
    c.name = name;
    c.what = of.what;
    c.dtype = of.dtype;
    c.score = ScoreKind::kAdditive;
    c.heads = c.kv_heads = 1;
    c.query_length = 64;
    c.key_length = 128;
    c.head_dim = c.value_dim = 64;
    c.magnitude = scale;
    c.weight_magnitude = 0.5;
    c.scale = 1;
    c.redo = Redo::kAny;
    c.out_error = of.out_error;
    c.largest_term = 1;
    if (scale >= 0.3 && scale <= 2) c.gradient_error = of.gradient_error;
    run_case(c);
  }
}

const testing::Test tests[] = {
    {"error by scale, generic float32", sweep<0>},
    {"error by scale, generic bfloat16", sweep<1>},
    {"error by scale, additive_exponential float32", sweep<2>},
    {"error by scale, additive_exponential bfloat16", sweep<3>},
    {"error by scale, additive_group", sweep<4>},
};

}  // namespace
