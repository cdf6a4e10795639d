// The weights' kernel for dot products by tiles: weights.h, amx_tiles.h, and attention_amx.cpp on
// what becomes of the dtypes.
#define TSA_CPU_ISA amx
#include "kernels/cpu/float_parts.h"
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_avx512(const AttentionWeights& call, const Parallel& parallel);

void attention_weights_amx(const AttentionWeights& call, const Parallel& parallel) {
  const bool done = amx::with_tiles(call.problem.dtype, [&]<typename Operand>() {
    return amx::WeightsKernel<amx::DotScore<Operand>>(call, parallel).run();
  });
  if (!done) attention_weights_avx512(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
