// The tiled kernels for the baseline of the platform (x86-64: SSE2, no fused multiply-add): 16-byte
// vectors, register tile of 4 x 2 vectors, panels of 8 keys in float. Algorithm, ownership and
// bound are at the top of forward.h, backward.h and score.h; every instruction set runs the same
// source.
#define TSA_CPU_ISA generic
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_generic(const AttentionForward& call, const Parallel& parallel) {
  generic::forward(call, parallel);
}
void attention_backward_generic(const AttentionBackward& call, const Parallel& parallel) {
  generic::backward(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
