// The C interface that benchmarks/limits.py loads. Work is done by OpenMP's threads, which are
// those that torch uses and that OMP_PROC_BIND has given a core each.
#include "loops.h"

#include <omp.h>

#include <algorithm>

namespace torch_selfattn::loops {

extern const Loops generic_loops;
#if defined(__x86_64__)
extern const Loops avx2_loops;
extern const Loops avx512_loops;
#endif

namespace {

// By the names of torch_selfattn's implementations, in this order; null: not on this machine.
const Loops* loops_of(int isa) {
#if defined(__x86_64__)
  if (isa == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return &avx512_loops;
  }
  if (isa == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return &avx2_loops;
  }
#endif
  return isa == 0 ? &generic_loops : nullptr;
}

}  // namespace
}  // namespace torch_selfattn::loops

#define EXPORT extern "C" __attribute__((visibility("default")))
using torch_selfattn::loops::Loops;
using torch_selfattn::loops::loops_of;

// 0: this machine does not run it.
EXPORT int loops_vector_bytes(int isa) {
  const Loops* const chosen = loops_of(isa);
  return chosen == nullptr ? 0 : chosen->vector_bytes;
}

// `rounds` rounds on every thread. what: as in Loops.
EXPORT void loops_arithmetic(int isa, int what, std::int64_t rounds, int threads) {
  const Loops& chosen = *loops_of(isa);
#pragma omp parallel num_threads(threads)
  {
    volatile float result = chosen.arithmetic[what](rounds);  // volatile: somebody needs it
    static_cast<void>(result);
  }
}

// Reads n floats once, each thread a part.
EXPORT void loops_read(int isa, const float* data, std::int64_t n, int threads) {
  const Loops& chosen = *loops_of(isa);
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t part = (n + threads - 1) / threads;
    const std::int64_t begin = std::min(n, omp_get_thread_num() * part);
    volatile float result = chosen.read(data + begin, std::min(part, n - begin));
    static_cast<void>(result);
  }
}
