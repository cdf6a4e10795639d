// The tiled kernels for AVX-512 (F, BW, VL, DQ): 64-byte vectors, register tile of 8 x 2 vectors
// (16 accumulators keep two FMA units of latency 4 busy), panels of 32 keys in float. Algorithm,
// ownership and bound are at the top of forward.h, backward.h and score.h; every instruction set
// runs the same source.
#define TSA_CPU_ISA avx512
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx512(const AttentionForward& call, const Parallel& parallel) {
  avx512::forward(call, parallel);
}
void attention_backward_avx512(const AttentionBackward& call, const Parallel& parallel) {
  avx512::backward(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
