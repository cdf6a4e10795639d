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
