#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cstdint>

#include "kernels/common/reference.h"
#include "kernels/cpu/amx.h"

namespace torch_selfattn::kernels::cpu {

// One file per instruction set, attention_<name>.cpp, compiled for it and entered only on machines
// that have it.
void attention_forward_generic(const AttentionForward& call, const Parallel& parallel);
void attention_backward_generic(const AttentionBackward& call, const Parallel& parallel);
void attention_weights_generic(const AttentionWeights& call, const Parallel& parallel);
#if defined(__x86_64__)
void attention_forward_avx2(const AttentionForward& call, const Parallel& parallel);
void attention_backward_avx2(const AttentionBackward& call, const Parallel& parallel);
void attention_weights_avx2(const AttentionWeights& call, const Parallel& parallel);
void attention_forward_avx512(const AttentionForward& call, const Parallel& parallel);
void attention_backward_avx512(const AttentionBackward& call, const Parallel& parallel);
void attention_weights_avx512(const AttentionWeights& call, const Parallel& parallel);
void attention_forward_avx512bf16(const AttentionForward& call, const Parallel& parallel);
void attention_backward_avx512bf16(const AttentionBackward& call, const Parallel& parallel);
void attention_weights_avx512bf16(const AttentionWeights& call, const Parallel& parallel);
void attention_forward_amx(const AttentionForward& call, const Parallel& parallel);
void attention_backward_amx(const AttentionBackward& call, const Parallel& parallel);
void attention_weights_amx(const AttentionWeights& call, const Parallel& parallel);
void attention_forward_sines(const AttentionForward& call, const Parallel& parallel);
void attention_backward_sines(const AttentionBackward& call, const Parallel& parallel);
#endif

namespace {

const char* always_supported(const AttentionProblem& /*problem*/) { return nullptr; }

#if defined(__x86_64__)
const char* avx2_not_supported(const AttentionProblem& /*problem*/) {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("f16c");
  return supported ? nullptr : "this CPU has no AVX2 with FMA";
}

const char* avx512_not_supported(const AttentionProblem& /*problem*/) {
  static const bool supported =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return supported ? nullptr : "this CPU has no AVX-512 (F, BW, VL, DQ)";
}

bool cpu_has_avx512bf16() {
  return avx512_not_supported(AttentionProblem{}) == nullptr &&
         __builtin_cpu_supports("avx512bf16");
}

const char* avx512bf16_not_supported(const AttentionProblem& problem) {
  static const bool supported = cpu_has_avx512bf16();
  if (!supported) return "this CPU has no AVX512-BF16";
  if (problem.dtype != DType::kBFloat16) return "the inputs are not bfloat16";
  if (problem.score != ScoreKind::kDotProduct) return "the additive score has no products of pairs";
  return nullptr;
}

bool cpu_has_tiles() {
  static const bool supported = cpu_has_amx() && cpu_has_avx512bf16();
  return supported;
}

const char* amx_not_supported(const AttentionProblem& problem) {
  if (!cpu_has_tiles()) return "this CPU has no AMX for bfloat16";
  if (problem.score != ScoreKind::kDotProduct) return "the additive score has no products of pairs";
  if (problem.dtype == DType::kFloat64) return "the inputs are float64";
  return may_use_amx() ? nullptr : "the operating system does not permit AMX";
}

const char* sines_not_supported(const AttentionProblem& problem) {
  if (!cpu_has_tiles()) return "this CPU has no AMX for bfloat16";
  if (problem.score != ScoreKind::kAdditive) return "the score is not additive";
  if (problem.activation != Activation::kTanh) return "the activation is not tanh";
  if (problem.dtype != DType::kBFloat16) return "the inputs are not bfloat16";
  return may_use_amx() ? nullptr : "the operating system does not permit AMX";
}

// How many keys a query sees, of some queries of some samples, on average.
std::int64_t keys_seen(const AttentionProblem& p) {
  std::int64_t sum = 0;
  std::int64_t rows = 0;
  for (std::int64_t b = 0; b < p.batch; b += std::max<std::int64_t>(p.batch / 8, 1)) {
    for (const std::int64_t eighths : {1, 3, 5, 7}) {
      const KeyRange range = key_range(p, b, p.query_length * eighths / 8);
      sum += std::max<std::int64_t>(range.end - range.begin, 0);
      ++rows;
    }
  }
  return rows == 0 ? 0 : sum / rows;
}

// What is made once for each token must pay off, of keys for each query head; measured on Granite
// Rapids. Blocks of wide heads are large, beside what a window leaves of them.
const char* sines_slower(const AttentionProblem& problem) {
  const bool wide = problem.head_dim > 64;
  const bool grouped = problem.heads > problem.kv_heads;
  if (problem.query_length < 128) return "there are few queries";
  const bool window = problem.window_left >= 0 && problem.window_right >= 0;
  std::int64_t needed = window ? 192 : 96;
  if (wide || grouped) needed = wide && window ? 512 : 256;
  if (keys_seen(problem) < needed) return "there are few keys";
  if (problem.head_dim > (grouped ? 64 : 256)) return "the heads are wide";
  return nullptr;
}

// To take elements to parts pays off where each part is multiplied often; measured with 1 to 8
// heads on Granite Rapids.
const char* amx_slower(const AttentionProblem& problem) {
  if (problem.dtype == DType::kBFloat16) return nullptr;
  const bool is_float = problem.dtype == DType::kFloat32;
  const bool few_in_all = is_float && problem.batch * problem.heads * problem.query_length < 512;
  if (few_in_all || problem.query_length < (is_float ? 128 : 32)) return "there are few queries";
  if (is_float && problem.head_dim <= 16 && problem.value_dim <= 16) return "the heads are narrow";
  return nullptr;
}
#endif

const AttentionImplementation implementations[] = {
#if defined(__x86_64__)
    {"amx", amx_not_supported, attention_forward_amx, attention_backward_amx, attention_weights_amx,
     amx_slower},
    {"amx_sines", sines_not_supported, attention_forward_sines, attention_backward_sines,
     attention_weights_avx512, sines_slower},
    {"avx512bf16", avx512bf16_not_supported, attention_forward_avx512bf16,
     attention_backward_avx512bf16, attention_weights_avx512bf16},
    {"avx512", avx512_not_supported, attention_forward_avx512, attention_backward_avx512,
     attention_weights_avx512},
    {"avx2", avx2_not_supported, attention_forward_avx2, attention_backward_avx2,
     attention_weights_avx2},
#endif
    {"generic", always_supported, attention_forward_generic, attention_backward_generic,
     attention_weights_generic},
    {"reference", always_supported, reference::forward, reference::backward, reference::weights},
};

}  // namespace

std::span<const AttentionImplementation> attention_implementations() { return implementations; }

}  // namespace torch_selfattn::kernels::cpu
