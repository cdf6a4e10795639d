// The weights' kernel for dot products of bfloat16 with AMX; see weights.h and amx_tiles.h.
#define TSA_CPU_ISA amx
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_avx512(const AttentionWeights& call, const Parallel& parallel);

void attention_weights_amx(const AttentionWeights& call, const Parallel& parallel) {
  if (call.problem.dtype != DType::kBFloat16) {
    attention_weights_avx512(call, parallel);
    return;
  }
  amx::WeightsKernel<amx::DotScore<amx::Bfloat16Tiles>>(call, parallel).run();
}

}  // namespace torch_selfattn::kernels::cpu
