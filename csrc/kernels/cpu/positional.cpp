#include "kernels/cpu/positional.h"

#include <cstring>

#define TSA_INSTRUCTION_SET baseline
#include "kernels/cpu/positional_generic.h"

namespace torch_selfattn::kernels::cpu {

#if defined(__x86_64__)
namespace avx2 {
extern const PositionalKernels positional;
}
namespace avx512 {
extern const PositionalKernels positional;
}
#endif

namespace {

struct Variant {
  const char* name;
  const PositionalKernels* kernels;
  bool (*runs_here)();
};

// Best first.
const Variant variants[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::positional,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
    {"avx2", &avx2::positional,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {"baseline", &baseline::positional, [] { return true; }},
};

const PositionalKernels& best_variant() {
  for (const Variant& variant : variants) {
    if (variant.runs_here()) return *variant.kernels;
  }
  return baseline::positional;
}

}  // namespace

const PositionalKernels& positional_kernels() {
  static const PositionalKernels& best = best_variant();
  return best;
}

const PositionalKernels* positional_kernels(const char* instruction_set) {
  for (const Variant& variant : variants) {
    if (std::strcmp(variant.name, instruction_set) == 0 && variant.runs_here()) {
      return variant.kernels;
    }
  }
  return nullptr;
}

}  // namespace torch_selfattn::kernels::cpu
