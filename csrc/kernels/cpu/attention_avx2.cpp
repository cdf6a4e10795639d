// The tiled kernels for AVX2 with FMA: 32-byte vectors, register tile of 6 x 2 vectors (12 of the
// 16 registers), panels of 16 keys in float. Algorithm, ownership and bound are at the top of
// forward.h, backward.h and score.h; every instruction set runs the same source.
#define TSA_CPU_ISA avx2
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx2(const AttentionForward& call, const Parallel& parallel) {
  avx2::forward(call, parallel);
}
void attention_backward_avx2(const AttentionBackward& call, const Parallel& parallel) {
  avx2::backward(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
