// Dot-product attention of bfloat16 with AMX: what attention_avx512bf16.cpp says, with tdpbf16ps in
// the place of vdpbf16ps (amx_tiles.h). Roundings are the same; sums are made in another order.
// Bound: the passes over the scores.
#define TSA_CPU_ISA amx
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_amx(const AttentionForward& call, const Parallel& parallel) {
  amx::forward_of_pairs<amx::Bfloat16Tiles>(call, parallel);
}
void attention_backward_amx(const AttentionBackward& call, const Parallel& parallel) {
  amx::BackwardKernel<amx::DotGradient<amx::Bfloat16Tiles>>(call, parallel).run();
}

}  // namespace torch_selfattn::kernels::cpu
