#pragma once

#include "kernels/common/parallel.h"
#include "kernels/common/positional_problem.h"

// Positional encodings on the CPU; each call runs the variant for this machine's instruction set.
// Position ids must be in range: kernels do not check.
namespace torch_selfattn::kernels::cpu {

struct PositionalKernels {
  void (*sinusoid_table)(const SinusoidTable&, const Parallel&);
  void (*add_sinusoid)(const AddSinusoid&, const Parallel&);
  void (*add_learned)(const AddLearned&, const Parallel&);
  void (*learned_table_grad)(const LearnedTableGrad&, const Parallel&);
  void (*rotary)(const Rotary&, const Parallel&);
};

const PositionalKernels& positional_kernels();

// By name, for tests: "baseline", "avx2", "avx512"; null if this machine cannot run it.
const PositionalKernels* positional_kernels(const char* instruction_set);

}  // namespace torch_selfattn::kernels::cpu
